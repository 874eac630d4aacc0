"""Integers around a zero point: the grids of ``uintN``, and of formats with a fixed zero.

Value = (code - zero point) * scale. Each group chooses its own zero point: it covers
[min(x, 0), max(x, 0)] (``absmax``), or the best shrunken range (``mse``), so that zero is always a
code. Where the zero point z is given, by the format or by the caller, the scale is the larger of
max(x, 0) / (hi - z) and -min(x, 0) / (z - lo); a side without codes is clipped.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError
from loraq_sim.formats import Element, Format
from loraq_sim.quantizers.tensor import (
    GroupEnds,
    QuantizedTensor,
    as_rows,
    clip_ratios,
    group_ends,
    stored_scales,
    unit_of_tensor,
)

__all__ = ["checked_zeros", "exact_scales", "quantize_around_zero"]


def checked_zeros(zero: ArrayLike, fmt: Format, shape: tuple[int, ...]) -> NDArray[np.integer]:
    """Given zero points in the shape of the scales and the dtype of the codes."""
    if not fmt.stores_zero_points:
        fixed = "" if fmt.zero is None else f" but the fixed {fmt.zero}"
        raise InputError(f"zero is for uintN formats; {fmt} has no zero points{fixed}")
    values = np.asarray(zero)
    if values.dtype.kind not in "iu":
        raise InputError(f"zero must hold integers, codes of {fmt.element.name}, got {zero!r:.60}")
    wanted = fmt.scale_shape(shape)
    if values.shape not in ((), wanted):
        raise InputError(
            f"zero has shape {values.shape}; {fmt} of shape {shape} has one for each scale: give "
            f"shape {wanted}, or one integer"
        )
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < fmt.element.lo or high > fmt.element.hi:
        raise InputError(
            f"zero holds values from {int(values.min())} to {int(values.max())}, outside the codes "
            f"of {fmt.element.name} ({fmt.element.lo}..{fmt.element.hi})"
        )
    return np.broadcast_to(values, wanted).astype(np.uint8)


def exact_scales(
    rows: NDArray[np.float32], group: int, fmt: Format, rule: str | None = None
) -> NDArray[np.float64]:
    """Scales of integer groups before they are rounded to their format, (rows, groups).

    Parameters
    ----------
    rows : ndarray of shape (rows, K), float32
        As `as_rows` gives them, with `group`.
    fmt : Format
        Integers without a block.
    rule : str, optional
        ``absmax`` (default) or ``signed_absmax``, which has negative scales.
    """
    low, high = (ends.astype(np.float64) for ends in group_ends(rows, group))
    if fmt.zero is not None:
        return _scales_around(low, high, fmt.element, np.float64(fmt.zero))
    if fmt.element.has_zero_point:
        return (high - low) / fmt.element.hi
    if rule == "signed_absmax":
        return np.where(high >= -low, high, low) / fmt.element.lo
    return np.maximum(high, -low) / fmt.element.hi


def _scales_around(
    low: NDArray[np.float64], high: NDArray[np.float64], element: Element, zero: Any
) -> NDArray[np.float64]:
    """Scales that cover [low, high] around given zero points; a side without codes is left out."""
    below, above = zero - element.lo, element.hi - zero
    return np.maximum(
        np.where(above > 0, high / np.maximum(above, 1), 0.0),
        np.where(below > 0, -low / np.maximum(below, 1), 0.0),
    )


def quantize_around_zero(
    values: np.ndarray,
    fmt: Format,
    rule: str,
    given: NDArray[np.integer] | None = None,
    ends: GroupEnds | None = None,
) -> QuantizedTensor:
    """Quantize finite float32 `values` (..., K); `given` are checked zero points, of each scale.

    `ends` are those of the groups, where they are known.
    """
    from loraq_sim.kernels.quantize import round_around

    if rule.startswith("signed"):
        raise InputError(f"{fmt}: {rule} is for symmetric integers; use 'mse' or 'absmax'")
    rows, group = as_rows(values, fmt)
    element, shape = fmt.element, fmt.scale_shape(values.shape)
    if fmt.zero is not None:
        given = np.full(shape, fmt.zero, dtype=np.int64)
    fixed = None if given is None else given.reshape(rows.shape[0], -1).astype(np.float64)
    # float64: the range and the squares of values near the end of float32 overflow there.
    low, high = (end.astype(np.float64) for end in ends or group_ends(rows, group))
    whole = (high - low) / element.hi
    if fixed is not None:
        whole = _scales_around(low, high, element, fixed)
    dtype = np.int8 if element.is_signed else np.uint8
    tried, codes = np.empty(rows.shape, dtype), np.empty(rows.shape, dtype)
    scales: NDArray[np.float32] = np.zeros(low.shape, np.float32)
    zeros: NDArray[np.float64] = np.zeros(low.shape, np.float64)
    best = np.full(low.shape, np.inf, np.float64)
    ratios = clip_ratios(element.bits).astype(np.float64) if rule == "mse" else np.ones(1)
    misses = np.empty(low.shape if len(ratios) > 1 else (0, 0), np.float64)
    reach = (high - low).max() if fixed is None else whole.max() * element.hi
    unit = unit_of_tensor(float(reach), fmt)
    for ratio in ratios:
        # One rounding in float64: a ratio divided first would move most scales by an ulp.
        exact = (high - low) * ratio / element.hi if fixed is None else whole * ratio
        scale = stored_scales(exact, fmt, unit)
        step = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        zero = np.clip(np.rint(-low * ratio / step), 0, element.hi) if fixed is None else fixed
        round_around(rows, group, step, zero, float(element.lo), float(element.hi), tried, misses)
        if not misses.size:
            codes, scales, zeros = tried, scale, zero
            break
        better = misses < best
        best = np.where(better, misses, best)
        codes = np.where(_of_elements(better, group, rows.shape[1]), tried, codes)
        scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    return QuantizedTensor(
        codes=codes.reshape(values.shape),
        scales=scales.reshape(shape),
        format=fmt,
        zero_points=zeros.reshape(shape).astype(dtype),
        tensor_scale=unit,
    )


def _of_elements(per_group: np.ndarray, group: int, k: int) -> np.ndarray:
    return np.repeat(per_group, group, axis=1)[:, :k]
