"""The methods that `loraq` is compared with, side by side, and the plain candidates it has to beat.

With round() nearest codes by the default scales of the format and SVD_r the best rank-r fit:

- ``rtn``: Q = round(W), no branch.
- ``lqer``: Q = round(W); L R = SVD_r(W - Q). Zhang et al., "LQER: Low-Rank Quantization Error
  Reconstruction for LLMs", ICML 2024 (the data-free form).
- ``l2qer``: L R S = SVD_r((W - Q) S) with S = ``diag(mean |x|)``, section 3.2 there. Needs data.
- ``qera``: L R = SVD_r((W - Q) C) C^-1 with C = (X^T X / T)^(1/2), which minimizes the error of the
  layer's output. Zhang et al., "QERA: an Analytical Framework for Quantization Error
  Reconstruction", ICLR 2025, theorem 1 (QERA-exact). Needs data.
- ``svdquant``: L R = SVD_r(W); Q = round(W - L R), without smoothing. Li et al., "SVDQuant:
  Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models", ICLR 2025
  (arXiv 2411.05007). Published with a 16-bit branch; with a narrower one the main branch is rounded
  against the branch as it is stored.
- ``svdquant_tuned``: with what its authors run on top, by the recipe of deepcompressor
  (github.com/mit-han-lab/deepcompressor, commit 69f3473, configs for INT4). Smoothing (only with
  activations, and where the caller gave none): s = max|x|^a / max|w|^b per channel, for (a, b) in
  (0, 0), (a, 0) and (a, 1 - a), a = 0.05 .. 0.95: 39 candidates, chosen by the output error of the
  plain method with activations rounded to the main format. Iterations: Q = round(W - L R),
  L R = SVD_r(W - Q), until the error rises: that of the output if there are activations, else that
  of the weight. The preset sets how many at most (published: 100).
- ``svdquant_published``: the same without economy, as in the paper: a and b each from 0, 0.05 ..
  0.95 (400 pairs), and up to 100 iterations whatever the preset.
- ``loftq``: Q <- round(W - L R), L R <- SVD_r(W - Q) in turn, from L R = 0. Li et al., "LoftQ:
  LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024, algorithm 1. The branch
  is rounded once, at the end, as published; the preset sets the passes (published: 1 to 5).
- ``alternating``: block descent from L R = SVD_r(W) with searched scales; each pass also gives a
  candidate L^, R^ = round(L R) (least-squares refit of each factor), Q = round(W - L^ R^), so that
  the main branch absorbs the rounding of the branch.

Of methods that iterate, the best stored iterate is returned.

A descent has no promise: where round to nearest is exact already (identity, signs, weights that
were quantized before) or a few outliers rule the branch, its end is worse than doing nothing. So
`best_candidate` compares it, on the stored codes, with no branch (zero factors beside the rounded
weight, scales by the default rule and searched) and with LQER at the same rank, the best that a
branch can add to round to nearest. Most weights rule the costly ones out beforehand. With
E = W - round(W) and its singular values s, the r largest s**2 sum up to at most
r m + sqrt(v r (d - r)), m and v their mean and variance over d = min(N, K) values: LQER removes no
more of ||E||^2 than that. Their variance follows from ||E^T E||_F^2, which products of E with a few
random vectors estimate. Whether searched scales could do is asked of a few rows, drawn in
proportion to the error of the end.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

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
    "required_activations",
    "round_to_nearest",
    "solve_alternating",
    "solve_l2qer",
    "solve_loftq",
    "solve_lqer",
    "solve_qera",
    "solve_svdquant",
    "solve_svdquant_published",
    "solve_svdquant_tuned",
]

# Candidates of SVDQuant's smoothing, and the rows of activations that choose among them.
_STRENGTHS = np.arange(1, 20, dtype=np.float64) / 20
_GRID_ROWS = 256
_PUBLISHED_ITERATIONS = 100
# Share of the mean variance that is added to every direction, so that few rows of activations, or
# channels that are always zero, leave the metric invertible.
_DAMPING = 1e-4
# Random vectors that estimate ||E^T E||_F^2, and what the estimate may be too small by.
_PROBES = 4
_PROBE_SLACK = 1.5
# Rows that tell whether searched scales are worth a try, and how much worse they may look there.
_ROWS = 32
_ROW_SLACK = 1.3


def round_to_nearest(weight: np.ndarray, main: Format) -> Branches:
    """Round to nearest: the main branch alone, scales by the default rule of the format."""
    return Branches(main=quantize(weight, main))


def solve_lqer(problem: Problem) -> Branches:
    """Quantize first, then fit the rounding error with a low-rank branch."""
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    _, rows = problem.truncated_svd(residual)
    left, right = round_branch(residual, rows, problem.branch, problem.branch_rotation)
    return _measured(problem, "lqer", main, left, right)


def solve_l2qer(problem: Problem) -> Branches:
    """LQER with the rounding error scaled by the activations' magnitudes."""
    scale = _mean_magnitudes(required_activations(problem, "l2qer"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual * scale)
    left, right = round_factors(columns, rows / scale, problem.branch, problem.branch_rotation)
    return _measured(problem, "l2qer", main, left, right)


def solve_qera(problem: Problem) -> Branches:
    """The low-rank term that minimizes the error of the layer's output, in closed form."""
    root, inverse = _second_moment_root(required_activations(problem, "qera"))
    main = quantize(problem.weight, problem.main)
    residual = problem.weight - main.dequantize()
    columns, rows = problem.truncated_svd(residual @ root)
    left, right = round_factors(columns, rows @ inverse, problem.branch, problem.branch_rotation)
    return _measured(problem, "qera", main, left, right)


def solve_svdquant(problem: Problem) -> Branches:
    """Take the best rank-r part of W away, then round the rest; no smoothing."""
    columns, rows = problem.truncated_svd(problem.weight)
    left, right = round_branch(columns @ rows, rows, problem.branch, problem.branch_rotation)
    main = quantize(problem.weight - product(left, right), problem.main)
    return _measured(problem, "svdquant", main, left, right)


def solve_svdquant_tuned(problem: Problem) -> Branches:
    """SVDQuant with what its authors run on top: a grid of smoothing strengths, and iterations.

    ``smooth`` of the result holds the factors.
    """
    pairs = [(a, b) for a in _STRENGTHS for b in (0.0, 1.0 - a)]
    return _tuned(problem, "svdquant_tuned", pairs, problem.effort.alternations)


def solve_svdquant_published(problem: Problem) -> Branches:
    """SVDQuant at its best: all pairs of 20 smoothing strengths, up to 100 iterations."""
    strengths = (0.0, *_STRENGTHS)
    pairs = [(a, b) for a in strengths for b in strengths if a or b]
    return _tuned(problem, "svdquant_published", pairs, _PUBLISHED_ITERATIONS)


def _tuned(
    problem: Problem, method: str, pairs: Sequence[tuple[float, float]], iterations: int
) -> Branches:
    x, factors = problem.activations, None
    if x is not None and not problem.is_smoothed:
        factors = _best_factors(problem, x, pairs)
        if factors is not None:
            weight = problem.weight * factors
            problem = dataclasses.replace(problem, weight=weight, activations=x / factors)
    return dataclasses.replace(_iterate(problem, method, iterations), smooth=factors)


def _iterate(problem: Problem, method: str, iterations: int) -> Branches:
    best, rows = _iterated(problem, method, problem.weight, None, 0)
    least, trace = _objective(problem, best), best.trace
    for iteration in range(1, iterations + 1):
        target = problem.weight - best.main.dequantize()
        candidate, rows = _iterated(problem, method, target, rows, iteration)
        trace = trace + candidate.trace
        objective = _objective(problem, candidate)
        if objective >= least:
            break
        best, least = candidate, objective
    return dataclasses.replace(best, trace=trace)


def _iterated(
    problem: Problem, method: str, target: np.ndarray, start: np.ndarray | None, iteration: int
) -> tuple[Branches, np.ndarray]:
    """A branch that carries `target`, what it leaves rounded, and the row space of the branch."""
    _, rows = problem.truncated_svd(target, start=start)
    left, right = round_branch(target, rows, problem.branch, problem.branch_rotation)
    main = quantize(problem.weight - product(left, right), problem.main)
    return _measured(problem, method, main, left, right, iteration), rows


def _objective(problem: Problem, candidate: Branches) -> float:
    """What the iterations lower: the error of the output if it is known, else of the weight."""
    if problem.activations is None:
        return candidate.trace[-1].weight_error
    missed = problem.weight - candidate.reconstruct()
    return float(np.linalg.norm(problem.activations @ missed.T))


def _best_factors(
    problem: Problem, activations: np.ndarray, pairs: Sequence[tuple[float, float]]
) -> np.ndarray | None:
    """The smoothing of least output error; None if that is none at all."""
    x = activations
    x = x[np.arange(min(len(x), _GRID_ROWS)) * len(x) // min(len(x), _GRID_ROWS)]
    wanted = x @ problem.weight.T
    candidates = [power_smoothing(a, b, problem.weight, activations) for a, b in pairs]
    best: np.ndarray | None = None
    least = np.inf
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


def solve_loftq(problem: Problem) -> Branches:
    """Rounding and low-rank fit in turn, starting from the rounding."""
    return _best_iterate(_loftq_iterates(problem))


def _loftq_iterates(problem: Problem) -> Iterator[Branches]:
    carried = np.zeros_like(problem.weight)
    rows = None
    for iteration in range(problem.effort.alternations):
        main = quantize(problem.weight - carried, problem.main)
        target = problem.weight - main.dequantize()
        columns, rows = problem.truncated_svd(target, start=rows)
        left, right = round_branch(target, rows, problem.branch, problem.branch_rotation)
        yield _measured(problem, "loftq", main, left, right, iteration)
        carried = columns @ rows


def solve_alternating(problem: Problem) -> Branches:
    """Block descent on main codes and branch in turn, from the best low-rank part of the weight."""
    return _best_iterate(_alternating_iterates(problem))


def _alternating_iterates(problem: Problem) -> Iterator[Branches]:
    columns, rows = problem.truncated_svd(problem.weight)
    rule = main_scale_rule(problem.main)
    for iteration in range(problem.effort.alternations + 1):
        left, right = round_branch(columns @ rows, rows, problem.branch, problem.branch_rotation)
        main = quantize(problem.weight - product(left, right), problem.main, rule=rule)
        yield _measured(problem, "alternate", main, left, right, iteration)
        if iteration < problem.effort.alternations:
            main = quantize(problem.weight - columns @ rows, problem.main, rule=rule)
            columns, rows = problem.truncated_svd(
                problem.weight - main.dequantize(), power_iterations=1, start=rows
            )


def _best_iterate(iterates: Iterator[Branches]) -> Branches:
    """The iterate of least weight error, the first of equals, with the trace of all."""
    trace: Trace = []

    def error(iterate: Branches) -> float:
        trace.extend(iterate.trace)
        return iterate.trace[-1].weight_error

    best = min(iterates, key=error)
    return dataclasses.replace(best, trace=trace)


def _measured(
    problem: Problem,
    stage: str,
    main: QuantizedTensor,
    left: QuantizedTensor,
    right: QuantizedTensor,
    iteration: int = 0,
) -> Branches:
    """The branches with a trace of their one error."""
    solved = Branches(main=main, left=left, right=right)
    error = problem.relative_error(solved.reconstruct())
    entry = TraceEntry(stage=stage, iteration=iteration, weight_error=error)
    return dataclasses.replace(solved, trace=[entry])


def required_activations(problem: Problem, method: str) -> np.ndarray:
    """The activations (T, K) of `problem`, or an error that says who needs them."""
    if problem.activations is None:
        raise InputError(
            f"method {method!r} needs activations; pass activations=, or use a data-free method "
            "such as 'loraq'"
        )
    return problem.activations


def _mean_magnitudes(activations: np.ndarray) -> np.ndarray:
    """Mean |x| of each channel over sqrt(min max) of all, (K,) float32; Zhang et al., eq. 13."""
    sizes = np.abs(activations).mean(axis=0, dtype=np.float64)
    floor = max(float(sizes.max()) * 1e-3, float(np.finfo(np.float32).tiny))
    sizes = np.maximum(sizes, floor)
    return (sizes / np.sqrt(sizes.min() * sizes.max())).astype(np.float32)


def _second_moment_root(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric root of X^T X / T and its inverse, both (K, K) float32."""
    x = activations.astype(np.float64)
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0.0) + _DAMPING * max(float(values.mean()), 1e-30)
    roots = np.sqrt(values)
    root = (vectors * roots) @ vectors.T
    inverse = (vectors / roots) @ vectors.T
    return root.astype(np.float32), inverse.astype(np.float32)


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
        yield _without_branch(
            problem, quantize(problem.weight, problem.main, rule=rule), "searched"
        )


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
    if main.spans_rows or len(weight) <= 2 * _ROWS:
        return True
    squares = np.square(weight - best.reconstruct()).sum(axis=1, dtype=np.float64)
    ends = np.cumsum(squares)
    drawn = np.searchsorted(ends, (np.arange(_ROWS) + 0.5) / _ROWS * ends[-1])
    some = weight[drawn]
    errors = np.square(some - quantize(some, main, rule=rule).dequantize()).sum(
        axis=1, dtype=np.float64
    )
    # Rows drawn in proportion to their error: the mean of these ratios estimates that of the sums.
    return float((errors / squares[drawn]).mean()) <= _ROW_SLACK**2
