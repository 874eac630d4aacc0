"""The loops over tiles of a GEMM: rows in blocks that stay in cache, merges, edges, statistics."""

import numpy as np
from numba import njit

from loraq_sim.kernels.tile import ARGUMENTS
from loraq_sim.kernels.tile_kernel import call_tile

__all__ = ["COUNT", "MEASURE", "NEVER", "PLAIN", "TOTALS"]

# What `statistics` holds for one tile (see `kernels.tile`).
PLAIN, MEASURE, COUNT = 0, 1, 2
# Entries of `totals`: overflows, outputs with any, first K index of one, lowest and highest prefix.
TOTALS = 5
NEVER = 2**31 - 1
_BLOCK_BYTES = 2**18


@njit
def _merge(total, part, wraps, lo, hi, mode, flags, totals, k):
    """Add accumulator `part` into `total`, both (rows, width) int32, under the overflow rule."""
    for r in range(total.shape[0]):
        for n in range(total.shape[1]):
            exact = np.int64(total[r, n]) + np.int64(part[r, n])
            fitted = min(max(exact, lo), hi)
            if wraps:
                fitted = ((exact - lo) & (hi - lo)) + lo
            total[r, n] = np.int32(fitted)
            if mode == MEASURE:
                totals[3] = min(totals[3], exact)
                totals[4] = max(totals[4], exact)
            elif mode == COUNT and fitted != exact:
                totals[0] += 1
                totals[2] = min(totals[2], k)
                flags[r * total.shape[1] + n] = 1


@njit
def _fold_counts(statistics, held, width, totals, p, accumulators, chunk):
    """Add one segment's counts to `totals` and clear them; `held` outputs keep their flags."""
    first = np.int32(NEVER)
    for n in range(width):
        totals[0] += statistics[held + n]
        statistics[held + n] = 0
        first = min(first, statistics[held + width + n])
        statistics[held + width + n] = NEVER
    if first != NEVER:
        totals[2] = min(totals[2], (np.int64(first) * accumulators + p) * chunk)


@njit
def _copy_start(init, shift, start):
    """start[r, n] = init[r, n] << shift; init may be smaller than the tile, the rest is zero."""
    start[:] = 0
    for r in range(init.shape[0]):
        source, target = init[r], start[r]
        for n in range(source.size):
            target[n] = source[n] << shift


@njit(cache=True, nogil=True)
def run_tiles(
    tile, rows, width, a, w, offsets, last, segments, inner, limits, merge_limits, wraps,
    init, todo, wanted, mode, k, chunk, totals, start, statistics, out,
):  # fmt: skip
    """Compute the tiles of a GEMM; writes `out` and `totals`, uses `start` and `statistics`.

    Parameters
    ----------
    tile : address of a compiled tile of `rows` x `width` outputs (`TileKernel.address`)
    a : (row panels, .) int32 ; w : (column panels, .), packed operands, C-contiguous
    offsets : (column panels, .) int32, chunk offsets of a moving rule
    last : (P, columns) int32, what to take off each accumulator's sum at its end
    segments : (P, 4) int64, start of each accumulator's share in a panel of `a`, of `w` and of
        `offsets`, in bytes, and its turns of the chunk loop
    inner : dot steps per chunk
    limits : (4,) int64, lo, hi, up and down of the tile
    merge_limits, wraps : (lo, hi) int64 of the accumulator, and whether it wraps; for the merges
    init : (M, N) int32, or (0, 0) for none
    todo, wanted : (row panels, column panels) uint8; only tiles marked `wanted` are computed, all
        where `todo` has no rows
    mode : PLAIN, MEASURE or COUNT
    k, chunk : K and the products per chunk, to name K indices
    totals : (5,) int64, see `TOTALS`; added to
    start : (2, rows, width) int32 or int16 for 16-bit lanes; zeros, the second for `init`
    statistics : int32, the registers of the tile's statistics
    out : (M, N) int32, C-contiguous
    """
    m, n = out.shape
    arguments = np.zeros(ARGUMENTS, np.int64)
    arguments[4], arguments[9] = statistics.ctypes.data, inner
    arguments[10:] = limits
    accumulators = segments.shape[0]
    total = np.empty((rows, width), np.int32)
    part = np.empty((rows, width), np.int32)
    flags = statistics[: rows * width]
    # An aligned accumulator starts aligned; a wrapping one has its low bits where they are.
    shift = np.int32(limits[3] if limits[2] == 0 else 0)
    block = max(1, _BLOCK_BYTES // (a.shape[1] * 4 + 1))
    for first in range(0, a.shape[0], block):
        for j in range(w.shape[0]):
            j0, j1 = j * width, min(n, (j + 1) * width)
            for i in range(first, min(first + block, a.shape[0])):
                if todo.shape[0] > 0 and todo[i, j] != wanted:
                    continue
                i0, i1 = i * rows, min(m, (i + 1) * rows)
                whole = i1 - i0 == rows and j1 - j0 == width
                if mode == COUNT:
                    flags[:] = 0
                for p in range(accumulators):
                    begin = start[0].ctypes.data
                    if p == 0 and init.shape[0] > 0:
                        _copy_start(init[i0:i1, j0:j1], shift, start[1])
                        begin = start[1].ctypes.data
                    target, stride = part.ctypes.data, 4 * width
                    if p == 0 and accumulators > 1:
                        target = total.ctypes.data
                    elif accumulators == 1 and whole:
                        target, stride = out.ctypes.data + 4 * (i0 * n + j0), 4 * n
                    arguments[0] = a.ctypes.data + i * a.strides[0] + segments[p, 0]
                    arguments[1] = w.ctypes.data + j * w.strides[0] + segments[p, 1]
                    arguments[2] = offsets.ctypes.data + j * offsets.strides[0] + segments[p, 2]
                    arguments[3] = begin
                    arguments[5] = last.ctypes.data + 4 * (p * last.shape[1] + j0)
                    arguments[6], arguments[7] = target, stride
                    arguments[8] = segments[p, 3]
                    call_tile(tile, arguments.ctypes.data)
                    if mode == COUNT:
                        held = rows * width
                        _fold_counts(statistics, held, width, totals, p, accumulators, chunk)
                    if p > 0:
                        mlo, mhi = merge_limits
                        _merge(total, part, wraps, mlo, mhi, mode, flags, totals, k)
                if mode == COUNT:
                    for q in range(rows * width):
                        totals[1] += np.int64(flags[q] != 0)
                if accumulators > 1 or not whole:
                    source = total if accumulators > 1 else part
                    for r in range(i1 - i0):
                        row, target_row = source[r], out[i0 + r, j0:j1]
                        for q in range(target_row.size):
                            target_row[q] = row[q]
    if mode == MEASURE:
        for q in range(width):
            totals[3] = min(totals[3], statistics[q])
            totals[4] = max(totals[4], statistics[width + q])
