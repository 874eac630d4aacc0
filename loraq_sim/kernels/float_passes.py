"""Passes over float32 values, one each: sums, ranges of groups, and rounding under known scales.

Every step of a sum is rounded as written. `add_scaled` adds the pass of one scale group;
`sum_to_bf16` and `sum_to_fp16` take the last sums of a layer to the format it is written in.

Ranges are found on the bits of the numbers, as integers: their order is that of the floats once the
magnitude of negative ones is flipped, and compilers vectorize extremes of integers without being
told that there is no NaN.

A small float has 1 sign bit, e exponent bits and m fraction bits, and 2**(1 - bias - m) is its
smallest step. Adding a power of two with that step as its last bit rounds a subnormal; a normal one
is rounded by adding half a unit of its last place to the bits, less one where that is even.
"""

import numpy as np

from loraq_sim.kernels.jit import larger, njit, smaller

__all__ = [
    *("add_scaled", "encode_groups", "group_ranges", "group_squares", "largest_bits"),
    *("round_groups", "sum_to_bf16", "sum_to_fp16"),
]

# Bits of float32 as int32 and as uint32; below half of the last place of bf16, and what it keeps.
_ONE, _SIZE, _SIGN = np.int32(1), np.int32(2**31 - 1), np.int32(31)
_HALF, _UNIT, _KEPT = np.uint32(0x7FFF), np.uint32(1), np.uint32(0xFFFF0000)
_SHIFT, _MAGNITUDE, _SIGN_16 = np.uint32(16), np.uint32(0x7FFFFFFF), np.uint32(0x8000)
# float32 from here on round to infinity: half a step beyond the largest value.
_BEYOND_BF16, _BEYOND_FP16 = np.uint32(0x7F7F8000), np.uint32(0x477FF000)
# Of fp16: its smallest normal number as a float32, and a number whose last bit is its smallest.
_LEAST_NORMAL, _STEP = np.uint32(0x38800000), np.float32(0.5)
_STEP_BITS, _REBIASED = np.uint32(0x3F000000), np.uint32(112 << 23)
_BELOW_HALF, _CUT = np.uint32(0xFFF), np.uint32(13)


@njit(cache=True, nogil=True)
def _to_bf16(row):
    """Round float32 values to bfloat16 in place, half to even; NaN stays NaN."""
    bits = row.view(np.uint32)
    for n in range(row.size):
        value = bits[n]
        nearest = np.uint32(value + _HALF + np.uint32((value >> _SHIFT) & _UNIT)) & _KEPT
        bits[n] = nearest if row[n] == row[n] else value


@njit(cache=True, nogil=True)
def add_scaled(acc, x_scale, w_scale, bf16, total):
    """total[m, n] += fl32(acc[m, n]) * fl32(x_scale[m] * w_scale[n]), each step rounded to float32.

    acc (M, N) int32; x_scale (M,) and w_scale (N,) float32; total (M, N) float32, in place. With
    `bf16` the product and the sum are rounded to bfloat16 as well.
    """
    partial = np.empty(acc.shape[1], np.float32)
    for m in range(acc.shape[0]):
        row, kept, scale = acc[m], total[m], x_scale[m]
        for n in range(row.size):
            partial[n] = np.float32(row[n]) * np.float32(scale * w_scale[n])
        if bf16:
            _to_bf16(partial)
        for n in range(row.size):
            kept[n] = np.float32(kept[n] + partial[n])
        if bf16:
            _to_bf16(kept)


@njit
def _sum_row(y, z, bias, row):
    """row = y + z + bias, each sum rounded; `z` and `bias` are empty for none."""
    for n in range(row.size):
        row[n] = y[n]
    if z.size > 0:
        for n in range(row.size):
            row[n] = np.float32(row[n] + z[n])
    if bias.size > 0:
        for n in range(row.size):
            row[n] = np.float32(row[n] + bias[n])


@njit(cache=True, nogil=True)
def sum_to_bf16(y, z, bias, out):
    """out = bits of bf16(y + z + bias), each sum rounded to float32, ties to even; or False.

    False says that a value is not finite, on the way or in the end: then `out` is of no use.

    Parameters
    ----------
    y : ndarray of shape (M, N), float32
    z : ndarray of the same shape, or (M, 0) for none
    bias : ndarray of shape (N,), float32, or (0,) for none
    out : ndarray of shape (M, N), uint16
        Written in place.
    """
    row = np.empty(y.shape[1], np.float32)
    bits = row.view(np.uint32)
    largest = np.uint32(0)
    for m in range(y.shape[0]):
        _sum_row(y[m], z[m], bias, row)
        written = out[m]
        for n in range(row.size):
            value = bits[n]
            largest = larger(largest, np.uint32(value & _MAGNITUDE))
            nearest = np.uint32(value + _HALF + np.uint32((value >> _SHIFT) & _UNIT))
            written[n] = nearest >> _SHIFT
    return largest < _BEYOND_BF16


@njit(cache=True, nogil=True)
def sum_to_fp16(y, z, bias, out):
    """As `sum_to_bf16`, rounded to fp16."""
    row, raised = np.empty(y.shape[1], np.float32), np.empty(y.shape[1], np.float32)
    bits, raised_bits = row.view(np.uint32), raised.view(np.uint32)
    largest = np.uint32(0)
    for m in range(y.shape[0]):
        _sum_row(y[m], z[m], bias, row)
        written = out[m]
        for n in range(row.size):
            raised[n] = np.float32(abs(row[n]) + _STEP)
        for n in range(row.size):
            value = np.uint32(bits[n] & _MAGNITUDE)
            largest = larger(largest, value)
            nearest = np.uint32(value + _BELOW_HALF + np.uint32((value >> _CUT) & _UNIT))
            normal = np.uint32(nearest - _REBIASED) >> _CUT
            code = normal if value >= _LEAST_NORMAL else np.uint32(raised_bits[n] - _STEP_BITS)
            written[n] = code | np.uint32(np.uint32(bits[n] >> _SHIFT) & _SIGN_16)
    return largest < _BEYOND_FP16


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
            part = bits[i, g * group : smaller(g * group + group, k)]
            bottom, top = np.int32(0), np.int32(0)
            for j in range(part.size):
                ordered = np.int32(part[j] ^ np.int32((part[j] >> _SIGN) & _SIZE))
                bottom, top = smaller(bottom, ordered), larger(top, ordered)
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
            start, stop = g * group, smaller(g * group + group, k)
            values, rounded, scale = x[i, start:stop], codes[i, start:stop], scales[i, g]
            if scale == np.float32(0):
                scale = np.float32(1)
            for j in range(values.size):
                rounded[j] = np.int32(np.rint(smaller(larger(values[j] / scale, lo), hi)))


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
            start, stop = g * group, smaller(g * group + group, k)
            values, scale = x[i, start:stop], scales[i, g]
            kept, up = row[start:stop], raised[start:stop]
            if scale == np.float32(0):
                scale = np.float32(1)
            for j in range(values.size):
                value = smaller(larger(values[j] / scale, -largest), largest)
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
            part = codes[i, g * group : smaller(g * group + group, k)]
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
        largest = larger(largest, np.int32(bits[i] & _SIZE))
    return largest
