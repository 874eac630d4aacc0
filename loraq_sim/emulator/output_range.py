"""What accumulators and outputs of a requantizer may hold: limits, dtypes and checks of both."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.mac_array import checked_int
from loraq_sim.errors import InputError
from loraq_sim.formats import Saturation, parse_saturation

__all__ = [
    *("INT32", "as_matrix", "checked_integers", "int32_values", "narrowed", "output_dtype"),
    *("output_finish", "output_limits", "per_column", "spread", "within_int32"),
]

INT32 = np.iinfo(np.int32)


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


def checked_integers(name: str, values: ArrayLike) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return integers as int32 or int64 without changing a value, or raise InputError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {int(array.max())}, which does not fit in int64")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def output_finish(
    zero_point: int, out_bits: int, signed: bool, clamp: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Return (zero point, lowest, highest output), checked."""
    lo, hi = output_limits(out_bits, signed=signed)
    zero_point = checked_int("zero_point", zero_point, lo, hi)
    if clamp is None:
        return zero_point, lo, hi
    low = checked_int("clamp[0]", clamp[0], lo, hi)
    return zero_point, low, checked_int("clamp[1]", clamp[1], low, hi)


def within_int32(values: NDArray[np.integer]) -> bool:
    """Whether all values fit int32."""
    return not values.size or bool(values.min() >= INT32.min and values.max() <= INT32.max)


def int32_values(acc: ArrayLike) -> NDArray[np.integer]:
    """Accumulators as an (R, N) matrix, or InputError if one does not fit int32."""
    values = checked_integers("acc", acc)
    if not within_int32(values):
        worst = max(int(values.max()), int(values.min()), key=abs)
        raise InputError(f"acc must fit int32, got {worst}; these multipliers are defined on int32")
    return as_matrix(values)


def as_matrix(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """(..., N) as (R, N), contiguous."""
    n = values.shape[-1] if values.ndim else 1
    return np.ascontiguousarray(values).reshape(values.size // n if n else 0, n)


def narrowed(
    kernel: Callable[..., None],
    acc: ArrayLike,
    values: NDArray[np.integer],
    arguments: tuple[Any, ...],
    dtype: np.dtype,
) -> NDArray[np.integer]:
    """What a kernel makes of `values` (R, N), in the shape of the `acc` they are made of."""
    out = np.array(values, np.int64, order="C")
    kernel(out, *arguments)
    return out.astype(dtype).reshape(np.shape(acc))


def per_column(name: str, values: ArrayLike, n: int, low: int, high: int) -> NDArray[np.int64]:
    """One integer or (N,) of them as (N,) int64, each from `low` to `high`, or InputError."""
    array = checked_integers(name, values).astype(np.int64)
    if array.size and (array.min() < low or array.max() > high):
        worst = int(array.min()) if array.min() < low else int(array.max())
        raise InputError(f"{name} must be from {low} to {high}, got {worst}")
    return spread(name, array, n)


def spread(name: str, array: NDArray, n: int) -> NDArray:
    """One value or (N,) of them as (N,), or InputError with the shape."""
    if array.shape not in ((), (1,), (n,)):
        raise InputError(
            f"{name} has shape {array.shape}; give one value or one per column, ({n},)"
        )
    # A copy: a read-only view would compile its reader once more.
    return np.array(np.broadcast_to(array, (n,)), order="C")
