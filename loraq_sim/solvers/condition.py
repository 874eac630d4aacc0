"""Smoothing and rotation of a layer chosen by what they do to its output, or by a rule.

Rotation trades outliers of few channels for a little more of all; smoothing moves them into the
weight, whose rounding they then enter. What is best depends on the layer: ``condition="auto"``
compares none, the closed form of `loraq_sim.conditioning.balanced_smoothing` and SmoothQuant's
strength 0.5, each as it is and rotated by the largest block Hadamard matrix. For rows X left out of
the statistics, with L R = SVD_r(W) and V = W - L R, the squared error of the output is close to

    || round(X) V^T + round(round(X) R^T) L^T - X W^T ||^2  +  g || X (V - round(V))^T ||^2,

all of the smoothed and rotated X and W. g stands for what a solver makes of the error of rounding V
(`loraq`: 0.35 to 0.5 of it), so that nothing needs to be solved for the comparison.

Without activations, or with too few, inputs of up to four bits are rotated and all others are left
as they are: a rotation never needs data, and four bits cannot hold an outlier and the rest.
"""

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

__all__ = ["EnteringFormats", "chosen_condition"]

_GAIN = 0.4**2
# Fewer rows say little of channels; more than the second number say the same.
_LEAST_ROWS = 32
_MOST_ROWS = 1024
_FOLDS = 4
# What costs work at run time has to gain more than this.
_WORTH = 0.02
_FEW_BITS = 4
# Blocks that are too short spread nothing.
_LEAST_BLOCK = 8

Smooth = float | NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class EnteringFormats:
    """What the weight of the main branch, its inputs, and those of the branch are rounded to."""

    main: Format
    main_activation: Format
    branch_activation: Format


def chosen_condition(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32] | None,
    condition: str | None,
    *,
    rotate: str | None,
    smooth: Smooth,
    formats: "EnteringFormats",
    rank: int,
) -> tuple[str | None, Smooth]:
    """`rotate` and `smooth` with what `condition` makes of those that are None.

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

    Raises
    ------
    InputError
        If `condition` is none of these, or asks for statistics of activations that are not there.
    """
    check_condition(condition)
    if condition is None:
        return rotate, smooth
    if condition == "rms":
        if activations is None:
            raise InputError(
                "condition='rms' smooths by the root mean squares of activations; pass "
                "activations=, or use rotate='hadamard', which needs none"
            )
        return rotate, balanced_smoothing(weight, activations) if smooth is None else smooth
    block = _rotatable(weight.shape[1])
    if activations is None or len(activations) < _LEAST_ROWS:
        is_coarse = formats.main_activation.element.bits <= _FEW_BITS
        return ("hadamard" if block and is_coarse and rotate is None else rotate), smooth
    return _best(weight, activations, rotate, smooth, _Trial(weight, formats, rank), block)


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
) -> tuple[str | None, Smooth]:
    count = min(len(activations), _MOST_ROWS)
    rows = activations[np.arange(count) * len(activations) // count]
    left_out = np.arange(count) % _FOLDS == _FOLDS // 2
    rotations = [rotate] if rotate is not None else [None, *(["hadamard"] if block else [])]
    least, best = np.inf, (rotate, smooth)
    for of_seen, of_all in zip(
        _smoothings(weight, rows[~left_out], smooth),
        _smoothings(weight, activations, smooth),
        strict=True,
    ):
        for turn in rotations:
            error = trial.error(rows[left_out], of_seen, turn)
            # The plainest comes first, and yields to what is clearly better.
            if error < least * (1 - _WORTH) ** 2:
                least, best = error, (turn, of_all)
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

    def error(self, x: NDArray[np.float32], smooth: Smooth, rotate: str | None) -> float:
        """The squared error for rows `x`, smoothed and rotated."""
        weight = self.weight
        if isinstance(smooth, np.ndarray):
            weight, x = weight * smooth, x / smooth
        block = hadamard_block(rotate, weight.shape[1])
        if block is not None:
            weight, x = rotate_channels(weight, block), rotate_channels(x, block)
        formats, rest = self.formats, weight
        missed = -x @ weight.T
        if self.rank:
            left, right = truncated_svd(
                weight, self.rank, rng=np.random.default_rng(0), power_iterations=1
            )
            sizes = np.linalg.norm(right, axis=1)
            # Sizes as `solvers.branch` shares them out: P is rounded in groups of components.
            in_left = np.where(sizes > 0, sizes, 1) ** np.float32(0.75)
            rest = weight - left @ right
            entering = quantize(x, formats.branch_activation).dequantize()
            p = entering @ (right / in_left[:, None]).T
            missed += quantize(p, formats.branch_activation).dequantize() @ (left * in_left).T
        missed += quantize(x, formats.main_activation).dequantize() @ rest.T
        of_weight = x @ (rest - quantize(rest, formats.main).dequantize()).T
        return _square(missed) + _GAIN * _square(of_weight)


def _square(values: NDArray[np.float32]) -> float:
    return float(np.square(values, dtype=np.float64).sum())
