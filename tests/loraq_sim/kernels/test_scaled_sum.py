"""The one-pass scaled sum against NumPy, step by step, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.kernels.run_blocks import add_scaled


def as_bf16(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_step_rounds_as_in_numpy(bf16, plain):
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**31), 2**31, (7, 53)).astype(np.int32)
    acc[0], acc[1] = rng.integers(-300, 300, 53), 0
    x = np.exp2(rng.uniform(-20, 4, 7)).astype(np.float32)
    w = np.exp2(rng.uniform(-20, 4, 53)).astype(np.float32)
    x[3], w[4], w[5] = 0, 3e38, 1e-42  # zero scale, sums at infinity, subnormal scale
    total = rng.standard_normal((7, 53)).astype(np.float32)
    total = as_bf16(total) if bf16 else total
    with np.errstate(over="ignore", under="ignore"):
        partial = acc.astype(np.float32) * (x[:, None] * w[None, :])
        expected = total + (as_bf16(partial) if bf16 else partial)
        expected = as_bf16(expected) if bf16 else expected
        (add_scaled.py_func if plain else add_scaled)(acc, x, w, bf16, total)
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(np.signbit(total), np.signbit(expected))
