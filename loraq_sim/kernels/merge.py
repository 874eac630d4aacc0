"""Merge partial accumulators under the overflow rule, with the statistics of the rule."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["add_limited", "merge_exact", "merge_limited"]


@njit(cache=True, nogil=True)
def merge_exact(total, part, totals):
    """Add `part` to `total`, both (M, N) int32, exactly; totals[3:5] keep the extreme sums."""
    low, high = np.int32(totals[3]), np.int32(totals[4])
    for m in range(total.shape[0]):
        row, other = total[m], part[m]
        for n in range(row.size):
            value = np.int32(row[n] + other[n])
            low, high = min(low, value), max(high, value)
            row[n] = value
    totals[3], totals[4] = low, high


@njit(cache=True, nogil=True)
def add_limited(total, part, limits):
    """Add `part` to `total`, both (N,) int32 of at most 31 bits, clamped to limits (lo, hi)."""
    lo, hi = np.int32(limits[0]), np.int32(limits[1])
    for n in range(total.size):
        total[n] = min(max(np.int32(total[n] + part[n]), lo), hi)


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
