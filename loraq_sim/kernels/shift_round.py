"""Narrow integers and widen them: shift-round-saturate, upshift, and the requantizers of runtimes.

Shift, round and saturate is one branch-free body for every rounding mode. With x = q * 2**s + r and
0 <= r < 2**s (q is the arithmetic shift, the floor), every mode is
``q + ((r + c0 + c1 * [x < 0] + c2 * [q odd]) >> s)`` for three constants of the mode, so all modes
cost the same. Adding the constants to the remainder instead of to x cannot overflow int64.

The other requantizations are one pass over (R, N) int64 accumulators each, which become codes in
place, with a multiplier, a float scale or several constants for each column, in arrays of shape
(N,). One dtype for all of them: each is compiled once.
"""

import numpy as np

from loraq_sim.kernels.jit import larger, njit, smaller

__all__ = [
    *("ADD", "FUSED_ADD", "MULTIPLY", "count_outside", "double_scale", "float_scale"),
    *("float_steps", "gemmlowp", "nvdla_stages", "round_twice_up"),
    *("rounding_constants", "shift_left", "shift_right_round", "shift_up", "single_rounding"),
    *("single_rounding_wide", "xmos_transform"),
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
            out[i] = smaller(larger(q + (r >> shift), lo), hi)
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
            x = smaller(larger(np.int64(acc[i]), -bound), bound) << shift
            out[i] = smaller(larger(x, lo), hi)
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
def shift_up(x, shift, clamp, bottom, top, lowest, highest, spare):
    """Multiply x by 2**shift in place, in an accumulator of ``64 - spare`` bits.

    x (S,) int64; shift 0..63. With `clamp`, an x below `bottom` or above `top` becomes `lowest` or
    `highest`; without, the low bits are kept and their sign is extended. All scalars int64 but
    `clamp`, a bool.
    """
    if clamp:
        for i in range(x.size):
            value = x[i] << shift
            if x[i] > top:
                value = highest
            elif x[i] < bottom:
                value = lowest
            x[i] = value
    else:
        for i in range(x.size):
            x[i] = ((x[i] << shift) << spare) >> spare


@njit(cache=True)
def gemmlowp(acc, multiplier, left, right, zero_point, lo, hi):
    """Double rounding: doubling high multiply, then a rounding divide by a power of two.

    acc within int32, also after the left shift; multiplier, left (0..30) and right (0..31) (N,)
    int64; the scalars int64.
    """
    zero, one = np.int64(0), np.int64(1)
    half = one << np.int64(30)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            product = (acc[i, j] << left[j]) * multiplier[j]
            # The nudge and C's division, which truncates, round ties toward plus infinity.
            if product >= zero:
                high = (product + half) >> np.int64(31)
            else:
                high = -((half - one - product) >> np.int64(31))
            # Only INT32_MIN * INT32_MIN leaves int32.
            high = smaller(high, np.int64(_INT32_MAX))
            mask = (one << right[j]) - one
            threshold = (mask >> one) + np.int64(high < zero)
            value = (high >> right[j]) + np.int64((high & mask) > threshold)
            acc[i, j] = smaller(larger(value + zero_point, lo), hi)


@njit(cache=True)
def single_rounding(acc, multiplier, shift, zero_point, lo, hi):
    """One rounding, ties toward plus infinity: (acc * multiplier + 2**(shift-1)) >> shift.

    acc within int32, multiplier (0..2**31-1) and shift (1..62) (N,) int64; or acc within int48,
    multiplier (0..32767) and shift (8..46). The scalars int64. The result is clamped to int32
    before the zero point.
    """
    one = np.int64(1)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # Below 2**62 + 2**61, so int64 holds it.
            total = acc[i, j] * multiplier[j] + (one << (shift[j] - one))
            value = smaller(larger(total >> shift[j], np.int64(_INT32_MIN)), np.int64(_INT32_MAX))
            acc[i, j] = smaller(larger(value + zero_point, lo), hi)


@njit(cache=True)
def float_scale(acc, scale, zero_point, lo, hi):
    """Float32 convert, float32 multiply, round half to even, zero point, clamp.

    scale (N,) float32; zero_point, lo and hi float64 holding integers.
    """
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # float64 holds every float32 and every limit of 32 bits, so only the product rounds.
            rounded = np.float64(np.rint(np.float32(acc[i, j]) * scale[j]))
            acc[i, j] = np.int64(smaller(larger(rounded + zero_point, lo), hi))


# Operations of `float_steps`.
MULTIPLY, ADD, FUSED_ADD = 0, 1, 2

_SYMMETRIC_16 = 2**15 - 1


@njit(cache=True)
def round_twice_up(acc, multiplier, left, right, zero_point, lo, hi):
    """Doubling high multiply, then a division by a power of two; both send ties up.

    acc within int32, also after the left shift; multiplier (0..2**31-1), left (0..30) and right
    (0..31) (N,) int64; the scalars int64.
    """
    one = np.int64(1)
    half = one << np.int64(30)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            # Below 2**62 + 2**30, so int64 holds it.
            high = ((acc[i, j] << left[j]) * multiplier[j] + half) >> np.int64(31)
            nudge = (one << right[j]) >> one
            acc[i, j] = smaller(larger(((high + nudge) >> right[j]) + zero_point, lo), hi)


@njit(cache=True)
def single_rounding_wide(acc, multiplier, shift, zero_point, lo, hi):
    """Any int64 accumulator: (acc * multiplier + 2**(shift-1)) >> shift, in 96 bits.

    multiplier (0..2**31-1) and shift (1..62) (N,) int64; the scalars int64. The
    result is clamped to int32 before the zero point.
    """
    one, word = np.int64(1), np.int64(32)
    mask = (one << word) - one
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            x, s = acc[i, j], shift[j]
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
            value = smaller(larger(total, np.int64(_INT32_MIN)), np.int64(_INT32_MAX))
            acc[i, j] = smaller(larger(value + zero_point, lo), hi)


@njit
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
def float_steps(acc, operations, operands, lowest, zero_point, lo, hi):
    """Float32 multiplications and additions in order, each rounded; then half to even.

    operations (S,) int64 of `MULTIPLY`, `ADD` and `FUSED_ADD`; operands
    (S, N) float64 that hold float32 but for `FUSED_ADD`; zero_point, lo and hi float64 that hold
    integers. NaN gives `lo`; with `lowest`, a bool, what int32 does not hold does too.
    """
    end = np.float64(-np.int64(_INT32_MIN))
    # One step for a whole row after the other, so that columns share vectors.
    values = np.empty(acc.shape[1], dtype=np.float32)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            values[j] = np.float32(acc[i, j])
        for s in range(operations.shape[0]):
            operand = operands[s]
            if operations[s] == MULTIPLY:
                for j in range(acc.shape[1]):
                    values[j] = np.float32(values[j] * np.float32(operand[j]))
            elif operations[s] == ADD:
                for j in range(acc.shape[1]):
                    values[j] = np.float32(values[j] + np.float32(operand[j]))
            else:
                for j in range(acc.shape[1]):
                    values[j] = _added_once(values[j], operand[j])
        for j in range(acc.shape[1]):
            rounded = np.float64(np.rint(values[j]))
            if lowest and not (rounded < end and rounded >= -end):
                rounded = -end
            # NaN compares false and becomes the lowest.
            above = rounded + zero_point if rounded == rounded else lo
            acc[i, j] = np.int64(smaller(larger(above, lo), hi))


@njit(cache=True)
def double_scale(acc, scale, zero_point, lo, hi):
    """Float64 convert and multiply, then to an integer, half away from zero.

    scale (N,) float64; zero_point, lo and hi float64 holding integers.
    """
    half = 0.5
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            value = np.float64(acc[i, j]) * scale[j]
            whole = np.trunc(value)
            # Exact: a value and its integer part differ by less than one.
            if abs(value - whole) >= half:
                whole += np.copysign(1.0, value)
            acc[i, j] = np.int64(smaller(larger(whole + zero_point, lo), hi))


@njit
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
def nvdla_stages(acc, truncate, bias, multiplier, shift, converter, lo, hi):
    """NVDLA from accumulator to output: CACC, then SDP's per-channel stage and converter.

    acc within 34 bits (48 for int16 operands); bias, multiplier and shift (N,) int64;
    converter (3,) int64: offset, scale and shift; truncate, lo and hi int64 scalars.
    """
    low32, high32 = np.int64(_INT32_MIN), np.int64(_INT32_MAX)
    low17, high17 = np.int64(-(2**16)), np.int64(2**16 - 1)
    one, fraction = np.int64(1), np.int64(16)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            x = acc[i, j]
            # The fraction is 16 bits wide; what a longer shift pushes beyond it is lost, and with
            # it the difference of a tie from a little more.
            whole = x >> truncate
            rest = ((x - (whole << truncate)) << fraction) >> truncate
            half = one << (fraction - one)
            if rest > half or (rest == half and x >= np.int64(0)):
                whole += one
            value = smaller(larger(whole, low32), high32)
            value = _rounded_away((value + bias[j]) * multiplier[j], shift[j])
            value = smaller(larger(value, low32), high32)
            value = _rounded_away((value - converter[0]) * converter[1], converter[2])
            value = smaller(larger(value, low17), high17)
            acc[i, j] = smaller(larger(value, lo), hi)


@njit
def _clamped_16(value):
    return smaller(larger(value, np.int64(-_SYMMETRIC_16)), np.int64(_SYMMETRIC_16))


@njit
def _shifted_16(value, shift):
    """VLASHR in 16-bit mode: right with ties up, or left, then clamped symmetrically."""
    one = np.int64(1)
    if shift >= np.int64(15):
        return -np.int64(value < np.int64(0))
    if shift > np.int64(0):
        return _clamped_16((value + (one << (shift - one))) >> shift)
    return _clamped_16(value << -shift)


@njit(cache=True)
def xmos_transform(acc, initial, multiplier, bias, final, lo, hi):
    """The output transform of XMOS lib_nn on the 16-bit lanes of the xcore VPU.

    acc within int32; initial (-16..31), multiplier and bias (int16) (N,)
    int64; final (-16..31), lo and hi int64 scalars.
    """
    one = np.int64(1)
    for i in range(acc.shape[0]):
        for j in range(acc.shape[1]):
            value = acc[i, j]
            if initial[j] > np.int64(0):
                value = _clamped_16((value + (one << (initial[j] - one))) >> initial[j])
            else:
                value = _shifted_16(_clamped_16(value), initial[j])
            product = value * multiplier[j] + (one << np.int64(13))
            value = _clamped_16(product >> np.int64(14))
            value = _shifted_16(_clamped_16(value + bias[j]), final)
            acc[i, j] = smaller(larger((value + np.int64(128)) >> np.int64(8), lo), hi)
