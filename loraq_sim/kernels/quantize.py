"""Round groups of values to codes, and what descent on W - P asks of such rounding.

`best_scales` takes the best of several candidate scales for each group. A search sums each
candidate twice at most: first in whatever order is quickest (`reassoc`), then, if that comes near
the least error so far, in the one order that decides. The quick sum also rounds by `rint`, which
gives the same codes. Neither may use fused products (`contract`): their errors differ by more than
a share of the sum where values lie on the grid.

`round_residual` says what rounding leaves of W - P, group by group, with scales that follow a
slowly moving P. Each call tries the group's last scale, one a step below or above it, and now and
then a fresh one from the range of the group: a search that costs two candidates instead of some
thirty, because P moves little between calls.

`range_direction` is the gradient of a smooth measure of the range of each group of W - P.
F_p = 1/2 sum_g ||v_g - c_g||_p^2, v = W - P. For large p this is half the squared half-range, and
with integers of free scale the rounding error of a group is proportional to its range. The center
c_g is 0, or half a step towards the extreme for a grid with one more code on that side; it is
treated as constant. -dF/dv = -amax |u|^(p-2) u (sum |u|^p)^(2/p - 1) with u = (v - c) / amax.

Sums of a descent are taken in whatever order is quickest, too: the products that it is made of are
no more reproducible from processor to processor. Those that decide about what is stored are kept in
32 lanes, which a compiler may keep in vector registers without being allowed to reorder a float sum
(with 16, LLVM 20 unrolls the loop into scalar code, at half the speed). Adding
and subtracting 1.5 * 2**23 rounds a float32 of magnitude below 2**22 to the nearest integer, ties
to even.
"""

import math

import numpy as np

from loraq_sim.kernels.jit import larger, njit, smaller

__all__ = [
    *("best_scales", "round_around"),
    *("range_direction", "round_residual"),
]

_LANES = 32
_ROUND = np.float32(1.5 * 2**23)


@njit(inline="always")
def _group_error(values, n, scale, lo, hi, lanes):
    """Squared error of the first `n` float32 `values` on the integer grid of `scale`.

    Codes come from a product with 1 / scale: at a tie they may differ from those of a division,
    with the same error. `lanes` is scratch of shape (32,), float32.
    """
    inverse = np.float32(1) / scale
    for lane in range(_LANES):
        lanes[lane] = np.float32(0)
    full = n & ~(_LANES - 1)
    for j in range(0, full, _LANES):
        for lane in range(_LANES):
            x = values[j + lane]
            q = (smaller(larger(x * inverse, lo), hi) + _ROUND) - _ROUND
            miss = x - q * scale
            lanes[lane] += miss * miss
    error = np.float32(0)
    for lane in range(_LANES):
        error += lanes[lane]
    for j in range(full, n):
        x = values[j]
        q = (smaller(larger(x * inverse, lo), hi) + _ROUND) - _ROUND
        miss = x - q * scale
        error += miss * miss
    return error


@njit(cache=True)
def best_scales(x, candidates, group, lo, hi, scales):
    """Write the scale of every group: the candidate of least squared error, the first on ties.

    Parameters
    ----------
    x : ndarray of shape (rows, K), float32
    candidates : ndarray of shape (rows, groups, C), float32
        Scales to try, already rounded to the stored scale format; 0 marks an all-zero group.
    group : int
        Elements per scale; the last group of a row may be short.
    lo, hi : float32
        Smallest and largest code.
    scales : ndarray of shape (rows, groups), float32
        Written in place.
    """
    lanes = np.empty(_LANES, np.float32)
    zero, best = np.float32(0), 0
    for i in range(x.shape[0]):
        for g in range(candidates.shape[1]):
            if candidates[i, g, 0] == zero:
                scales[i, g] = zero
                continue
            values = x[i, g * group : smaller(g * group + group, x.shape[1])]
            # Two sums of n terms in different orders differ by less than 2 n 2**-24 of either.
            slack = np.float32(1 + values.size * 2.0**-22)
            # Neighboring groups are alike: what served the last one sets a bar that most miss. The
            # smallest factors of a tiny scale are zero in its stored format: nothing to divide by.
            guess = best if candidates[i, g, best] != zero else 0
            best, least = 0, np.float32(np.inf)
            for turn in range(-1, candidates.shape[2]):
                c = turn if turn >= 0 else guess
                scale = candidates[i, g, c]
                if scale == zero or turn == guess:
                    continue
                if turn >= 0 and _quick_error(values, scale, lo, hi) > least * slack:
                    continue
                error = _group_error(values, values.size, scale, lo, hi, lanes)
                if error < least or (error == least and c < best):
                    best, least = c, error
            scales[i, g] = candidates[i, g, best]


@njit(fastmath={"reassoc", "nnan"})
def _quick_error(values, scale, lo, hi):
    """As `_group_error`, summed in another order."""
    inverse = np.float32(1) / scale
    error = np.float32(0)
    for j in range(values.size):
        x = values[j]
        miss = x - np.rint(smaller(larger(x * inverse, lo), hi)) * scale
        error += miss * miss
    return error


@njit(cache=True)
def round_around(x, group, step, zero, lo, hi, codes, misses):
    """Write clip(round half to even(x / step) + zero, lo, hi), and the squared error of each group.

    Parameters
    ----------
    x : ndarray of shape (rows, K), float32
    group : int
        Elements per scale; the last group of a row may be short.
    step, zero : ndarray of shape (rows, groups), float64
        What to divide by, not 0, and the code of zero.
    lo, hi : float64
        Smallest and largest code.
    codes : ndarray of shape (rows, K), uint8 or int8
        Written in place.
    misses : ndarray of shape (rows, groups), float64
        Written in place; empty where nobody asks.
    """
    k = x.shape[1]
    for i in range(x.shape[0]):
        for g in range(step.shape[1]):
            start, stop = g * group, smaller(g * group + group, k)
            values, rounded, s, z = x[i, start:stop], codes[i, start:stop], step[i, g], zero[i, g]
            for j in range(values.size):
                code = np.rint(np.float64(values[j]) / s) + z
                rounded[j] = np.int32(smaller(larger(code, lo), hi))
            if misses.size == 0:
                continue
            error = 0.0
            for j in range(values.size):
                miss = (np.float64(rounded[j]) - z) * s - np.float64(values[j])
                error += miss * miss
            misses[i, g] = error


_E2M1_MAX = np.float32(6)


@njit(cache=True)
def round_residual(weight, product, group, ends, fresh, is_power, steps, scales):
    """Turn `product` into (W - P) - round(W - P) on a grid; returns its squared norm.

    Parameters
    ----------
    weight : ndarray of shape (rows, K), float32
    product : ndarray of shape (rows, K), float32
        P on entry, overwritten by the error.
    group : int
        Elements per scale; the last group of a row may be short.
    ends : (float32, float32), or ()
        Smallest and largest code of integers, or none for the codes 0, 0.5, 1, 1.5, 2, 3, 4, 6 and
        their negatives. Either is compiled on its own, when it is asked for.
    fresh : float32
        What code the extreme of a group gets under a fresh scale; negative for scales with a sign.
        0: fresh scales only for groups without a scale. Without `ends` it is always the largest.
    is_power : bool
        Whether scales are powers of two.
    steps : ndarray of shape (C,), float32
        Factors of the last scale to try.
    scales : ndarray of shape (rows, groups), float32
        Last scales on entry, 0 where there is none; overwritten by the best.
    """
    lanes, v = np.empty(_LANES, np.float32), np.empty(group, np.float32)
    zero, total = np.float32(0), 0.0
    # Only branches on the length of a tuple are left out where they are not taken.
    if len(ends) == 0:
        code = _E2M1_MAX
    else:
        lo, hi = ends
        code = fresh if fresh != zero else hi
    for i in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            start = g * group
            n = smaller(start + group, weight.shape[1]) - start
            for j in range(n):
                v[j] = weight[i, start + j] - product[i, start + j]
            last = scales[i, g]
            best, error = last, np.float32(np.inf)
            # The fresh scale comes last.
            for c in range(steps.size + 1):
                if c < steps.size:
                    scale = last * steps[c]
                elif fresh != zero or best == zero:
                    scale = _fresh_scale(v, n, code, is_power)
                else:
                    scale = zero
                if scale == zero:
                    continue
                if len(ends) == 0:
                    trial = _error_e2m1(v, n, scale, lanes)
                else:
                    trial = _quick_error(v[:n], scale, lo, hi)
                if trial < error:
                    best, error = scale, trial
            scales[i, g] = best
            if best == zero:
                for j in range(n):
                    product[i, start + j] = v[j]
                continue
            total += np.float64(error)
            inverse = np.float32(1) / best
            for j in range(n):
                if len(ends) == 0:
                    q = _round_e2m1(v[j] * inverse)
                else:
                    q = (smaller(larger(v[j] * inverse, lo), hi) + _ROUND) - _ROUND
                product[i, start + j] = v[j] - q * best
    return total


@njit(inline="always")
def _fresh_scale(v, n, code, is_power):
    """The scale that puts the extreme of `v` on `code`, rounded up to a power of two if asked."""
    top, bottom = np.float32(0), np.float32(0)
    for j in range(n):
        top, bottom = larger(top, v[j]), smaller(bottom, v[j])
    scale = (top if top >= -bottom else bottom) / code
    if is_power or code > np.float32(0):
        scale = abs(scale)
    if not is_power or scale == np.float32(0):
        return scale
    fraction, exponent = math.frexp(scale)
    return np.float32(math.ldexp(1.0, exponent - (fraction == 0.5)))


@njit
def _round_e2m1(x):
    size = smaller(abs(x), _E2M1_MAX)
    # Spacing 0.5 below 2, 1 below 4, 2 above; an even multiple of it has an even mantissa.
    per_unit = np.float32(2) if size < 2 else (np.float32(1) if size < 4 else np.float32(0.5))
    spacing = np.float32(0.5) if size < 2 else (np.float32(1) if size < 4 else np.float32(2))
    return math.copysign(((size * per_unit + _ROUND) - _ROUND) * spacing, x)


@njit(inline="always")
def _error_e2m1(v, n, scale, lanes):
    inverse = np.float32(1) / scale
    for lane in range(_LANES):
        lanes[lane] = np.float32(0)
    full = n & ~(_LANES - 1)
    for j in range(0, full, _LANES):
        for lane in range(_LANES):
            x = v[j + lane]
            miss = x - _round_e2m1(x * inverse) * scale
            lanes[lane] += miss * miss
    error = np.float32(0)
    for lane in range(_LANES):
        error += lanes[lane]
    for j in range(full, n):
        x = v[j]
        miss = x - _round_e2m1(x * inverse) * scale
        error += miss * miss
    return error


# Smaller elements weigh 2**-(3 p) of the largest: nothing; their powers would be subnormal.
_FLOOR = np.float32(2.0**-6)


@njit(cache=True)
def range_direction(weight, product, group, doublings, offset):
    """Turn `product` into dF/dv, the direction in which P flattens W - P.

    Parameters
    ----------
    weight : ndarray of shape (rows, K), float32
    product : ndarray of shape (rows, K), float32
        P on entry, overwritten by the direction.
    group : int
        Elements per scale; the last group of a row may be short.
    doublings : int
        log2 p, from 3 to 5.
    offset : float32
        Shift of the center towards the extreme, as a share of the range of the group.
    """
    zero, k = np.float32(0), weight.shape[1]
    count = -(-k // group)
    v, power, base = np.empty(k, np.float32), np.empty(k, np.float32), np.empty(k, np.float32)
    # Of each group; divisions and roots of a row in a loop of their own do not wait for each other.
    centers, sizes = np.empty(count, np.float32), np.empty(count, np.float32)
    for i in range(weight.shape[0]):
        for g in range(count):
            # Views, of which a compiler sees that no index is negative.
            start, stop = g * group, smaller(g * group + group, k)
            w, p, rest = weight[i, start:stop], product[i, start:stop], v[start:stop]
            top, bottom = zero, zero
            for j in range(w.size):
                x = w[j] - p[j]
                rest[j] = x
                top, bottom = larger(top, x), smaller(bottom, x)
            center = offset * (top - bottom)
            if top < -bottom:
                center = -center
            centers[g] = center
            sizes[g] = larger(top - center, center - bottom)
        for g in range(count):
            # All zero: nothing to flatten, and the direction comes out as zero.
            sizes[g] = np.float32(1) / sizes[g] if sizes[g] != zero else zero
        for g in range(count):
            start, stop = g * group, smaller(g * group + group, k)
            rest, square, high = v[start:stop], base[start:stop], power[start:stop]
            center, inverse = centers[g], sizes[g]
            for j in range(rest.size):
                rest[j] -= center
                u = rest[j] * inverse
                square[j] = larger(u * u, _FLOOR)
                high[j] = square[j]
            # u**2, u**6, u**14, u**30: no division by u**2 afterwards.
            for _ in range(doublings - 2):
                for j in range(rest.size):
                    high[j] = high[j] * high[j] * square[j]
            sizes[g] = _dot(high, square)
        for g in range(count):
            root = np.float64(sizes[g])
            for _ in range(doublings - 1):
                root = np.sqrt(root)
            sizes[g] = np.float32(root / sizes[g])
        for g in range(count):
            start, stop = g * group, smaller(g * group + group, k)
            p, rest, high, factor = (
                product[i, start:stop],
                v[start:stop],
                power[start:stop],
                sizes[g],
            )
            for j in range(p.size):
                p[j] = rest[j] * high[j] * factor


@njit(fastmath={"reassoc", "nnan"})
def _dot(a, b):
    total = np.float32(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total
