"""Sums and rounding under known scales, bit for bit as NumPy and ml_dtypes take each step."""

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.kernels import float_passes
from loraq_sim.kernels.float_passes import add_scaled, sum_to_bf16, sum_to_fp16

ELEMENTS = (
    "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e5m2",
)  # fmt: skip


def kernel(name, plain):
    found = getattr(float_passes, name)
    return found.py_func if plain else found


@pytest.fixture(params=[False, True], ids=["compiled", "plain"])
def plain(request):
    return request.param


def spread(scales, group, k):
    return np.repeat(np.where(scales == 0, np.float32(1), scales), group, axis=1)[:, :k]


@pytest.mark.parametrize("group", [1, 7, 32, 50])
def test_ranges_hold_zero_and_the_ends_of_each_group(group, plain):
    x = np.random.default_rng(group).standard_normal((5, 50)).astype(np.float32)
    x[0], x[1], x[2, :9] = np.abs(x[0]), -np.abs(x[1]), [0.0, -0.0, 1e-45, -1e-45, *[0.0] * 5]
    low, high = np.empty((2, 5, -(-50 // group)), np.float32)
    ends = low.view(np.int32), high.view(np.int32)
    kernel("group_ranges", plain)(x.view(np.int32), group, *ends)
    starts = np.arange(0, 50, group)
    np.testing.assert_array_equal(low, np.minimum(np.minimum.reduceat(x, starts, axis=1), 0))
    np.testing.assert_array_equal(high, np.maximum(np.maximum.reduceat(x, starts, axis=1), 0))


@pytest.mark.parametrize("wild", [np.inf, -np.inf, np.nan, -np.nan, 3.4e38])
def test_largest_bits_tell_what_is_not_finite(wild, plain):
    x = np.linspace(-1, 1, 37, dtype=np.float32)
    x[5] = wild
    largest = kernel("largest_bits", plain)(x.view(np.int32))
    assert (largest < 0x7F800000) == np.isfinite(wild)


@pytest.mark.parametrize(("lo", "hi", "dtype"), [(-8, 7, np.int8), (-32768, 32767, np.int16)])
def test_integers_round_half_to_even_and_saturate(lo, hi, dtype, plain):
    rng = np.random.default_rng(0)
    x = (rng.integers(-3 * hi, 3 * hi, (4, 45)) / 2).astype(np.float32)
    scales = np.float32([[1, -2, 0.5, 1], [1, 1, 1, 1], [3, 7, 1e-3, 0], [1, 1, 1, 1]])
    x[2, 39:] = 0
    codes = np.empty(x.shape, dtype)
    kernel("round_groups", plain)(x, scales, 13, np.float32(lo), np.float32(hi), codes)
    wanted = np.clip(np.rint(x / spread(scales, 13, 45)), lo, hi)
    np.testing.assert_array_equal(codes, wanted)


@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("exponents", [(-3, 3), (-20, 20)])
def test_small_floats_round_as_ml_dtypes_rounds_them(element, exponents, plain):
    dtype = np.dtype(getattr(ml_dtypes, element))
    info, rng = ml_dtypes.finfo(dtype), np.random.default_rng(1)
    largest = np.float32(info.max)
    x = rng.standard_normal((6, 90)).astype(np.float32)
    # Every value of the element and every middle between two, of both signs.
    codes = np.arange(2 ** (info.bits - 1), dtype=np.uint8).view(dtype).astype(np.float32)
    values = np.sort(codes[np.isfinite(codes)])
    middles = (values[1:] + values[:-1]) / 2
    x[0], x[1] = np.resize(values, 90), np.resize(-middles, 90)
    scales = np.exp2(rng.uniform(*exponents, (6, 6))).astype(np.float32)
    scales[:2], scales[2, 0], x[2, :16] = 1, 0, -0.0
    found = np.empty(x.shape, np.uint8)
    layout = tuple(np.int32(v) for v in (info.nmant, 1 - info.minexp, info.bits))
    kernel("encode_groups", plain)(x, scales, 16, largest, layout, found)
    wanted = np.clip(x / spread(scales, 16, 90), -largest, largest).astype(dtype)
    np.testing.assert_array_equal(found, wanted.view(np.uint8))


def test_squares_are_exact_at_both_ends_of_a_byte(plain):
    for dtype, code in ((np.int8, -128), (np.uint8, 255)):
        squares = np.empty((2, 2), np.int32)
        kernel("group_squares", plain)(np.full((2, 70), code, dtype), 64, squares)
        np.testing.assert_array_equal(squares, [[64 * code**2, 6 * code**2]] * 2)


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
