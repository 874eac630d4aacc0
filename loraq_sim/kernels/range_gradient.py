"""Gradient of a smooth measure of the range of each group of W - P.

F_p = 1/2 sum_g ||v_g - c_g||_p^2, v = W - P. For large p this is half the squared half-range, and
with integers of free scale the rounding error of a group is proportional to its range. The center
c_g is 0, or half a step towards the extreme for a grid with one more code on that side; it is
treated as constant. -dF/dv = -amax |u|^(p-2) u (sum |u|^p)^(2/p - 1) with u = (v - c) / amax.
"""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["range_direction"]

_LANES = 32
# Smaller elements weigh 2**-(3 p) of the largest: nothing; their powers would be subnormal.
_FLOOR = np.float32(2.0**-6)


@njit(cache=True)
def range_direction(weight, product, group, doublings, offset):
    """Turn `product` into dF/dv, the direction in which P flattens W - P.

    Parameters
    ----------
    weight : ndarray of shape (rows, K), float32
    product : ndarray of shape (rows, K), float32
        P on entry, overwritten by the direction.
    group : int
        Elements per scale; the last group of a row may be short.
    doublings : int
        log2 p, from 3 to 5.
    offset : float32
        Shift of the center towards the extreme, as a share of the range of the group.
    """
    k = weight.shape[1]
    v = np.empty(group, dtype=np.float32)
    power = np.empty(group, dtype=np.float32)
    lanes = np.zeros(_LANES, dtype=np.float32)
    exponent = 2.0 / 2.0**doublings - 1.0
    for i in range(weight.shape[0]):
        for start in range(0, k, group):
            n = min(start + group, k) - start
            top = np.float32(0)
            bottom = np.float32(0)
            for j in range(n):
                x = weight[i, start + j] - product[i, start + j]
                v[j] = x
                top = max(top, x)
                bottom = min(bottom, x)
            if top == bottom:
                for j in range(n):
                    product[i, start + j] = np.float32(0)
                continue
            center = offset * (top - bottom)
            if top < -bottom:
                center = -center
            amax = max(top - center, center - bottom)
            inverse = np.float32(1) / amax
            for j in range(n):
                u = (v[j] - center) * inverse
                power[j] = max(u * u, _FLOOR)
            for _ in range(doublings - 1):
                for j in range(n):
                    power[j] = power[j] * power[j]
            for lane in range(_LANES):
                lanes[lane] = np.float32(0)
            full = n - n % _LANES
            for j in range(0, full, _LANES):
                for lane in range(_LANES):
                    lanes[lane] += power[j + lane]
            total = np.float32(0)
            for lane in range(_LANES):
                total += lanes[lane]
            for j in range(full, n):
                total += power[j]
            factor = np.float32(total**exponent)
            for j in range(n):
                shifted = v[j] - center
                u = shifted * inverse
                product[i, start + j] = shifted * (power[j] / max(u * u, _FLOOR)) * factor
