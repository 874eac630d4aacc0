"""Rounding a weight column by column, each column making up for what the ones before it lost.

GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", ICLR 2023, algorithm 1): with H = X^T X of the inputs, and U
the upper Cholesky factor of H^-1, columns are rounded in turn,

    e_j = (w_j - q_j) / U_jj,      w_k <- w_k - e_j U_jk   for all k > j,

which, for the given order, loses least of tr((W - Q) H (W - Q)^T). As published, 1 % of the mean
diagonal of H is added to it. Columns go from the loudest input to the quietest ("act-order"), and
scales are found beforehand for the whole weight ("static groups"), both options of the authors'
code (github.com/IST-DASLab/gptq); scales are searched by squared error.

`finish_with_data` is the same at the end of a solver with a branch. R and all scales of the main
branch are kept, and L is left to be refitted. What the main branch multiplies is not X but what
rounding makes of it, X_a = X + n, whose noise n is known: its variance of each channel, diag(v),
needs few rows. With H = X^T X / T, P^ = X R^T + m and G = R H R^T + diag(var m), the output error

    || X W^T - X_a M^T - P^ L^T ||^2     is least where     M H' = W (H - F R H),   L = (W - M) F,

    F = H R^T G^-1,     H' = H + diag(v) - F R H.

Where the inputs are quieter than the noise, M is smaller than what is left of W: it passes on less
noise (as in LRC and in a Wiener filter). M is rounded column by column in the metric H', and L
again for the M that came out. Few tokens tell little of H: it is shrunk by adding its mean diagonal
times the first of `_SHRINKAGES`, by less as long as that is better on tokens that H was not made
of, and a finish is kept only where it is better there than none.

`solve_lrc` is LRC (Scetbon, Hensman, "Low-Rank Correction for Quantized LLMs", arXiv 2412.07902):
the same objective with R free and a branch that reads X as it is. From the R of a main branch that
is not rounded, M (by GPTQ) and L R (of rank r, in the metric H) are fitted in turn. As in the paper
the branch has 16 bits and X is rotated before (``rotate="hadamard"``). The paper adds 1 % of the
mean diagonal to H, from 262,144 tokens; here the shrinkage is chosen as for a finish.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.baselines import required_activations
from loraq_sim.solvers.branch import round_factors
from loraq_sim.solvers.main_grid import grid_of, main_scale_rule, nearest_codes, requantize
from loraq_sim.solvers.problem import Branches, Problem, TraceEntry, relative_distance
from loraq_sim.solvers.residual import (
    InputGrid,
    dequantized,
    rounded_inputs,
    simulated_output,
)

FINISHES = ("data",)
"""What may follow a solver; see `loraq_sim.solve`."""

__all__ = [
    "FINISHES",
    "check_finish",
    "finish_quickly",
    "finish_with_data",
    "round_in_metric",
    "second_moment",
    "solve_deflated",
    "solve_gptq",
    "solve_lrc",
]

# Share of the mean diagonal that is added to H, as published.
_DAMPING = 0.01
# Columns whose losses are passed on at once to all behind them.
_BLOCK = 128
# Mean diagonals that a finish may add to H.
_SHRINKAGES = (1.0, 0.1, 0.01)
# The deflated metric has no weight in the row space of R: L takes that up, but L is rounded. Times
# the root of the shrinkage.
_DEFLATED_DAMPING = 0.2
# Eigenvalues below this share of the largest are rounding noise.
_CUTOFF = 1e-10
# One row in so many is left out of the metric for the comparison; fewer rows are too few.
_FOLDS = 4
_LEAST_ROWS = 16
# A finish has to be better by more than the noise of that comparison, and less shrinkage than more.
_NOISE = 0.01
_LESS_IS_BETTER = 0.002
# Turns of LRC; further ones gain less than 1 %.
_TURNS = 2


def check_finish(finish: str | None) -> str | None:
    """`finish` if it is None or one of `FINISHES`; else an InputError."""
    if finish is not None and finish not in FINISHES:
        raise InputError(unknown_name("finish", finish, FINISHES))
    return finish


def second_moment(x: NDArray[np.float32], shrinkage: float = 0.0) -> NDArray[np.float64]:
    """X^T X / T plus `shrinkage` times its mean diagonal, (K, K); the identity for zero inputs."""
    moment = (x.T.astype(np.float64) @ x.astype(np.float64)) / len(x)
    size = float(np.trace(moment)) / len(moment)
    if size == 0.0:
        return np.eye(len(moment))
    moment[np.diag_indices_from(moment)] += shrinkage * size
    return moment


def round_in_metric(
    weight: NDArray[np.float32],
    metric: NDArray[np.float64],
    like: QuantizedTensor,
    damping: float = _DAMPING,
) -> QuantizedTensor:
    """`weight` (N, K) on the grid of `like`, for a small tr((W - Q) H (W - Q)^T).

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    metric : ndarray of shape (K, K), float64
        H, symmetric positive semidefinite. Not modified.
    like : QuantizedTensor
        Gives format, scales and zero points.
    damping : float
        Mean diagonals added to H.
    """
    if like.scales is None:
        return requantize(weight, like)
    order = np.argsort(-np.diag(metric), kind="stable")
    upper = _inverse_root(metric[np.ix_(order, order)], damping).astype(np.float32)
    # Rows of a transpose are columns of the weight: contiguous.
    rest = np.ascontiguousarray(weight.T[order])
    steps, zeros = grid_of(like)
    steps = np.ascontiguousarray(np.broadcast_to(steps, like.shape).T[order])
    if zeros is not None:
        zeros = np.ascontiguousarray(np.broadcast_to(zeros, like.shape).T[order])
    codes = np.empty(rest.shape, dtype=like.codes.dtype)
    for start in range(0, len(rest), _BLOCK):
        stop = min(start + _BLOCK, len(rest))
        lost = np.empty((stop - start, rest.shape[1]), dtype=np.float32)
        for j in range(start, stop):
            zero = np.float32(0) if zeros is None else zeros[j]
            found = nearest_codes(
                rest[j], steps[j], None if zeros is None else zeros[j], like.format
            )
            value = (found.astype(np.float32) - zero) * steps[j]
            codes[order[j]] = found
            lost[j - start] = (rest[j] - value) / upper[j, j]
            rest[j + 1 : stop] -= upper[j, j + 1 : stop, None] * lost[j - start]
        rest[stop:] -= upper[start:stop, stop:].T @ lost
    return dataclasses.replace(like, codes=np.ascontiguousarray(codes.T))


def _inverse_root(metric: NDArray[np.float64], damping: float) -> NDArray[np.float64]:
    """The upper triangular U with U^T U = (H + damping mean(diag H) I)^-1."""
    from scipy.linalg import solve_triangular

    size = float(np.trace(metric)) / len(metric) or 1.0
    damped = metric + damping * size * np.eye(len(metric))
    # With both axes reversed, H = C C^T with C lower; back again H = A A^T with A upper, and
    # H^-1 = A^-T A^-1.
    while True:
        try:
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            break
        except np.linalg.LinAlgError:
            # Singular to rounding, as a metric without damping may be.
            damped[np.diag_indices_from(damped)] += max(damping, _DAMPING) * size
    return solve_triangular(lower, np.eye(len(metric)), lower=True)[::-1, ::-1]


def solve_gptq(problem: Problem) -> Branches:
    """GPTQ: the main branch alone, scales searched by squared error of the weight."""
    x = required_activations(problem, "gptq")
    start = quantize(problem.weight, problem.main, rule=main_scale_rule(problem.main))
    main = round_in_metric(problem.weight, second_moment(x), start)
    error = problem.relative_error(main.dequantize())
    entry = TraceEntry(stage="gptq", iteration=0, weight_error=error)
    return Branches(main=main, trace=[entry])


def solve_deflated(problem: Problem) -> Branches:
    """GPTQ for what a residual input leaves, its shrinkage chosen on rows left out.

    For ``quad`` and ``resq``, whose whole branch is a residual input.
    """
    grids = _known_grids(problem)
    start = quantize(problem.weight, problem.main, rule=main_scale_rule(problem.main))

    def make(x: NDArray[np.float32], shrinkage: float) -> Branches:
        return Branches(main=round_in_metric(problem.weight, second_moment(x, shrinkage), start))

    x = required_activations(problem, "quad")
    return _measured(problem, _best_shrunk(problem.weight, x, grids, make), "gptq")


def solve_lrc(problem: Problem) -> Branches:
    """LRC: main branch and low-rank branch fitted in turn to inputs that are rounded."""
    grids = _known_grids(problem)
    x = required_activations(problem, "lrc")

    def make(x: NDArray[np.float32], shrinkage: float) -> Branches:
        return _corrected(problem, x, grids, shrinkage)

    return _measured(problem, _best_shrunk(problem.weight, x, grids, make), "lrc")


def _known_grids(problem: Problem) -> tuple[InputGrid, InputGrid]:
    plain = (problem.main, "absmax"), (problem.branch, "absmax")
    return problem.into_main or plain[0], problem.into_branch or plain[1]


def _measured(problem: Problem, found: Branches, stage: str) -> Branches:
    error = problem.relative_error(found.reconstruct())
    entry = TraceEntry(stage=stage, iteration=0, weight_error=error)
    return dataclasses.replace(found, trace=[entry])


def _corrected(
    problem: Problem,
    x: NDArray[np.float32],
    grids: tuple[InputGrid, InputGrid],
    shrinkage: float,
) -> Branches:
    weight, none = problem.weight, problem.weight[:0]
    moments = _moments(x, none, grids, shrinkage)
    entering = moments.inputs + np.diag(moments.noise)
    passed = np.linalg.solve(entering, moments.inputs)
    # What a main branch that is not rounded leaves of the output: W Psi W^T.
    left_over = moments.inputs - moments.inputs @ passed
    values, vectors = np.linalg.eigh(moments.inputs)
    roots = np.sqrt(np.maximum(values, _CUTOFF * values[-1]))
    root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
    wide = weight.astype(np.float64)
    columns = np.linalg.eigh(wide @ left_over @ wide.T)[1][:, -problem.rank :]
    left, right = columns, columns.T @ wide
    for _ in range(_TURNS):
        target = ((wide - left @ right) @ passed.T).astype(np.float32)
        start = quantize(target, problem.main, rule=main_scale_rule(problem.main))
        main = round_in_metric(target, entering, start)
        missed = ((wide - main.dequantize()) @ root).astype(np.float32)
        columns, rows = problem.truncated_svd(missed)
        left, right = columns.astype(np.float64), rows @ inverse
    stored = round_factors(
        np.ascontiguousarray(left, dtype=np.float32),
        np.ascontiguousarray(right, dtype=np.float32),
        problem.branch,
        problem.branch_rotation,
    )
    return Branches(main=main, left=stored[0], right=stored[1])


def finish_with_data(
    weight: NDArray[np.float32],
    solved: Branches,
    activations: NDArray[np.float32],
    *,
    into_main: InputGrid,
    into_branch: InputGrid,
) -> Branches:
    """`solved`, or what GPTQ and a refit of L make of it where that is better on tokens left out.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
        What the branches approximate, smoothed and rotated.
    solved : Branches
        Stored branches; R and all scales of the main branch stay.
    activations : ndarray of shape (T, K), float32
        What enters the branches. With fewer than 16 rows `solved` is returned.
    into_main, into_branch : InputGrid
        What enters is rounded to these where errors are compared.
    """
    grids = (into_main, into_branch)

    def make(x: NDArray[np.float32], shrinkage: float) -> Branches:
        return _finished(weight, solved, x, grids, shrinkage)

    final = _best_shrunk(weight, activations, grids, make, unless=solved)
    if final is solved:
        return solved
    error = relative_distance(weight, final.reconstruct())
    entry = TraceEntry(stage="data", iteration=0, weight_error=error)
    return dataclasses.replace(final, trace=[*solved.trace, entry])


def finish_quickly(
    weight: NDArray[np.float32],
    grids: tuple[InputGrid, InputGrid],
    solved: Branches,
    activations: NDArray[np.float32],
) -> Branches:
    """`finish_with_data` without its comparisons, to compare finished solutions with each other."""
    is_known = len(activations) >= activations.shape[1]
    shrinkage = _SHRINKAGES[1 if is_known else 0]
    return _finished(weight, solved, activations, grids, shrinkage)


def _best_shrunk(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    grids: tuple[InputGrid, InputGrid],
    make: Callable[[NDArray[np.float32], float], Branches],
    unless: Branches | None = None,
) -> Branches:
    """What `make` gives of all rows with the shrinkage that is best on rows left out.

    Or `unless` where it is as good there, or rows are too few to leave any out.
    """
    if len(activations) < _LEAST_ROWS:
        return make(activations, _SHRINKAGES[0]) if unless is None else unless
    held_out = np.arange(len(activations)) % _FOLDS == _FOLDS // 2
    seen, unseen = activations[~held_out], activations[held_out]
    least: float = np.inf
    best: float | None = None
    if unless is not None:
        least = (1 - _NOISE) * _output_error(weight, unless, unseen, *grids)
    for shrinkage in _SHRINKAGES:
        error = _output_error(weight, make(seen, shrinkage), unseen, *grids)
        if error < least:
            least, best = (1 - _LESS_IS_BETTER) * error, shrinkage
        elif best is not None:
            break
    if best is None and unless is not None:
        return unless
    return make(activations, best or _SHRINKAGES[0])


class _Moments(NamedTuple):
    """Second moments of what enters: H (K, K) of X, and the noise variances of X_a and of P^."""

    inputs: NDArray[np.float64]
    noise: NDArray[np.float64]
    p_noise: NDArray[np.float64]


def _moments(
    x: NDArray[np.float32],
    right: NDArray[np.float32],
    grids: tuple[InputGrid, InputGrid],
    shrinkage: float,
) -> _Moments:
    into_main, into_branch = grids
    lost = p_lost = rounded_inputs(x, into_main) - x
    if len(right):
        stored = rounded_inputs(rounded_inputs(x, into_branch) @ right.T, into_branch)
        p_lost = stored - x @ right.T
    return _Moments(
        second_moment(x, shrinkage),
        np.square(lost, dtype=np.float64).mean(axis=0),
        np.square(p_lost, dtype=np.float64).mean(axis=0)[: len(right)],
    )


def _finished(
    weight: NDArray[np.float32],
    solved: Branches,
    x: NDArray[np.float32],
    grids: tuple[InputGrid, InputGrid],
    shrinkage: float,
) -> Branches:
    stored = dequantized(solved)
    right = weight[:0] if stored.right is None else stored.right
    moments = _moments(x, right, grids, shrinkage)
    rows = right.astype(np.float64)
    seen = rows @ moments.inputs
    # A component that was rounded to zero, or repeats another, has nothing to fit.
    gram = seen @ rows.T + np.diag(moments.p_noise)
    fit = (np.linalg.pinv(gram, rcond=_CUTOFF, hermitian=True) @ seen).T
    signal = moments.inputs - fit @ seen
    deflated = signal + np.diag(moments.noise)
    damping = _DEFLATED_DAMPING * math.sqrt(shrinkage)
    start = weight if stored.left is None else weight - stored.left @ right
    target = _fitted_to_noise(weight.astype(np.float64) @ signal, deflated, start, damping)
    main = round_in_metric(target, deflated, solved.main, damping)
    if solved.left is None:
        return dataclasses.replace(solved, main=main)
    left = (weight - main.dequantize()) @ fit.astype(np.float32)
    rule = main_scale_rule(solved.left.format)
    stored_left = quantize(left, solved.left.format, rule=rule)
    return dataclasses.replace(solved, main=main, left=stored_left, branch_noise=None)


def _fitted_to_noise(
    wanted: NDArray[np.float64],
    metric: NDArray[np.float64],
    start: NDArray[np.float32],
    damping: float,
) -> NDArray[np.float32]:
    """M (N, K) with M metric = `wanted`, held near `start` by `damping` mean diagonals."""
    hold = damping * (float(np.trace(metric)) / len(metric) or 1.0)
    held = metric + hold * np.eye(len(metric))
    solution = np.linalg.solve(held, (wanted + hold * start).T)
    return np.ascontiguousarray(solution.T, dtype=np.float32)


def _output_error(
    weight: NDArray[np.float32],
    solved: Branches,
    x: NDArray[np.float32],
    into_main: InputGrid,
    into_branch: InputGrid,
) -> float:
    """||Y^ - Y||_F of rows `x`, X and P rounded as the data path rounds them."""
    output = simulated_output(x, dequantized(solved), None, into_main, into_branch)
    return float(np.linalg.norm(output - x @ weight.T))
