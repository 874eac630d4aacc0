"""Requantize accumulators by fixed-point multipliers or float32 scales, one per column."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__: list[str] = []

_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1


@njit(cache=True)
def _gemmlowp(acc, multiplier, left, right, zero_point, lo, hi, out):
    """Double rounding: doubling high multiply, then a rounding divide by a power of two.

    acc (R, N) int32 or int64 within int32, also after the left shift; multiplier, left (0..30)
    and right (0..31) (N,) int64; the scalars int64; out (R, N), written in place.
    """
    zero, one = np.int64(0), np.int64(1)
    half = one << np.int64(30)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            product = (np.int64(acc[i, j]) << left[j]) * multiplier[j]
            # The nudge and C's division, which truncates, round ties toward plus infinity.
            if product >= zero:
                high = (product + half) >> np.int64(31)
            else:
                high = -((half - one - product) >> np.int64(31))
            # Only INT32_MIN * INT32_MIN leaves int32.
            high = min(high, np.int64(_INT32_MAX))
            mask = (one << right[j]) - one
            threshold = (mask >> one) + np.int64(high < zero)
            value = (high >> right[j]) + np.int64((high & mask) > threshold)
            out[i, j] = min(max(value + zero_point, lo), hi)


@njit(cache=True)
def _single_rounding(acc, multiplier, shift, zero_point, lo, hi, out):
    """One rounding, ties toward plus infinity: (acc * multiplier + 2**(shift-1)) >> shift.

    acc (R, N) int32 or int64 within int32; multiplier (0..2**31-1) and shift (1..62) (N,) int64;
    the scalars int64; out (R, N), written in place.
    """
    one = np.int64(1)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # Below 2**62 + 2**61, so int64 holds it.
            total = np.int64(acc[i, j]) * multiplier[j] + (one << (shift[j] - one))
            value = min(max(total >> shift[j], np.int64(_INT32_MIN)), np.int64(_INT32_MAX))
            out[i, j] = min(max(value + zero_point, lo), hi)


@njit(cache=True)
def _float_scale(acc, scale, zero_point, lo, hi, out):
    """Float32 convert, float32 multiply, round half to even, zero point, clamp.

    acc (R, N) int32 or int64; scale (N,) float32; zero_point, lo and hi float64 holding integers;
    out (R, N), written in place.
    """
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # float64 holds every float32 and every limit of 32 bits, so only the product rounds.
            rounded = np.float64(np.rint(np.float32(acc[i, j]) * scale[j]))
            out[i, j] = np.int64(min(max(rounded + zero_point, lo), hi))
