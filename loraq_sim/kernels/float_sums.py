"""Sums of float32 values in one pass over memory, every step rounded as written.

`add_scaled` adds the pass of one scale group; `round_sums` takes the last sums of a layer to the
16-bit format it is written in.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["BF16", "FP16", "add_scaled", "round_sums"]

# Formats that `round_sums` rounds to.
BF16, FP16 = 0, 1

_HALF, _ONE, _KEPT = np.uint32(0x7FFF), np.uint32(1), np.uint32(0xFFFF0000)
_SHIFT = np.uint32(16)


@njit(cache=True, nogil=True)
def _to_bf16(row):
    """Round float32 values to bfloat16 in place, half to even; NaN stays NaN."""
    bits = row.view(np.uint32)
    for n in range(row.size):
        value = bits[n]
        nearest = np.uint32(value + _HALF + np.uint32((value >> _SHIFT) & _ONE)) & _KEPT
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


_SIZE, _SIGN = np.uint32(0x7FFFFFFF), np.uint32(0x8000)
# Of fp16: its smallest normal number as a float32, and a number whose last bit is its smallest.
_LEAST_NORMAL, _STEP = np.uint32(0x38800000), np.float32(0.5)
_STEP_BITS, _REBIASED = np.uint32(0x3F000000), np.uint32(112 << 23)
_BELOW_HALF, _CUT = np.uint32(0xFFF), np.uint32(13)
_LARGEST = np.uint32(0x7C00)


@njit(cache=True, nogil=True)
def round_sums(y, z, bias, kind, out):
    """out = bits of y + z + bias, each sum rounded to float32, the last to `kind`; or False.

    False says that a value is not finite, in float32 or in `kind`: then `out` is of no use.

    Parameters
    ----------
    y : ndarray of shape (M, N), float32
    z : ndarray of the same shape, or (0, 0) for none
    bias : ndarray of shape (N,), float32, or (0,) for none
    kind : int
        `BF16` or `FP16`; ties to even.
    out : ndarray of shape (M, N), uint16
        Written in place.
    """
    n_columns = y.shape[1]
    row, raised = np.empty(n_columns, np.float32), np.empty(n_columns, np.float32)
    bits, raised_bits = row.view(np.uint32), raised.view(np.uint32)
    largest = np.uint32(0)
    for m in range(y.shape[0]):
        first, written = y[m], out[m]
        for n in range(n_columns):
            row[n] = first[n]
        if z.shape[0] > 0:
            second = z[m]
            for n in range(n_columns):
                row[n] = np.float32(row[n] + second[n])
        if bias.size > 0:
            for n in range(n_columns):
                row[n] = np.float32(row[n] + bias[n])
        if kind == BF16:
            for n in range(n_columns):
                value = bits[n]
                nearest = np.uint32(value + _HALF + np.uint32((value >> _SHIFT) & _ONE))
                largest = max(largest, max(value & _SIZE, nearest & _SIZE))
                written[n] = nearest >> _SHIFT
            continue
        for n in range(n_columns):
            raised[n] = np.float32(abs(row[n]) + _STEP)
        for n in range(n_columns):
            value = bits[n] & _SIZE
            nearest = np.uint32(value + _BELOW_HALF + np.uint32((value >> _CUT) & _ONE))
            normal = np.uint32(nearest - _REBIASED) >> _CUT
            code = normal if value >= _LEAST_NORMAL else np.uint32(raised_bits[n] - _STEP_BITS)
            largest = max(largest, max(value, code << _SHIFT))
            written[n] = code | np.uint32(np.uint32(bits[n] >> _SHIFT) & _SIGN)
    return largest < (_INFINITY if kind == BF16 else min(_INFINITY, _LARGEST << _SHIFT))


_INFINITY = np.uint32(0x7F800000)
