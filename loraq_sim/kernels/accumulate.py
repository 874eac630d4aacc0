"""Accumulate products of codes as a MAC array does, without tiles: two loops with the same bits.

*Lanes*, 32-bit and vectorizable. Operands come packed: K is ordered so that each accumulator's
chunks are contiguous (segment p holds accumulator p's chunks in order), every chunk is padded with
zeros to c products and every segment to a multiple of `BLOCK` chunks. Adding zero never overflows,
so padding changes nothing. W is in panels (tiles, K, width): the inner loops run over one panel
row, contiguous and of one width, which is what lets LLVM vectorize them. A step runs in two stages:
the exact sums of `BLOCK` chunks, then `BLOCK` adds under the overflow rule; stage two exists once
per rule. The caller proves that every lane value fits int32: chunk sums are at most
64 * 2**15 * 255 < 2**29, and accumulators have at most 30 bits or provably stay inside int32 (then
the rule is EXACT).

*Wide*, one output at a time in 64 bits: every width, every rule, no lane proof needed. It serves
what the lanes cannot hold (accumulators of 31 to 64 bits that may really overflow, sums beyond
int32) and checks them, since it reads operands unpacked and in order. No step overflows int64: an
add first asks whether the room left is enough.
"""

import numpy as np

from loraq_sim.kernels.jit import larger, njit, smaller
from loraq_sim.kernels.processor import NEVER

__all__ = ["BLOCK", "CLAMP", "EXACT", "WRAP", "accumulate_lanes", "accumulate_wide"]

EXACT, CLAMP, WRAP = 0, 1, 2
BLOCK = 4


@njit
def _chunk_sums(a, panel, start, c, part):
    """part[q] = sum over i < c of a[start + q * c + i] * panel[start + q * c + i]."""
    for q in range(BLOCK):
        row = part[q]
        k = start + q * c
        i = 0
        if c >= 4:
            a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
            w0, w1, w2, w3 = panel[k], panel[k + 1], panel[k + 2], panel[k + 3]
            for n in range(row.size):
                s = np.int32(a0 * np.int32(w0[n])) + np.int32(a1 * np.int32(w1[n]))
                t = np.int32(a2 * np.int32(w2[n])) + np.int32(a3 * np.int32(w3[n]))
                row[n] = np.int32(s + t)
            i = 4
        elif c >= 2:
            a0, a1 = a[k], a[k + 1]
            w0, w1 = panel[k], panel[k + 1]
            for n in range(row.size):
                s = np.int32(a0 * np.int32(w0[n])) + np.int32(a1 * np.int32(w1[n]))
                row[n] = np.int32(s)
            i = 2
        else:
            a0 = a[k]
            w0 = panel[k]
            for n in range(row.size):
                row[n] = np.int32(a0 * np.int32(w0[n]))
            i = 1
        while i + 4 <= c:
            a0, a1, a2, a3 = a[k + i], a[k + i + 1], a[k + i + 2], a[k + i + 3]
            w0, w1, w2, w3 = panel[k + i], panel[k + i + 1], panel[k + i + 2], panel[k + i + 3]
            for n in range(row.size):
                s = np.int32(a0 * np.int32(w0[n])) + np.int32(a1 * np.int32(w1[n]))
                t = np.int32(a2 * np.int32(w2[n])) + np.int32(a3 * np.int32(w3[n]))
                row[n] = np.int32(row[n] + np.int32(s + t))
            i += 4
        while i < c:
            a0 = a[k + i]
            w0 = panel[k + i]
            for n in range(row.size):
                row[n] = np.int32(row[n] + np.int32(a0 * np.int32(w0[n])))
            i += 1


@njit
def _fit_tree(part, clamp, lo, hi, mask, events):
    """Apply the tree's rule to BLOCK chunk sums in place; events[n] counts those that left it."""
    for q in range(BLOCK):
        row = part[q]
        if clamp:
            for n in range(row.size):
                s = row[n]
                v = smaller(larger(s, lo), hi)
                events[n] = np.int32(events[n] + np.int32(v != s))
                row[n] = v
        else:
            for n in range(row.size):
                s = row[n]
                v = np.int32(np.int32(np.int32(s - lo) & mask) + lo)
                events[n] = np.int32(events[n] + np.int32(v != s))
                row[n] = v


@njit
def _add_exact(part, acc, low, high):
    """Add BLOCK chunks without a limit; low and high keep the extreme prefixes."""
    p0, p1, p2, p3 = part[0], part[1], part[2], part[3]
    for n in range(acc.size):
        v0 = np.int32(acc[n] + p0[n])
        v1 = np.int32(v0 + p1[n])
        v2 = np.int32(v1 + p2[n])
        v3 = np.int32(v2 + p3[n])
        low[n] = smaller(low[n], smaller(smaller(v0, v1), smaller(v2, v3)))
        high[n] = larger(high[n], larger(larger(v0, v1), larger(v2, v3)))
        acc[n] = v3


@njit
def _add_clamped(part, acc, lo, hi):
    """Add BLOCK chunks, clamping each sum to [lo, hi]."""
    p0, p1, p2, p3 = part[0], part[1], part[2], part[3]
    for n in range(acc.size):
        v = smaller(larger(np.int32(acc[n] + p0[n]), lo), hi)
        v = smaller(larger(np.int32(v + p1[n]), lo), hi)
        v = smaller(larger(np.int32(v + p2[n]), lo), hi)
        acc[n] = smaller(larger(np.int32(v + p3[n]), lo), hi)


@njit
def _add_clamped_counted(part, acc, lo, hi, events, chunk, first):
    """Add BLOCK chunks, clamping each sum; events[n] counts the sums that left [lo, hi].

    `chunk` is the number of the first; first[n] keeps the number of the first that left.
    """
    for q in range(BLOCK):
        row = part[q]
        here = np.int32(chunk + q)
        for n in range(acc.size):
            s = np.int32(acc[n] + row[n])
            v = smaller(larger(s, lo), hi)
            events[n] = np.int32(events[n] + np.int32(v != s))
            first[n] = smaller(first[n], here) if v != s else first[n]
            acc[n] = v


@njit
def _add_wrapped_counted(part, acc, lo, mask, events, chunk, first):
    """Add BLOCK chunks modulo mask + 1; events[n] counts the sums that left the range.

    `chunk` and `first` as above.
    """
    for q in range(BLOCK):
        row = part[q]
        here = np.int32(chunk + q)
        for n in range(acc.size):
            s = np.int32(acc[n] + row[n])
            v = np.int32(np.int32(np.int32(s - lo) & mask) + lo)
            events[n] = np.int32(events[n] + np.int32(v != s))
            first[n] = smaller(first[n], here) if v != s else first[n]
            acc[n] = v


@njit
def _merge(total, acc, rule, lo, hi, mask, low, high, events):
    """Add accumulator `acc` into `total` under the rule; return whether a sum left its range."""
    some = False
    for n in range(total.size):
        s = np.int32(total[n] + acc[n])
        v = s
        if rule == CLAMP:
            v = smaller(larger(s, lo), hi)
        elif rule == WRAP:
            v = np.int32(np.int32(np.int32(s - lo) & mask) + lo)
        events[n] = np.int32(events[n] + np.int32(v != s))
        low[n] = smaller(low[n], s)
        high[n] = larger(high[n], s)
        some |= v != s
        total[n] = v
    return some


@njit(cache=True)
def accumulate_lanes(a, panels, ends, c, tree, acc_rule, count, extremes, totals, k, out):
    """Accumulate every output; `out` holds the initial values and is overwritten in place.

    Parameters
    ----------
    a : (M, K) int32, packed
    panels : (tiles, K, width) int16, packed
    ends : (P,) int64, end of each accumulator's segment of K
    c : int, products per chunk
    tree : (rule, lo, hi, mask), int32, rule EXACT for an unbounded tree
    acc_rule : (rule, lo, hi, mask), int32, rule EXACT for no limit
    count : bool, whether CLAMP counts its overflows (WRAP always does)
    extremes : (2,) int32, lowest and highest exact prefix; only rule EXACT updates them fully
    totals : (4,) int64, accumulator overflows, tree overflows, outputs with either, first K index
        of an accumulator overflow (lowered only)
    k : int, K before packing, where merges stand
    out : (M, tiles * width) int32
    """
    tiles, _, width = panels.shape
    tree_rule, tree_lo, tree_hi, tree_mask = tree
    rule, lo, hi, mask = acc_rule
    part = np.zeros((BLOCK, width), np.int32)
    spare = np.zeros(width, np.int32)
    low = np.zeros(width, np.int32)
    high = np.zeros(width, np.int32)
    events = np.zeros(width, np.int32)
    tree_events = np.zeros(width, np.int32)
    first = np.full(width, NEVER, np.int32)
    for tile in range(tiles):
        panel = panels[tile]
        for m in range(a.shape[0]):
            row = a[m]
            total = out[m, tile * width : (tile + 1) * width]
            for n in range(width):
                low[n] = smaller(low[n], total[n])
                high[n] = larger(high[n], total[n])
            # Typed: a literal would compile what it is passed to twice.
            start = np.int64(0)
            for p in range(ends.size):
                acc = total
                begin = start
                if p > 0:
                    spare[:] = 0
                    acc = spare
                while start < ends[p]:
                    _chunk_sums(row, panel, start, c, part)
                    if tree_rule != EXACT:
                        _fit_tree(
                            part, tree_rule == CLAMP, tree_lo, tree_hi, tree_mask, tree_events
                        )
                    chunk = (start - begin) // c
                    if rule == EXACT:
                        _add_exact(part, acc, low, high)
                    elif rule == WRAP:
                        _add_wrapped_counted(part, acc, lo, mask, events, chunk, first)
                    elif count:
                        _add_clamped_counted(part, acc, lo, hi, events, chunk, first)
                    else:
                        _add_clamped(part, acc, lo, hi)
                    start += BLOCK * c
                earliest = np.int32(NEVER)
                for n in range(width):
                    earliest = smaller(earliest, first[n])
                if earliest != NEVER:
                    totals[3] = smaller(totals[3], (np.int64(earliest) * ends.size + p) * c)
                    first[:] = NEVER
                if p > 0 and _merge(total, spare, rule, lo, hi, mask, low, high, events):
                    totals[3] = smaller(totals[3], k)
            for n in range(width):
                totals[0] += events[n]
                totals[1] += tree_events[n]
                totals[2] += np.int64((events[n] | tree_events[n]) != 0)
            events[:] = 0
            tree_events[:] = 0
    for n in range(width):
        extremes[0] = smaller(extremes[0], low[n])
        extremes[1] = larger(extremes[1], high[n])


_TWO_31 = np.int64(2**31)
_HIGHEST = np.int64(2**63 - 1)
_LOWEST = np.int64(-(2**63 - 1) - 1)


@njit
def _add(x, y, rule, lo, hi):
    """Return (x + y under the rule, whether the exact sum left [lo, hi]); all int64.

    x lies in [lo, hi]. y does too, or is a chunk sum of at most 2**29 in magnitude. Wrapping needs
    the modulus once when y is below it, which holds from 32 bits on; narrower sums use a mask.
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


@njit
def _load(x, rule, lo, hi):
    """Return (x as an accumulator of [lo, hi] holds it, whether it does not fit); int64."""
    if lo <= x and x <= hi:
        return x, False
    if rule == CLAMP:
        return (hi, True) if x > hi else (lo, True)
    # Narrower than 64 bits, where everything fits: hi - lo is a mask of ones.
    mask = hi - lo
    low = x & mask
    return (low - mask - np.int64(1), True) if low > hi else (low, True)


@njit(cache=True)
def accumulate_wide(a, w, c, n_acc, tree, acc_rule, extremes, beyond, totals, out):
    """Accumulate every output; `out` holds the initial values and is overwritten in place.

    An initial value outside the accumulator is put there under its rule first, which counts as an
    overflow at K index 0; exact prefixes start from the value itself.

    Parameters
    ----------
    a : (M, K) int32 ; w : (N, K) int16
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
            held[0], over = _load(init, rule, lo, hi)
            # Accumulator 0 and the merges start at init; the exact sums are kept without it.
            low0, high0, low, high = zero, zero, zero, zero
            overflows, tree_overflows = np.int64(over), zero
            if over:
                totals[3] = zero
            p = 0
            for start in range(0, row.size, c):
                total = zero
                for k in range(start, smaller(start + c, row.size)):
                    total += np.int64(row[k]) * np.int64(column[k])
                if tree_rule != EXACT:
                    kept, over = _add(zero, total, tree_rule, tree_lo, tree_hi)
                    total = kept
                    tree_overflows += np.int64(over)
                held[p], over = _add(held[p], total, rule, lo, hi)
                overflows += np.int64(over)
                if over:
                    totals[3] = smaller(totals[3], start)
                exact[p] += total
                if p == 0:
                    low0, high0 = smaller(low0, exact[0]), larger(high0, exact[0])
                else:
                    low, high = smaller(low, exact[p]), larger(high, exact[p])
                p = p + 1 if p + 1 < n_acc else 0
            for q in range(1, n_acc):
                held[0], over = _add(held[0], held[q], rule, lo, hi)
                overflows += np.int64(over)
                if over:
                    totals[3] = smaller(totals[3], row.size)
                exact[0] += exact[q]
                low0, high0 = smaller(low0, exact[0]), larger(high0, exact[0])
            if (init > zero and high0 > _HIGHEST - init) or (init < zero and low0 < _LOWEST - init):
                beyond[0] = True
            else:
                extremes[0] = smaller(smaller(extremes[0], low), init + low0)
                extremes[1] = larger(larger(extremes[1], high), init + high0)
            out[m, j] = held[0]
            totals[0] += overflows
            totals[1] += tree_overflows
            totals[2] += np.int64(overflows + tree_overflows > zero)
