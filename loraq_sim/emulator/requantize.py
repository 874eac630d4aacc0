"""Narrow an accumulator to an output (SRS) and widen a vector into an accumulator (UPS).

The definitions are those of AMD AI Engines (UG1583, aie_api); SRS was checked against silicon by
xdna-emu: rounding uses the whole accumulator, and the range test sees the exact rounded value.
Requantization by a multiplier or a float scale is in `loraq_sim.emulator.multiplier` and can be
imported from here as well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.multiplier import (
    checked_int,
    checked_integers,
    float_requantize,
    gemmlowp_requantize,
    output_dtype,
    output_limits,
    quantize_multiplier,
    single_rounding_requantize,
)
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Saturation, parse_rounding

__all__ = [
    "CLAMP_ORDERS",
    "SHIFT_RANGE",
    "UPSHIFT_RANGE",
    "SrsReport",
    "float_requantize",
    "gemmlowp_requantize",
    "output_limits",
    "quantize_multiplier",
    "single_rounding_requantize",
    "srs",
    "srs_report",
    "ups",
]

# UG1583: the shift register holds -4 to 59; a negative shift is a left shift.
SHIFT_RANGE = (-4, 59)
# UG1583: an upshift is 0 to 63 bits.
UPSHIFT_RANGE = (0, 63)
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
    from loraq_sim.kernels.shift_round import _shift_left, _shift_right_round, rounding_constants

    rounding = parse_rounding(rounding)
    lo, hi = output_limits(out_bits, signed=signed, saturation=saturation)
    shift = checked_int("shift", shift, *SHIFT_RANGE)
    values = checked_integers("acc", acc)
    clamp = saturation != Saturation.NONE
    mask = np.int64(2**out_bits - 1)
    sign = np.int64(2 ** (out_bits - 1) if signed else 0)
    out = np.empty(values.size, dtype=output_dtype(out_bits, signed))
    flat = np.ascontiguousarray(values).reshape(-1)
    finish = (clamp, np.int64(lo), np.int64(hi), mask, sign, out)
    if shift < 0:
        _shift_left(flat, np.int64(-shift), *finish)
    else:
        constants = (np.int64(c) for c in rounding_constants(rounding.value, shift))
        _shift_right_round(flat, np.int64(shift), *constants, *finish)
    return out.reshape(values.shape)


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
    from loraq_sim.kernels.shift_round import _count_outside, rounding_constants

    options = {"out_bits": out_bits, "signed": signed}
    out = srs(acc, shift, rounding=rounding, saturation=saturation, **options)
    lo, hi = output_limits(saturation=saturation, **options)
    flat = np.ascontiguousarray(checked_integers("acc", acc)).reshape(-1)
    if shift < 0:
        # x << n lies within [lo, hi] exactly where x lies within these.
        lo, hi, shift = -(-lo >> -shift), hi >> -shift, 0
    constants = (np.int64(c) for c in rounding_constants(parse_rounding(rounding).value, shift))
    outside = _count_outside(flat, np.int64(shift), *constants, np.int64(lo), np.int64(hi))
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
    from loraq_sim.kernels.shift_round import _shift_up

    shift = checked_int("shift", shift, *UPSHIFT_RANGE)
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
    out = np.empty(values.size, dtype=np.int32 if acc_bits <= 32 else np.int64)
    flat = np.ascontiguousarray(values).reshape(-1)
    # Bits above the accumulator's are dropped by moving them out of int64 and back.
    _shift_up(flat, np.int64(shift), bool(saturate), *limits, np.int64(64 - acc_bits), out)
    return out.reshape(values.shape)
