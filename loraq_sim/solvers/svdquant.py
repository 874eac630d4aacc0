"""SVDQuant without smoothing: take the best rank-r part of W away, then round the rest.

L R = SVD_r(W); Q = round(W - L R). Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components
for 4-Bit Diffusion Models", ICLR 2025 (arXiv 2411.05007). Published with a 16-bit branch; with a
narrower one the main branch is rounded against the branch as it is stored.
"""

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_branch
from loraq_sim.solvers.one_shot import rounded_once
from loraq_sim.solvers.problem import Branches, Problem, product

__all__ = ["solve_svdquant"]


def solve_svdquant(problem: Problem) -> Branches:
    """One truncated SVD of W, one rounding of the branch, one rounding of what is left."""
    columns, rows = problem.truncated_svd(problem.weight)
    left, right = round_branch(columns @ rows, rows, problem.branch, problem.branch_rotation)
    main = quantize(problem.weight - product(left, right), problem.main)
    return rounded_once(problem, "svdquant", main, left, right)
