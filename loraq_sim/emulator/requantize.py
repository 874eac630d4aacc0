"""Narrow an accumulator to an output, and widen a vector into an accumulator (UPS).

Four ways to narrow, each ending in a clamp to the output's range; they differ in how the scale is
held and where rounding happens, which decides last bits:

    srs              a right shift, ten rounding modes, three saturations
    gemmlowp         scale = multiplier * 2**(exponent - 31); two roundings: the product to 32 bits
                     (ties toward plus infinity), then the power of two (ties away from zero)
    single rounding  scale = multiplier * 2**-shift; one rounding, ties toward plus infinity
    float            scale is a float32; accumulator and product round to float32 (ties to even),
                     then to an integer, ties to even

Shift-round-saturate and upshift are those of AMD AI Engines (UG1583, aie_api); SRS was checked
against silicon by xdna-emu: rounding uses the whole accumulator, and the range test sees the exact
rounded value. The other three add a zero point before the clamp, and their scales may differ from
column to column (per output channel): arrays of shape (N,).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.bounds import (
    INT32,
    as_matrix,
    checked_integers,
    int32_values,
    narrowed,
    output_dtype,
    output_finish,
    output_limits,
    per_column,
    spread,
    within_int32,
)
from loraq_sim.emulator.mac_array import checked_int
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Saturation, parse_rounding

__all__ = [
    *(
        "CLAMP_ORDERS",
        "SHIFT_RANGE",
        "SrsReport",
        "output_dtype",
        "output_limits",
        "srs",
        "srs_report",
        "ups",
    ),
    *("float_requantize", "gemmlowp_requantize", "quantize_multiplier"),
    "single_rounding_requantize",
]

# UG1583: the shift register holds -4 to 59; a negative shift is a left shift.
SHIFT_RANGE = (-4, 59)
# UG1583: an upshift is 0 to 63 bits.
_UPSHIFT_RANGE = (0, 63)
CLAMP_ORDERS = ("after", "before")


@dataclass(frozen=True, kw_only=True)
class SrsReport:
    """Outputs of a shift-round-saturate and how many were out of range.

    `out` as `srs` returns it. `out_of_range_count` counts the rounded values outside the limits of
    the output: clamped, or cut to their low bits with saturation ``none``. The hardware's sticky
    overflow bit is set where it is not zero.
    """

    out: NDArray[np.integer]
    out_of_range_count: int


def srs(
    acc: ArrayLike,
    shift: int,
    *,
    out_bits: int = 8,
    signed: bool = True,
    rounding: str = "conv_even",
    saturation: str = "saturate",
) -> NDArray[np.integer]:
    """Shift right, round and saturate accumulators to a narrow integer.

    Parameters
    ----------
    acc : array of any shape, any integer dtype within int64
        Accumulator values. Not modified.
    shift : int
        Right shift in bits, -4 to 59; a negative shift multiplies by ``2**-shift``.
    out_bits : int
        Output width in bits, 2 to 32.
    signed : bool
        Whether the output is signed.
    rounding : str
        One of the ten modes of `loraq_sim.formats.Rounding`.
    saturation : {"saturate", "symmetric", "none"}
        Clamp to the output range, clamp without the most negative value, or keep the low bits.

    Returns
    -------
    out : ndarray of the shape of `acc`
        The smallest of int8, int16, int32 (or uint8, uint16, uint32) that holds `out_bits`.

    Raises
    ------
    InputError
        If `acc` is not integer, or `shift`, `out_bits` or a mode is outside its range.

    References
    ----------
    .. [1] AMD UG1583, AIE-ML kernel guide; Xilinx/aie_api ``aie::rounding_mode``.
    """
    from loraq_sim.kernels.shift_round import rounding_constants, shift_left, shift_right_round

    mode = parse_rounding(rounding).value
    lo, hi = output_limits(out_bits, signed=signed, saturation=saturation)
    shift = checked_int("shift", shift, *SHIFT_RANGE)
    values = checked_integers("acc", acc)
    clamp = saturation != Saturation.NONE
    mask = np.int64(2**out_bits - 1)
    sign = np.int64(2 ** (out_bits - 1) if signed else 0)
    wanted = output_dtype(out_bits, signed)
    # Bits are the same with and without a sign, and 8 and 32 of them compile for all widths.
    out = np.empty(values.size, np.int8 if wanted.itemsize == 1 else np.int32)
    flat = np.ascontiguousarray(values).reshape(-1)
    finish = (clamp, np.int64(lo), np.int64(hi), mask, sign, out)
    if shift < 0:
        shift_left(flat, np.int64(-shift), *finish)
    else:
        constants = (np.int64(c) for c in rounding_constants(mode, shift))
        shift_right_round(flat, np.int64(shift), *constants, *finish)
    same = out.itemsize == wanted.itemsize
    return (out.view(wanted) if same else out.astype(wanted)).reshape(values.shape)


def srs_report(
    acc: ArrayLike,
    shift: int,
    *,
    out_bits: int = 8,
    signed: bool = True,
    rounding: str = "conv_even",
    saturation: str = "saturate",
) -> SrsReport:
    """Shift, round and saturate as `srs` does, and count the values that were out of range."""
    from loraq_sim.kernels.shift_round import count_outside, rounding_constants

    out = srs(
        acc, shift, out_bits=out_bits, signed=signed, rounding=rounding, saturation=saturation
    )
    lo, hi = output_limits(out_bits, signed=signed, saturation=saturation)
    flat = np.ascontiguousarray(checked_integers("acc", acc)).reshape(-1)
    if shift < 0:
        # x << n lies within [lo, hi] exactly where x lies within these.
        lo, hi, shift = -(-lo >> -shift), hi >> -shift, 0
    constants = (np.int64(c) for c in rounding_constants(parse_rounding(rounding).value, shift))
    outside = count_outside(flat, np.int64(shift), *constants, np.int64(lo), np.int64(hi))
    return SrsReport(out=out, out_of_range_count=int(outside))


def ups(
    x: ArrayLike, shift: int, *, acc_bits: int = 32, saturate: bool = False, clamp: str = "after"
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Shift a vector left into accumulators: ``x * 2**shift``, wrapped or clamped to `acc_bits`.

    Parameters
    ----------
    x : array of any shape, any integer dtype within int64
        Vector elements; the dtype says whether they are signed. Not modified.
    shift : int
        Left shift in bits, 0 to 63. Nothing is rounded.
    acc_bits : int
        Width of the signed accumulator, 8 to 64 (32 or 64 on AIE-ML and AIE2P).
    saturate : bool
        False keeps the low `acc_bits` bits (two's complement); True clamps. The hardware's
        saturation register decides, and resets to False.
    clamp : {"after", "before"}
        Where `saturate` clamps. ``after``: the exact product, to [-2**(b-1), 2**(b-1) - 1], as the
        model of xdna-emu does. ``before``: the input, to those limits shifted right, as the
        pseudo-code of UG1583 does; a value beyond them then ends in zero bits. The two differ only
        for values out of range, which an 8-bit input reaches in 32 bits from a shift of 25 on.

    Returns
    -------
    acc : ndarray of the shape of `x`
        int32 for accumulators of up to 32 bits, int64 above.

    Raises
    ------
    InputError
        If `x` is not integer, or `shift`, `acc_bits` or `clamp` is outside its range.

    References
    ----------
    .. [1] AMD UG1583, AIE-ML kernel guide, upshift; hardware tests of the xdna-emu project.
    """
    from loraq_sim.kernels.shift_round import shift_up

    shift = checked_int("shift", shift, *_UPSHIFT_RANGE)
    acc_bits = checked_int("acc_bits", acc_bits, 8, 64)
    if clamp not in CLAMP_ORDERS:
        raise InputError(unknown_name("clamp", clamp, CLAMP_ORDERS))
    values = checked_integers("x", x)
    lowest, highest = -(2 ** (acc_bits - 1)), 2 ** (acc_bits - 1) - 1
    # The inputs that fit, exactly: lowest <= x * 2**shift <= highest.
    bottom, top = -(-lowest >> shift), highest >> shift
    if clamp == "before":
        lowest, highest = bottom << shift, top << shift
    limits = (np.int64(v) for v in (bottom, top, lowest, highest))
    flat = np.array(values, np.int64, order="C").reshape(-1)
    # Bits above the accumulator's are dropped by moving them out of int64 and back.
    shift_up(flat, np.int64(shift), bool(saturate), *limits, np.int64(64 - acc_bits))
    dtype = np.dtype("int32" if acc_bits <= 32 else "int64")
    return flat.astype(dtype, copy=False).reshape(values.shape)


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
    from loraq_sim.kernels.shift_round import gemmlowp

    values = int32_values(acc)
    n = values.shape[1]
    multipliers = per_column("multiplier", multiplier, n, INT32.min, INT32.max)
    exponents = per_column("exponent", exponent, n, -31, 30)
    left, right = np.maximum(exponents, 0), np.maximum(-exponents, 0)
    if left.any() and values.size:
        shifted = values.astype(np.int64) << left
        if shifted.min() < INT32.min or shifted.max() > INT32.max:
            worst = int(np.abs(shifted).max())
            raise InputError(
                f"acc * 2**exponent reaches {worst} in magnitude and must fit int32; "
                "use a smaller exponent with a larger multiplier"
            )
    limits = map(np.int64, output_finish(zero_point, out_bits, signed, clamp))
    arguments = (multipliers, left, right, *limits)
    return narrowed(gemmlowp, acc, values, arguments, output_dtype(out_bits, signed))


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
    acc : array of shape (..., N), integers within int64
        Not modified. Products of 64-bit accumulators are exact (96 bits).
    multiplier : int or array of shape (N,)
        0 to 2**31 - 1.
    shift : int or array of shape (N,)
        1 to 62; scale = multiplier * 2**-shift. TFLite's shift s is 31 - shift here.
    zero_point, out_bits, signed, clamp
        As for `gemmlowp_requantize`, and so are the result and its errors.

    References
    ----------
    .. [1] TensorFlow Lite, ``MultiplyByQuantizedMultiplier`` in kernels/internal/common.h, built
       with TFLITE_SINGLE_ROUNDING; google/ruy, apply_multiplier.cc.
    .. [2] TOSA specification, ``apply_scale_32`` without double rounding.
    """
    from loraq_sim.kernels.shift_round import single_rounding, single_rounding_wide

    values = as_matrix(checked_integers("acc", acc))
    n = values.shape[1]
    multipliers = per_column("multiplier", multiplier, n, 0, INT32.max)
    shifts = per_column("shift", shift, n, 1, 62)
    limits = map(np.int64, output_finish(zero_point, out_bits, signed, clamp))
    narrow = values.dtype == np.int32 or within_int32(values)
    run = single_rounding if narrow else single_rounding_wide
    arguments = (multipliers, shifts, *limits)
    return narrowed(run, acc, values, arguments, output_dtype(out_bits, signed))


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
        As for `gemmlowp_requantize`, and so are the result and its errors.

    References
    ----------
    .. [1] google/XNNPACK, fp32 ``lrintf`` and magic-bias requantization; ONNX ``QuantizeLinear``.
    """
    from loraq_sim.kernels.shift_round import float_scale

    values = as_matrix(checked_integers("acc", acc))
    scales = np.asarray(scale, dtype=np.float64)
    # Rounding to float32 must not make an infinity; float32 has none below this.
    if not (np.abs(scales) <= np.finfo(np.float32).max).all():
        raise InputError(f"scale must be finite in float32, got {scales.reshape(-1).tolist()[:4]}")
    scales = spread("scale", scales.astype(np.float32), values.shape[1])
    limits = map(np.float64, output_finish(zero_point, out_bits, signed, clamp))
    return narrowed(float_scale, acc, values, (scales, *limits), output_dtype(out_bits, signed))
