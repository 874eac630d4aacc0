"""SVDQuant with what its authors run on top: a grid of smoothing strengths, and iterations.

- Smoothing (only with activations, and where the caller gave none): s = max|x|^a / max|w|^b per
  channel, for (a, b) in (0, 0), (a, 0) and (a, 1 - a), a = 0.05 .. 0.95: 39 candidates, chosen by
  the output error of the plain method with activations rounded to the main format.
- Iterations: Q = round(W - L R), L R = SVD_r(W - Q), until the error rises: that of the output if
  there are activations, else that of the weight. The preset sets how many at most (published: 100).

Recipe of deepcompressor (github.com/mit-han-lab/deepcompressor, commit 69f3473, configs for INT4).

Fitting an error as the activations see it: min ||X (E - L R)^T||_F over rank-r L R.

With a factor S of the metric, E S is what a truncated SVD fits, and R S^-1 is the row factor. S is
diagonal for L2QER (mean magnitude of each channel) and the root of the second moment for QERA.

The record every method that rounds once returns.

Round to nearest: the main branch alone, scales by the default rule of the format.

LQER: quantize first, then fit the rounding error with a low-rank branch.

Q = round(W); L R = SVD_r(W - Q). Zhang et al., "LQER: Low-Rank Quantization Error Reconstruction
for LLMs", ICML 2024 (the data-free form; L2QER scales the error by activation magnitudes).

What `loraq` has to beat: no branch, an unoptimized branch, and its own start.

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

L2QER: LQER with the rounding error scaled by the activations' magnitudes.

Q = round(W); L R S = SVD_r((W - Q) S) with S = diag(mean |x|). Zhang et al., "LQER: Low-Rank
Quantization Error Reconstruction for LLMs", ICML 2024, section 3.2. A reference that needs data.

SVDQuant without smoothing: take the best rank-r part of W away, then round the rest.

L R = SVD_r(W); Q = round(W - L R). Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components
for 4-Bit Diffusion Models", ICLR 2025 (arXiv 2411.05007). Published with a 16-bit branch; with a
narrower one the main branch is rounded against the branch as it is stored.

QERA: the low-rank term that minimizes the error of the layer's output, in closed form.

Q = round(W); L R = SVD_r((W - Q) C) C^-1 with C = (X^T X / T)^(1/2). Zhang et al., "QERA: an
Analytical Framework for Quantization Error Reconstruction", ICLR 2025, theorem 1 (QERA-exact). A
reference that needs data.

LoftQ: rounding and low-rank fit in turn, starting from the rounding.

Q <- round(W - L R), L R <- SVD_r(W - Q), from L R = 0. Li et al., "LoftQ: LoRA-Fine-Tuning-Aware
Quantization for Large Language Models", ICLR 2024, algorithm 1. Scales follow the default rule of
the format and the branch is rounded once, at the end, as published; the preset sets the passes
(published: 1 to 5), and the best stored iterate is returned.

Block descent on main codes and branch in turn, from the best low-rank part of the weight.

Minimize ||W - Q - L R||_F^2 over Q on the main grid and L, R on the branch grid, from
L R = SVD_r(W):

    Q   <- round(W - L R)                       nearest codes, scales by squared error
    L R <- SVD_r(W - Q)                         best fit of what is left (Eckart-Young)
    L^, R^ <- round(L R)                        least-squares refit of each stored factor
    Q   <- round(W - L^ R^)                     the main branch also absorbs the branch's rounding

The last two steps give a candidate each iteration; the best one is returned.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from loraq_sim.conditioning import power_smoothing
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.branch import round_branch, round_factors
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.main_grid import main_scale_rule
from loraq_sim.solvers.problem import Branches, Problem, Trace, TraceEntry, product

__all__ = [
    "best_candidate",
    "mean_magnitudes",
    "required_activations",
    "round_to_nearest",
    "rounded_once",
    "second_moment_root",
    "solve_alternating",
    "solve_l2qer",
    "solve_loftq",
    "solve_lqer",
    "solve_qera",
    "solve_svdquant",
    "solve_svdquant_tuned",
]


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


# Share of the mean variance that is added to every direction, so that few rows of activations, or
# channels that are always zero, leave the metric invertible.
_DAMPING = 1e-4


def required_activations(problem: Problem, method: str) -> np.ndarray:
    """The activations (T, K) of `problem`, or an error that says who needs them."""
    if problem.activations is None:
        raise InputError(
            f"method {method!r} needs activations; pass activations=, or use a data-free method "
            "such as 'loraq'"
        )
    return problem.activations


def mean_magnitudes(activations: np.ndarray) -> np.ndarray:
    """Mean |x| of each channel over sqrt(min max) of all, (K,) float32; Zhang et al., eq. 13."""
    sizes = np.abs(activations).mean(axis=0, dtype=np.float64)
    floor = max(float(sizes.max()) * 1e-3, np.finfo(np.float32).tiny)
    sizes = np.maximum(sizes, floor)
    return (sizes / np.sqrt(sizes.min() * sizes.max())).astype(np.float32)


def second_moment_root(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric root of X^T X / T and its inverse, both (K, K) float32."""
    x = activations.astype(np.float64)
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0.0) + _DAMPING * max(float(values.mean()), 1e-30)
    roots = np.sqrt(values)
    root = (vectors * roots) @ vectors.T
    inverse = (vectors / roots) @ vectors.T
    return root.astype(np.float32), inverse.astype(np.float32)


def rounded_once(
    problem: Problem,
    stage: str,
    main: QuantizedTensor,
    left: QuantizedTensor,
    right: QuantizedTensor,
) -> Branches:
    """The branches with a trace of their one error."""
    solved = Branches(main=main, left=left, right=right)
    error = problem.relative_error(solved.reconstruct())
    entry = TraceEntry(stage=stage, iteration=0, weight_error=error)
    return Branches(main=main, left=left, right=right, trace=[entry])


def round_to_nearest(weight, main: Format) -> Branches:
    """Quantize `weight` (N, K) to `main` with the default scales of the format, no branch."""
    return Branches(main=quantize(weight, main))


def solve_lqer(problem: Problem) -> Branches:
    """One rounding of W, one truncated SVD of what is left, one rounding of the branch."""
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    _, right = problem.truncated_svd(residual)
    left, right = round_branch(residual, right, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "lqer", main, left, right)


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


def solve_l2qer(problem: Problem) -> Branches:
    """One rounding of W and one truncated SVD of the scaled error."""
    scale = mean_magnitudes(required_activations(problem, "l2qer"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual * scale)
    left, right = round_factors(columns, rows / scale, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "l2qer", main, left, right)


def solve_svdquant(problem: Problem) -> Branches:
    """One truncated SVD of W, one rounding of the branch, one rounding of what is left."""
    columns, rows = problem.truncated_svd(problem.weight)
    left, right = round_branch(columns @ rows, rows, problem.branch, problem.branch_rotation)
    main = quantize(problem.weight - product(left, right), problem.main)
    return rounded_once(problem, "svdquant", main, left, right)


def solve_qera(problem: Problem) -> Branches:
    """One rounding of W and one truncated SVD of the error in the activations' metric."""
    root, inverse = second_moment_root(required_activations(problem, "qera"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual @ root)
    left, right = round_factors(columns, rows @ inverse, problem.branch, problem.branch_rotation)
    return rounded_once(problem, "qera", main, left, right)


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
