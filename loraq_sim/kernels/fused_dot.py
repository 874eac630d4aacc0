"""Fused dot-adds of tensor cores: products aligned to the largest exponent, truncated, summed.

Operands come as integers: a significand and the exponent of its unit's leading place, so that a
value is ``significand * 2**(exponent - fraction)``. The running sum of an output is held the same
way, with 23 fraction bits. `loraq_sim.emulator.tensor_cores` says which machine does which.
"""

import math

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["ZERO_EXPONENT", "fused_dot_add", "fused_dot_round_down", "fused_group_add"]

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
