"""Smoothing and rotation of a layer chosen by what they do to its output, or by a rule.

Rotation trades outliers of few channels for a little more of all; smoothing moves them into the
weight, whose rounding they then enter. What is best depends on the layer: ``condition="auto"``
compares none, the closed form of `loraq_sim.conditioning.balanced_smoothing` and SmoothQuant's
strength 0.5, each as it is and rotated by the largest block Hadamard matrix. For rows X left out of
the statistics, with L R = SVD_r(W) and V = W - L R, the squared error of the output is close to

    || round(X) V^T + round(round(X) R^T) L^T - X W^T ||^2  +  g || X (V - round(V))^T ||^2,

all of the smoothed and rotated X and W; where the layer may have a residual input
(`loraq_sim.solvers.residual`), a quarter of the rank is tried on it, too, and what is best with it
is a second candidate beside what is best without. g stands for what a solver
makes of the error of rounding V (`loraq`: 0.35 to 0.5 of it), so that nothing needs to be solved
for the comparison.

Without activations, or with too few, inputs of up to four bits are rotated and all others are left
as they are: a rotation never needs data, and four bits cannot hold an outlier and the rest.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import (
    balanced_smoothing,
    check_condition,
    hadamard_block,
    power_smoothing,
    rotate_channels,
)
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.residual import InputGrid, residual_input, rounded_inputs

__all__ = ["EnteringFormats", "conditions_to_try"]

_GAIN = 0.4**2
# Fewer rows say little of channels; more than the second number say the same.
_LEAST_ROWS = 32
_MOST_ROWS = 1024
_FOLDS = 4
# What costs work at run time has to gain more than this.
_WORTH = 0.02
_FEW_BITS = 4
# One component in so many is tried on a residual input.
_PART_TRIED = 4
# Blocks that are too short spread nothing.
_LEAST_BLOCK = 8

Smooth = float | NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class EnteringFormats:
    """What the weights of both branches, and their inputs, are rounded to."""

    main: Format
    branch: Format | None
    into_main: InputGrid
    into_branch: InputGrid


def conditions_to_try(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32] | None,
    condition: str | None,
    *,
    rotate: str | None,
    smooth: Smooth,
    formats: "EnteringFormats",
    rank: int,
    may_deflate: bool,
) -> list[tuple[str | None, Smooth]]:
    """`rotate` and `smooth` with what `condition` makes of those that are None.

    One choice, or two where a residual input may make another one the better.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32, optional
    condition : None, "auto" or "rms"
    rotate, smooth
        As for `loraq_sim.solve`; what is given stays.
    formats : EnteringFormats
    rank : int
        Of the branch; 0 without one.
    may_deflate : bool
        Whether the layer may have a residual input.

    Raises
    ------
    InputError
        If `condition` is none of these, or asks for statistics of activations that are not there.
    """
    check_condition(condition)
    if condition is None:
        return [(rotate, smooth)]
    if condition == "rms":
        if activations is None:
            raise InputError(
                "condition='rms' smooths by the root mean squares of activations; pass "
                "activations=, or use rotate='hadamard', which needs none"
            )
        return [(rotate, balanced_smoothing(weight, activations) if smooth is None else smooth)]
    block = _rotatable(weight.shape[1])
    if activations is None or len(activations) < _LEAST_ROWS:
        is_coarse = formats.into_main[0].element.bits <= _FEW_BITS
        return [("hadamard" if block and is_coarse and rotate is None else rotate, smooth)]
    return _best(
        weight, activations, rotate, smooth, _Trial(weight, formats, rank, may_deflate), block
    )


def _rotatable(k: int) -> int | None:
    block = k & -k
    return block if block >= _LEAST_BLOCK else None


def _best(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    rotate: str | None,
    smooth: Smooth,
    trial: "_Trial",
    block: int | None,
) -> list[tuple[str | None, Smooth]]:
    count = min(len(activations), _MOST_ROWS)
    rows = activations[np.arange(count) * len(activations) // count]
    left_out = np.arange(count) % _FOLDS == _FOLDS // 2
    rotations = [rotate] if rotate is not None else [None, *(["hadamard"] if block else [])]
    choices: list[tuple[str | None, Smooth]] = []
    errors: list[tuple[float, float]] = []
    for of_seen, of_all in zip(
        _smoothings(weight, rows[~left_out], smooth),
        _smoothings(weight, activations, smooth),
        strict=True,
    ):
        for turn in rotations:
            choices.append((turn, of_all))
            errors.append(trial.errors(rows[~left_out], rows[left_out], of_seen, turn))
    plain, either = (_clearly_least(each) for each in zip(*errors, strict=True))
    return [choices[i] for i in dict.fromkeys((plain, either))]


def _clearly_least(errors: Iterable[float]) -> int:
    """The plainest comes first, and yields to what is clearly better."""
    least, best = np.inf, 0
    for i, error in enumerate(errors):
        if error < least * (1 - _WORTH) ** 2:
            least, best = error, i
    return best


def _smoothings(
    weight: NDArray[np.float32], activations: NDArray[np.float32], smooth: Smooth
) -> list[Smooth]:
    if smooth is not None:
        return [smooth]
    return [
        None,
        balanced_smoothing(weight, activations),
        power_smoothing(0.5, 0.5, weight, activations),
    ]


@dataclass(frozen=True)
class _Trial:
    """About what a solver leaves of the output of a layer, without solving."""

    weight: NDArray[np.float32]
    formats: EnteringFormats
    rank: int
    may_deflate: bool

    def errors(
        self,
        seen: NDArray[np.float32],
        x: NDArray[np.float32],
        smooth: Smooth,
        rotate: str | None,
    ) -> tuple[float, float]:
        """The squared error for rows `x`, and the lesser of it and that with a residual input.

        All are smoothed and rotated; directions are those of `seen`.
        """
        weight = self.weight
        if isinstance(smooth, np.ndarray):
            weight, seen, x = weight * smooth, seen / smooth, x / smooth
        block = hadamard_block(rotate, weight.shape[1])
        if block is not None:
            weight, seen, x = (rotate_channels(rows, block) for rows in (weight, seen, x))
        left, right = weight[:, :0], weight[:0]
        if self.rank:
            left, right = truncated_svd(
                weight, self.rank, rng=np.random.default_rng(0), power_iterations=1
            )
        plain = deflated = self._of_branch(weight, x, x, left, right, 0.0)
        spent = min(self.rank // _PART_TRIED, *seen.shape) if self.may_deflate else 0
        if spent and self.formats.branch is not None:
            found = residual_input(
                weight, seen, spent, self.formats.branch, np.random.default_rng(0)
            )
            rows, into = found.feedback.dequantize(), self.formats.into_branch
            p = rounded_inputs(rounded_inputs(x, into) @ rows.T, into)
            own, carried = self.rank - spent, p @ found.feedback_left.dequantize().T
            parts = left[:, :own], right[:own]
            deflated = self._of_branch(weight, x, x - p @ rows, *parts, carried)
        return plain, min(plain, deflated)

    def _of_branch(
        self,
        weight: NDArray[np.float32],
        x: NDArray[np.float32],
        d: NDArray[np.float32],
        left: NDArray[np.float32],
        right: NDArray[np.float32],
        carried: "NDArray[np.float32] | float",
    ) -> float:
        """The squared error of branches that read `d`, beside what is `carried` of `x` already."""
        formats, rest = self.formats, weight
        missed = carried - x @ weight.T
        if len(right):
            sizes = np.linalg.norm(right, axis=1)
            # Sizes as `solvers.branch` shares them out: P is rounded in groups of components.
            in_left = np.where(sizes > 0, sizes, 1) ** np.float32(0.75)
            rest = weight - left @ right
            p = rounded_inputs(d, formats.into_branch) @ (right / in_left[:, None]).T
            missed += rounded_inputs(p, formats.into_branch) @ (left * in_left).T
        missed += rounded_inputs(d, formats.into_main) @ rest.T
        of_weight = d @ (rest - quantize(rest, formats.main).dequantize()).T
        return _square(missed) + _GAIN * _square(of_weight)


def _square(values: NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
