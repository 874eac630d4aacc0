"""The residual input: a part of the branch deflates what the main branch has to round.

At four bits the rounding of activations, not of weights, makes most of the error. The rank of the
branch is split, r = r_f + r_w. r_f components carry the loud directions V (r_f, K) of the inputs;
the main branch, and the r_w components that take up the weight's rounding, read what is left:

    P_f = X_b V^T, rounded to P^_f         D   = X - P^_f V
    P_w = D_b R_w^T, rounded to P^_w       y   = D_a Q^T + P^_w L_w^T + P^_f L_f^T + bias

with Q + L_w R_w close to W, and L_f = W V^T. D is formed of the *rounded* P^_f and of V as stored:
whatever P_f's rounding loses is still in D, so that P_f may have few bits. What remains is

    D (Q + L_w R_w - W)^T + e_D Q^T + e_Pw L_w^T + P^_f (L_f - W V^T)^T,

in which groups of D are quieter than groups of X, and the weight's error acts on D alone. As one
matrix on X the layer is (Q + L_w R_w)(I - V^T V) + L_f V (`with_residual_input`).

V are the principal directions of the calibration inputs, from their second moment; descending on
group ranges instead gains 1 to 3 %. V is stored once, with a scale per block of 64 components and
64 channels, which serves X V^T and P V alike. Where the inputs are sparse and spiky, deflation
spreads one group's spike over all of them and does harm: `spend_on_residual_input` compares shares
of the rank, none among them, on calibration rows that V was not made of.

Deflating activations is known: ResQ (arXiv 2412.14363), QUAD (arXiv 2503.19353) and DiRotQ (arXiv
2605.16732) keep loud directions at higher precision, LRC (arXiv 2412.07902) corrects with low-rank
terms on unquantized activations. Here P_f is rounded and its error fed back, and the branch is
below 16 bits.

Methods ``quad`` and ``resq`` spend the whole branch on the residual input and round W by GPTQ in
the metric of D (`loraq_sim.solvers.gptq.solve_deflated`); ``resq`` turns the directions among
themselves, so that all components of P_f are equally loud. Exact: the subspace, the bits (those of
the split; published are 16 for QUAD, 8 for ResQ), GPTQ. Left out: what the papers fuse into the
layers before (V is applied at run time here, and its bytes count), ResQ's share of an eighth of
the width (here the bytes of the branch say how much), its random rotation of the rest
(``rotate="hadamard"`` is close to one), QUAD's tuning of the extra weights. D is formed of the
rounded P_f, which is better than published.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.problem import Branches
from loraq_sim.split import feedback_format, feedback_left_format

__all__ = [
    "SHARES",
    "InputGrid",
    "Operands",
    "ResidualInput",
    "checked_feedback",
    "dequantized",
    "feedback_outputs",
    "principal_directions",
    "residual_input",
    "rounded_inputs",
    "simulated_output",
    "spend_on_residual_input",
    "whole_branch",
    "with_residual_input",
]

SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Shares of the rank that may be spent on the residual input."""

# More rows than this tell a second moment no better.
_MOST_ROWS = 2048
# Rows on which shares are compared: errors then differ by 1 % or less from those on all.
_ROWS_COMPARED = 512
# Fewer rows are too few to leave any out; fewer than the second number are left out a quarter at a
# time, so that directions are made of most of them.
_LEAST_ROWS = 8
_FEW_ROWS = 128
# A share must be better than none by more than this, for it costs time; than a smaller one by less.
_NOISE = 0.01
_WORTH_MORE = 0.002


InputGrid = tuple[Format, str]
"""The format that inputs are rounded to, and the rule by which their scales are found."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidualInput:
    """Stored directions ``feedback`` (r_f, K) and their outputs ``feedback_left`` (N, r_f)."""

    feedback: QuantizedTensor
    feedback_left: QuantizedTensor

    @property
    def rank(self) -> int:
        """Components, r_f."""
        return self.feedback.shape[0]

    def left_of(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """D = X - X V^T V (T, K), with V as stored."""
        rows = self.feedback.dequantize()
        return x - (x @ rows.T) @ rows


def residual_input(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    rank: int,
    branch: Format,
    rng: np.random.Generator,
    turned: bool = False,
) -> ResidualInput:
    """The stored parts of a residual input of `rank` components.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32
        Smoothed and rotated like the weight.
    rank : int
        From 1 to min(T, K).
    branch : Format
        Format of the branch's factors.
    turned : bool
        Whether a random orthogonal matrix shares the sizes of P_f out among its components.

    Raises
    ------
    InputError
        If `rank` is more than the activations can tell.
    """
    known = min(activations.shape)
    if rank > known:
        raise InputError(
            f"feedback={rank} asks for more directions than {len(activations)} activation rows of "
            f"{activations.shape[1]} channels hold; give feedback={known} at most, or more rows"
        )
    directions = principal_directions(activations, rank, rng)
    if turned:
        turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0].astype(np.float32)
        directions = turn @ directions
    stored = quantize(directions, feedback_format(branch), rule=_rule(branch))
    fmt = feedback_left_format(branch, rank)
    return ResidualInput(feedback=stored, feedback_left=feedback_outputs(weight, stored, fmt))


def feedback_outputs(
    weight: NDArray[np.float32], feedback: QuantizedTensor, fmt: Format
) -> QuantizedTensor:
    """L_f = W V^T (N, r_f) stored in `fmt`, for V as stored."""
    return quantize(weight @ feedback.dequantize().T, fmt, rule=_rule(fmt))


def with_residual_input(
    weight: NDArray[np.float32], feedback: QuantizedTensor, feedback_left: QuantizedTensor
) -> NDArray[np.float32]:
    """What the layer multiplies X with, (N, K), where `weight` multiplies D = X - X V^T V."""
    rows = feedback.dequantize()
    return weight + (feedback_left.dequantize() - weight @ rows.T) @ rows


def principal_directions(
    x: NDArray[np.float32], rank: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Orthonormal rows (rank, K): the leading right singular vectors of rows spread over `x`."""
    if len(x) > max(_MOST_ROWS, rank):
        count = max(_MOST_ROWS, rank)
        x = x[np.arange(count) * len(x) // count]
    _, rows = truncated_svd(np.ascontiguousarray(x), rank, rng=rng)
    sizes = np.linalg.norm(rows, axis=1, keepdims=True)
    # A direction without any size, of fewer distinct rows than components, stays empty.
    return (rows / np.where(sizes == 0, 1, sizes)).astype(np.float32)


def _rule(fmt: Format) -> str | None:
    return None if fmt.element.is_plain_float else "mse"


def checked_feedback(
    feedback: "int | str | None",
    plain_method: str | None,
    branch: Format | None,
    activations: NDArray[np.float32] | None,
) -> "int | str | None":
    """`feedback` as `loraq_sim.solve` takes it; None where no component is asked for.

    `plain_method` names the method if it makes no branch.

    Raises
    ------
    InputError
        If it is none of None, ``auto`` or a number of components, or cannot be.
    """
    is_count = isinstance(feedback, int) and not isinstance(feedback, bool) and feedback >= 0
    if not (feedback is None or feedback == "auto" or is_count):
        raise InputError(
            f"feedback must be None, 'auto' or a whole number of components, got {feedback!r:.60}"
        )
    if not feedback:
        return None
    if branch is None or plain_method is not None:
        why = "branch=None has none" if branch is None else f"method {plain_method!r} makes none"
        raise InputError(
            f"feedback={feedback!r} spends a part of a low-rank branch, and {why}; choose another, "
            "or leave feedback out"
        )
    if activations is None:
        raise InputError(
            f"feedback={feedback!r} deflates the inputs of a layer, which it must know: give "
            "activations, or leave feedback out (loraq needs no data)"
        )
    return feedback


def whole_branch(
    method: str, feedback: "int | str | None", rank_with: Callable[[Callable[[int], int]], int]
) -> int:
    """The rank of a branch that `method` spends on the residual input as a whole.

    `rank_with` as for `spend_on_residual_input`.
    """
    if not feedback:
        raise InputError(
            f"method {method!r} spends its whole branch on directions of the inputs: write the "
            "split with ~ (W4A4~W16A16r32), or give feedback='auto'"
        )
    total = rank_with(lambda rank: rank)
    if feedback not in ("auto", total):
        raise InputError(
            f"method {method!r} spends its whole branch of rank {total} on directions of the "
            f"inputs, got feedback={feedback}; give feedback='auto', or method='loraq'"
        )
    return total


def spend_on_residual_input(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    feedback: "int | str",
    rank_with: Callable[[Callable[[int], int]], int],
    branches: Callable[[int], Branches],
    *,
    finished: Callable[[Branches, NDArray[np.float32]], Branches] | None = None,
    branch: Format,
    into_main: InputGrid,
    into_branch: InputGrid,
    rng: np.random.Generator,
    turned: bool = False,
) -> tuple[int, ResidualInput | None, float]:
    """The rank of the whole branch, the residual input's part of it, None if it gets nothing.

    And the error of the output on rows left out; 0 where no share was chosen.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32
        Smoothed and rotated like the weight.
    feedback : int or "auto"
        Components, or whatever is best of `SHARES`.
    rank_with : callable
        The rank of the whole branch, from a function that says how many components of a rank the
        residual input has.
    branches : callable
        A quick solution of the weight by its own rank, to compare shares with.
    finished : callable, optional
        What follows it, quickly, from a solution and what enters the branches, (T, K).
    branch : Format
        Of the factors.
    into_main, into_branch : InputGrid
        Of what enters the branches; P is rounded as the branch's inputs are.
    turned : bool
        As for `residual_input`.

    Raises
    ------
    InputError
        If more components are asked for than the branch or the activations have.
    """

    def ranks(share: float) -> tuple[int, int]:
        total = rank_with(lambda rank: round(share * rank))
        return total, round(share * total)

    miss = 0.0
    if isinstance(feedback, int):
        wanted = feedback
        total, spent = rank_with(lambda rank: min(wanted, rank)), wanted
        if spent > total:
            raise InputError(
                f"feedback={spent} is more than the rank {total} of the whole branch; give "
                f"feedback={total} at most, or a larger rank or budget"
            )
    else:
        grids = into_main, into_branch
        # Of its own, so that V is the same whether its size was given or chosen.
        tried = rng.spawn(1)[0]
        share, miss = _best_share(
            weight, activations, ranks, branches, finished, branch, grids, tried
        )
        total, spent = ranks(share)
    found = residual_input(weight, activations, spent, branch, rng, turned) if spent else None
    return total, found, miss


def _best_share(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    ranks: Callable[[float], tuple[int, int]],
    branches: Callable[[int], Branches],
    finished: Callable[[Branches, NDArray[np.float32]], Branches] | None,
    branch: Format,
    grids: tuple[InputGrid, InputGrid],
    rng: np.random.Generator,
) -> tuple[float, float]:
    """The share of the rank whose output error is least on rows that V was not made of, and it."""
    count = min(len(activations), _ROWS_COMPARED)
    if count < _LEAST_ROWS:
        return 0.0, 0.0
    x = activations[np.arange(count) * len(activations) // count]
    n_folds = 4 if count < _FEW_ROWS else 2
    folds = [np.arange(count) % n_folds == fold for fold in range(n_folds)]
    # Of each share as solved, and as finished where that is better.
    errors = np.full((len(SHARES), n_folds), np.inf)
    tried: set[tuple[int, int]] = set()
    for i, share in enumerate(SHARES):
        rank, spent = ranks(share)
        # Of a small rank, two shares may be the same components.
        if spent > min(activations.shape) or (rank, spent) in tried:
            continue
        tried.add((rank, spent))
        solved = branches(rank - spent)
        found = np.full((2, n_folds), np.inf)
        for j, left_out in enumerate(folds):
            seen, unseen, deflation = x[~left_out], x[left_out], None
            known = min(spent, len(seen))
            if known:
                deflation = residual_input(weight, seen, known, branch, rng)
            ends = [solved]
            if finished is not None:
                ends.append(
                    finished(solved, seen if deflation is None else deflation.left_of(seen))
                )
            for of_end, end in zip(found, ends, strict=False):
                y = simulated_output(unseen, dequantized(end), deflation, *grids)
                of_end[j] = np.square(y - unseen @ weight.T, dtype=np.float64).sum()
        errors[i] = min(found, key=np.sum)
    totals = np.sqrt(errors.sum(axis=1))
    # In every fold: of few rows, one may decide the sum.
    is_better = (errors <= (1 + _NOISE) * errors[0]).all(axis=1) & (
        totals < (1 - _NOISE) * totals[0]
    )
    if not is_better.any():
        return 0.0, float(totals[0])
    least = totals[is_better].min()
    best = int(np.flatnonzero(is_better & (totals <= (1 + _WORTH_MORE) * least))[0])
    return SHARES[best], float(totals[best])


def rounded_inputs(values: NDArray[np.float32], grid: InputGrid) -> NDArray[np.float32]:
    """`values` (T, K) as they are after rounding to `grid`."""
    fmt, rule = grid
    return quantize(values, fmt, rule=None if rule == "absmax" else rule).dequantize()


class Operands(NamedTuple):
    """What the branches multiply with: main (N, K), left (N, r) and right (r, K), all float32."""

    main: NDArray[np.float32]
    left: NDArray[np.float32] | None = None
    right: NDArray[np.float32] | None = None


def dequantized(solved: Branches) -> Operands:
    """The operands that stored branches stand for."""
    if solved.left is None or solved.right is None:
        return Operands(solved.main.dequantize())
    return Operands(*(part.dequantize() for part in (solved.main, solved.left, solved.right)))


def simulated_output(
    x: NDArray[np.float32],
    operands: Operands,
    deflation: ResidualInput | None,
    into_main: InputGrid,
    into_branch: InputGrid,
) -> NDArray[np.float32]:
    """Output (T, N) of a layer with every rounding of its inputs, P and P_f, and none of its sums.

    Shares of a residual input, conditions and finishes are all compared by it.
    """
    terms = []
    if deflation is not None:
        directions = deflation.feedback.dequantize()
        p = rounded_inputs(rounded_inputs(x, into_branch) @ directions.T, into_branch)
        terms.append(p @ deflation.feedback_left.dequantize().T)
        x = x - p @ directions
    terms.append(rounded_inputs(x, into_main) @ operands.main.T)
    if operands.left is not None and operands.right is not None:
        p = rounded_inputs(rounded_inputs(x, into_branch) @ operands.right.T, into_branch)
        terms.append(p @ operands.left.T)
    return np.sum(terms, axis=0, dtype=np.float32)
