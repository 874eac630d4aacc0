"""What rounding leaves of W - P, group by group, with scales that follow a slowly moving P.

Each call tries the group's last scale, one a step below or above it, and now and then a fresh one
from the range of the group: a search that costs two candidates instead of some thirty, because P
moves little between calls. Sums are kept in lanes as in `loraq_sim.kernels.group_quantize`.
"""

import math

import numpy as np

from loraq_sim.kernels.group_quantize import group_error
from loraq_sim.kernels.jit import njit

__all__ = ["round_residual", "round_residual_e2m1"]

_LANES = 32
_ROUND = np.float32(1.5 * 2**23)
_E2M1_MAX = np.float32(6)


@njit(cache=True)
def round_residual(weight, product, group, lo, hi, fresh, is_power, steps, scales):
    """Turn `product` into (W - P) - round(W - P) on an integer grid; returns its squared norm.

    Parameters
    ----------
    weight : ndarray of shape (rows, K), float32
    product : ndarray of shape (rows, K), float32
        P on entry, overwritten by the error.
    group : int
        Elements per scale; the last group of a row may be short.
    lo, hi : float32
        Smallest and largest code.
    fresh : float32
        What code the extreme of a group gets under a fresh scale; negative for scales with a sign.
        0: fresh scales only for groups without a scale.
    is_power : bool
        Whether scales are powers of two.
    steps : ndarray of shape (C,), float32
        Factors of the last scale to try.
    scales : ndarray of shape (rows, groups), float32
        Last scales on entry, 0 where there is none; overwritten by the best.
    """
    k = weight.shape[1]
    lanes = np.zeros(_LANES, dtype=np.float32)
    v = np.empty(group, dtype=np.float32)
    total = 0.0
    for i in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            start = g * group
            n = min(start + group, k) - start
            for j in range(n):
                v[j] = weight[i, start + j] - product[i, start + j]
            best, error = scales[i, g], np.inf
            if best != np.float32(0):
                last = best
                for c in range(steps.size):
                    trial = group_error(v, n, last * steps[c], lo, hi, lanes)
                    if trial < error:
                        best, error = last * steps[c], trial
            if fresh != np.float32(0) or best == np.float32(0):
                scale = _fresh_scale(v, n, fresh if fresh != np.float32(0) else hi, is_power)
                if scale != np.float32(0):
                    trial = group_error(v, n, scale, lo, hi, lanes)
                    if trial < error:
                        best, error = scale, trial
            scales[i, g] = best
            if best == np.float32(0):
                for j in range(n):
                    product[i, start + j] = v[j]
                continue
            total += error
            inverse = np.float32(1) / best
            for j in range(n):
                q = (min(max(v[j] * inverse, lo), hi) + _ROUND) - _ROUND
                product[i, start + j] = v[j] - q * best
    return total


@njit(cache=True)
def round_residual_e2m1(weight, product, group, fresh, is_power, steps, scales):
    """As `round_residual`, for the elements 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    k = weight.shape[1]
    lanes = np.zeros(_LANES, dtype=np.float32)
    v = np.empty(group, dtype=np.float32)
    total = 0.0
    for i in range(weight.shape[0]):
        for g in range(scales.shape[1]):
            start = g * group
            n = min(start + group, k) - start
            for j in range(n):
                v[j] = weight[i, start + j] - product[i, start + j]
            best, error = scales[i, g], np.inf
            if best != np.float32(0):
                last = best
                for c in range(steps.size):
                    trial = _error_e2m1(v, n, last * steps[c], lanes)
                    if trial < error:
                        best, error = last * steps[c], trial
            if fresh != np.float32(0) or best == np.float32(0):
                scale = _fresh_scale(v, n, np.float32(_E2M1_MAX), is_power)
                if scale != np.float32(0):
                    trial = _error_e2m1(v, n, scale, lanes)
                    if trial < error:
                        best, error = scale, trial
            scales[i, g] = best
            if best == np.float32(0):
                for j in range(n):
                    product[i, start + j] = v[j]
                continue
            total += error
            inverse = np.float32(1) / best
            for j in range(n):
                product[i, start + j] = v[j] - _round_e2m1(v[j] * inverse) * best
    return total


@njit(inline="always")
def _fresh_scale(v, n, code, is_power):
    """The scale that puts the extreme of `v` on `code`, rounded up to a power of two if asked."""
    top = np.float32(0)
    bottom = np.float32(0)
    for j in range(n):
        top = max(top, v[j])
        bottom = min(bottom, v[j])
    scale = (top if top >= -bottom else bottom) / code
    if is_power or code > np.float32(0):
        scale = abs(scale)
    if is_power and scale != np.float32(0):
        scale = np.float32(2.0 ** math.ceil(math.log2(scale)))
    return scale


@njit(inline="always")
def _round_e2m1(x):
    size = min(abs(x), _E2M1_MAX)
    # Spacing 0.5 below 2, 1 below 4, 2 above; an even multiple of it has an even mantissa.
    per_unit = np.float32(2) if size < 2 else (np.float32(1) if size < 4 else np.float32(0.5))
    spacing = np.float32(0.5) if size < 2 else (np.float32(1) if size < 4 else np.float32(2))
    return math.copysign(((size * per_unit + _ROUND) - _ROUND) * spacing, x)


@njit(inline="always")
def _error_e2m1(v, n, scale, lanes):
    inverse = np.float32(1) / scale
    for lane in range(_LANES):
        lanes[lane] = np.float32(0)
    full = n - n % _LANES
    for j in range(0, full, _LANES):
        for lane in range(_LANES):
            x = v[j + lane]
            miss = x - _round_e2m1(x * inverse) * scale
            lanes[lane] += miss * miss
    error = np.float32(0)
    for lane in range(_LANES):
        error += lanes[lane]
    for j in range(full, n):
        x = v[j]
        miss = x - _round_e2m1(x * inverse) * scale
        error += miss * miss
    return error
