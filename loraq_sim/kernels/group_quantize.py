"""Round groups of a row to integer codes, with the best of several candidate scales each.

Squared errors are summed in 32 lanes, which a compiler may keep in vector registers without being
allowed to reorder a float sum (with 16, LLVM 20 unrolls the loop into scalar code, at half the
speed). Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest
integer, ties to even.
"""

import numpy as np
from numba import njit

__all__ = ["group_error", "group_extremes", "quantize_groups"]

_LANES = 32
_ROUND = np.float32(1.5 * 2**23)


@njit(inline="always")
def group_error(values, n, scale, lo, hi, lanes):
    """Squared error of the first `n` float32 `values` on the integer grid of `scale`.

    Codes come from a product with 1 / scale: at a tie they may differ from those of a division,
    with the same error. `lanes` is scratch of shape (32,), float32.
    """
    inverse = np.float32(1) / scale
    for lane in range(_LANES):
        lanes[lane] = np.float32(0)
    full = n - n % _LANES
    for j in range(0, full, _LANES):
        for lane in range(_LANES):
            x = values[j + lane]
            q = (min(max(x * inverse, lo), hi) + _ROUND) - _ROUND
            miss = x - q * scale
            lanes[lane] += miss * miss
    error = np.float32(0)
    for lane in range(_LANES):
        error += lanes[lane]
    for j in range(full, n):
        x = values[j]
        q = (min(max(x * inverse, lo), hi) + _ROUND) - _ROUND
        miss = x - q * scale
        error += miss * miss
    return error


@njit(cache=True)
def group_extremes(x, group, extremes):
    """Write the signed element of largest magnitude of each group, the positive one on ties.

    Parameters
    ----------
    x : ndarray of shape (rows, K), float32
    group : int
        Elements per scale; the last group of a row may be short.
    extremes : ndarray of shape (rows, groups), float32
        Written in place.
    """
    k = x.shape[1]
    tops = np.empty(_LANES, dtype=np.float32)
    bottoms = np.empty(_LANES, dtype=np.float32)
    for i in range(x.shape[0]):
        row = x[i]
        for g in range(extremes.shape[1]):
            start = g * group
            stop = min(start + group, k)
            for lane in range(_LANES):
                tops[lane] = np.float32(0)
                bottoms[lane] = np.float32(0)
            full = stop - (stop - start) % _LANES
            for j in range(start, full, _LANES):
                for lane in range(_LANES):
                    tops[lane] = max(tops[lane], row[j + lane])
                    bottoms[lane] = min(bottoms[lane], row[j + lane])
            top = np.float32(0)
            bottom = np.float32(0)
            for lane in range(_LANES):
                top = max(top, tops[lane])
                bottom = min(bottom, bottoms[lane])
            for j in range(full, stop):
                top = max(top, row[j])
                bottom = min(bottom, row[j])
            extremes[i, g] = top if top >= -bottom else bottom


@njit(cache=True)
def quantize_groups(x, candidates, group, lo, hi, codes, scales):
    """Write codes and scales of every group; checks nothing.

    Parameters
    ----------
    x : ndarray of shape (rows, K), float32
    candidates : ndarray of shape (rows, groups, C), float32
        Scales to try, already rounded to the stored scale format; 0 marks an all-zero group.
    group : int
        Elements per scale; the last group of a row may be short.
    lo, hi : float32
        Smallest and largest code.
    codes : ndarray of shape (rows, K), int8
        Written in place: clip(round half to even(x / scale), lo, hi).
    scales : ndarray of shape (rows, groups), float32
        Written in place: the candidate of least squared error, the first one on ties.
    """
    n_rows, k = x.shape
    zero = np.float32(0)
    lanes = np.zeros(_LANES, dtype=np.float32)
    values = np.empty(group, dtype=np.float32)
    for i in range(n_rows):
        row = x[i]
        out = codes[i]
        for g in range(candidates.shape[1]):
            start = g * group
            stop = min(start + group, k)
            best = candidates[i, g, 0]
            if candidates.shape[2] > 1 and best != zero:
                best_error = np.inf
                for j in range(start, stop):
                    values[j - start] = row[j]
                for c in range(candidates.shape[2]):
                    scale = candidates[i, g, c]
                    error = group_error(values, stop - start, scale, lo, hi, lanes)
                    if error < best_error:
                        best_error = error
                        best = scale
            scales[i, g] = best
            if best == zero:
                for j in range(start, stop):
                    out[j] = 0
            else:
                for j in range(start, stop):
                    q = np.rint(row[j] / best)
                    out[j] = np.int8(min(max(q, lo), hi))
