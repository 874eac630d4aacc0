"""Round groups of a row to integer codes, with the best of several candidate scales each.

Squared errors are summed in 32 lanes, which a compiler may keep in vector registers without being
allowed to reorder a float sum (with 16, LLVM 20 unrolls the loop into scalar code, at half the
speed). Adding and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest
integer, ties to even.

A search sums each candidate twice at most: first in whatever order is quickest (`reassoc`), then,
if that comes near the least error so far, in the one order that decides. The quick sum also rounds
by `rint`, which gives the same codes. Neither may use fused products (`contract`): their errors
differ by more than a share of the sum where values lie on the grid.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

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


@njit(cache=True, fastmath={"nnan", "nsz"})
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
    for i in range(x.shape[0]):
        row = x[i]
        for g in range(extremes.shape[1]):
            top = np.float32(0)
            bottom = np.float32(0)
            for value in row[g * group : min(g * group + group, k)]:
                top = max(top, value)
                bottom = min(bottom, value)
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
    k = x.shape[1]
    lanes = np.zeros(_LANES, dtype=np.float32)
    for i in range(x.shape[0]):
        # Neighboring groups are alike: what served the last one sets a bar that most miss.
        guess = 0
        for g in range(candidates.shape[1]):
            values = x[i, g * group : min(g * group + group, k)]
            tried = candidates[i, g]
            if tried.size > 1 and tried[0] != np.float32(0):
                guess = _best_candidate(values, tried, guess, lo, hi, lanes)
                scales[i, g] = tried[guess]
            else:
                scales[i, g] = tried[0]
            _round_group(values, scales[i, g], lo, hi, codes[i, g * group : g * group + group])


@njit
def _best_candidate(values, tried, guess, lo, hi, lanes):
    """Index of the scale of least error, the first on ties; `guess` is tried before the others."""
    # Two sums of n terms in different orders differ by less than 2 n 2**-24 of either.
    slack = np.float32(1 + values.size * 2.0**-22)
    # The smallest factors of a tiny scale are zero in its stored format: nothing to divide by.
    best = guess if tried[guess] != np.float32(0) else 0
    guess = best
    least = group_error(values, values.size, tried[best], lo, hi, lanes)
    if not least < np.inf:
        best, least = 0, np.float32(np.inf)
    for c in range(tried.size):
        if (
            c == guess
            or tried[c] == np.float32(0)
            or _quick_error(values, tried[c], lo, hi) > least * slack
        ):
            continue
        error = group_error(values, values.size, tried[c], lo, hi, lanes)
        if error < least or (error == least and c < best):
            best, least = c, error
    return best


@njit(fastmath={"reassoc", "nnan"})
def _quick_error(values, scale, lo, hi):
    """As `group_error`, summed in another order."""
    inverse = np.float32(1) / scale
    error = np.float32(0)
    for j in range(values.size):
        x = values[j]
        miss = x - np.rint(min(max(x * inverse, lo), hi)) * scale
        error += miss * miss
    return error


@njit(fastmath={"nnan"})
def _round_group(values, scale, lo, hi, codes):
    if scale == np.float32(0):
        codes[:] = 0
        return
    for j in range(values.size):
        codes[j] = np.int8(np.int32(np.rint(min(max(values[j] / scale, lo), hi))))
