"""L2QER: LQER with the rounding error scaled by the activations' magnitudes.

Q = round(W); L R S = SVD_r((W - Q) S) with S = diag(mean |x|). Zhang et al., "LQER: Low-Rank
Quantization Error Reconstruction for LLMs", ICML 2024, section 3.2. A reference that needs data.
"""

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_factors
from loraq_sim.solvers.input_metric import mean_magnitudes, required_activations
from loraq_sim.solvers.one_shot import rounded_once
from loraq_sim.solvers.problem import Branches, Problem

__all__ = ["solve_l2qer"]


def solve_l2qer(problem: Problem) -> Branches:
    """One rounding of W and one truncated SVD of the scaled error."""
    scale = mean_magnitudes(required_activations(problem, "l2qer"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual * scale)
    left, right = round_factors(columns, rows / scale, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "l2qer", main, left, right)
