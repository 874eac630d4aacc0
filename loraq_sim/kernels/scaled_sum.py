"""Add scaled integer partial sums to a float32 matrix, in one pass."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["add_scaled"]

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
