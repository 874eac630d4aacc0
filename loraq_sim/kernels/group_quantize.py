"""Round groups of a row to integer codes, with the best of several candidate scales each."""

import numpy as np
from numba import njit

__all__ = ["quantize_groups"]


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
    for i in range(n_rows):
        row = x[i]
        out = codes[i]
        for g in range(candidates.shape[1]):
            start = g * group
            stop = min(start + group, k)
            best = candidates[i, g, 0]
            if candidates.shape[2] > 1 and best != zero:
                best_error = np.float32(np.inf)
                for c in range(candidates.shape[2]):
                    scale = candidates[i, g, c]
                    error = zero
                    for j in range(start, stop):
                        q = np.rint(row[j] / scale)
                        q = min(max(q, lo), hi)
                        miss = row[j] - q * scale
                        error += miss * miss
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
