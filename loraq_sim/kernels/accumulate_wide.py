"""Accumulate one output at a time in 64 bits: every width, every rule, no lane proof needed.

This route serves what the 32-bit lanes cannot hold (accumulators of 31 to 64 bits that may really
overflow, sums beyond int32). It reads operands unpacked and in order, so it also checks the lanes.
No step overflows int64: an add first asks whether the room left is enough.
"""

import numpy as np

from loraq_sim.kernels.accumulate import CLAMP, EXACT
from loraq_sim.kernels.jit import njit

__all__ = []

_TWO_31 = np.int64(2**31)
_HIGHEST = np.int64(2**63 - 1)
_LOWEST = np.int64(-(2**63 - 1) - 1)


@njit(cache=True)
def _add(x, y, rule, lo, hi):
    """Return (x + y under the rule, whether the exact sum left [lo, hi]); all int64.

    x lies in [lo, hi]. y does too, or is a chunk sum below 2**22 in magnitude. Wrapping needs the
    modulus once when y is below it, which holds from 32 bits on; narrower sums use a mask.
    """
    zero = np.int64(0)
    above = y > zero and x > hi - y
    below = y < zero and x < lo - y
    if not (above or below):
        return x + y, False
    if rule == CLAMP:
        return (hi, True) if above else (lo, True)
    if hi < _TWO_31:
        mask = hi - lo
        return (((x + y - lo) & mask) + lo), True
    # The modulus 2**bits is hi - lo + 1; halves of it keep 64-bit wrapping inside int64.
    return ((x + lo) + (y + lo), True) if above else ((x - lo) + (y - lo), True)


@njit(cache=True)
def _accumulate_wide(a, w, c, n_acc, tree, acc_rule, extremes, beyond, totals, out):
    """Accumulate every output; `out` holds the initial values and is overwritten in place.

    Parameters
    ----------
    a : (M, K) int32 ; w : (N, K) int8
    c, n_acc : int, products per chunk and number of accumulators
    tree, acc_rule : (rule, lo, hi), int64
    extremes : (2,) int64, lowest and highest exact prefix that int64 holds
    beyond : (1,) bool, whether an exact prefix left int64 (then 65 bits hold it)
    totals : (4,) int64, accumulator overflows, tree overflows, outputs with either, first K index
        of an accumulator overflow (lowered only)
    out : (M, N) int64
    """
    tree_rule, tree_lo, tree_hi = tree
    rule, lo, hi = acc_rule
    zero = np.int64(0)
    held = np.zeros(n_acc, np.int64)
    exact = np.zeros(n_acc, np.int64)
    for m in range(a.shape[0]):
        row = a[m]
        for j in range(w.shape[0]):
            column = w[j]
            init = out[m, j]
            held[:] = zero
            exact[:] = zero
            held[0] = init
            # Accumulator 0 and the merges start at init; the exact sums are kept without it.
            low0, high0, low, high = zero, zero, zero, zero
            overflows, tree_overflows = zero, zero
            p = 0
            for start in range(0, row.size, c):
                total = zero
                for k in range(start, min(start + c, row.size)):
                    total += np.int64(row[k]) * np.int64(column[k])
                if tree_rule != EXACT:
                    kept, over = _add(zero, total, tree_rule, tree_lo, tree_hi)
                    total = kept
                    tree_overflows += np.int64(over)
                held[p], over = _add(held[p], total, rule, lo, hi)
                overflows += np.int64(over)
                if over:
                    totals[3] = min(totals[3], start)
                exact[p] += total
                if p == 0:
                    low0, high0 = min(low0, exact[0]), max(high0, exact[0])
                else:
                    low, high = min(low, exact[p]), max(high, exact[p])
                p = p + 1 if p + 1 < n_acc else 0
            for q in range(1, n_acc):
                held[0], over = _add(held[0], held[q], rule, lo, hi)
                overflows += np.int64(over)
                if over:
                    totals[3] = min(totals[3], row.size)
                exact[0] += exact[q]
                low0, high0 = min(low0, exact[0]), max(high0, exact[0])
            if (init > zero and high0 > _HIGHEST - init) or (init < zero and low0 < _LOWEST - init):
                beyond[0] = True
            else:
                extremes[0] = min(extremes[0], low, init + low0)
                extremes[1] = max(extremes[1], high, init + high0)
            out[m, j] = held[0]
            totals[0] += overflows
            totals[1] += tree_overflows
            totals[2] += np.int64(overflows + tree_overflows > zero)
