"""A GEMM on tiles in one compiled call for each thread, and the adds of partial sums around it.

`run_blocks` packs rows of A, where the kernel does not take them as they lie, and runs it over
them. Python between the blocks would find
its own code and data evicted from the caches by each block. The threads share a queue. Each takes
the next block of rows, packs it and takes its columns unit by unit; when no block is left, it takes
units of the blocks that others are still at.

Partial sums meet here as well: `merge_exact` and `merge_limited` add the accumulators of an array
under its overflow rule, `add_partials` the columns of a two-level array to its wide accumulator.
"""

import numpy as np
from llvmlite import ir
from numba.core import types

from loraq_sim.kernels.jit import intrinsic, larger, njit, smaller
from loraq_sim.kernels.pack_panels import PackArguments, code_range, gather_codes, sampled_norms
from loraq_sim.kernels.processor import TileArguments

__all__ = [
    *("DONE", "allowed", "run_blocks"),
    *("add_partials", "merge_exact", "merge_limited"),
]


@njit(cache=True, nogil=True)
def merge_exact(total, part, totals):
    """Add `part` to `total`, both (M, N) int32, exactly; totals[3:5] keep the extreme sums."""
    low, high = np.int32(totals[3]), np.int32(totals[4])
    for m in range(total.shape[0]):
        row, other = total[m], part[m]
        for n in range(row.size):
            value = np.int32(row[n] + other[n])
            low, high = smaller(low, value), larger(high, value)
            row[n] = value
    totals[3], totals[4] = low, high


@njit(cache=True, nogil=True)
def merge_limited(total, part, wraps, lo, hi, k, changed, totals):
    """Add `part` to `total`, both (M, N) int32, under the rule of an accumulator [lo, hi], int64.

    changed (M, N) int32, or (0, 0) to count nothing: marks outputs that the rule changed.
    totals[0] counts them, totals[2] becomes at most k where there is one.
    """
    counts = changed.shape[0] > 0
    for m in range(total.shape[0]):
        row, other = total[m], part[m]
        for n in range(row.size):
            exact = np.int64(row[n]) + np.int64(other[n])
            fitted = min(max(exact, lo), hi)
            if wraps:
                fitted = ((exact - lo) & (hi - lo)) + lo
            row[n] = np.int32(fitted)
            if counts and fitted != exact:
                totals[0] += 1
                totals[2] = min(totals[2], k)
                changed[m, n] |= 1


@njit(cache=True)
def add_partials(partial, clamp, lo, hi, mask, sign, held, exact, touched, extremes, beyond):
    """Add `partial` to `held` element by element; return how many adds left [lo, hi].

    partial (S,) int32 or int64; held (S,), the accumulators, and exact (S,), what they would hold
    without a limit (modulo 2**64), int64; touched (S,) bool marks elements with an overflow;
    extremes (2,) int64 the lowest and highest `exact` so far; beyond (1,) bool whether an exact sum
    left int64. These five are updated in place. With `clamp` an out-of-range sum becomes `lo` or
    `hi`, otherwise ``((sum & mask) ^ sign) - sign``. The scalars are int64 but `clamp`, a bool.
    """
    zero = np.int64(0)
    count = zero
    for i in range(partial.size):
        amount = np.int64(partial[i])
        before = held[i]
        total = before + amount
        # Both operands have the sign that the sum lost: the exact sum does not fit int64.
        leaves_int64 = ((before ^ total) & (amount ^ total)) < zero
        overflows = leaves_int64 or total < lo or total > hi
        if overflows:
            count += np.int64(1)
            touched[i] = True
            if not clamp:
                total = ((total & mask) ^ sign) - sign
            elif leaves_int64:
                total = hi if before >= zero else lo
            else:
                total = min(max(total, lo), hi)
        held[i] = total
        known = exact[i]
        full = known + amount
        if ((known ^ full) & (amount ^ full)) < zero:
            beyond[0] = True
        exact[i] = full
        extremes[0] = min(extremes[0], full)
        extremes[1] = max(extremes[1], full)
    return count


_INDEX = {name: i for i, name in enumerate(TileArguments._fields)}
_A, _W, _OFFSETS, _LAST = (_INDEX[name] for name in ("a", "w", "offsets", "last"))
_START, _START_ROW, _START_PANEL = (_INDEX[name] for name in ("start", "start_row", "start_panel"))
_OUT, _OUT_ROW, _OUT_PANEL = (_INDEX[name] for name in ("out", "out_row", "out_panel"))
_A_STRIDE, _A_ROW, _A_STEP = (_INDEX[name] for name in ("a_stride", "a_row", "a_step"))
_ROW_PANELS, _COLUMN_PANELS = _INDEX["row_panels"], _INDEX["column_panels"]
_FIRST_PANEL, _CHUNKS = _INDEX["first_panel"], _INDEX["chunks"]
_PACK_FIELDS = len(PackArguments._fields)
# What a queue holds before the next unit of each block; `DONE` counts column panels of blocks.
_NEXT_BLOCK, DONE, _BLOCKS = 0, 1, 2
# Looks at the queue, some 100 microseconds of them: to sleep and to wake takes a fifth of that.
_LOOKS = 2**14


@intrinsic
def _call_tile(typingctx, function, arguments):
    """Call a compiled kernel, given its address and that of its arguments, int64 both."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def _fetch_add(typingctx, address, amount):
    """Add `amount` to the int64 at an address that threads share; return what was there."""

    def emit(context, builder, signature, args):
        where = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        # What a thread wrote before it added is there for who sees the sum.
        return builder.atomic_rmw("add", where, args[1], "acq_rel")

    return types.int64(types.int64, types.int64), emit


@njit(cache=True, nogil=True)
def allowed(codes, mask, height, limits):
    """Whether the codes (M, K) int8 of A let a kernel run.

    mask : as for `row_norms`; height : rows of a panel. The lowest (magnitude, L1 norm, squared L2
    norm) of the first row of each panel must exceed three limits, unless the first is -1, and codes
    lie in [-x, x - 1] for the fourth.
    """
    if limits[0] >= 0:
        _, _, _, top, l1, l2 = sampled_norms(codes, mask, height)
        if top <= limits[0] or l1 <= limits[1] or l2 <= limits[2]:
            return False
    if limits[3] < 128:
        low, high = code_range(codes)
        return -limits[3] <= low and high < limits[3]
    return True


@njit(nogil=True)
def _prepare(codes, first, order, packing, height, rooms, given):
    """Say where a block of rows lies, the first of them row `first` of A; pack it where it must be.

    Returns the address of a last panel that lies elsewhere, in `ordered`, or 0: it has rows that do
    not exist.
    """
    packed, ordered, _, _ = rooms
    function, mask, shift, blocks = packing
    panels = -(-codes.shape[0] // height)
    data, row, whole = codes.ctypes.data, codes.strides[0], panels
    if row != ordered.shape[1] or order.size:
        gather_codes(codes, order, ordered)
        data, row = ordered.ctypes.data, ordered.strides[0]
    elif panels * height > codes.shape[0]:
        whole -= 1
        gather_codes(codes[whole * height :], order, ordered[:height])
    given[_START] += first * given[_START_ROW]
    given[_ROW_PANELS] = panels
    last = ordered.ctypes.data if whole < panels else 0
    if function == 0:
        given[_A] += data
        given[_A_STRIDE], given[_A_ROW], given[_A_STEP] = height * row, row, 4
        return last
    asked = np.empty(_PACK_FIELDS, np.int64)
    asked[0], asked[1], asked[2], asked[3] = data, row, packed.ctypes.data, packed.strides[0]
    asked[4], asked[5], asked[6], asked[7] = whole, blocks, mask, shift
    _call_tile(function, asked.ctypes.data)
    if whole < panels:
        asked[0], asked[1], asked[4] = last, ordered.strides[0], 1
        asked[2] += whole * packed.strides[0]
        _call_tile(function, asked.ctypes.data)
    given[_A] += packed.ctypes.data
    return 0


@njit(nogil=True)
def _run_rows(given, last, height, function):
    """Run the tiles of `given`; those of the last panel of rows read A at `last`, unless it is 0.

    A whole block has no last panel elsewhere, and one that has starts where it starts.
    """
    if last == 0:
        _call_tile(function, given.ctypes.data)
        return
    whole = given[_ROW_PANELS] - 1
    other = given.copy()
    other[_ROW_PANELS] = whole
    _call_tile(function, other.ctypes.data)
    other[_ROW_PANELS], other[_A] = 1, last
    other[_START] += whole * height * other[_START_ROW]
    other[_OUT] += whole * height * other[_OUT_ROW]
    _call_tile(function, other.ctypes.data)


@njit(nogil=True)
def _add_limited(total, part, limits):
    """Add `part` to `total`, both (N,) int32 of at most 31 bits, clamped to limits (lo, hi)."""
    lo, hi = np.int32(limits[0]), np.int32(limits[1])
    for n in range(total.size):
        total[n] = smaller(larger(np.int32(total[n] + part[n]), lo), hi)


@njit(nogil=True)
def _merge_others(given, target, begin, rows, segments, limits, zeros, spare, function):
    """Run the accumulators after the first over the tiles of `given`, and add each to `target`."""
    size = given[_COLUMN_PANELS] * given[_OUT_PANEL]
    other = given.copy()
    other[_START], other[_START_ROW], other[_START_PANEL] = zeros, 0, 0
    other[_OUT] = spare.ctypes.data - given[_FIRST_PANEL] * given[_OUT_PANEL]
    other[_OUT_ROW] = size
    for p in range(1, segments.shape[0]):
        other[_A], other[_W] = given[_A] + segments[p, 0], given[_W] + segments[p, 1]
        other[_OFFSETS] = given[_OFFSETS] + segments[p, 2]
        other[_LAST], other[_CHUNKS] = given[_LAST] + segments[p, 3], segments[p, 4]
        _call_tile(function, other.ctypes.data)
        for r in range(rows):
            part = spare[r * size // 4 : (r + 1) * size // 4]
            _add_limited(target[r, begin : begin + size].view(np.int32), part, limits)


@njit(nogil=True)
def _run_unit(
    first, stop, whole, height, last, out, given, segments, merge, zeros, rooms, function
):  # fmt: skip
    """Run tiles of column panels first..stop into `out`, (rows, bytes) int8, of `whole` panels.

    A panel that ends beyond it goes through a buffer. `last` is that of `_prepare`.
    """
    rows = given[_ROW_PANELS] * height
    panel, spare, edge = given[_OUT_PANEL], rooms[2], rooms[3]
    while first < stop:
        inside = first < whole
        count = smaller(stop, whole) - first if inside else 1
        target, begin = (out, first * panel) if inside else (edge, 0)
        given[_FIRST_PANEL], given[_COLUMN_PANELS] = first, count
        given[_OUT_ROW] = target.strides[0]
        given[_OUT] = target.ctypes.data + begin - first * panel
        _run_rows(given, last, height, function)
        if segments.shape[0] > 1:
            _merge_others(given, target, begin, rows, segments, merge, zeros, spare, function)
        if not inside:
            for r in range(rows):
                for i in range(out.shape[1] - whole * panel):
                    out[r, whole * panel + i] = edge[r, i]
        first += count


@njit(cache=True, nogil=True)
def run_blocks(
    codes, order, packing, sizes, segments, merge, zeros, arguments, function, rooms, out, queue,
    waits,
):  # fmt: skip
    """Fill `out` together with the other threads that got the same queue.

    Parameters
    ----------
    codes : (M, K) int8
    order : as for `gather_codes`
    packing : address of the kernel that packs A, or 0 where the tiles read A in rows; then its
        mask, shift and blocks
    sizes : row panels of a block, column panels of a unit, rows of a tile
    segments : (P, 5) int64, for each accumulator: byte offsets into A, W, offsets and last, and
        turns of the chunk loop
    merge : (lo, hi) int32 of the merges
    zeros : address of initial values of the accumulators after the first
    arguments : (fields of `TileArguments`,) int64
    function : address of the kernel
    rooms : this thread's packed (block, dwords) int32; ordered (rows of a block, packed K or more)
        int8, for A in order; spare int32, sums of a unit; edge (rows, bytes of a tile) int8
    out : (padded rows, bytes) int8
    queue : (2 + blocks,) int64, zeros at first
    waits : bool, whether to stay for a moment for units that other threads are still at
    """
    block, unit, height = sizes
    panel, panels = arguments[_OUT_PANEL], arguments[_COLUMN_PANELS]
    whole = out.shape[1] // panel
    shared, counter = np.int64(queue.ctypes.data), np.int64(8)
    one, none = np.int64(1), np.int64(0)
    blocks = queue.size - _BLOCKS
    taken, b = False, np.int64(-1)
    while not taken or b + 1 < blocks:
        # First the blocks that nobody has, then what others have not reached of theirs.
        b = b + 1 if taken else _fetch_add(shared + counter * _NEXT_BLOCK, one)
        if b >= blocks:
            taken, b = True, np.int64(-1)
            continue
        given, ready, last = arguments, False, none
        j = _fetch_add(shared + counter * (_BLOCKS + b), np.int64(unit))
        while j < panels:
            first = b * block * height
            if not ready:
                given, ready = arguments.copy(), True
                some = codes[first : first + block * height]
                last = np.int64(_prepare(some, first, order, packing, height, rooms, given))
            stop, target = smaller(j + unit, panels), out[first:]
            _run_unit(
                j, stop, whole, height, last, target, given, segments, merge, zeros, rooms, function
            )
            _fetch_add(shared + counter * DONE, np.int64(stop - j))
            j = _fetch_add(shared + counter * (_BLOCKS + b), np.int64(unit))
    looks = _LOOKS if waits else 0
    while looks > 0 and _fetch_add(shared + counter * DONE, none) < blocks * panels:
        looks -= 1
