"""Why a solution is as good as it is: ranges of groups, what rank is left to win, clipping."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.hadamard import rotate_channels
from loraq_sim.quantizers.groups import as_rows, group_extremes
from loraq_sim.solvers.problem import product

if TYPE_CHECKING:
    from loraq_sim.solvers.solution import Solution

__all__ = ["Diagnostics", "diagnose"]

# Ranks at which the share of the remaining error that they could carry is reported.
_RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Measures of one solution of one weight.

    ``amax_over_rms_before`` and ``_after`` are means over the scale groups of W and of what the
    main branch rounds, W - L R (1.7 for uniform, about 2.6 for 64 normal values); ``residual_norm``
    is ||W - L R|| / ||W||. ``left_to_win`` maps a rank r to the share of ||W - Q - L R||_F^2 in its
    r largest singular values: what an unquantized branch of r more components would remove.
    ``max_abs_error`` is in units of the weight; ``branch_noise`` is
    ||stored L R - L R||_F / ||W||_F where the method knows it.
    """

    amax_over_rms_before: float
    amax_over_rms_after: float
    residual_norm: float
    left_to_win: dict[int, float]
    max_abs_error: float
    branch_noise: float | None


def diagnose(solution: "Solution", weight: np.ndarray) -> Diagnostics:
    """Measure `solution`, a `Solution` of `weight` (N, K).

    Takes about as long as one full singular value decomposition of the weight.

    Raises
    ------
    InputError
        If the shapes differ.
    """
    if weight.shape != solution.main.shape:
        raise InputError(
            f"the solution is of a weight of shape {solution.main.shape}, got {weight.shape}"
        )
    smoothed = np.asarray(weight, dtype=np.float32)
    if solution.smooth is not None:
        smoothed = smoothed * solution.smooth
    if solution.rotation is not None:
        smoothed = rotate_channels(smoothed, solution.rotation)
    rest = smoothed
    if solution.left is not None:
        rest = smoothed - product(solution.left, solution.right)
    error = rest - solution.main.dequantize()
    squares = np.square(np.linalg.svd(error, compute_uv=False).astype(np.float64))
    total = float(squares.sum()) or 1.0
    fmt = solution.main.format
    original = error if solution.rotation is None else rotate_channels(error, solution.rotation)
    unsmoothed = original if solution.smooth is None else original / solution.smooth
    size = float(np.linalg.norm(smoothed)) or 1.0
    return Diagnostics(
        amax_over_rms_before=_amax_over_rms(*as_rows(np.ascontiguousarray(smoothed), fmt)),
        amax_over_rms_after=_amax_over_rms(*as_rows(rest, fmt)),
        residual_norm=float(np.linalg.norm(rest)) / size,
        left_to_win={r: float(squares[:r].sum()) / total for r in _RANKS if r <= len(squares)},
        max_abs_error=float(np.abs(unsmoothed).max()),
        branch_noise=solution.branch_noise,
    )


def _amax_over_rms(rows: np.ndarray, group: int) -> float:
    """Mean over groups that are not all zero; 0 if all are."""
    amax = np.abs(group_extremes(rows, group)).astype(np.float64)
    starts = np.arange(0, rows.shape[1], group)
    counts = np.diff(np.append(starts, rows.shape[1]))
    squares = np.add.reduceat(np.square(rows, dtype=np.float64), starts, axis=1)
    rms = np.sqrt(squares / counts)
    used = rms > 0
    return float((amax[used] / rms[used]).mean()) if used.any() else 0.0
