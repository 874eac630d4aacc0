"""The narrow integer a requantization writes: its limits, its dtype, and argument checks.

Requantize by a real scale: fixed-point multipliers (two kinds) and float32 scales.

All three turn an accumulator into ``clamp(round(acc * scale) + zero_point)`` and differ in how the
scale is held and where rounding happens, which decides last bits:

    gemmlowp         scale = multiplier * 2**(exponent - 31); two roundings: the product to 32 bits
                     (ties toward plus infinity), then the power of two (ties away from zero)
    single rounding  scale = multiplier * 2**-shift; one rounding, ties toward plus infinity
    float            scale is a float32; accumulator and product round to float32 (ties to even),
                     then to an integer, ties to even

Scales may differ from column to column (per output channel): arrays of shape (N,).
"""

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError
from loraq_sim.formats import Saturation, parse_saturation

__all__ = [
    "checked_int",
    "checked_integers",
    "float_requantize",
    "gemmlowp_requantize",
    "output_dtype",
    "output_limits",
    "quantize_multiplier",
    "single_rounding_requantize",
]


def output_limits(
    out_bits: int, *, signed: bool = True, saturation: str = "saturate"
) -> tuple[int, int]:
    """Return the (lowest, highest) output value; InputError if an argument is out of range.

    `out_bits` is 2 to 32. ``symmetric`` gives up the most negative value of a signed output.
    """
    mode = parse_saturation(saturation)
    out_bits = checked_int("out_bits", out_bits, 2, 32)
    if not signed:
        return 0, 2**out_bits - 1
    high = 2 ** (out_bits - 1) - 1
    return (-high if mode is Saturation.SYMMETRIC else -high - 1), high


def output_dtype(out_bits: int, signed: bool) -> np.dtype:
    """Return the smallest of int8, int16, int32 (or unsigned) that holds `out_bits`."""
    width = 8 if out_bits <= 8 else 16 if out_bits <= 16 else 32
    return np.dtype(f"{'int' if signed else 'uint'}{width}")


def checked_int(name: str, value: int, low: int, high: int) -> int:
    """Return `value` as a Python integer, or raise InputError with the value and the rule."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return number


def checked_integers(name: str, values: ArrayLike) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return integers as int32 or int64 without changing a value, or raise InputError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {int(array.max())}, which does not fit in int64")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


_INT32 = np.iinfo(np.int32)


def quantize_multiplier(scale: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return (multiplier, exponent) int32, the nearest ``multiplier * 2**(exponent - 31)``.

    `scale` is one float or an array of any shape, finite, at least 0 and below 2**30. A scale
    other than 0 gives a multiplier in [2**30, 2**31); one below 2**-32 gives (0, 0). For
    `single_rounding_requantize`, shift = 31 - exponent.

    Raises
    ------
    InputError
        If a scale is negative, not finite or too large.

    References
    ----------
    .. [1] TensorFlow Lite, ``QuantizeMultiplier`` in kernels/internal/quantization_util.cc.
    """
    values = np.asarray(scale, dtype=np.float64)
    bad = ~(np.isfinite(values) & (values >= 0) & (values < 2.0**30))
    if bad.any():
        raise InputError(
            f"scale must be finite, at least 0 and below 2**30, got {values[bad].flat[0]}"
        )
    fraction, exponent = np.frexp(values)
    # Half away from zero, as TfLiteRound; the fraction has 53 bits, so the sum is exact.
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    carried = multiplier == 2**31
    multiplier, exponent = np.where(carried, 2**30, multiplier), exponent + carried
    # Only a scale that rounds up to 2**30 itself; the nearest that fits, as TFLite does.
    multiplier = np.where(exponent > 30, 2**31 - 1, multiplier)
    exponent = np.minimum(exponent, 30)
    vanished = (exponent < -31) | (multiplier == 0)
    return (
        np.where(vanished, 0, multiplier).astype(np.int32),
        np.where(vanished, 0, exponent).astype(np.int32),
    )


def gemmlowp_requantize(
    acc: ArrayLike,
    multiplier: ArrayLike,
    exponent: ArrayLike,
    *,
    zero_point: int = 0,
    out_bits: int = 8,
    signed: bool = True,
    clamp: tuple[int, int] | None = None,
) -> NDArray[np.integer]:
    """Requantize by a fixed-point multiplier with the two roundings of gemmlowp and TFLite.

    With x = acc * 2**max(exponent, 0) and n = max(-exponent, 0)::

        high = (x * multiplier + nudge) / 2**31     C division (truncates); nudge is 2**30 where
                                                    the product is >= 0, else 1 - 2**30
        out  = clamp(RoundingDivideByPOT(high, n) + zero_point)

    The first step (SaturatingRoundingDoublingHighMul) sends ties toward plus infinity and gives
    2**31 - 1 for the one product that leaves int32; the second sends ties away from zero.

    Parameters
    ----------
    acc : array of shape (..., N), integers within int32
        Not modified.
    multiplier : int or array of shape (N,)
        Within int32; TFLite uses [2**30, 2**31).
    exponent : int or array of shape (N,)
        -31 to 30, so that scale = multiplier * 2**(exponent - 31); see `quantize_multiplier`.
    zero_point : int
        Added after the rounding; within the output range.
    out_bits, signed
        Width (2 to 32) and signedness of the output.
    clamp : (int, int), optional
        Narrower output limits, as a fused activation sets them.

    Returns
    -------
    out : ndarray of the shape of `acc`
        The smallest of int8, int16, int32 (or unsigned) that holds `out_bits`.

    Raises
    ------
    InputError
        If an argument is outside its range, shapes do not match, or acc * 2**exponent leaves
        int32, where the C++ is undefined.

    References
    ----------
    .. [1] google/gemmlowp, fixedpoint/fixedpoint.h.
    .. [2] TensorFlow Lite, ``MultiplyByQuantizedMultiplier`` in kernels/internal/common.h, built
       without TFLITE_SINGLE_ROUNDING.
    """
    from loraq_sim.kernels.shift_round import _gemmlowp

    values = _int32_values(acc)
    n = values.shape[1]
    multipliers = _per_column("multiplier", multiplier, n, _INT32.min, _INT32.max)
    exponents = _per_column("exponent", exponent, n, -31, 30)
    left, right = np.maximum(exponents, 0), np.maximum(-exponents, 0)
    if left.any() and values.size:
        shifted = values.astype(np.int64) << left
        if shifted.min() < _INT32.min or shifted.max() > _INT32.max:
            worst = int(np.abs(shifted).max())
            raise InputError(
                f"acc * 2**exponent reaches {worst} in magnitude and must fit int32; "
                "use a smaller exponent with a larger multiplier"
            )
    finish = _finish(zero_point, out_bits, signed, clamp)
    out = np.empty(values.shape, output_dtype(out_bits, signed))
    _gemmlowp(values, multipliers, left, right, *(np.int64(v) for v in finish), out)
    return out.reshape(np.shape(acc))


def single_rounding_requantize(
    acc: ArrayLike,
    multiplier: ArrayLike,
    shift: ArrayLike,
    *,
    zero_point: int = 0,
    out_bits: int = 8,
    signed: bool = True,
    clamp: tuple[int, int] | None = None,
) -> NDArray[np.integer]:
    """Requantize by a fixed-point multiplier with one rounding, ties toward plus infinity.

    ``out = clamp(int32((acc * multiplier + 2**(shift-1)) >> shift) + zero_point)``; the inner
    result is clamped to int32, which TFLite and TOSA require to be without effect.

    Parameters
    ----------
    acc : array of shape (..., N), integers within int32
        Not modified.
    multiplier : int or array of shape (N,)
        0 to 2**31 - 1.
    shift : int or array of shape (N,)
        1 to 62; scale = multiplier * 2**-shift. TFLite's shift s is 31 - shift here.
    zero_point, out_bits, signed, clamp
        As for `gemmlowp_requantize`.

    Returns
    -------
    out : ndarray of the shape of `acc`

    Raises
    ------
    InputError
        If an argument is outside its range or shapes do not match.

    References
    ----------
    .. [1] TensorFlow Lite, ``MultiplyByQuantizedMultiplier`` in kernels/internal/common.h, built
       with TFLITE_SINGLE_ROUNDING; google/ruy, apply_multiplier.cc.
    .. [2] TOSA specification, ``apply_scale_32`` without double rounding.
    """
    from loraq_sim.kernels.shift_round import _single_rounding

    values = _int32_values(acc)
    n = values.shape[1]
    multipliers = _per_column("multiplier", multiplier, n, 0, _INT32.max)
    shifts = _per_column("shift", shift, n, 1, 62)
    finish = _finish(zero_point, out_bits, signed, clamp)
    out = np.empty(values.shape, output_dtype(out_bits, signed))
    _single_rounding(values, multipliers, shifts, *(np.int64(v) for v in finish), out)
    return out.reshape(np.shape(acc))


def float_requantize(
    acc: ArrayLike,
    scale: ArrayLike,
    *,
    zero_point: int = 0,
    out_bits: int = 8,
    signed: bool = True,
    clamp: tuple[int, int] | None = None,
) -> NDArray[np.integer]:
    """Requantize by a float32 scale, rounding half to even.

    ``out = clamp(rint(float32(acc) * scale) + zero_point)``: accumulators beyond 2**24 round when
    they become float32, the product rounds to float32, and only then to an integer. Clamping the
    float product first, as some kernels do, gives the same values.

    Parameters
    ----------
    acc : array of shape (..., N), integers within int64
        Not modified.
    scale : float or array of shape (N,)
        Finite; rounded to float32 if it is not.
    zero_point, out_bits, signed, clamp
        As for `gemmlowp_requantize`.

    Returns
    -------
    out : ndarray of the shape of `acc`

    Raises
    ------
    InputError
        If an argument is outside its range or shapes do not match.

    References
    ----------
    .. [1] google/XNNPACK, fp32 ``lrintf`` and magic-bias requantization; ONNX ``QuantizeLinear``.
    """
    from loraq_sim.kernels.shift_round import _float_scale

    values = _as_matrix(checked_integers("acc", acc))
    scales = np.asarray(scale, dtype=np.float64)
    # Rounding to float32 must not make an infinity; float32 has none below this.
    if not (np.abs(scales) <= np.finfo(np.float32).max).all():
        raise InputError(f"scale must be finite in float32, got {scales.reshape(-1).tolist()[:4]}")
    scales = _spread("scale", scales.astype(np.float32), values.shape[1])
    finish = _finish(zero_point, out_bits, signed, clamp)
    out = np.empty(values.shape, output_dtype(out_bits, signed))
    _float_scale(values, scales, *(np.float64(v) for v in finish), out)
    return out.reshape(np.shape(acc))


def _finish(
    zero_point: int, out_bits: int, signed: bool, clamp: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Return (zero point, lowest, highest output), checked."""
    lo, hi = output_limits(out_bits, signed=signed)
    zero_point = checked_int("zero_point", zero_point, lo, hi)
    if clamp is None:
        return zero_point, lo, hi
    low = checked_int("clamp[0]", clamp[0], lo, hi)
    return zero_point, low, checked_int("clamp[1]", clamp[1], low, hi)


def _int32_values(acc: ArrayLike) -> NDArray[np.integer]:
    values = checked_integers("acc", acc)
    if values.size and (values.min() < _INT32.min or values.max() > _INT32.max):
        worst = max(int(values.max()), int(values.min()), key=abs)
        raise InputError(f"acc must fit int32, got {worst}; these multipliers are defined on int32")
    return _as_matrix(values)


def _as_matrix(values: NDArray[np.integer]) -> NDArray[np.integer]:
    n = values.shape[-1] if values.ndim else 1
    return np.ascontiguousarray(values).reshape(values.size // n if n else 0, n)


def _per_column(name: str, values: ArrayLike, n: int, low: int, high: int) -> NDArray[np.int64]:
    array = checked_integers(name, values).astype(np.int64)
    if array.size and (array.min() < low or array.max() > high):
        worst = int(array.min()) if array.min() < low else int(array.max())
        raise InputError(f"{name} must be from {low} to {high}, got {worst}")
    return _spread(name, array, n)


def _spread(name: str, array: NDArray, n: int) -> NDArray:
    if array.shape not in ((), (1,), (n,)):
        raise InputError(
            f"{name} has shape {array.shape}; give one value or one per column, ({n},)"
        )
    return np.ascontiguousarray(np.broadcast_to(array, (n,)))
