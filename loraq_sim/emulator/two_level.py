"""Integer GEMM on a two-level array: narrow column sums, then a wide accumulator.

    for each tile t of column_k products, in order of K:
        partial[t] = column sums the tile from zero          (`emulate_gemm`, its own overflow rule)
        acc        = fit(acc + partial[t], acc_bits, overflow)

A tile is one pass through a systolic array; the wide accumulator is the memory behind it.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.errors import InputError

__all__ = ["TwoLevelReport", "emulate_two_level", "emulate_two_level_report"]


@dataclass(frozen=True, kw_only=True)
class TwoLevelReport:
    """Accumulators of one GEMM on a two-level array and what happened at both levels.

    Attributes
    ----------
    acc : ndarray of shape (M, N), int32 (acc_bits <= 32) or int64
    overflow_count : int
        Adds of a partial sum to the wide accumulator whose exact result left its range.
    outputs_affected : int
        Outputs with at least one of them.
    first_overflow_k : int or None
        First K index of the first tile whose add overflowed; None without overflow.
    safe_acc_bits : int
        Narrowest two's complement accumulator that holds every exact prefix of these partial sums,
        taken as the columns deliver them.
    guaranteed_acc_bits : int
        Narrowest one that holds every prefix for any activations of the given range.
    column_overflow_count, column_tree_overflow_count : int
        The counts of `GemmReport` inside the columns, added over tiles.
    partials_affected : int
        Partial sums, of the M * N * tiles there are, with at least one of these.
    safe_column_bits, guaranteed_column_bits : int
        The widths of `GemmReport`, the largest over tiles.
    """

    acc: NDArray[np.int32] | NDArray[np.int64]
    overflow_count: int
    outputs_affected: int
    first_overflow_k: int | None
    safe_acc_bits: int
    guaranteed_acc_bits: int
    column_overflow_count: int
    column_tree_overflow_count: int
    partials_affected: int
    safe_column_bits: int
    guaranteed_column_bits: int


def emulate_two_level(
    a: ArrayLike, w: ArrayLike, array: TwoLevelArray, *, init: ArrayLike | None = None
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return the accumulators of ``a @ w.T`` on a two-level array, bit for bit.

    Parameters
    ----------
    a, w
        As for `emulate_gemm`.
    array : TwoLevelArray
    init : array broadcastable to (M, N), any integer dtype, or None
        Initial value of the wide accumulator; must fit it.

    Returns
    -------
    acc : ndarray of shape (M, N)
        int32 for wide accumulators of up to 32 bits, int64 above.

    Raises
    ------
    InputError
        As `emulate_gemm`.
    """
    codes, weights, start = _checked(a, w, array, init)
    one_level = _same_in_one_level(array, codes, weights)
    if one_level is not None:
        return emulate_gemm(codes, weights, one_level, init=start)
    wide = _WideAccumulator(array, start)
    for tile in _tiles(codes.shape[1], array.column_k):
        wide.add(emulate_gemm(codes[:, tile], weights[:, tile], array.column), tile.start)
    return wide.value


def emulate_two_level_report(
    a: ArrayLike,
    w: ArrayLike,
    array: TwoLevelArray,
    *,
    init: ArrayLike | None = None,
    a_bits: int = 8,
) -> TwoLevelReport:
    """Return the accumulators of ``a @ w.T`` on a two-level array with the counts of both levels.

    `a_bits` is the width of the activation codes, 2 to 8: the range that the guaranteed widths
    cover, signed or unsigned as `emulate_gemm_report` decides. Other arguments and errors as for
    `emulate_two_level`.
    """
    codes, weights, start = _checked(a, w, array, init)
    wide = _WideAccumulator(array, start)
    # An empty tile checks a_bits, and says what a GEMM without products reports.
    reports = [emulate_gemm_report(codes[:, :0], weights[:, :0], array.column, a_bits=a_bits)]
    for tile in _tiles(codes.shape[1], array.column_k):
        report = emulate_gemm_report(codes[:, tile], weights[:, tile], array.column, a_bits=a_bits)
        wide.add(report.acc, tile.start)
        reports.append(report)
    low, high = _reach(codes, weights, array, a_bits)
    lows = start.min(axis=0, initial=0) if start.shape[0] == 0 else start.min(axis=0)
    highs = start.max(axis=0, initial=0) if start.shape[0] == 0 else start.max(axis=0)
    return TwoLevelReport(
        acc=wide.value,
        overflow_count=wide.overflow_count,
        outputs_affected=int(np.count_nonzero(wide.touched)),
        first_overflow_k=wide.first_overflow_k,
        safe_acc_bits=wide.safe_bits,
        guaranteed_acc_bits=signed_width(
            min((int(x) + int(y) for x, y in zip(lows, low, strict=True)), default=0),
            max((int(x) + int(y) for x, y in zip(highs, high, strict=True)), default=0),
        ),
        column_overflow_count=sum(report.overflow_count for report in reports),
        column_tree_overflow_count=sum(report.tree_overflow_count for report in reports),
        partials_affected=sum(report.outputs_affected for report in reports),
        safe_column_bits=max(report.safe_acc_bits for report in reports),
        guaranteed_column_bits=max(report.guaranteed_acc_bits for report in reports),
    )


def _same_in_one_level(
    array: TwoLevelArray, a: NDArray[np.integer], w: NDArray[np.integer]
) -> MacArray | None:
    """Return a MacArray with the same result for these operands, if one is known.

    A column that wraps, adding exact chunks, delivers the exact sum of its tile modulo 2**b: that
    is a tree of b bits that wraps, in front of the wide accumulator. A column that provably cannot
    overflow is an exact tree.
    """
    column = array.column
    if array.column_k > 64:
        return None
    one_level = MacArray(
        acc_bits=array.acc_bits, overflow=array.overflow, products_per_add=array.column_k
    )
    if _columns_fit(array, a, w):
        return one_level
    if column.overflow == "wrap" and column.tree_bits is None:
        return replace(one_level, tree_bits=column.acc_bits, tree_overflow="wrap")
    return None


def _columns_fit(array: TwoLevelArray, a: NDArray[np.integer], w: NDArray[np.integer]) -> bool:
    """Whether max|a| * ||w||_1 of every tile, which bounds any part of its sum, fits a column."""
    if a.size == 0 or w.size == 0 or a.dtype.kind not in "iu" or w.dtype.kind not in "iu":
        return False
    column = array.column
    narrowest = min(column.acc_bits, column.tree_bits or column.acc_bits)
    top = max(int(a.max()), -int(a.min()))
    # int16 holds the magnitude of -128 too; codes beyond it are refused by the GEMM.
    norms = np.add.reduceat(
        np.abs(w.astype(np.int16)), range(0, w.shape[1], array.column_k), axis=1, dtype=np.int64
    )
    return top * int(norms.max()) <= overflow_limits(narrowest, "saturate_symmetric")[1]


class _WideAccumulator:
    """The wide accumulators (M, N) of one GEMM, what they would hold exactly, and the counts."""

    def __init__(self, array: TwoLevelArray, start: NDArray[np.int64]) -> None:
        self.array = array
        self.held = np.array(start, dtype=np.int64, order="C")
        self.exact = self.held.copy()
        self.touched = np.zeros(start.shape, dtype=np.bool_)
        self.overflow_count = 0
        self.first_overflow_k: int | None = None
        ends = (start.min(), start.max()) if start.size else (0, 0)
        self._extremes = np.array(ends, dtype=np.int64)
        self._beyond = np.zeros(1, dtype=np.bool_)

    def add(self, partial: NDArray[np.integer], k: int) -> None:
        from loraq_sim.kernels.wide_add import _add_partials

        bits = self.array.acc_bits
        count = _add_partials(
            np.ascontiguousarray(partial).reshape(-1),
            self.array.overflow != "wrap",
            np.int64(self.array.lo),
            np.int64(self.array.hi),
            np.int64(-1 if bits == 64 else 2**bits - 1),
            np.int64(-(2**63) if bits == 64 else 2 ** (bits - 1)),
            self.held.reshape(-1),
            self.exact.reshape(-1),
            self.touched.reshape(-1),
            self._extremes,
            self._beyond,
        )
        self.overflow_count += int(count)
        if count and self.first_overflow_k is None:
            self.first_overflow_k = k

    @property
    def value(self) -> NDArray[np.int32] | NDArray[np.int64]:
        return self.held.astype(np.int32 if self.array.acc_bits <= 32 else np.int64)

    @property
    def safe_bits(self) -> int:
        # A sum beyond int64 needs one bit more: all partial sums together stay below 2**63.
        return 65 if self._beyond[0] else signed_width(*(int(x) for x in self._extremes))


def _checked(
    a: ArrayLike, w: ArrayLike, array: TwoLevelArray, init: ArrayLike | None
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.int64]]:
    """Return codes, weights and the initial values as int64 (M, N), all checked.

    A GEMM over none of K checks `init` against the wide accumulator; one over all of K would check
    the codes too, but cost as much as the emulation: the tiles do that.
    """
    codes, weights = np.asarray(a), np.asarray(w)
    for name, matrix in (("a", codes), ("w", weights)):
        if matrix.ndim != 2:
            raise InputError(f"{name} must be a matrix (rows, K), got shape {matrix.shape}")
    if codes.shape[1] != weights.shape[1]:
        raise InputError(
            f"a has shape {codes.shape} and w has shape {weights.shape}: both must be "
            f"(rows, K) with the same K, got K={codes.shape[1]} and K={weights.shape[1]}"
        )
    # Whether a is signed must be seen over all of K, not tile by tile.
    if codes.size and codes.dtype.kind in "iu" and codes.min() < 0 and codes.max() > 127:
        raise InputError(
            f"a holds codes from {codes.min()} to {codes.max()}; they must lie within "
            "-128..127 (signed) or 0..255 (unsigned)"
        )
    if codes.dtype.kind == "i" and codes.size and codes.min() >= 0 and codes.max() > 127:
        codes = codes.astype(np.uint8) if codes.max() <= 255 else codes
    empty = MacArray(acc_bits=array.acc_bits, overflow=array.overflow)
    start = emulate_gemm(codes[:, :0], weights[:, :0], empty, init=init)
    return codes, weights, start.astype(np.int64)


def _tiles(k: int, column_k: int) -> list[slice]:
    return [slice(start, min(start + column_k, k)) for start in range(0, k, column_k)]


def _reach(
    a: NDArray[np.integer], w: NDArray[np.integer], array: TwoLevelArray, a_bits: int
) -> tuple[list[int], list[int]]:
    """Return the lowest and highest sum of partial sums per column of W, for any activations.

    Each product takes its own extreme. A clamped sum stays between the exact sums of the negative
    and of the positive products, and within the limits; a sum that may wrap can be anything there.
    """
    a_low, a_high = overflow_limits(a_bits, "wrap") if a.dtype.kind == "i" else (0, 2**a_bits - 1)
    column = array.column
    lows, highs = [0] * len(w), [0] * len(w)
    for tile in _tiles(w.shape[1], array.column_k):
        positive = np.maximum(w[:, tile], 0).sum(axis=1, dtype=np.int64)
        negative = np.minimum(w[:, tile], 0).sum(axis=1, dtype=np.int64)
        for j, (up, down) in enumerate(zip(positive.tolist(), negative.tolist(), strict=True)):
            low, high = up * a_low + down * a_high, up * a_high + down * a_low
            fits = column.lo <= low and high <= column.hi
            wraps = column.overflow == "wrap" and not fits
            if column.tree_bits is not None and column.tree_rule == "wrap":
                tree_low, tree_high = overflow_limits(column.tree_bits, "wrap")
                wraps |= low < tree_low or high > tree_high
            lows[j] += column.lo if wraps else max(low, column.lo)
            highs[j] += column.hi if wraps else min(high, column.hi)
    return lows, highs
