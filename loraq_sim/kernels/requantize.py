"""Requantizers of runtimes, one compiled pass over (R, N) accumulators each, a scale per column.

Beside the shifts, multipliers and float scales of `loraq_sim.kernels.shift_round`. Every kernel
writes `out` in place; what a column needs is an array of shape (N,), the other parameters scalars.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = [
    *("ADD", "FUSED_ADD", "MULTIPLY", "double_scale", "float_steps"),
    *("nvdla_stages", "reduced_multiplier", "round_twice_up", "single_rounding_wide"),
    "xmos_transform",
]

# Operations of `float_steps`.
MULTIPLY, ADD, FUSED_ADD = 0, 1, 2

_INT32_MIN = -(2**31)
_INT32_MAX = 2**31 - 1
_SYMMETRIC_16 = 2**15 - 1


@njit(cache=True)
def round_twice_up(acc, multiplier, left, right, zero_point, lo, hi, out):
    """Doubling high multiply, then a division by a power of two; both send ties up.

    acc (R, N) int32 or int64 within int32, also after the left shift; multiplier (0..2**31-1), left
    (0..30) and right (0..31) (N,) int64; the scalars int64.
    """
    one = np.int64(1)
    half = one << np.int64(30)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # Below 2**62 + 2**30, so int64 holds it.
            high = ((np.int64(acc[i, j]) << left[j]) * multiplier[j] + half) >> np.int64(31)
            nudge = (one << right[j]) >> one
            out[i, j] = min(max(((high + nudge) >> right[j]) + zero_point, lo), hi)


@njit(cache=True)
def reduced_multiplier(acc, multiplier, shift, zero_point, lo, hi, out):
    """Accumulators of up to 48 bits times 15 bits of multiplier, one rounding, ties up.

    acc (R, N) int32 or int64 within int48; multiplier (0..32767) and shift (8..46) (N,) int64; the
    scalars int64. The result is clamped to int32 before the zero point.
    """
    one = np.int64(1)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # Below 2**62 + 2**45, so int64 holds it.
            total = np.int64(acc[i, j]) * multiplier[j] + (one << (shift[j] - one))
            value = min(max(total >> shift[j], np.int64(_INT32_MIN)), np.int64(_INT32_MAX))
            out[i, j] = min(max(value + zero_point, lo), hi)


@njit(cache=True)
def single_rounding_wide(acc, multiplier, shift, zero_point, lo, hi, out):
    """Any int64 accumulator: (acc * multiplier + 2**(shift-1)) >> shift, in 96 bits.

    acc (R, N) int64; multiplier (0..2**31-1) and shift (1..62) (N,) int64; the scalars int64. The
    result is clamped to int32 before the zero point.
    """
    one, word = np.int64(1), np.int64(32)
    mask = (one << word) - one
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            x, s = np.int64(acc[i, j]), shift[j]
            low = (x & mask) * multiplier[j]
            # |x >> 32| <= 2**31 and multiplier < 2**31, so the sums below stay within 2**63.
            high = (x >> word) * multiplier[j] + (low >> word)
            low = low & mask
            if s > word:
                total = (high + (one << (s - word - one))) >> (s - word)
            else:
                low = low + (one << (s - one))
                total = high + (low >> word)
                # Beyond 32 bits the shift leaves it there; within, the sum has at most 63 bits.
                if total >= np.int64(_INT32_MIN) and total <= np.int64(_INT32_MAX):
                    total = (total << (word - s)) + ((low & mask) >> s)
            value = min(max(total, np.int64(_INT32_MIN)), np.int64(_INT32_MAX))
            out[i, j] = min(max(value + zero_point, lo), hi)


@njit(cache=True)
def _added_once(value, term):
    """float32 of the exact sum of a float32 and a float64: what a fused multiply-add gives."""
    wide = np.float64(value)
    total = wide + term
    part = total - wide
    rest = (wide - (total - part)) + (term - part)
    above, below = np.nextafter(total, np.inf), np.nextafter(total, -np.inf)
    # Where float64 lies halfway between two float32, the rest decides.
    if rest != 0.0 and np.float32(above) != np.float32(below):
        total = above if rest > 0.0 else below
    return np.float32(total)


@njit(cache=True)
def float_steps(acc, operations, operands, lowest, zero_point, lo, hi, out):
    """Float32 multiplications and additions in order, each rounded; then half to even.

    acc (R, N) int32 or int64; operations (S,) int64 of `MULTIPLY`, `ADD` and `FUSED_ADD`; operands
    (S, N) float64 that hold float32 but for `FUSED_ADD`; zero_point, lo and hi float64 that hold
    integers. NaN gives `lo`; with `lowest`, a bool, what int32 does not hold does too.
    """
    end = np.float64(-np.int64(_INT32_MIN))
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            value = np.float32(acc[i, j])
            for s in range(operations.shape[0]):
                if operations[s] == MULTIPLY:
                    value = np.float32(value * np.float32(operands[s, j]))
                elif operations[s] == ADD:
                    value = np.float32(value + np.float32(operands[s, j]))
                else:
                    value = _added_once(value, operands[s, j])
            # float64 holds every float32 and every limit of 32 bits, so nothing rounds here.
            rounded = np.float64(np.rint(value))
            if lowest and (rounded >= end or rounded < -end):
                rounded = -end
            rounded += zero_point
            out[i, j] = np.int64(min(rounded, hi)) if rounded >= lo else np.int64(lo)


@njit(cache=True)
def double_scale(acc, scale, zero_point, lo, hi, out):
    """Float64 convert and multiply, then to an integer, half away from zero.

    acc (R, N) int32 or int64; scale (N,) float64; zero_point, lo and hi float64 holding integers.
    """
    half = 0.5
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            value = np.float64(acc[i, j]) * scale[j]
            whole = np.trunc(value)
            # Exact: a value and its integer part differ by less than one.
            if abs(value - whole) >= half:
                whole += np.copysign(1.0, value)
            out[i, j] = np.int64(min(max(whole + zero_point, lo), hi))


@njit(cache=True)
def _rounded_away(value, shift):
    """`value` / 2**shift, half away from zero; all int64, shift 0..62."""
    one = np.int64(1)
    if shift == np.int64(0):
        return value
    half = one << (shift - one)
    if value >= np.int64(0):
        return (value + half) >> shift
    return -((half - value) >> shift)


@njit(cache=True)
def nvdla_stages(acc, truncate, bias, multiplier, shift, converter, lo, hi, out):
    """NVDLA from accumulator to output: CACC, then SDP's per-channel stage and converter.

    acc (R, N) int64 within 34 bits (48 for int16 operands); bias, multiplier and shift (N,) int64;
    converter (3,) int64: offset, scale and shift; truncate, lo and hi int64 scalars.
    """
    low32, high32 = np.int64(_INT32_MIN), np.int64(_INT32_MAX)
    low17, high17 = np.int64(-(2**16)), np.int64(2**16 - 1)
    one, fraction = np.int64(1), np.int64(16)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            x = np.int64(acc[i, j])
            # The fraction is 16 bits wide; what a longer shift pushes beyond it is lost, and with
            # it the difference of a tie from a little more.
            whole = x >> truncate
            rest = ((x - (whole << truncate)) << fraction) >> truncate
            half = one << (fraction - one)
            if rest > half or (rest == half and x >= np.int64(0)):
                whole += one
            value = min(max(whole, low32), high32)
            value = _rounded_away((value + bias[j]) * multiplier[j], shift[j])
            value = min(max(value, low32), high32)
            value = _rounded_away((value - converter[0]) * converter[1], converter[2])
            value = min(max(value, low17), high17)
            out[i, j] = min(max(value, lo), hi)


@njit(cache=True)
def _clamped_16(value):
    return min(max(value, np.int64(-_SYMMETRIC_16)), np.int64(_SYMMETRIC_16))


@njit(cache=True)
def _shifted_16(value, shift):
    """VLASHR in 16-bit mode: right with ties up, or left, then clamped symmetrically."""
    one = np.int64(1)
    if shift >= np.int64(15):
        return -np.int64(value < np.int64(0))
    if shift > np.int64(0):
        return _clamped_16((value + (one << (shift - one))) >> shift)
    return _clamped_16(value << -shift)


@njit(cache=True)
def xmos_transform(acc, initial, multiplier, bias, final, lo, hi, out):
    """The output transform of XMOS lib_nn on the 16-bit lanes of the xcore VPU.

    acc (R, N) int32 or int64 within int32; initial (-16..31), multiplier and bias (int16) (N,)
    int64; final (-16..31), lo and hi int64 scalars.
    """
    one = np.int64(1)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            value = np.int64(acc[i, j])
            if initial[j] > np.int64(0):
                value = _clamped_16((value + (one << (initial[j] - one))) >> initial[j])
            else:
                value = _shifted_16(_clamped_16(value), initial[j])
            product = value * multiplier[j] + (one << np.int64(13))
            value = _clamped_16(product >> np.int64(14))
            value = _shifted_16(_clamped_16(value + bias[j]), final)
            out[i, j] = min(max((value + np.int64(128)) >> np.int64(8), lo), hi)
