"""Round groups of float32 values under scales that are known, as a data path does: one pass each.

Ranges are found on the bits of the numbers, as integers: their order is that of the floats once the
magnitude of negative ones is flipped, and compilers vectorize extremes of integers without being
told that there is no NaN.

A small float has 1 sign bit, e exponent bits and m fraction bits, and 2**(1 - bias - m) is its
smallest step. Adding a power of two with that step as its last bit rounds a subnormal; a normal one
is rounded by adding half a unit of its last place to the bits, less one where that is even.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["encode_groups", "group_ranges", "group_squares", "largest_bits", "round_groups"]

_ONE, _SIZE, _SIGN = np.int32(1), np.int32(2**31 - 1), np.int32(31)


@njit(cache=True, nogil=True)
def group_ranges(bits, group, low, high):
    """Lowest and highest value of each group, both with 0.

    Parameters
    ----------
    bits : ndarray of shape (rows, K), int32
        Of float32 values that are finite.
    group : int
        Elements per scale; the last group of a row may be short.
    low, high : ndarray of shape (rows, groups), int32
        Bits of float32, written in place.
    """
    k = bits.shape[1]
    for i in range(bits.shape[0]):
        for g in range(low.shape[1]):
            part = bits[i, g * group : min(g * group + group, k)]
            bottom, top = np.int32(0), np.int32(0)
            for j in range(part.size):
                ordered = np.int32(part[j] ^ np.int32((part[j] >> _SIGN) & _SIZE))
                bottom, top = min(bottom, ordered), max(top, ordered)
            low[i, g] = bottom ^ np.int32((bottom >> _SIGN) & _SIZE)
            high[i, g] = top


@njit(cache=True, nogil=True, fastmath={"nnan"})
def round_groups(x, scales, group, lo, hi, codes):
    """Write clip(round half to even(x / scale), lo, hi).

    Parameters
    ----------
    x : ndarray of shape (rows, K), float32
    scales : ndarray of shape (rows, groups), float32
        0 marks a group of zeros.
    group : int
        Elements per scale; the last group of a row may be short.
    lo, hi : float32
        Smallest and largest code.
    codes : ndarray of shape (rows, K), int8 or int16
        Written in place.
    """
    k = x.shape[1]
    for i in range(x.shape[0]):
        for g in range(scales.shape[1]):
            start, stop = g * group, min(g * group + group, k)
            values, rounded, scale = x[i, start:stop], codes[i, start:stop], scales[i, g]
            if scale == np.float32(0):
                scale = np.float32(1)
            for j in range(values.size):
                rounded[j] = np.int32(np.rint(min(max(values[j] / scale, lo), hi)))


@njit(cache=True, nogil=True)
def encode_groups(x, scales, group, largest, layout, codes):
    """Write x / scale as codes of a small float: nearest, ties to even, beyond `largest` that.

    Parameters
    ----------
    x, scales, group
        As of `round_groups`.
    largest : float32
        Largest value of the element.
    layout : tuple of int32
        Fraction bits, bias of the exponent, bits of the element.
    codes : ndarray of shape (rows, K), uint8
        Written in place.
    """
    k = x.shape[1]
    fraction_bits, bias, size = layout
    cut = np.int32(23 - fraction_bits)
    below_half = np.int32((_ONE << np.int32(cut - 1)) - 1)
    least_normal, first = np.int32((128 - bias) << 23), np.int32((127 - bias) << fraction_bits)
    row, raised = np.empty(k, np.float32), np.empty(k + 1, np.float32)
    bits, raised_bits = row.view(np.int32), raised.view(np.int32)
    step = np.float32(2.0 ** (24 - bias - fraction_bits))
    raised[k] = step
    start_of_steps, sign = raised_bits[k], np.int32(_ONE << np.int32(size - 1))
    for i in range(x.shape[0]):
        for g in range(scales.shape[1]):
            start, stop = g * group, min(g * group + group, k)
            values, scale = x[i, start:stop], scales[i, g]
            kept, up = row[start:stop], raised[start:stop]
            if scale == np.float32(0):
                scale = np.float32(1)
            for j in range(values.size):
                value = min(max(values[j] / scale, -largest), largest)
                kept[j] = value
                up[j] = abs(value) + step
        out = codes[i]
        for j in range(k):
            a = np.int32(bits[j] & _SIZE)
            rounded = np.int32(a + np.int32(below_half + np.int32((a >> cut) & _ONE)))
            normal = np.int32(np.int32(rounded >> cut) - first)
            code = normal if a >= least_normal else np.int32(raised_bits[j] - start_of_steps)
            out[j] = code | (sign if bits[j] < np.int32(0) else np.int32(0))


@njit(cache=True, nogil=True)
def group_squares(codes, group, squares):
    """Sum of the squares of each group of codes.

    Parameters
    ----------
    codes : ndarray of shape (rows, K), int8 or uint8
    group : int
        At most 2**15, so that int32 holds the sum.
    squares : ndarray of shape (rows, groups), int32
        Written in place.
    """
    k = codes.shape[1]
    for i in range(codes.shape[0]):
        for g in range(squares.shape[1]):
            part = codes[i, g * group : min(g * group + group, k)]
            total = np.int32(0)
            for j in range(part.size):
                code = np.int32(part[j])
                total = np.int32(total + np.int32(code * code))
            squares[i, g] = total


@njit(cache=True, nogil=True)
def largest_bits(bits):
    """Return the largest of `bits`, (N,) int32, without the sign bit, int32; 0 of none."""
    largest = np.int32(0)
    for i in range(bits.size):
        largest = max(largest, np.int32(bits[i] & _SIZE))
    return largest
