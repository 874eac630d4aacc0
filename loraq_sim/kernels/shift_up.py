"""Shift integers left into an accumulator, wrapping or clamping."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__: list[str] = []


@njit(cache=True)
def _shift_up(x, shift, clamp, bottom, top, lowest, highest, spare, out):
    """Write x * 2**shift to `out`, in an accumulator of ``64 - spare`` bits.

    x (S,) int32 or int64; shift 0..63. With `clamp`, an x below `bottom` or above `top` becomes
    `lowest` or `highest`; without, the low bits are kept and their sign is extended. All scalars
    int64 but `clamp`, a bool.
    """
    if clamp:
        for i in range(x.size):
            value = np.int64(x[i])
            if value > top:
                out[i] = highest
            elif value < bottom:
                out[i] = lowest
            else:
                out[i] = value << shift
    else:
        for i in range(x.size):
            out[i] = ((np.int64(x[i]) << shift) << spare) >> spare
