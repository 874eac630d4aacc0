"""Block descent on main codes and branch in turn, from the best low-rank part of the weight.

Minimize ||W - Q - L R||_F^2 over Q on the main grid and L, R on the branch grid, from
L R = SVD_r(W):

    Q   <- round(W - L R)                       nearest codes, scales by squared error
    L R <- SVD_r(W - Q)                         best fit of what is left (Eckart-Young)
    L^, R^ <- round(L R)                        least-squares refit of each stored factor
    Q   <- round(W - L^ R^)                     the main branch also absorbs the branch's rounding

The last two steps give a candidate each iteration; the best one is returned.
"""

import numpy as np

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_branch
from loraq_sim.solvers.main_grid import main_scale_rule
from loraq_sim.solvers.problem import Branches, Problem, Trace, TraceEntry, product

__all__ = ["solve_alternating"]


def solve_alternating(problem: Problem) -> Branches:
    """Alternate main rounding and low-rank fit; return the best stored iterate."""
    columns, rows = problem.truncated_svd(problem.weight)
    rule = main_scale_rule(problem.main)
    best: Branches | None = None
    best_error = np.inf
    trace: Trace = []
    for iteration in range(problem.effort.alternations + 1):
        candidate = _stored(problem, columns @ rows, rows, rule)
        error = problem.relative_error(candidate.reconstruct())
        trace.append(TraceEntry(stage="alternate", iteration=iteration, weight_error=error))
        if error < best_error:
            best, best_error = candidate, error
        if iteration < problem.effort.alternations:
            main = quantize(problem.weight - columns @ rows, problem.main, rule)
            columns, rows = problem.truncated_svd(
                problem.weight - main.dequantize(), power_iterations=1, start=rows
            )
    return Branches(main=best.main, left=best.left, right=best.right, trace=trace)


def _stored(problem: Problem, target: np.ndarray, rows: np.ndarray, rule: str) -> Branches:
    left, right = round_branch(target, rows, problem.branch, problem.branch_rotation)
    main = quantize(problem.weight - product(left, right), problem.main, rule)
    return Branches(main=main, left=left, right=right)
