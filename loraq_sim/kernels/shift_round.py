"""Narrow integers and widen them: shift-round-saturate, upshift, multipliers and float scales.

Shift, round and saturate is one branch-free body for every rounding mode. With x = q * 2**s + r and
0 <= r < 2**s (q is the arithmetic shift, the floor), every mode is
``q + ((r + c0 + c1 * [x < 0] + c2 * [q odd]) >> s)`` for three constants of the mode, so all modes
cost the same. Adding the constants to the remainder instead of to x cannot overflow int64.

The other three requantizations take a multiplier or a float32 scale for each column.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = [
    *("count_outside", "rounding_constants", "shift_left", "shift_right_round", "shift_up"),
    *("float_scale", "gemmlowp", "single_rounding"),
]

_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1


def rounding_constants(rounding: str, shift: int) -> tuple[int, int, int]:
    """Return (c0, c1, c2) of a rounding mode for a right shift of `shift` >= 1 bits.

    With full = 2**shift - 1 and half = 2**(shift - 1). A shift of 0 drops nothing: (0, 0, 0).
    """
    if shift == 0:
        return 0, 0, 0
    full, half = 2**shift - 1, 2 ** (shift - 1)
    return {
        "floor": (0, 0, 0),
        "ceil": (full, 0, 0),
        "symmetric_floor": (0, full, 0),
        "symmetric_ceil": (full, -full, 0),
        "negative_inf": (half - 1, 0, 0),
        "positive_inf": (half, 0, 0),
        "symmetric_zero": (half - 1, 1, 0),
        "symmetric_inf": (half, -1, 0),
        "conv_even": (half - 1, 0, 1),
        "conv_odd": (half, 0, -1),
    }[rounding]


@njit(cache=True)
def shift_right_round(acc, shift, c0, c1, c2, clamp, lo, hi, mask, sign, out):
    """Write round(acc / 2**shift) to `out`, clamped to [lo, hi] or cut to its low bits.

    acc (S,) int32 or int64; shift 0..59; every other scalar int64 but `clamp`, a bool.
    Without `clamp`, ``((q & mask) ^ sign) - sign`` keeps the low bits and extends their sign.
    """
    zero = np.int64(0)
    one = np.int64(1)
    dropped = (one << shift) - one
    if clamp:
        for i in range(acc.size):
            x = np.int64(acc[i])
            q = x >> shift
            r = (x & dropped) + c0 + (c1 & -np.int64(x < zero)) + (c2 & -(q & one))
            out[i] = min(max(q + (r >> shift), lo), hi)
    else:
        for i in range(acc.size):
            x = np.int64(acc[i])
            q = x >> shift
            r = (x & dropped) + c0 + (c1 & -np.int64(x < zero)) + (c2 & -(q & one))
            out[i] = (((q + (r >> shift)) & mask) ^ sign) - sign


@njit(cache=True)
def shift_left(acc, shift, clamp, lo, hi, mask, sign, out):
    """Write acc * 2**shift to `out`, clamped or cut to its low bits; shift 1..4.

    acc (S,) int32 or int64. The limits are applied to acc before the shift, exactly: outputs
    have at most 32 bits, so a value beyond 2**33 is out of range before and after any left shift,
    and its bits above the 32nd never reach the low bits kept.
    """
    bound = np.int64(1) << np.int64(33)
    low_bits = (np.int64(1) << np.int64(32)) - np.int64(1)
    if clamp:
        for i in range(acc.size):
            x = min(max(np.int64(acc[i]), -bound), bound) << shift
            out[i] = min(max(x, lo), hi)
    else:
        for i in range(acc.size):
            x = (np.int64(acc[i]) & low_bits) << shift
            out[i] = ((x & mask) ^ sign) - sign


@njit(cache=True)
def count_outside(acc, shift, c0, c1, c2, lo, hi):
    """Return how many values of round(acc / 2**shift) lie outside [lo, hi].

    acc (S,) int32 or int64; shift 0..59; every other scalar int64.
    """
    zero = np.int64(0)
    one = np.int64(1)
    dropped = (one << shift) - one
    outside = zero
    for i in range(acc.size):
        x = np.int64(acc[i])
        q = x >> shift
        r = (x & dropped) + c0 + (c1 & -np.int64(x < zero)) + (c2 & -(q & one))
        rounded = q + (r >> shift)
        outside += np.int64(rounded < lo) | np.int64(rounded > hi)
    return outside


@njit(cache=True)
def shift_up(x, shift, clamp, bottom, top, lowest, highest, spare, out):
    """Write x * 2**shift to `out`, in an accumulator of ``64 - spare`` bits.

    x (S,) int32 or int64; shift 0..63. With `clamp`, an x below `bottom` or above `top` becomes
    `lowest` or `highest`; without, the low bits are kept and their sign is extended. All scalars
    int64 but `clamp`, a bool.
    """
    if clamp:
        for i in range(x.size):
            value = np.int64(x[i])
            if value > top:
                out[i] = highest
            elif value < bottom:
                out[i] = lowest
            else:
                out[i] = value << shift
    else:
        for i in range(x.size):
            out[i] = ((np.int64(x[i]) << shift) << spare) >> spare


@njit(cache=True)
def gemmlowp(acc, multiplier, left, right, zero_point, lo, hi, out):
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
def single_rounding(acc, multiplier, shift, zero_point, lo, hi, out):
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
def float_scale(acc, scale, zero_point, lo, hi, out):
    """Float32 convert, float32 multiply, round half to even, zero point, clamp.

    acc (R, N) int32 or int64; scale (N,) float32; zero_point, lo and hi float64 holding integers;
    out (R, N), written in place.
    """
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # float64 holds every float32 and every limit of 32 bits, so only the product rounds.
            rounded = np.float64(np.rint(np.float32(acc[i, j]) * scale[j]))
            out[i, j] = np.int64(min(max(rounded + zero_point, lo), hi))
