"""Zero points of an integer GEMM: the correction they need, and where it enters the array.

With codes u of the activations and v of the weights, and zero points z and z_w,

    sum (u - z) (v - z_w)  =  sum u v  +  c,    c = K z z_w - z sum v - z_w sum u

The array multiplies codes; c is one integer for each output. ``zero_point="initial"``: c is part of
the value that the (first, or wide) accumulator starts from, and obeys its overflow rule, as the
bias of a kernel does: what the exact c and `init` do not fit is clamped or wrapped before the first
product, and counts as one overflow at K index 0. ``zero_point="after"``: the array adds plain
products, and c is added behind it, exactly, in 64 bits; nothing there can overflow.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.errors import InputError, unknown_name

__all__ = [
    "ZERO_POINT_PLACES",
    "NO_ZEROS",
    "GivenZeros",
    "ZeroPoints",
    "checked_zero_points",
    "fitted",
]

ZERO_POINT_PLACES = ("initial", "after")


class GivenZeros(NamedTuple):
    """Zero points as a caller gave them, not checked: of `a`, of `w`, and where they enter."""

    a: ArrayLike | None = None
    w: ArrayLike | None = None
    place: str = "initial"


NO_ZEROS = GivenZeros()


@dataclass(frozen=True, kw_only=True, eq=False)
class ZeroPoints:
    """Zero points `a` (M,) of the rows of activations and `w` (N,) of the rows of weights, int64.

    ``after`` says that the correction is added behind the accumulators.
    """

    a: NDArray[np.int64]
    w: NDArray[np.int64]
    after: bool = False

    def correction(self, a: NDArray[np.integer], w: NDArray[np.integer]) -> NDArray[np.int64]:
        """c (M, N) of codes (M, K) and (N, K); its terms stay below 2**48 for any K below 2**16.

        A row of zero points that is zero needs no sums of the other operand.
        """
        c = np.zeros((a.shape[0], w.shape[0]), np.int64)
        if self.a.any():
            c -= self.a[:, None] * w.sum(axis=1, dtype=np.int64)
            c += self.a[:, None] * (a.shape[1] * self.w)
        if self.w.any():
            c -= a.sum(axis=1, dtype=np.int64)[:, None] * self.w
        return c

    def starts(
        self, init: NDArray[np.int64], a: NDArray[np.integer], a_range: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Extreme initial values (N,) for any codes within `a_range` in place of `a` (M, K).

        `init` (M, N) is that of these codes; zero points count as they are.
        """
        if not self.w.any():
            return init.min(axis=0), init.max(axis=0)
        fixed = init + a.sum(axis=1, dtype=np.int64)[:, None] * self.w
        ends = np.multiply.outer([-a.shape[1] * code for code in a_range], self.w)
        return fixed.min(axis=0) + ends.min(axis=0), fixed.max(axis=0) + ends.max(axis=0)


def checked_zero_points(
    given: GivenZeros, a: NDArray[np.integer], w: NDArray[np.integer]
) -> ZeroPoints | None:
    """The zero points of codes `a` (M, K) and `w` (N, K), in the dtypes the caller gave; or None.

    Raises
    ------
    InputError
        If a zero point is no integer of the range of its codes, is neither one nor one a row, or
        the place is unknown.
    """
    if given.place not in ZERO_POINT_PLACES:
        raise InputError(unknown_name("zero_point", str(given.place), ZERO_POINT_PLACES))
    if given.a is None and given.w is None:
        return None
    of_a, of_w = _of_rows("a", given.a, a), _of_rows("w", given.w, w)
    return ZeroPoints(a=of_a, w=of_w, after=given.place == "after")


def _of_rows(name: str, given: ArrayLike | None, codes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Zero points (rows,) int64 of a code matrix (rows, K)."""
    rows = codes.shape[0]
    if given is None:
        return np.zeros(rows, np.int64)
    values = np.asarray(given)
    if values.dtype.kind not in "iu":
        raise InputError(
            f"{name}_zero must hold integers, got dtype {values.dtype}; a zero point is a code of "
            f"{name}"
        )
    if values.shape not in ((), (1,), (rows,), (rows, 1)):
        raise InputError(
            f"{name}_zero has shape {values.shape}; give one zero point, or one for each of the "
            f"{rows} rows of {name}: shape ({rows},)"
        )
    low, high = _range(codes)
    if values.size:
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise InputError(
                f"{name}_zero holds values from {least} to {most}, outside the codes of {name} "
                f"({low}..{high}); a zero point is the code that stands for 0"
            )
    flat = values.reshape(-1).astype(np.int64)
    return np.ascontiguousarray(np.broadcast_to(flat, (rows,)) if flat.size == 1 else flat)


def _range(codes: NDArray[np.integer]) -> tuple[int, int]:
    """Lowest and highest code: of a narrow dtype its own, else of what the codes could be."""
    if codes.dtype.itemsize == 1 or codes.dtype == np.int16:
        limits = np.iinfo(codes.dtype)
        return int(limits.min), int(limits.max)
    low = int(codes.min()) if codes.size else 0
    high = int(codes.max()) if codes.size else 0
    return (0 if high > 127 else -128, 127 if low < 0 else 255)


def fitted(values: NDArray[np.int64], array: MacArray | TwoLevelArray) -> NDArray[np.int64]:
    """`values` under the overflow rule of an accumulator; a register of 64 bits takes all."""
    if array.overflow != "wrap":
        return np.clip(values, array.lo, array.hi)
    if array.acc_bits == 64:
        return values
    low = values & np.int64(2**array.acc_bits - 1)
    return np.where(low > array.hi, low - np.int64(2**array.acc_bits), low)
