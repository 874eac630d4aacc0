"""What `loraq` has to beat: no branch, an unoptimized branch, and its own start.

A descent has no promise: where round to nearest is exact already (identity, signs, weights that
were quantized before) or a few outliers rule the branch, its end is worse than doing nothing. So
the end is compared, on the stored codes, with

- no branch: zero factors beside the rounded weight, scales by the default rule and searched;
- LQER at the same rank, which is the best that a branch can add to round to nearest;
- the start of the descent.

Most weights rule the costly ones out beforehand. With E = W - round(W) and its singular values s,
the r largest s**2 sum up to at most r m + sqrt(v r (d - r)), m and v their mean and variance over
d = min(N, K) values: LQER removes no more of ||E||^2 than that. Their variance follows from
||E^T E||_F^2, which products of E with a few random vectors estimate. Whether searched scales could
do is asked of a few rows, drawn in proportion to the error of the end.
"""

import math
from collections.abc import Iterator

import numpy as np

from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.lqer import solve_lqer
from loraq_sim.solvers.main_grid import main_scale_rule
from loraq_sim.solvers.problem import Branches, Problem, TraceEntry

__all__ = ["best_candidate"]

# Random vectors that estimate ||E^T E||_F^2, and what the estimate may be too small by.
_PROBES = 4
_PROBE_SLACK = 1.5
# Rows that tell whether searched scales are worth a try, and how much worse they may look there.
_ROWS = 32
_ROW_SLACK = 1.3


def best_candidate(problem: Problem, own: dict[str, Branches]) -> tuple[str, Branches]:
    """The name and branches of least weight error: of `own`, in their order, or a plain candidate.

    Each of `own` has its error as the last entry of its trace. ``problem.rng`` should be as it was
    given to the method, so that LQER gives what it gives alone. The trace of a plain candidate is
    that of its one error, named ``rtn``, ``searched`` or ``lqer``.
    """
    name = min(own, key=lambda name: own[name].trace[-1].weight_error)
    best, least = own[name], own[name].trace[-1].weight_error
    if least == 0.0:
        return name, best
    for candidate in _plain_candidates(problem, best, least):
        error = candidate.trace[-1].weight_error
        if error < least:
            name, best, least = candidate.trace[-1].stage, candidate, error
    return name, best


def _plain_candidates(problem: Problem, best: Branches, least: float) -> Iterator[Branches]:
    """Candidates that may be better than `best`, whose error is `least`."""
    plain = quantize(problem.weight, problem.main)
    missed = problem.weight - plain.dequantize()
    size = float(np.linalg.norm(problem.weight))
    allowed = (least * size) ** 2 if math.isfinite(least) else math.inf
    total = float(np.linalg.norm(missed)) ** 2
    # float32 sums: what is close is measured.
    if total <= 1.01 * allowed:
        yield _without_branch(problem, plain, "rtn")
    if total * (1.0 - _share_within(missed, total, problem)) <= allowed:
        yield solve_lqer(problem)
    rule = main_scale_rule(problem.main)
    if rule is not None and _search_may_help(problem, best, rule):
        yield _without_branch(problem, quantize(problem.weight, problem.main, rule), "searched")


def _without_branch(problem: Problem, main: QuantizedTensor, stage: str) -> Branches:
    n, k = problem.weight.shape
    left = quantize(np.zeros((n, problem.rank), dtype=np.float32), problem.branch)
    right = quantize(np.zeros((problem.rank, k), dtype=np.float32), problem.branch)
    error = problem.relative_error(main.dequantize())
    entry = TraceEntry(stage=stage, iteration=0, weight_error=error)
    return Branches(main=main, left=left, right=right, trace=[entry], branch_noise=0.0)


def _share_within(missed: np.ndarray, total: float, problem: Problem) -> float:
    """At most what share of ||E||^2 = `total` a branch of this rank can carry; 1 if unknown."""
    count = min(missed.shape)
    rank = problem.rank
    if total == 0.0 or rank >= count:
        return 1.0
    probes = problem.rng.spawn(1)[0].standard_normal((missed.shape[1], _PROBES), dtype=np.float32)
    # In units of its norm: fourth powers of small errors would vanish in float32.
    seen = (missed @ probes) / np.float32(math.sqrt(total))
    back = (missed.T @ seen) / np.float32(math.sqrt(total))
    # The same vectors estimate ||E||^2, which is known: their quotient is exact for rank 1, where
    # either alone would be far off.
    ratio = float(np.square(back, dtype=np.float64).sum() / np.square(seen, dtype=np.float64).sum())
    variance = max(_PROBE_SLACK * ratio * count - 1.0, 0.0)
    return min(1.0, (rank + math.sqrt(variance * rank * (count - rank))) / count)


def _search_may_help(problem: Problem, best: Branches, rule: str) -> bool:
    """Whether searched scales without a branch look nearly as good as `best` in some rows."""
    weight, main = problem.weight, problem.main
    if main.granularity == "tensor" or len(weight) <= 2 * _ROWS:
        return True
    squares = np.square(weight - best.reconstruct()).sum(axis=1, dtype=np.float64)
    ends = np.cumsum(squares)
    drawn = np.searchsorted(ends, (np.arange(_ROWS) + 0.5) / _ROWS * ends[-1])
    some = weight[drawn]
    errors = np.square(some - quantize(some, main, rule).dequantize()).sum(axis=1, dtype=np.float64)
    # Rows drawn in proportion to their error: the mean of these ratios estimates that of the sums.
    return float((errors / squares[drawn]).mean()) <= _ROW_SLACK**2
