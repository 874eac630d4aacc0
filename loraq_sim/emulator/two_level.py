"""Integer GEMM on a two-level array: narrow column sums, then a wide accumulator.

    for each tile t of column_k products, in order of K:
        partial[t] = column sums the tile from zero          (`accumulation`, its own overflow rule)
        acc        = fit(acc + partial[t], acc_bits, overflow)

A tile is one pass through a systolic array; the wide accumulator is the memory behind it. Three
ways give the same bits: columns that provably fit are exact trees in front of the wide accumulator;
columns of one accumulator and no narrow tree run both levels in registers; all others run tile by
tile, one emulated GEMM and one add each. The last takes every column there is, and checks the
registers.
"""

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.accumulation import Accumulation, accumulate, measured
from loraq_sim.emulator.bounds import Bounds
from loraq_sim.emulator.mac_array import (
    MacArray,
    TwoLevelArray,
    fitted,
    overflow_limits,
    signed_width,
)
from loraq_sim.emulator.packed_weight import PackedWeight
from loraq_sim.emulator.tile_job import (
    TileJob,
    activation_range,
    as_accumulators,
    checked_job,
)
from loraq_sim.emulator.tile_route import nested_fits, run_nested
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import on_a_path_that_compiles

__all__ = [
    *("TwoLevelReport", "emulate_two_level", "emulate_two_level_report"),
    *("two_level_report", "two_level_sums"),
]


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


@on_a_path_that_compiles
def emulate_two_level(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    array: TwoLevelArray,
    *,
    init: ArrayLike | None = None,
    threads: int = 1,
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return the accumulators of ``a @ w.T`` on a two-level array, bit for bit.

    Parameters
    ----------
    a, w, threads
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
    return two_level_sums(_checked(a, w, array, init, threads))


def two_level_sums(job: TileJob[TwoLevelArray]) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return the accumulators of a job of `emulate_two_level`."""
    array, one_level = job.mac, _same_in_one_level(job)
    if one_level is not None:
        same: TileJob[MacArray] = replace(cast(Any, job), mac=one_level)
        return as_accumulators(accumulate(same, statistics=False).acc, array)
    bounds = _bounds(job, statistics=False)
    if nested_fits(job, bounds, statistics=False):
        acc = run_nested(job, bounds, statistics=False)[0]
        return as_accumulators(acc, array)
    loop = _TileByTile(job)
    loop.run(job, statistics=False)
    return as_accumulators(loop.value, array)


@on_a_path_that_compiles
def emulate_two_level_report(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    array: TwoLevelArray,
    *,
    init: ArrayLike | None = None,
    a_bits: int = 8,
    threads: int = 1,
) -> TwoLevelReport:
    """Return the accumulators of ``a @ w.T`` on a two-level array with the counts of both levels.

    `a_bits` is the width of the activation codes, 2 to 8: the range that the guaranteed widths
    cover, signed or unsigned as `emulate_gemm_report` decides. Other arguments and errors as for
    `emulate_two_level`.
    """
    job = _checked(a, w, array, init, threads)
    return two_level_report(job, activation_range(np.asarray(a).dtype, job, a_bits))


def two_level_report(job: TileJob[TwoLevelArray], a_range: tuple[int, int]) -> TwoLevelReport:
    """Return the report of a job whose activations may be anything within `a_range`."""
    array, bounds = job.mac, _bounds(job, statistics=True)
    if nested_fits(job, bounds, statistics=True):
        acc, totals = run_nested(job, bounds, statistics=True)
        overflows, low, high, partials = totals.inner
        report = TwoLevelReport(
            acc=as_accumulators(acc, array),
            overflow_count=totals.overflows,
            outputs_affected=totals.affected,
            first_overflow_k=totals.first_k,
            safe_acc_bits=signed_width(totals.low, totals.high),
            guaranteed_acc_bits=0,
            column_overflow_count=overflows,
            column_tree_overflow_count=0,
            partials_affected=partials,
            safe_column_bits=signed_width(low, high),
            guaranteed_column_bits=0,
        )
    else:
        loop = _TileByTile(job)
        loop.run(job, statistics=True)
        report = loop.report()
    wide, narrow = _guaranteed(job, a_range)
    return replace(report, guaranteed_acc_bits=wide, guaranteed_column_bits=narrow)


def _checked(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    array: TwoLevelArray,
    init: ArrayLike | None,
    threads: int,
) -> TileJob[TwoLevelArray]:
    if not isinstance(array, TwoLevelArray):
        raise InputError(
            f"array must be a TwoLevelArray, got {array!r}; a MacArray runs in emulate_gemm"
        )
    return checked_job(a, w, array, init, threads)


def _bounds(job: TileJob[TwoLevelArray], *, statistics: bool) -> Bounds:
    """Bounds that let the registers take both levels, if any do."""
    ends = job.init_ends
    quick = Bounds.of_codes(job.top_code, job.weight.norms, ends)
    if nested_fits(job, quick, statistics=statistics):
        return quick
    return Bounds.of_norms(job.a_norms, job.weight.norms, ends)


def _same_in_one_level(job: TileJob[TwoLevelArray]) -> MacArray | None:
    """Return a MacArray with the same result for these operands, if columns provably fit.

    Then they are exact trees in front of the wide accumulator, of any size where that wraps.
    """
    array = job.mac
    wraps = array.overflow == "wrap" and array.acc_bits <= 32
    if not (wraps or array.column_k <= 64) or not _columns_fit(job):
        return None
    return MacArray(
        acc_bits=array.acc_bits,
        overflow=array.overflow,
        products_per_add=min(array.column_k, 64),
    )


def _columns_fit(job: TileJob[TwoLevelArray]) -> bool:
    """Whether max|a| * ||w||_1 of every tile, which bounds any part of its sum, fits a column."""
    if job.a.size == 0 or job.weight.codes.size == 0:
        return False
    column = job.mac.column
    narrowest = min(column.acc_bits, column.tree_bits or column.acc_bits)
    room = overflow_limits(narrowest, "saturate_symmetric")[1]
    longest = job.weight.longest_stretch(job.mac.column_k)
    return job.top_code * longest <= room or job.a_norms.top * longest <= room


def _guaranteed(job: TileJob[TwoLevelArray], a_range: tuple[int, int]) -> tuple[int, int]:
    """Widths of the wide accumulator and of a column that no activations in a range overflow.

    Each product takes its own extreme. A clamped sum stays between the exact sums of the negative
    and of the positive products, and within the limits; a sum that may wrap can be anything there.
    """
    array, column = job.mac, job.mac.column
    positive, negative = job.weight.stretch_sums(array.column_k)
    low = positive * a_range[0] + negative * a_range[1]
    high = positive * a_range[1] + negative * a_range[0]
    narrow = signed_width(int(low.min(initial=0)), int(high.max(initial=0)))
    wraps = np.zeros(low.shape, np.bool_)
    if column.overflow == "wrap":
        wraps |= (low < column.lo) | (high > column.hi)
    if column.tree_bits is not None and column.tree_rule == "wrap":
        tree_low, tree_high = overflow_limits(column.tree_bits, "wrap")
        wraps |= (low < tree_low) | (high > tree_high)
    # Python integers: many columns of 64 bits leave int64.
    lows = np.where(wraps, column.lo, np.maximum(low, column.lo)).sum(axis=1, dtype=object)
    highs = np.where(wraps, column.hi, np.minimum(high, column.hi)).sum(axis=1, dtype=object)
    if (starts := job.starts(a_range)) is not None:
        lows, highs = lows + starts[0], highs + starts[1]
    return signed_width(min(lows.tolist(), default=0), max(highs.tolist(), default=0)), narrow


class _TileByTile:
    """The wide accumulators (M, N) of one GEMM, what they would hold exactly, and the counts."""

    def __init__(self, job: TileJob[TwoLevelArray]) -> None:
        shape = job.a.shape[0], job.weight.shape[0]
        first = np.zeros(shape, np.int64) if job.init is None else job.init
        self.array = job.mac
        self._exact = np.array(first, dtype=np.int64, order="C")
        self.value = np.array(fitted(self._exact, job.mac), order="C")
        self._touched = self.value != self._exact
        self._overflow_count = int(np.count_nonzero(self._touched))
        self._first_overflow_k: int | None = 0 if self._overflow_count else None
        self._column_overflows = self._tree_overflows = self._partials_affected = 0
        self._safe_column_bits = 1
        ends = (first.min(), first.max()) if first.size else (0, 0)
        self._extremes = np.array(ends, dtype=np.int64)
        self._beyond = np.zeros(1, dtype=np.bool_)

    def run(self, job: TileJob[TwoLevelArray], *, statistics: bool) -> None:
        """Add all tiles of the job; with `statistics` see what the columns do."""
        for k in range(0, job.a.shape[1], self.array.column_k):
            tile = slice(k, k + self.array.column_k)
            codes = job.weight.codes[:, tile]
            column = checked_job(job.a[:, tile], codes, self.array.column, None, 1)
            partial = accumulate(column, statistics=statistics)
            if statistics:
                self._see(partial)
            self._add(partial.acc, k)

    def _see(self, partial: Accumulation) -> None:
        self._column_overflows += measured(partial.overflow_count)
        self._tree_overflows += measured(partial.tree_overflow_count)
        self._partials_affected += measured(partial.outputs_affected)
        width = signed_width(*(partial.extremes or (0, 0)))
        self._safe_column_bits = max(self._safe_column_bits, width)

    def _add(self, partial: NDArray[np.integer], k: int) -> None:
        from loraq_sim.kernels.run_blocks import add_partials

        bits = self.array.acc_bits
        count = add_partials(
            np.ascontiguousarray(partial).reshape(-1),
            self.array.overflow != "wrap",
            np.int64(self.array.lo),
            np.int64(self.array.hi),
            np.int64(-1 if bits == 64 else 2**bits - 1),
            np.int64(-(2**63) if bits == 64 else 2 ** (bits - 1)),
            self.value.reshape(-1),
            self._exact.reshape(-1),
            self._touched.reshape(-1),
            self._extremes,
            self._beyond,
        )
        self._overflow_count += int(count)
        if count and self._first_overflow_k is None:
            self._first_overflow_k = k

    def report(self) -> TwoLevelReport:
        """What was seen; the guaranteed widths are still to be filled in."""
        # A sum beyond int64 needs one bit more: all partial sums together stay below 2**63.
        low, high = self._extremes.tolist()
        return TwoLevelReport(
            acc=as_accumulators(self.value, self.array),
            overflow_count=self._overflow_count,
            outputs_affected=int(np.count_nonzero(self._touched)),
            first_overflow_k=self._first_overflow_k,
            safe_acc_bits=65 if self._beyond[0] else signed_width(low, high),
            guaranteed_acc_bits=0,
            column_overflow_count=self._column_overflows,
            column_tree_overflow_count=self._tree_overflows,
            partials_affected=self._partials_affected,
            safe_column_bits=self._safe_column_bits,
            guaranteed_column_bits=0,
        )
