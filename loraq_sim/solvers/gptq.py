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
branch are kept, and L is left to be refitted: for whatever Q is, the best L R takes from the error
all that lies in the row space of R, in the metric H. Columns are therefore rounded in what is left,

    H' = H - H R^T (R H R^T)^-1 R H,       L <- L + (W - L R - Q) H R^T (R H R^T)^-1,

and L is rounded again. Few tokens tell little of H: it is shrunk by adding its mean diagonal, and
the result is kept only where it is better on tokens that H was not made of.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.baselines import required_activations
from loraq_sim.solvers.main_grid import grid_of, main_scale_rule, nearest_codes, requantize
from loraq_sim.solvers.problem import Branches, Problem, TraceEntry, product, relative_distance
from loraq_sim.solvers.residual import InputGrid, dequantized, simulated_output

FINISHES = ("data",)
"""What may follow a solver; see `loraq_sim.solve`."""

__all__ = [
    "FINISHES",
    "check_finish",
    "finish_with_data",
    "round_in_metric",
    "second_moment",
    "solve_gptq",
]

# Share of the mean diagonal that is added to H, as published.
_DAMPING = 0.01
# Columns whose losses are passed on at once to all behind them.
_BLOCK = 128
# Mean diagonals that a finish adds to H.
_SHRINKAGE = 1.0
# The deflated metric has no weight in the row space of R: L takes that up, but L is rounded.
_DEFLATED_DAMPING = 0.2
# Eigenvalues below this share of the largest are rounding noise.
_CUTOFF = 1e-10
# One row in so many is left out of the metric for the comparison; fewer rows are too few.
_FOLDS = 4
_LEAST_ROWS = 16
# A finish has to be better by more than the noise of that comparison.
_NOISE = 0.01


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
    if len(activations) < _LEAST_ROWS:
        return solved
    held_out = np.arange(len(activations)) % _FOLDS == _FOLDS // 2
    seen, unseen = activations[~held_out], activations[held_out]
    how = (unseen, into_main, into_branch)
    trial = _finished(weight, solved, seen)
    if _output_error(weight, trial, *how) >= (1 - _NOISE) * _output_error(weight, solved, *how):
        return solved
    final = _finished(weight, solved, activations)
    error = relative_distance(weight, final.reconstruct())
    entry = TraceEntry(stage="data", iteration=0, weight_error=error)
    return dataclasses.replace(final, trace=[*solved.trace, entry])


def _finished(weight: NDArray[np.float32], solved: Branches, x: NDArray[np.float32]) -> Branches:
    metric = second_moment(x, _SHRINKAGE)
    if solved.left is None or solved.right is None:
        return dataclasses.replace(solved, main=round_in_metric(weight, metric, solved.main))
    rows = solved.right.dequantize().astype(np.float64)
    seen = metric @ rows.T
    # (R H R^T)^+: a component that was rounded to zero, or repeats another, has nothing to fit.
    fit = seen @ np.linalg.pinv(rows @ seen, rcond=_CUTOFF, hermitian=True)
    deflated = metric - fit @ seen.T
    target = weight - product(solved.left, solved.right)
    main = round_in_metric(target, deflated, solved.main, _DEFLATED_DAMPING)
    missed = target - main.dequantize()
    left = solved.left.dequantize() + missed @ fit.astype(np.float32)
    rule = main_scale_rule(solved.left.format)
    stored = quantize(left, solved.left.format, rule=rule)
    return dataclasses.replace(solved, main=main, left=stored, branch_noise=None)


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
