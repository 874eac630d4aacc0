"""Shift, round and saturate integers: one branch-free body for every rounding mode.

With x = q * 2**s + r and 0 <= r < 2**s (q is the arithmetic shift, the floor), every mode is
``q + ((r + c0 + c1 * [x < 0] + c2 * [q odd]) >> s)`` for three constants of the mode, so all modes
cost the same. Adding the constants to the remainder instead of to x cannot overflow int64.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["rounding_constants"]


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
def _shift_right_round(acc, shift, c0, c1, c2, clamp, lo, hi, mask, sign, out):
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
def _shift_left(acc, shift, clamp, lo, hi, mask, sign, out):
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
def _count_outside(acc, shift, c0, c1, c2, lo, hi):
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
