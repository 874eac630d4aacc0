"""The narrow integer a requantization writes: its limits, its dtype, and argument checks."""

import operator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.errors import InputError
from loraq_sim.rounding import Saturation, parse_saturation

__all__ = ["checked_int", "checked_integers", "output_dtype", "output_limits"]


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
