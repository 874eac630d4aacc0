"""LQER: quantize first, then fit the rounding error with a low-rank branch.

Q = round(W); L R = SVD_r(W - Q). Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction
for LLMs", ICML 2024 (the data-free form; L2QER scales the error by activation magnitudes).
"""

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_branch
from loraq_sim.solvers.one_shot import rounded_once
from loraq_sim.solvers.problem import Branches, Problem

__all__ = ["solve_lqer"]


def solve_lqer(problem: Problem) -> Branches:
    """One rounding of W, one truncated SVD of what is left, one rounding of the branch."""
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    _, right = problem.truncated_svd(residual)
    left, right = round_branch(residual, right, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "lqer", main, left, right)
