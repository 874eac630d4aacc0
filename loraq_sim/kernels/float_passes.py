"""Compiled loops over floats: passes over float32 values, and the fused dot-adds of tensor cores.

Every step of a sum is rounded as written. `add_scaled` adds the pass of one scale group;
`sum_to_bf16` and `sum_to_fp16` take the last sums of a layer to the format it is written in.

Ranges are found on the bits of the numbers, as integers: their order is that of the floats once the
magnitude of negative ones is flipped, and compilers vectorize extremes of integers without being
told that there is no NaN.

A small float has 1 sign bit, e exponent bits and m fraction bits, and 2**(1 - bias - m) is its
smallest step. Adding a power of two with that step as its last bit rounds a subnormal; a normal one
is rounded by adding half a unit of its last place to the bits, less one where that is even.

Fused dot-adds align products to the largest exponent, truncate and sum. Operands come as integers,
a value being ``significand * 2**(exponent - fraction)``; the running sum of an output is held the
same way, with 23 fraction bits (see `loraq_sim.emulator.tensor_cores`).
"""

import math

import numpy as np

from loraq_sim.kernels.jit import larger, njit, smaller

__all__ = [
    "ZERO_EXPONENT",
    "add_scaled",
    "encode_groups",
    "fused_dot_add",
    "fused_dot_round_down",
    "fused_group_add",
    "group_ranges",
    "group_squares",
    "largest_bits",
    "round_groups",
    "sum_to_bf16",
    "sum_to_fp16",
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


# Exponent of a zero operand: below that of any product, and within int32 after additions.
ZERO_EXPONENT = -100_000


_LOWEST = np.int64(-126)


@njit(cache=True)
def _shifted_toward_zero(value, shift):
    """value * 2**shift, truncated toward zero; `shift` int64, any; the result fits int64."""
    if shift >= np.int64(0):
        return value << shift
    if shift <= np.int64(-63):
        return np.int64(0)
    if value >= np.int64(0):
        return value >> -shift
    return -((-value) >> -shift)


@njit(cache=True)
def _bit_length(value):
    """Bits of a nonnegative int64, by halves."""
    count, step = np.int64(0), np.int64(32)
    while step > np.int64(0):
        if value >> step > np.int64(0):
            value >>= step
            count += step
        step >>= np.int64(1)
    return count + value


@njit(cache=True)
def _truncated(total, unit, kept):
    """(significand, exponent) of total * 2**unit with `kept` fraction bits, cut toward zero.

    The significand has 23 fraction bits, of which the lowest 23 - kept are zero; exponents end at
    -126, below which significands get shorter, as in float32.
    """
    magnitude = abs(total)
    if magnitude == np.int64(0):
        return np.int64(0), _LOWEST
    exponent = max(_bit_length(magnitude) - np.int64(1) + unit, _LOWEST)
    place = exponent - kept
    if place > unit:
        drop = place - unit
        magnitude = magnitude >> drop if drop < np.int64(63) else np.int64(0)
    else:
        magnitude = magnitude << (unit - place)
    magnitude <<= np.int64(23) - kept
    return (magnitude if total > np.int64(0) else -magnitude), exponent


@njit(cache=True)
def _as_float(significand, exponent):
    """float32 of a significand with 23 fraction bits; infinite from 2**128 on."""
    value = np.float64(significand) * 2.0 ** np.float64(exponent - np.int64(23))
    return np.float32(value)


@njit(cache=True)
def fused_dot_add(a, a_exponent, b, b_exponent, fraction, chunk, bits, zero, kept, out):
    """For each output and chunk of K: c <- cut(c + sum of products), all aligned together.

    a (M, K) and b (K, N) int32 significands, a_exponent and b_exponent int32 of them; a product has
    `fraction` fraction bits. Terms are cut toward zero at `bits` bits below the largest exponent
    (that of a c of zero is `zero`), summed exactly, and cut to `kept` bits. All scalars int64. out
    (M, N) float32, written in place. Columns run side by side, so that they share vectors.
    """
    one, last, left = np.int64(1), np.int32(31), bits - fraction
    n = b.shape[1]
    top = np.empty(n, dtype=np.int32)
    total = np.empty(n, dtype=np.int64)
    c = np.empty(n, dtype=np.int64)
    c_exponent = np.empty(n, dtype=np.int64)
    for i in range(a.shape[0]):
        c[:] = 0
        c_exponent[:] = zero
        for start in range(0, a.shape[1], chunk):
            stop = min(start + chunk, a.shape[1])
            for j in range(n):
                top[j] = np.int32(c_exponent[j])
                total[j] = 0
            for k in range(start, stop):
                place, row = a_exponent[i, k], b_exponent[k]
                for j in range(n):
                    top[j] = max(top[j], np.int32(place + row[j]))
            for k in range(start, stop):
                if a[i, k] == np.int32(0):
                    continue
                # At most 28 bits; 31 places to the right nothing is left of them.
                factor, place = np.int32(a[i, k] << left), a_exponent[i, k]
                row, places = b[k], b_exponent[k]
                for j in range(n):
                    product = np.int32(factor * row[j])
                    drop = np.int32(min(np.int32(top[j] - place - places[j]), last))
                    # Toward zero: a negative value gets the bits that are cut before the shift.
                    cut = np.int32((product >> last) & np.int32((one << drop) - one))
                    total[j] += np.int64(np.int32(product + cut) >> drop)
            for j in range(n):
                if c_exponent[j] > np.int64(127):
                    continue
                shift = bits - np.int64(23) + c_exponent[j] - top[j]
                whole = total[j] + _shifted_toward_zero(c[j], shift)
                c[j], c_exponent[j] = _truncated(whole, top[j] - bits, kept)
                if c[j] == np.int64(0):
                    c_exponent[j] = zero
        for j in range(n):
            out[i, j] = _as_float(c[j], c_exponent[j])


@njit(cache=True)
def fused_group_add(
    a, b, a_scale, a_exponent, b_scale, b_exponent, fraction, groups, bits, zero, out
):
    """As `fused_dot_add`, of exact sums of groups of 16 with a scale each.

    a (M, K) and b (K, N) int32 significands, K a multiple of 16; scales and exponents (M, K / 16)
    and (K / 16, N) int32: significands of 3 fraction bits. `groups` of them make one instruction.
    """
    size, n = 16, b.shape[1]
    sums = np.empty((groups, n), dtype=np.int32)
    seen = np.empty((groups, n), dtype=np.int32)
    c = np.empty(n, dtype=np.int64)
    c_exponent = np.empty(n, dtype=np.int64)
    for i in range(a.shape[0]):
        c[:] = 0
        c_exponent[:] = zero
        for first in range(0, a_scale.shape[1], groups):
            count = min(groups, a_scale.shape[1] - first)
            for g in range(count):
                sums[g] = 0
                seen[g] = 0
                for k in range((first + g) * size, (first + g + 1) * size):
                    factor, row = a[i, k], b[k]
                    if factor == np.int32(0):
                        continue
                    for j in range(n):
                        product = np.int32(factor * row[j])
                        sums[g, j] += product
                        seen[g, j] |= product
            for j in range(n):
                if c_exponent[j] > np.int64(127):
                    continue
                top = c_exponent[j]
                for g in range(count):
                    top = max(
                        top,
                        _place(
                            seen, a_scale, a_exponent, b_scale, b_exponent, first, i, j, g, zero
                        ),
                    )
                shift = bits - np.int64(23) + c_exponent[j] - top
                whole = _shifted_toward_zero(c[j], shift)
                for g in range(count):
                    place = _place(
                        seen, a_scale, a_exponent, b_scale, b_exponent, first, i, j, g, zero
                    )
                    scale = np.int64(a_scale[i, first + g]) * np.int64(b_scale[first + g, j])
                    shift = bits - fraction - np.int64(6) + place - top
                    whole += _shifted_toward_zero(np.int64(sums[g, j]) * scale, shift)
                c[j], c_exponent[j] = _truncated(whole, top - bits, np.int64(23))
                if c[j] == np.int64(0):
                    c_exponent[j] = zero
        for j in range(n):
            out[i, j] = _as_float(c[j], c_exponent[j])


@njit(cache=True)
def _place(seen, a_scale, a_exponent, b_scale, b_exponent, first, i, j, g, zero):
    """Exponent of a group's sum; that of zero where all its products or its scale are zero."""
    at = first + g
    if seen[g, j] == np.int32(0) or a_scale[i, at] == 0 or b_scale[at, j] == 0:
        return zero
    return np.int64(a_exponent[i, at]) + np.int64(b_exponent[at, j])


@njit(cache=True)
def fused_dot_round_down(a, a_exponent, b, b_exponent, fraction, chunk, bits, out):
    """CDNA3: a chunk's products cut toward zero and summed; sum and c then meet rounded down.

    Arguments as of `fused_dot_add`. Products align among themselves at `bits` bits; their sum keeps
    32 bits and c 24 below the larger exponent, both rounded toward minus infinity; the total keeps
    31 and rounds to float32, ties to even.
    """
    wide, inner = np.int64(32), np.int64(31)
    for i in range(a.shape[0]):
        for j in range(b.shape[1]):
            c = np.float32(0)
            for start in range(0, a.shape[1], chunk):
                stop = min(start + chunk, a.shape[1])
                largest = np.int64(2 * ZERO_EXPONENT)
                for k in range(start, stop):
                    # A zero operand's exponent is far below every other.
                    place = np.int64(a_exponent[i, k]) + np.int64(b_exponent[k, j])
                    largest = max(largest, place)
                total = np.int64(0)
                for k in range(start, stop):
                    product = np.int64(a[i, k]) * np.int64(b[k, j])
                    place = np.int64(a_exponent[i, k]) + np.int64(b_exponent[k, j])
                    if product != np.int64(0):
                        total += _shifted_toward_zero(product, bits - fraction + place - largest)
                mantissa, exponent = math.frexp(np.float64(c))
                c_place = max(np.int64(exponent) - np.int64(1), _LOWEST)
                if mantissa == 0.0:
                    c_place = _LOWEST
                # 23 fraction bits hold a float32 exactly, subnormal ones at the lowest exponent.
                held = np.int64(mantissa * 2.0 ** np.float64(exponent - c_place + np.int64(23)))
                top = max(largest, c_place)
                shift = largest - top + wide - bits
                total = total << shift if shift >= 0 else total >> min(-shift, np.int64(62))
                shift = c_place - top + np.int64(1)
                held = held << shift if shift >= 0 else held >> min(-shift, np.int64(62))
                total += held << (wide - np.int64(24))
                place = max(_bit_length(abs(total)) - np.int64(1) - wide + top, _LOWEST) - inner
                unit = top - wide
                if place > unit:
                    total = total >> min(place - unit, np.int64(62))
                    unit = place
                c = np.float32(np.float64(total) * 2.0 ** np.float64(unit))
                if not np.isfinite(c):
                    break
            out[i, j] = c
