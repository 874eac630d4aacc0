"""The one-pass scaled sum against NumPy, step by step, bit for bit."""

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.kernels.float_sums import add_scaled, sum_to_bf16, sum_to_fp16


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


KINDS = [(sum_to_bf16, ml_dtypes.bfloat16), (sum_to_fp16, np.float16)]


@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
@pytest.mark.parametrize(("round_sums", "dtype"), KINDS, ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [3e3, 1, 1e-4, 1e-6, 1e-8, 1e-38, 1e-41])
def test_the_last_sums_are_rounded_to_16_bits_as_numpy_rounds_them(round_sums, dtype, size, plain):
    rng = np.random.default_rng(0)
    y, z = (rng.standard_normal((2, 6, 41)) * size).astype(np.float32)
    bias = (rng.standard_normal(41) * size).astype(np.float32)
    # Zeros of both signs, the smallest normal half and halves of the smallest subnormal one.
    y[0, :6] = [0.0, -0.0, 2.0**-14, 2.0**-24, 2.0**-25, 3 * 2.0**-25]
    z[0, :6], bias[:6] = [0.0, -0.0, 0, 0, 0, 0], [0.0, -0.0, 0, 0, 0, 0]
    out = np.empty(y.shape, np.uint16)

    def run(*arguments):
        # Bits of numbers that take the other branch wrap on their way.
        with np.errstate(over="ignore"):
            return (round_sums.py_func if plain else round_sums)(*arguments)

    assert run(y, z, bias, out)
    np.testing.assert_array_equal(out, ((y + z) + bias).astype(dtype).view(np.uint16))
    assert run(y, z[:, :0], bias[:0], out)
    np.testing.assert_array_equal(out, y.astype(dtype).view(np.uint16))


LARGEST_NAN = np.uint32(0x7FFFFFFF).view(np.float32)


@pytest.mark.parametrize(("round_sums", "dtype"), KINDS, ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "value", [np.inf, -np.inf, np.nan, LARGEST_NAN, 3.4e38, 3.39e38, 65519.0, 65520.0, -65520.0]
)
def test_values_beyond_the_format_are_told(round_sums, dtype, value):
    y, out = np.ones((3, 20), np.float32), np.empty((3, 20), np.uint16)
    y[1, 7] = value
    with np.errstate(over="ignore", invalid="ignore"):
        finite = bool(np.isfinite(y.astype(dtype)).all())
    assert round_sums(y, y[:, :0], np.zeros(20, np.float32), out) == finite
