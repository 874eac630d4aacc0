"""A GEMM on one level of accumulators: the choice of a route, the routes, and the report.

All routes give the same bits; `accumulate` takes the fastest that is proved exact for the operands.

exact        float32 BLAS: no overflow is possible, or the sums wrap, which commutes with adding
tiles        vector kernels (`loraq_sim.emulator.tile_route`)
exact+tiles  the same, some tiles proved free of overflow, the others not
lanes        32-bit loops: no tiles here, or reports of trees that may overflow in front of several
             accumulators
wide         64-bit loops: any width, always measured
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, guaranteed_bits
from loraq_sim.emulator.mac_array import MacArray, overflow_limits, signed_width
from loraq_sim.emulator.tile_job import TileJob, as_accumulators
from loraq_sim.emulator.tile_ready import run_ready
from loraq_sim.emulator.tile_route import (
    count_overflows,
    measure,
    nested_fits,
    run_nested,
    run_plain,
    tiles_fit,
)
from loraq_sim.kernels.processor import NEVER

__all__ = ["Accumulation", "GemmReport", "accumulate", "measured", "report_of"]

# Columns of one panel, at most. Wide panels amortize the per-row calls of the kernel (1152 columns
# ran 2x as fast as 384), and streaming W from an outer cache costs less than those calls.
_PANEL_WIDTH = 2048
# Above this many columns the copy back from a transposed run costs more than it gains.
_WIDE_ENOUGH = 512
_LANE = 16


@dataclass(frozen=True, kw_only=True, repr=False)
class GemmReport:
    """Accumulators of one GEMM and what happened on the way.

    Attributes
    ----------
    acc : ndarray of shape (M, N), int32 (acc_bits <= 32) or int64
    overflow_count : int or None
        Adds into an accumulator, merges included, whose exact result left its range.
    tree_overflow_count : int or None
        Chunk sums that left the tree's range.
    outputs_affected : int or None
        Outputs with at least one of either.
    first_overflow_k : int or None
        Lowest K index of a chunk whose add overflowed an accumulator; K if only merges did.
        None if nothing overflowed (or where `overflow_count` is None).
    safe_acc_bits : int or None
        Narrowest two's complement accumulator that holds every exact prefix of these operands in
        this order (the chunk sums taken as the tree delivers them). Measured; may be below 8.
    guaranteed_acc_bits : int
        Narrowest one that holds every prefix for any activations of the given range.
    route : str
        ``exact``, ``tiles``, ``exact+tiles``, ``lanes`` or ``wide``.

    The counts are None only with ``statistics=False``, where not known without measuring: None says
    unknown, 0 that there is provably none.
    """

    acc: NDArray[np.int32] | NDArray[np.int64]
    overflow_count: int | None
    tree_overflow_count: int | None
    outputs_affected: int | None
    first_overflow_k: int | None
    safe_acc_bits: int | None
    guaranteed_acc_bits: int
    route: str

    def __repr__(self) -> str:
        rows, columns = self.acc.shape
        return (
            f"GemmReport of {rows} x {columns} sums: overflow_count={self.overflow_count}, "
            f"tree_overflow_count={self.tree_overflow_count}, "
            f"outputs_affected={self.outputs_affected}, first_overflow_k={self.first_overflow_k}\n"
            f"safe_acc_bits={self.safe_acc_bits}, guaranteed_acc_bits={self.guaranteed_acc_bits}, "
            f"route={self.route!r}"
        )

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import gemm_card

        return gemm_card(self)


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """Accumulators (M, N) with the counts and extreme exact prefixes that the route measured."""

    acc: NDArray[np.integer]
    route: str
    overflow_count: int | None = None
    tree_overflow_count: int | None = None
    outputs_affected: int | None = None
    first_overflow_k: int | None = None
    extremes: tuple[int, int] | None = None


def measured(count: int | None) -> int:
    """A count of a report with statistics, which leaves none open; TypeError for None."""
    if count is None:
        raise TypeError("this count was not measured; ask for statistics")
    return count


def accumulate(job: TileJob[MacArray], *, statistics: bool) -> Accumulation:
    """Run the fastest route that is proved exact for these operands."""
    if not statistics and (ready := run_ready(job)) is not None:
        return Accumulation(acc=ready[0], route=ready[1], tree_overflow_count=0)
    if tiles_fit(job, statistics=statistics):
        return _run_tiled(job, statistics)
    mac, bounds = job.mac, job.bounds
    if mac.tree_bits is not None and nested_fits(job, bounds, statistics=statistics):
        return _run_tree(job, statistics)
    exact = bounds.tree_fits(mac) and (mac.overflow == "wrap" or bounds.accumulator_fits(mac))
    operands = (job.a, job.weight.codes, mac, job.init)
    if exact and not statistics:
        return _run_exact(*operands, bounds)
    if bounds.lanes_fit(mac) and not job.starts_outside:
        return run_lanes(*operands, bounds, statistics)
    return run_wide(*operands)


def report_of(job: TileJob[MacArray], a_range: tuple[int, int], *, statistics: bool) -> GemmReport:
    """Return the report of a GEMM whose activations may be anything within `a_range`."""
    result = accumulate(job, statistics=statistics)
    # Without statistics a kernel counts nothing, but a proof says that there is nothing to count.
    proved = not statistics and job.bounds.accumulator_fits(job.mac)
    overflows = 0 if proved else result.overflow_count
    affected = result.outputs_affected
    if affected is None and overflows == 0 and result.tree_overflow_count == 0:
        affected = 0
    return GemmReport(
        acc=as_accumulators(result.acc, job.mac),
        overflow_count=overflows,
        tree_overflow_count=result.tree_overflow_count,
        outputs_affected=affected,
        first_overflow_k=result.first_overflow_k,
        safe_acc_bits=None if result.extremes is None else signed_width(*result.extremes),
        guaranteed_acc_bits=guaranteed_bits(job.weight, a_range, job.starts(a_range), job.mac),
        route=result.route,
    )


def _run_tiled(job: TileJob[MacArray], statistics: bool) -> Accumulation:
    """Run the vector kernels, twice where overflow must be both measured and applied."""
    if not statistics:
        acc, route = run_plain(job)
        return Accumulation(acc=acc, route=route, tree_overflow_count=0)
    acc, totals = measure(job)
    extremes = totals.low, totals.high
    if not (job.mac.lo <= totals.low and totals.high <= job.mac.hi):
        acc, totals = count_overflows(job)
    return Accumulation(
        acc=acc,
        route="tiles",
        overflow_count=totals.overflows,
        tree_overflow_count=0,
        outputs_affected=totals.affected,
        first_overflow_k=totals.first_k,
        extremes=extremes,
    )


def _run_tree(job: TileJob[MacArray], statistics: bool) -> Accumulation:
    """Run the vector kernel of a tree that may overflow in front of an accumulator."""
    acc, totals = run_nested(job, job.bounds, statistics=statistics)
    if not statistics:
        return Accumulation(acc=acc, route="tiles")
    return Accumulation(
        acc=acc,
        route="tiles",
        overflow_count=totals.overflows,
        tree_overflow_count=totals.inner[0],
        outputs_affected=totals.either,
        first_overflow_k=totals.first_k,
        extremes=(totals.low, totals.high),
    )


def _run_exact(
    a: NDArray[np.integer],
    w: NDArray[np.integer],
    mac: MacArray,
    init: NDArray[np.int64] | None,
    bounds: Bounds,
) -> Accumulation:
    """Multiply exactly in BLAS, K block by K block, then wrap.

    float32 holds every integer up to 2**24, so a block of K whose every partial sum stays below
    that is exact in any order. The blocks add up in integers. Products of 16-bit codes would make
    blocks of a few: they take float64, up to 2**53.
    """
    safe = bounds.accumulator_fits(mac)
    reach = max(bounds.init_high, -bounds.init_low) + bounds.total
    acc = np.zeros((a.shape[0], w.shape[0]), np.int32 if reach < 2**31 else np.int64)
    if init is not None:
        acc += init.astype(acc.dtype)
    k, most = a.shape[1], 2**24
    is_wide = bounds.total > most and bounds.product > 2**17
    most, dtype = (2**53, "f8") if is_wide else (most, "f4")
    block = k if bounds.total <= most else most // bounds.product
    for start in range(0, k, max(block, 1)):
        left = a[:, start : start + block].astype(dtype)
        right = w[:, start : start + block].astype(dtype)
        acc += (left @ right.T).astype(acc.dtype)
    return Accumulation(
        acc=acc if safe else _wrap_to(acc, mac.acc_bits),
        route="exact",
        overflow_count=0 if safe else None,
        tree_overflow_count=0,
        outputs_affected=0 if safe else None,
    )


def _wrap_to(values: NDArray[np.integer], bits: int) -> NDArray[np.integer]:
    """Return the low `bits` of each value as a two's complement number, same dtype."""
    if bits >= values.dtype.itemsize * 8:
        return values
    sign = values.dtype.type(2 ** (bits - 1))
    mask = values.dtype.type(2**bits - 1)
    return ((values & mask) ^ sign) - sign


def run_lanes(
    a: NDArray[np.integer],
    w: NDArray[np.integer],
    mac: MacArray,
    init: NDArray[np.int64] | None,
    bounds: Bounds,
    statistics: bool,
) -> Accumulation:
    """Run the vectorized int32 kernel, twice where overflow must be both measured and applied.

    The first pass adds without a limit and finds the extreme prefixes. Where they fit the
    accumulator its result is already the answer; otherwise the second pass applies the rule.
    """
    if _runs_better_transposed(a, w):
        turned = run_lanes(w, a, mac, None if init is None else init.T, bounds, statistics)
        return replace(turned, acc=np.ascontiguousarray(turned.acc.T))
    order, ends = _segment_order(a.shape[1], mac)
    packed = _gather(a, order, np.int32)
    # One dtype and layout, whatever the codes are: the kernel is compiled once.
    panels = _pack_panels(_gather(w, order, np.int16))
    fits = bounds.accumulator_fits(mac)
    lanes = (packed, panels, ends, mac, init, *w.shape)
    if not (statistics or fits or mac.overflow == "wrap"):
        acc, _, _ = _call_lanes(*lanes, limited=True, count=False)
        return Accumulation(acc=acc, route="lanes")
    acc, extremes, totals = _call_lanes(*lanes, limited=False, count=False)
    if not (mac.lo <= extremes[0] and extremes[1] <= mac.hi):
        if not statistics:
            return Accumulation(acc=_wrap_to(acc, mac.acc_bits), route="lanes")
        acc, _, totals = _call_lanes(*lanes, limited=True, count=True)
    return Accumulation(
        acc=acc,
        route="lanes",
        overflow_count=int(totals[0]),
        tree_overflow_count=int(totals[1]),
        outputs_affected=int(totals[2]),
        first_overflow_k=None if totals[3] == NEVER else int(totals[3]),
        extremes=extremes,
    )


def run_wide(
    a: NDArray[np.integer],
    w: NDArray[np.integer],
    mac: MacArray,
    init: NDArray[np.int64] | None,
) -> Accumulation:
    """Run the 64-bit kernel, which takes any width and always measures."""
    from loraq_sim.kernels.accumulate import accumulate_wide

    out = np.zeros((a.shape[0], w.shape[0]), np.int64)
    if init is not None:
        out[:] = init
    extremes, beyond = np.zeros(2, np.int64), np.zeros(1, np.bool_)
    totals = np.array([0, 0, 0, NEVER], np.int64)
    accumulate_wide(
        np.ascontiguousarray(a, dtype=np.int32),
        np.ascontiguousarray(w, dtype=np.int16),
        mac.products_per_add,
        mac.accumulators,
        _rule(mac.tree_rule, mac.tree_bits, np.int64)[:3],
        _rule(mac.overflow, mac.acc_bits, np.int64)[:3],
        extremes,
        beyond,
        totals,
        out,
    )
    # A prefix beyond int64 needs exactly one bit more: products add less than 2**63 to init.
    low, high = int(extremes[0]), int(extremes[1])
    return Accumulation(
        acc=out,
        route="wide",
        overflow_count=int(totals[0]),
        tree_overflow_count=int(totals[1]),
        outputs_affected=int(totals[2]),
        first_overflow_k=None if totals[3] == NEVER else int(totals[3]),
        extremes=(low, 2**63) if beyond[0] else (low, high),
    )


def _runs_better_transposed(a: NDArray[np.integer], w: NDArray[np.integer]) -> bool:
    """Whether w @ a.T fills the panels better: few columns, more rows, and codes fit int8 panels.

    A product of two codes is the same either way, and so is the order of K.
    """
    few = w.shape[0] < _WIDE_ENOUGH and a.shape[0] > w.shape[0]
    return few and a.dtype != np.int16 and int(a.max(initial=0)) <= 127


def _segment_order(k: int, mac: MacArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the packed order of K (-1 for a zero) and the end of each accumulator's segment."""
    from loraq_sim.kernels.accumulate import BLOCK

    c = mac.products_per_add
    n_chunks = -(-k // c)
    chunks = np.full((n_chunks, c), -1, np.int64)
    chunks.reshape(-1)[:k] = np.arange(k)
    segments = []
    for p in range(min(mac.accumulators, max(n_chunks, 1))):
        own = chunks[p :: mac.accumulators]
        padding = np.full((-len(own) % BLOCK, c), -1, np.int64)
        segments.append(np.concatenate([own, padding]).reshape(-1))
    ends = np.cumsum([len(segment) for segment in segments], dtype=np.int64)
    return np.concatenate(segments), ends


def _gather(codes: NDArray[np.integer], order: NDArray[np.int64], dtype: type) -> NDArray:
    """Return the columns of `codes` in `order`, zero where it is -1."""
    if np.array_equal(order, np.arange(codes.shape[1])):
        return np.ascontiguousarray(codes, dtype=dtype)
    padded = np.zeros((codes.shape[0], codes.shape[1] + 1), dtype)
    padded[:, :-1] = codes
    return np.ascontiguousarray(padded[:, order])


def _pack_panels(w: NDArray[np.int16]) -> NDArray[np.int16]:
    """Return W as panels (tiles, K, width), zero columns filling the last one."""
    n, k = w.shape
    tiles = max(1, math.ceil(n / _PANEL_WIDTH))
    width = _LANE * math.ceil(n / tiles / _LANE)
    full = np.zeros((tiles * width, k), w.dtype)
    full[:n] = w
    return np.ascontiguousarray(full.reshape(tiles, width, k).transpose(0, 2, 1))


def _call_lanes(a, panels, ends, mac, init, n, k, *, limited, count):
    """Run the lane kernel; `limited` applies the accumulator's rule, else the sums are exact."""
    from loraq_sim.kernels.accumulate import accumulate_lanes

    tiles, _, width = panels.shape
    out = np.zeros((a.shape[0], tiles * width), np.int32)
    if init is not None:
        out[:, :n] = init
    extremes, totals = np.zeros(2, np.int32), np.array([0, 0, 0, NEVER], np.int64)
    tree = _rule(mac.tree_rule, mac.tree_bits, np.int32)
    rule = _rule(mac.overflow, mac.acc_bits if limited else None, np.int32)
    accumulate_lanes(
        a, panels, ends, mac.products_per_add, tree, rule, count, extremes, totals, k, out
    )
    return out[:, :n], (int(extremes[0]), int(extremes[1])), totals


def _rule(overflow: str, bits: int | None, dtype: type) -> tuple:
    """Return (rule, lo, hi, mask) for a kernel in `dtype`.

    A register at least as wide as the lanes cannot overflow in them: that is rule EXACT, and the
    64-bit kernel gets 64-bit registers as they are.
    """
    from loraq_sim.kernels.accumulate import CLAMP, EXACT, WRAP

    if bits is None or (dtype is np.int32 and bits > 31):
        return tuple(dtype(x) for x in (EXACT, 0, 0, 0))
    lo, hi = overflow_limits(bits, overflow)
    kind = WRAP if overflow == "wrap" else CLAMP
    mask = hi - lo if bits < 32 else 0
    return tuple(dtype(x) for x in (kind, lo, hi, mask))
