"""SVDQuant with what its authors run on top: a grid of smoothing strengths, and iterations.

- Smoothing (only with activations, and where the caller gave none): s = max|x|^a / max|w|^b per
  channel, for (a, b) in (0, 0), (a, 0) and (a, 1 - a), a = 0.05 .. 0.95: 39 candidates, chosen by
  the output error of the plain method with activations rounded to the main format.
- Iterations: Q = round(W - L R), L R = SVD_r(W - Q), until the error rises: that of the output if
  there are activations, else that of the weight. The preset sets how many at most (published: 100).

Recipe of deepcompressor (github.com/mit-han-lab/deepcompressor, commit 69f3473, configs for INT4).
"""

import dataclasses

import numpy as np

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch_rounding import round_branch
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.problem import Branches, Problem, Trace, TraceEntry, product
from loraq_sim.solvers.smoothing import power_smoothing

__all__ = ["solve_svdquant_tuned"]

_STRENGTHS = np.arange(1, 20, dtype=np.float64) / 20
# Rows of activations that choose among the candidates, spread evenly.
_GRID_ROWS = 256


def solve_svdquant_tuned(problem: Problem) -> Branches:
    """Choose the smoothing, then iterate; ``smooth`` of the result holds the factors."""
    factors = None
    if problem.activations is not None and not problem.is_smoothed:
        factors = _best_factors(problem)
    if factors is not None:
        problem = dataclasses.replace(
            problem,
            weight=problem.weight * factors,
            activations=problem.activations / factors,
        )
    return dataclasses.replace(_iterate(problem), smooth=factors)


def _iterate(problem: Problem) -> Branches:
    best, least = None, np.inf
    trace: Trace = []
    target, start = problem.weight, None
    for iteration in range(problem.effort.alternations + 1):
        _, rows = problem.truncated_svd(target, start=start)
        start = rows
        left, right = round_branch(target, rows, problem.branch, problem.branch_rotation)
        main = quantize(problem.weight - product(left, right), problem.main)
        candidate = Branches(main=main, left=left, right=right)
        stored = candidate.reconstruct()
        error = problem.relative_error(stored)
        trace.append(TraceEntry(stage="svdquant_tuned", iteration=iteration, weight_error=error))
        objective = error
        if problem.activations is not None:
            objective = float(np.linalg.norm(problem.activations @ (problem.weight - stored).T))
        if objective >= least:
            break
        best, least = candidate, objective
        target = problem.weight - main.dequantize()
    return dataclasses.replace(best, trace=trace)


def _best_factors(problem: Problem) -> np.ndarray | None:
    """The smoothing of least output error; None if that is none at all."""
    x = problem.activations
    x = x[np.arange(min(len(x), _GRID_ROWS)) * len(x) // min(len(x), _GRID_ROWS)]
    wanted = x @ problem.weight.T
    pairs = [(a, b) for a in _STRENGTHS for b in (0.0, 1.0 - a)]
    candidates = [power_smoothing(a, b, problem.weight, problem.activations) for a, b in pairs]
    best, least = None, np.inf
    for factors in (None, *candidates):
        smoothed = problem.weight if factors is None else problem.weight * factors
        entering = quantize(x if factors is None else x / factors, problem.main).dequantize()
        columns, rows = truncated_svd(
            smoothed, problem.rank, rng=np.random.default_rng(0), device=problem.device
        )
        carried = columns @ rows
        main = quantize(smoothed - carried, problem.main).dequantize()
        # The branch takes its activations at 16 bits, as published.
        entering_branch = x if factors is None else x / factors
        output = entering @ main.T + entering_branch @ carried.T
        error = float(np.linalg.norm(output - wanted))
        if error < least:
            best, least = factors, error
    return best
