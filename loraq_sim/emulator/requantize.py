"""Requantize an accumulator: shift right, round, saturate to the output width (SRS).

The definition is that of AMD AI Engines (UG1583, aie_api), checked against silicon by xdna-emu:
rounding uses the whole accumulator, and the range test sees the exact rounded value.
"""

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError
from loraq_sim.rounding import Saturation, parse_rounding, parse_saturation

__all__ = ["SHIFT_RANGE", "output_limits", "srs"]

# UG1583: the shift register holds -4 to 59; a negative shift is a left shift.
SHIFT_RANGE = (-4, 59)


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
        One of the ten modes of `loraq_sim.rounding.Rounding`.
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
    shift = _checked_int("shift", shift, *SHIFT_RANGE)
    values = _checked_accumulator(acc)
    clamp = saturation != Saturation.NONE
    mask = np.int64(2**out_bits - 1)
    sign = np.int64(2 ** (out_bits - 1) if signed else 0)
    out = np.empty(values.size, dtype=_output_dtype(out_bits, signed))
    flat = np.ascontiguousarray(values).reshape(-1)
    finish = (clamp, np.int64(lo), np.int64(hi), mask, sign, out)
    if shift < 0:
        _shift_left(flat, np.int64(-shift), *finish)
    else:
        constants = (np.int64(c) for c in rounding_constants(rounding.value, shift))
        _shift_right_round(flat, np.int64(shift), *constants, *finish)
    return out.reshape(values.shape)


def output_limits(
    out_bits: int, *, signed: bool = True, saturation: str = "saturate"
) -> tuple[int, int]:
    """Return the (lowest, highest) output of an SRS; InputError if an argument is out of range."""
    mode = parse_saturation(saturation)
    out_bits = _checked_int("out_bits", out_bits, 2, 32)
    if not signed:
        return 0, 2**out_bits - 1
    high = 2 ** (out_bits - 1) - 1
    return (-high if mode is Saturation.SYMMETRIC else -high - 1), high


def _checked_int(name: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not low <= number <= high:
        raise InputError(f"{name} must be an integer from {low} to {high}, got {value!r}")
    return number


def _checked_accumulator(acc: ArrayLike) -> NDArray[np.int32] | NDArray[np.int64]:
    values = np.asarray(acc)
    if values.dtype.kind not in "iu":
        raise InputError(f"acc must hold integers, got dtype {values.dtype}")
    if values.dtype == np.uint64 and values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise InputError(f"acc holds {int(values.max())}, which does not fit in int64")
    return values if values.dtype in (np.int32, np.int64) else values.astype(np.int64)


def _output_dtype(out_bits: int, signed: bool) -> np.dtype:
    width = 8 if out_bits <= 8 else 16 if out_bits <= 16 else 32
    return np.dtype(f"{'int' if signed else 'uint'}{width}")
