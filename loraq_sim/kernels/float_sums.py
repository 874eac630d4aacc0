"""Sums of float32 values in one pass over memory, every step rounded as written.

`add_scaled` adds the pass of one scale group; `sum_to_bf16` and `sum_to_fp16` take the last sums of
a layer to the format it is written in.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["add_scaled", "sum_to_bf16", "sum_to_fp16"]

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
            nearest = np.uint32(value + _HALF + np.uint32((value >> _SHIFT) & _ONE))
            largest = max(largest, max(value & _SIZE, nearest & _SIZE))
            written[n] = nearest >> _SHIFT
    return largest < _INFINITY


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
            value = bits[n] & _SIZE
            nearest = np.uint32(value + _BELOW_HALF + np.uint32((value >> _CUT) & _ONE))
            normal = np.uint32(nearest - _REBIASED) >> _CUT
            code = normal if value >= _LEAST_NORMAL else np.uint32(raised_bits[n] - _STEP_BITS)
            largest = max(largest, max(value, code << _SHIFT))
            written[n] = code | np.uint32(np.uint32(bits[n] >> _SHIFT) & _SIGN)
    return largest < min(_INFINITY, _LARGEST << _SHIFT)


_INFINITY = np.uint32(0x7F800000)
