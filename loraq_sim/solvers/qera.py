"""QERA: the low-rank term that minimizes the error of the layer's output, in closed form.

Q = round(W); L R = SVD_r((W - Q) C) C^-1 with C = (X^T X / T)^(1/2). Zhang et al., "QERA: an
Analytical Framework for Quantization Error Reconstruction", ICLR 2025, theorem 1 (QERA-exact). A
reference that needs data.
"""

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_factors
from loraq_sim.solvers.input_metric import required_activations, second_moment_root
from loraq_sim.solvers.one_shot import rounded_once
from loraq_sim.solvers.problem import Branches, Problem

__all__ = ["solve_qera"]


def solve_qera(problem: Problem) -> Branches:
    """One rounding of W and one truncated SVD of the error in the activations' metric."""
    root, inverse = second_moment_root(required_activations(problem, "qera"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual @ root)
    left, right = round_factors(columns, rows @ inverse, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "qera", main, left, right)
