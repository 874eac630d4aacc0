"""Real tensors to stored codes: the scale of each group, then the code of each element.

`quantize` is the one door: it checks the input and chooses by format. Groups run along the last
axis; ``amax`` is the largest magnitude of a group. Scale rules of the symmetric integers:

- ``absmax``: amax / hi; nothing is clipped (except by the rounding of the scale itself);
- ``signed_absmax``: the scale has a sign, so that the extreme value lands on the code lo = -hi - 1
  and all 2**b codes serve: -extreme / 2**(b - 1); a value of the other sign and nearly its size is
  clipped to hi;
- ``mse``: the best of amax / hi * ratio over a fixed grid of ratios, by squared error;
- ``signed_mse``: as ``mse``, but scales may be negative, so that the extreme value may land on the
  code lo = -hi - 1 and all 2**b codes serve.

Asymmetric integers: `loraq_sim.quantizers.around_zero`. Scales are rounded to their stored format
before the codes are computed; those in e4m3 in units of the scale of the tensor, with which its
largest group gets the largest e4m3 value.

Block formats are MX (OCP), NVFP4 (NVIDIA) and block floating point (AMD AIE2P). The shared scale of
an MX block is a power of two, X = 2**e. With ``emax`` the exponent of the largest power of two of
the element:

- ``ocp``: e = floor(log2 amax) - emax (OCP Microscaling Formats v1.0, section 6.3); what then lies
  beyond the element's largest value saturates;
- ``amd``: the same, plus one where amax >= 1.75 * 2**floor(log2 amax), which avoids most of the
  saturation (the rule of the LoRaQ authors' kernels);
- ``absmax``: the smallest e for which nothing saturates;
- ``mse``: the best of the exponents one below to one above ``ocp``, by squared error.

NVFP4: the tensor's scale is amax(tensor) / (448 * 6), a block's is e4m3(amax / 6 / tensor scale)
(``absmax``; ``mse`` also tries smaller ones). Elements round to nearest, ties to even.

What enters a GEMM may be rounded in one of the ten modes of shift-round-saturate hardware
(`quantize_rounded`): the scale is the same, the code is x / scale, rounded as the mode says.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError, named_options, unknown_name
from loraq_sim.formats import Format, Rounding, parse_format, parse_rounding
from loraq_sim.layers import as_array, is_floating
from loraq_sim.quantizers.around_zero import checked_zeros, quantize_around_zero
from loraq_sim.quantizers.tensor import (
    GroupEnds,
    QuantizedTensor,
    all_finite,
    as_rows,
    clip_ratios,
    ends_of_groups,
    float_dtype,
    group_ends,
    padded_groups,
    round_scales,
    scale_of_tensor,
    scale_unit,
    spread,
    stored_scales,
    unit_of_tensor,
)

__all__ = [
    *("SCALE_RULES", "quantize", "quantize_near", "quantize_rounded", "round_values"),
]

INTEGER_RULES = ("absmax", "mse", "signed_absmax", "signed_mse")
BLOCK_RULES = ("ocp", "amd", "absmax", "mse")
SCALE_RULES = tuple(dict.fromkeys((*INTEGER_RULES, *BLOCK_RULES)))

# Neighbors of a scale that is already good.
_NEAR = np.array([1.0, 0.985, 1.015, 0.97, 1.03], dtype=np.float32)

_NVFP4_RATIOS = np.linspace(1.0, 0.7, 13, dtype=np.float32)
_AMD_LIMIT = np.float32(1.75)


@named_options
def quantize(
    x: np.ndarray,
    fmt: "str | Format",
    *,
    rule: str | None = None,
    zero: ArrayLike | None = None,
) -> QuantizedTensor:
    """Quantize `x` to `fmt`, groups along the last axis.

    Parameters
    ----------
    x : ndarray or torch tensor of shape (..., K), floating
        Finite values. Not modified; computed in float32.
    fmt : str or Format
        For example ``"int4/g64"`` or ``"mxfp4"``; see `loraq_sim.formats`.
    rule : str, optional
        Scale rule: ``absmax`` (default), ``signed_absmax``, ``mse`` or ``signed_mse`` for integers;
        ``ocp`` (default), ``amd``, ``absmax`` or ``mse`` for block formats. Without effect on plain
        floats, which round to nearest, ties to even, and saturate at the largest finite value.
    zero : integer or array of `Format.scale_shape`, optional
        Zero points of a ``uintN`` format, from calibration; by default each group has its own.

    Raises
    ------
    InputError
        If `x` is not a finite floating array, or the format, rule or zero points do not fit.
    """
    fmt = parse_format(fmt)
    if rule is not None and rule not in SCALE_RULES:
        raise InputError(unknown_name("scale rule", rule, SCALE_RULES))
    values = _checked(x)
    ends = ends_of_groups(values, fmt)
    if not (all_finite(values) if ends is None else ends.are_finite):
        raise _not_finite(values)
    zeros = None if zero is None else checked_zeros(zero, fmt, values.shape)
    return _quantized(values, fmt, rule, zeros, ends)


def _quantized(
    values: NDArray[np.float32],
    fmt: Format,
    rule: str | None,
    zeros: NDArray[np.integer] | None = None,
    ends: GroupEnds | None = None,
) -> QuantizedTensor:
    """Quantize finite `values` (..., K), C-contiguous; `zeros` are checked, `ends` as they are."""
    if fmt.element.is_plain_float:
        return _cast(values, fmt)
    if fmt.granularity == "block":
        return _quantize_blocks(values, fmt, rule, zeros)
    is_block = fmt.element.block is not None
    rules = BLOCK_RULES if is_block else INTEGER_RULES
    if rule is None:
        rule = _default_block_rule(fmt) if is_block else "absmax"
    elif rule not in rules:
        raise InputError(f"{fmt}: the scale rule must be one of {', '.join(rules)}, got {rule!r}")
    if fmt.has_zero_point:
        return quantize_around_zero(values, fmt, rule, zeros, ends)
    return (_quantize_block if is_block else _quantize_symmetric)(values, fmt, rule, ends)


def _quantize_blocks(
    values: np.ndarray, fmt: Format, rule: str | None, zeros: NDArray[np.integer] | None
) -> QuantizedTensor:
    """Quantize finite float32 `values` (R, K) with one scale per block of N x N."""
    if values.ndim != 2:
        raise InputError(
            f"{fmt} has blocks of rows and columns; quantize a matrix with it, got an array of "
            f"shape {values.shape}"
        )
    (n_rows, n_columns), (height, width) = values.shape, map(fmt.group_width, values.shape)
    # Zeros change neither the range of a block nor its error.
    padded = np.pad(values, ((0, -n_rows % height), (0, -n_columns % width)))
    high, wide = len(padded) // height, padded.shape[1] // width
    blocks = padded.reshape(high, height, wide, width).swapaxes(1, 2).reshape(high * wide, -1)
    given = None if zeros is None else zeros.reshape(-1, 1)
    in_rows = replace(fmt, granularity="row", group_size=None)
    one_each = quantize(blocks, in_rows, rule=rule, zero=given)
    codes = one_each.codes.reshape(high, wide, height, width).swapaxes(1, 2)
    codes = codes.reshape(padded.shape)[:n_rows, :n_columns]
    found = one_each.zero_points
    return replace(
        one_each,
        format=fmt,
        codes=np.ascontiguousarray(codes),
        scales=one_each.group_scales.reshape(high, wide),
        zero_points=None if found is None else found.reshape(high, wide),
    )


def _checked(x: np.ndarray) -> np.ndarray:
    try:
        values = as_array(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"quantize needs an array of floats, got {type(x).__name__}: {error}"
        ) from None
    if values.ndim == 0 or values.size == 0 or not is_floating(values.dtype):
        raise InputError(
            "quantize needs a non-empty floating array of at least one axis, got "
            f"{values.dtype} of shape {values.shape}"
        )
    return np.ascontiguousarray(values, dtype=np.float32)


def _not_finite(values: NDArray[np.float32]) -> InputError:
    finite = np.isfinite(values)
    where = tuple(int(i) for i in np.argwhere(~finite)[0])
    return InputError(
        f"cannot quantize {values.size - int(finite.sum())} non-finite values; "
        f"the first is {values[where]} at {where}"
    )


def _cast(values: np.ndarray, fmt: Format) -> QuantizedTensor:
    dtype = float_dtype(fmt)
    if fmt.element.bits == 16:
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(dtype).max)
        values = np.clip(values, -largest, largest)
    return QuantizedTensor(codes=values.astype(dtype), scales=None, format=fmt)


def quantize_rounded(
    x: NDArray[np.float32],
    fmt: "str | Format",
    rounding: str = "conv_even",
    rule: str | None = None,
    ends: GroupEnds | None = None,
) -> QuantizedTensor:
    """Quantize finite rows as a data path does; integer codes are rounded in the mode.

    Parameters
    ----------
    x : ndarray of shape (M, K), float32, finite
    fmt : str or Format
        Float elements are rounded to nearest even whatever the mode.
    rounding : str
        One of `loraq_sim.formats.Rounding`.
    rule : str, optional
        Scale rule, as for `quantize`: ``absmax`` or ``signed_absmax`` where a machine is meant.
    ends : GroupEnds, optional
        Those of `x` in groups of `fmt`, where they are known.
    """
    mode, fmt = parse_rounding(rounding), parse_format(fmt)
    stored = _quantized(np.ascontiguousarray(x, np.float32), fmt, rule, ends=ends)
    if mode is Rounding.CONV_EVEN or not fmt.element.is_integer:
        return stored
    per_element = spread(stored.group_scales, fmt, x.shape)
    # The quotient is rounded to float32 first, as `quantize` does; a zero scale marks zeros.
    steps = np.asarray(x, np.float32) / np.where(per_element == 0, np.float32(1), per_element)
    codes = round_values(steps, mode)
    if stored.zero_points is not None:
        codes = codes + spread(stored.zero_points, fmt, x.shape)
    codes = np.clip(codes, fmt.element.lo, fmt.element.hi)
    return replace(stored, codes=codes.astype(stored.codes.dtype))


def round_values(values: NDArray[np.floating], mode: "str | Rounding") -> NDArray[np.float64]:
    """Whole numbers of float values of magnitude below 2**30, rounded in one of the ten modes."""
    # Half a step is added in float64, where the sum of a float32 and 0.5 is exact.
    return _ROUND[parse_rounding(mode)](np.asarray(values, np.float64))


def _away(x: NDArray[np.float64], round_size: Callable) -> NDArray[np.float64]:
    """`round_size` of the magnitudes, with the signs of `x`."""
    return np.copysign(round_size(np.abs(x)), x)


def _ties_to_odd(x: NDArray[np.float64]) -> NDArray[np.float64]:
    down = np.floor(x)
    return np.where(x - down == 0.5, down + (down % 2 == 0), np.rint(x))


_ROUND: dict[Rounding, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    Rounding.FLOOR: np.floor,
    Rounding.CEIL: np.ceil,
    Rounding.SYMMETRIC_FLOOR: np.trunc,
    Rounding.SYMMETRIC_CEIL: lambda x: _away(x, np.ceil),
    Rounding.NEGATIVE_INF: lambda x: np.ceil(x - 0.5),
    Rounding.POSITIVE_INF: lambda x: np.floor(x + 0.5),
    Rounding.SYMMETRIC_ZERO: lambda x: _away(x, lambda size: np.ceil(size - 0.5)),
    Rounding.SYMMETRIC_INF: lambda x: _away(x, lambda size: np.floor(size + 0.5)),
    Rounding.CONV_EVEN: np.rint,
    Rounding.CONV_ODD: _ties_to_odd,
}


def quantize_near(
    values: np.ndarray, fmt: Format, rule: str, scales: np.ndarray
) -> QuantizedTensor:
    """As `quantize` to integers with a searching rule, trying the neighborhood of `scales` as well.

    Parameters
    ----------
    values : ndarray of shape (..., K), float32, finite
    fmt : Format
        ``intN`` with scales other than e8m0.
    rule : str
        ``mse`` or ``signed_mse``.
    scales : ndarray of shape `fmt.scale_shape(values.shape)`, float32
        Scales to start from, of either sign, not rounded; 0 where there is none.
    """
    return _quantize_symmetric(values, fmt, rule, near=scales)


def _quantize_symmetric(
    values: np.ndarray,
    fmt: Format,
    rule: str,
    ends: GroupEnds | None = None,
    near: np.ndarray | None = None,
) -> QuantizedTensor:
    element = fmt.element
    if rule.startswith("signed") and fmt.scale_format.name == "e8m0":
        raise InputError(
            f"{fmt}: e8m0 scales have no sign; use the rule {rule.removeprefix('signed_')!r}"
        )
    rows, group = as_rows(values, fmt)
    extreme = (ends or group_ends(rows, group)).extremes
    steps = np.abs(extreme) / np.float32(element.hi)
    unit = unit_of_tensor(float(np.abs(extreme).max()), fmt)
    if rule == "absmax":
        candidates = stored_scales(steps, fmt, unit)[:, :, None]
    elif rule == "signed_absmax":
        sizes = stored_scales(np.abs(extreme) / np.float32(-element.lo), fmt, unit)
        candidates = (sizes * -np.sign(extreme))[:, :, None]
    else:
        ratios = clip_ratios(element.bits)
        candidates = stored_scales(steps[:, :, None] * ratios, fmt, unit)
        if rule == "signed_mse":
            flipped = np.abs(extreme) / np.float32(-element.lo)
            mirrored = stored_scales(flipped[:, :, None] * ratios, fmt, unit)
            mirrored *= -np.sign(extreme)[:, :, None]
            candidates = np.concatenate([candidates, mirrored], axis=2)
    if near is not None:
        near = near.reshape(steps.shape)[:, :, None]
        around = stored_scales(np.abs(near) * _NEAR, fmt, unit) * np.sign(near)
        # Where there is none the first cold candidate stands in: zero would end the search.
        around = np.where(around == 0, candidates[:, :, :1], around)
        candidates = np.concatenate([candidates, around], axis=2)
    scales = np.ascontiguousarray(candidates[:, :, 0])
    if candidates.shape[2] > 1:
        from loraq_sim.kernels.quantize import best_scales

        best_scales(rows, candidates, group, np.float32(element.lo), np.float32(element.hi), scales)
    # The best scale of tiny values may be zero in its format: all codes are zero then.
    searched = candidates.shape[2] > 1
    steps = np.where(scales == 0, np.float32(np.inf), scales) if searched else scales
    codes = _rounded(rows, steps, group, fmt)
    return QuantizedTensor(
        codes=codes.reshape(values.shape),
        scales=scales.reshape(fmt.scale_shape(values.shape)),
        format=fmt,
        tensor_scale=unit,
    )


def _default_block_rule(fmt: Format) -> str:
    """``ocp`` for power-of-two scales, ``absmax`` for NVFP4."""
    return "absmax" if fmt.has_tensor_scale else "ocp"


def _quantize_block(
    values: np.ndarray, fmt: Format, rule: str, ends: GroupEnds | None = None
) -> QuantizedTensor:
    """Quantize finite float32 `values` (..., K) to a block format."""
    rows, group = as_rows(values, fmt)
    amax = (ends or group_ends(rows, group)).amax
    tensor_scale = None
    if fmt.has_tensor_scale:
        if rule not in ("absmax", "mse"):
            raise InputError(f"{fmt}: the rule {rule!r} is for power-of-two scales; use 'absmax'")
        tensor_scale = scale_of_tensor(float(amax.max()), float(_largest(fmt)), fmt.scale_format)
        candidates = _e4m3_candidates(amax, fmt, rule, tensor_scale)
    else:
        candidates = _power_candidates(amax, fmt, rule)
    candidates = (candidates * scale_unit(fmt, tensor_scale)).astype(np.float32)
    if candidates.shape[2] == 1:
        scales = np.ascontiguousarray(candidates[:, :, 0])
        codes = _rounded(rows, scales, group, fmt)
    else:
        codes, scales = _best(rows, group, candidates, fmt)
    return QuantizedTensor(
        codes=codes.reshape(values.shape),
        scales=scales.reshape(fmt.scale_shape(values.shape)),
        format=fmt,
        tensor_scale=tensor_scale,
    )


def _code_dtype(fmt: Format) -> np.dtype:
    if fmt.element.is_integer:
        return np.dtype(np.int16 if fmt.element.bits == 16 else np.int8)
    return float_dtype(fmt)


def _rounded(rows: np.ndarray, scales: np.ndarray, group: int, fmt: Format) -> np.ndarray:
    """Codes (rows, K) under known scales (rows, groups): nearest, ties to even, saturated."""
    from loraq_sim.kernels.float_passes import encode_groups, round_groups

    codes, element = np.empty(rows.shape, _code_dtype(fmt)), fmt.element
    if element.is_integer:
        ends = np.float32(element.lo), np.float32(element.hi)
        round_groups(rows, scales, group, *ends, codes)
        return codes
    import ml_dtypes

    info = ml_dtypes.finfo(codes.dtype)
    layout = tuple(np.int32(x) for x in (info.nmant, 1 - info.minexp, element.bits))
    encode_groups(rows, scales, group, _largest(fmt), layout, codes.view(np.uint8))
    return codes


def _largest(fmt: Format) -> np.float32:
    """Largest magnitude of an element under a stored scale of 1."""
    if fmt.element.is_integer:
        return np.float32(fmt.element.hi * 2.0**-fmt.element.fraction_bits)
    import ml_dtypes

    return np.float32(ml_dtypes.finfo(float_dtype(fmt)).max)


def _power_candidates(amax: np.ndarray, fmt: Format, rule: str) -> np.ndarray:
    """Stored scales 2**e to try, (rows, groups, C); 0 for an all-zero block."""
    # amax = mantissa * 2**exponent with mantissa in [0.5, 1): floor(log2 amax) = exponent - 1.
    mantissa, exponent = np.frexp(amax)
    e = exponent - 1 - fmt.element.emax
    if rule == "amd":
        e = e + (2 * mantissa >= _AMD_LIMIT)
    elif rule == "absmax":
        fits = np.ldexp(amax.astype(np.float64), -e) <= _largest(fmt)
        e = e + ~fits
    steps = np.array([0, -1, 1] if rule == "mse" else [0], dtype=np.int32)
    # From 2**(128 - emax) on, the largest elements would not be finite in float32.
    powers = np.ldexp(1.0, np.minimum(e[..., None] + steps, 127 - fmt.element.emax))
    return round_scales(np.where(amax[..., None] == 0, 0.0, powers), fmt.scale_format)


def _e4m3_candidates(
    amax: np.ndarray, fmt: Format, rule: str, tensor_scale: np.float32
) -> np.ndarray:
    exact = amax.astype(np.float64) / float(_largest(fmt)) / float(tensor_scale)
    ratios = _NVFP4_RATIOS if rule == "mse" else np.ones(1, dtype=np.float32)
    return round_scales(exact[..., None] * ratios, fmt.scale_format)


def _best(
    rows: np.ndarray, group: int, candidates: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, K) and scales (rows, groups) of least squared error."""
    grouped = padded_groups(rows, group)
    best_error = np.full(candidates.shape[:2], np.inf, dtype=np.float64)
    codes = np.zeros(grouped.shape, dtype=np.float32)
    scales = candidates[:, :, 0].copy()
    for c in range(candidates.shape[2]):
        scale = candidates[:, :, c]
        step = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        rounded = _round(grouped / step, fmt)
        error = np.square(rounded.astype(np.float64) * step - grouped).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        codes = np.where(better[:, :, None], rounded, codes)
        scales = np.where(better, scale, scales)
    flat = codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]]
    return flat.astype(_code_dtype(fmt)), scales


def _round(scaled: np.ndarray, fmt: Format) -> np.ndarray:
    """Nearest element values (codes, for fixed point), ties to even, saturated, as float32."""
    if fmt.element.is_integer:
        return np.clip(np.rint(scaled), fmt.element.lo, fmt.element.hi).astype(np.float32)
    largest = _largest(fmt)
    return np.clip(scaled, -largest, largest).astype(float_dtype(fmt)).astype(np.float32)
