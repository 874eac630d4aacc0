"""LoftQ: rounding and low-rank fit in turn, starting from the rounding.

Q <- round(W - L R), L R <- SVD_r(W - Q), from L R = 0. Li et al., "LoftQ: LoRA-Fine-Tuning-Aware
Quantization for Large Language Models", ICLR 2024, algorithm 1. Scales follow the default rule of
the format and the branch is rounded once, at the end, as published; the preset sets the passes
(published: 1 to 5), and the best stored iterate is returned.
"""

import numpy as np

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_branch
from loraq_sim.solvers.problem import Branches, Problem, Trace, TraceEntry

__all__ = ["solve_loftq"]


def solve_loftq(problem: Problem) -> Branches:
    """Alternate from the rounded weight; return the best stored iterate."""
    best, best_error = None, np.inf
    carried = np.zeros_like(problem.weight)
    rows = None
    trace: Trace = []
    for iteration in range(problem.effort.alternations):
        main = quantize(problem.weight - carried, problem.main)
        target = problem.weight - main.dequantize()
        columns, rows = problem.truncated_svd(target, start=rows)
        left, right = round_branch(target, rows, problem.branch, problem.branch_rotation)
        candidate = Branches(main=main, left=left, right=right)
        error = problem.relative_error(candidate.reconstruct())
        trace.append(TraceEntry(stage="loftq", iteration=iteration, weight_error=error))
        if error < best_error:
            best, best_error = candidate, error
        carried = columns @ rows
    return Branches(main=best.main, left=best.left, right=best.right, trace=trace)
