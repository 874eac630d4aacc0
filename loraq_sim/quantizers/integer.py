"""Quantization to integer and plain float formats, along the last axis.

Scale rules of the symmetric integers (``amax`` is the largest magnitude of the group):

- ``absmax``: amax / hi; nothing is clipped (except by the rounding of the scale itself);
- ``mse``: the best of amax / hi * ratio over a fixed grid of ratios, by squared error;
- ``signed_mse``: as ``mse``, but scales may be negative, so that the extreme value may land on the
  code lo = -hi - 1 and all 2**b codes serve.

Asymmetric integers cover [min(x, 0), max(x, 0)] of the group (``absmax``) or the best shrunken
range (``mse``). Plain floats round to nearest, ties to even, and saturate at the largest finite
value. Scales are rounded to their stored format before the codes are computed.
"""

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers.scale_storage import round_scales
from loraq_sim.quantizers.tensor import QuantizedTensor, float_dtype

__all__ = ["SCALE_RULES", "quantize"]

SCALE_RULES = ("absmax", "mse", "signed_mse")

# Optimal clipping of a 2-bit group lies near 0.4 amax, of a 4-bit one near 0.8; wider grids clip
# less. A step of 2.5 % costs less than 0.1 % of the error against a continuous search.
_RATIOS = {2: np.linspace(1.0, 0.25, 31), 3: np.linspace(1.0, 0.4, 25)}
_RATIOS_DEFAULT = np.linspace(1.0, 0.6, 17)
_RATIOS_WIDE = np.linspace(1.0, 0.8, 9)


def quantize(x: np.ndarray, fmt: "str | Format", rule: str = "absmax") -> QuantizedTensor:
    """Quantize `x` to `fmt`, groups along the last axis.

    Parameters
    ----------
    x : ndarray of shape (..., K), floating
        Finite values. Not modified; computed in float32.
    fmt : str or Format
        For example ``"int4/g64"``; see `loraq_sim.formats`.
    rule : str
        ``absmax``, ``mse`` or ``signed_mse``; without effect on plain floats.

    Raises
    ------
    InputError
        If `x` is not a finite floating array, or the format or rule does not fit.
    """
    fmt = parse_format(fmt)
    if rule not in SCALE_RULES:
        raise InputError(unknown_name("scale rule", rule, SCALE_RULES))
    values = _checked(x)
    if not fmt.element.is_integer:
        return _cast(values, fmt)
    if fmt.element.has_zero_point:
        return _quantize_asymmetric(values, fmt, rule)
    return _quantize_symmetric(values, fmt, rule)


def _checked(x: np.ndarray) -> np.ndarray:
    values = np.asarray(x)
    if values.ndim == 0 or values.size == 0 or values.dtype.kind not in "fV":
        raise InputError(
            "quantize needs a non-empty floating array of at least one axis, got "
            f"{values.dtype} of shape {values.shape}"
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"cannot quantize {values.size - int(finite.sum())} non-finite values; "
            f"the first is {values[where]} at {where}"
        )
    return values


def _cast(values: np.ndarray, fmt: Format) -> QuantizedTensor:
    dtype = float_dtype(fmt)
    if fmt.element.bits == 16:
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(dtype).max)
        values = np.clip(values, -largest, largest)
    return QuantizedTensor(codes=values.astype(dtype), scales=None, format=fmt)


def _quantize_symmetric(values: np.ndarray, fmt: Format, rule: str) -> QuantizedTensor:
    from loraq_sim.kernels.group_quantize import quantize_groups

    element = fmt.element
    if rule == "signed_mse" and fmt.scale.name == "e8m0":
        raise InputError(f"{fmt}: e8m0 scales have no sign; use the rule 'mse'")
    rows, group = _as_rows(values, fmt)
    extreme = _group_extremes(rows, group)
    steps = np.abs(extreme) / np.float32(element.hi)
    if rule == "absmax":
        candidates = round_scales(steps, fmt.scale)[:, :, None]
    else:
        ratios = _ratios(element.bits)
        candidates = round_scales(steps[:, :, None] * ratios, fmt.scale)
        if rule == "signed_mse":
            flipped = np.abs(extreme) / np.float32(-element.lo)
            mirrored = round_scales(flipped[:, :, None] * ratios, fmt.scale)
            mirrored *= -np.sign(extreme)[:, :, None]
            candidates = np.concatenate([candidates, mirrored], axis=2)
    codes = np.empty(rows.shape, dtype=np.int8)
    scales = np.empty(steps.shape, dtype=np.float32)
    quantize_groups(
        rows, candidates, group, np.float32(element.lo), np.float32(element.hi), codes, scales
    )
    return QuantizedTensor(
        codes=codes.reshape(values.shape),
        scales=scales.reshape(fmt.scale_shape(values.shape)),
        format=fmt,
    )


def _quantize_asymmetric(values: np.ndarray, fmt: Format, rule: str) -> QuantizedTensor:
    if rule == "signed_mse":
        raise InputError(f"{fmt}: signed_mse is for symmetric integers; use 'mse' or 'absmax'")
    rows, group = _as_rows(values, fmt)
    # float64: the range and the squares of values near the end of float32 overflow there.
    grouped = _padded_groups(rows, group).astype(np.float64)
    low = np.minimum(grouped.min(axis=2, keepdims=True), 0.0)
    high = np.maximum(grouped.max(axis=2, keepdims=True), 0.0)
    best_error = np.full(low.shape, np.inf, dtype=np.float64)
    codes = np.zeros(grouped.shape, dtype=np.uint8)
    scales = np.zeros(low.shape, dtype=np.float32)
    zeros = np.zeros(low.shape, dtype=np.uint8)
    ratios = _ratios(fmt.element.bits) if rule == "mse" else np.ones(1, dtype=np.float32)
    hi = fmt.element.hi
    for ratio in ratios:
        scale = round_scales((high - low) * (ratio / hi), fmt.scale)
        step = np.where(scale == 0, np.float32(1), scale).astype(np.float64)
        zero = np.clip(np.rint(-low * ratio / step), 0, hi)
        code = np.clip(np.rint(grouped / step) + zero, 0, hi)
        error = np.square((code - zero) * step - grouped).sum(axis=2, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        codes = np.where(better, code.astype(np.uint8), codes)
        scales = np.where(better, scale, scales)
        zeros = np.where(better, zero.astype(np.uint8), zeros)
    shape = fmt.scale_shape(values.shape)
    flat = codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]]
    return QuantizedTensor(
        codes=np.ascontiguousarray(flat).reshape(values.shape),
        scales=scales.reshape(shape),
        format=fmt,
        zero_points=zeros.reshape(shape),
    )


def _as_rows(values: np.ndarray, fmt: Format) -> tuple[np.ndarray, int]:
    """`values` as (rows, K) with one scale per `group` consecutive elements of a row."""
    if fmt.granularity == "tensor":
        return values.reshape(1, -1), values.size
    k = values.shape[-1]
    return values.reshape(-1, k), min(fmt.group_size, k) if fmt.granularity == "group" else k


def _padded_groups(rows: np.ndarray, group: int) -> np.ndarray:
    """`rows` as (rows, groups, group); a short last group is filled with zeros.

    Zero lies in the range of every group and is exactly a code, so it changes neither the range
    nor the error.
    """
    pad = -rows.shape[1] % group
    return np.pad(rows, ((0, 0), (0, pad))).reshape(rows.shape[0], -1, group)


def _group_extremes(rows: np.ndarray, group: int) -> np.ndarray:
    """The signed element of largest magnitude of each group, (rows, groups) float32."""
    starts = np.arange(0, rows.shape[1], group)
    high = np.maximum.reduceat(rows, starts, axis=1)
    low = np.minimum.reduceat(rows, starts, axis=1)
    return np.where(high >= -low, high, low)


def _ratios(bits: int) -> np.ndarray:
    grid = _RATIOS.get(bits, _RATIOS_WIDE if bits >= 6 else _RATIOS_DEFAULT)
    return grid.astype(np.float32)
