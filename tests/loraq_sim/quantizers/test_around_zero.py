"""Grids around a zero point, signed scales and 16-bit integers, against their definitions."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.errors import InputError
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.quantize import quantize_rounded


def matrix(seed=0, shape=(5, 70)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_signed_scale_puts_the_extreme_on_the_longer_side(bits):
    x = matrix(bits)
    q = lq.quantize(x, f"int{bits}/g32/fp32", rule="signed_absmax")
    for row, codes, scales in zip(x, q.codes, q.scales, strict=True):
        for g, start in enumerate(range(0, 70, 32)):
            part = row[start : start + 32]
            at = np.argmax(np.abs(part))
            assert codes[start + at] == -(2 ** (bits - 1))
            assert scales[g] == np.float32(part[at]) / np.float32(-(2 ** (bits - 1)))


def test_a_signed_scale_wastes_no_code_where_one_side_is_shorter():
    x = np.array([[8, *range(-7, 8)]], dtype=np.float32)
    np.testing.assert_array_equal(lq.quantize(x, "int4/g64", rule="signed_absmax").dequantize(), x)


@pytest.mark.parametrize(
    "fmt", ["uint4/g32/fp16/z0", "uint8/tensor/fp32/z128", "int8/row/bf16/z-3"]
)
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_a_fixed_zero_point_is_stored_nowhere_and_read_back(fmt, rule):
    x = matrix(2)
    q = lq.quantize(x, fmt, rule=rule)
    assert (q.zero_points == q.format.zero).all()
    assert len(q.pack()) == q.nbytes == lq.parse_format(fmt).storage_bytes(x.shape)
    plain = fmt.rpartition("/")[0]
    assert q.nbytes - lq.parse_format(plain).storage_bytes(x.shape) <= 0
    back = QuantizedTensor.unpack(q.pack(), fmt, x.shape)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())


def test_a_fixed_zero_covers_the_side_that_needs_more_and_clips_a_side_without_codes():
    x = np.array([[-1.0, 3.0, 0.5]], np.float32)
    middle = lq.quantize(x, "uint4/row/fp32/z8")
    assert middle.scales[0, 0] == np.float32(3 / 7)
    assert middle.codes.tolist() == [[6, 15, 9]]
    bottom = lq.quantize(x, "uint4/row/fp32/z0")
    assert bottom.scales[0, 0] == np.float32(3 / 15)
    assert bottom.dequantize()[0, 0] == 0.0
    top = lq.quantize(x, "uint4/row/fp32/z15")
    assert (top.scales[0, 0], top.dequantize()[0, 1]) == (np.float32(1 / 15), 0.0)


def test_given_zero_points_are_those_of_the_tensor():
    x = matrix(3)
    zeros = np.random.default_rng(0).integers(1, 15, (5, 3))
    q = lq.quantize(x, "uint4/g32", zero=zeros)
    np.testing.assert_array_equal(q.zero_points, zeros)
    assert lq.quantize(x, "uint4/b32", zero=7).zero_points.tolist() == [[7, 7, 7]]
    # Free zero points cover the range of a group with the least step.
    assert (lq.quantize(x, "uint4/g32/fp32").scales <= q.scales * np.float32(1.001)).all()


@pytest.mark.parametrize(
    ("fmt", "options", "message"),
    [
        ("uint4/g32/z16", {}, r"zero point 16 is outside the codes of uint4 \(0..15\)"),
        ("int8/g32/z-129", {}, r"zero point -129 is outside the codes of int8 \(-128..127\)"),
        ("mxint4/g32/z1", {}, "mxint4 has no zero point; drop 'z1'"),
        ("uint4/g32", {"zero": -1}, r"zero holds values from -1 to -1, outside the codes of uint4"),
        ("uint4/g32", {"zero": [1, 2]}, r"zero has shape \(2,\).* give shape \(5, 3\)"),
        ("uint4/g32", {"zero": 1.5}, "zero must hold integers, codes of uint4, got 1.5"),
        ("int4/g32", {"zero": 1}, "zero is for uintN formats; int4/g32/fp16 has no zero points"),
        ("uint4/g32/z3", {"zero": 1}, "has no zero points but the fixed 3"),
        ("uint4/g32", {"rule": "signed_absmax"}, "signed_absmax is for symmetric integers"),
        ("int4/g32/e8m0", {"rule": "signed_absmax"}, "e8m0 scales have no sign.* 'absmax'"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(fmt, options, message):
    with pytest.raises(InputError, match=message) as caught:
        lq.quantize(matrix(), fmt, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16"])
def test_16_bit_codes_never_leave_their_range_by_the_rounding_of_a_scale(scale):
    x = matrix(4) * np.float32(1e-3)
    q = lq.quantize(x, f"int16/g32/{scale}")
    assert q.codes.dtype == np.int16
    steps = np.repeat(q.scales, 32, axis=1)[:, :70]
    assert (np.abs(q.dequantize() - x) <= 0.5 * steps + 2e-7 * np.abs(x)).all()
    back = QuantizedTensor.unpack(q.pack(), q.format, x.shape)
    np.testing.assert_array_equal(back.codes, q.codes)


@pytest.mark.parametrize(("fmt", "rule"), [("uint4/g32", None), ("int4/g32", "signed_absmax")])
def test_codes_are_rounded_in_the_mode_around_their_zero_point(fmt, rule):
    x = matrix(5)
    near = quantize_rounded(x, fmt, "conv_even", rule)
    down = quantize_rounded(x, fmt, "floor", rule)
    steps = np.repeat(near.scales, 32, axis=1)[:, :70].astype(np.float64)
    zeros = 0
    if near.zero_points is not None:
        zeros = np.repeat(near.zero_points, 32, axis=1)[:, :70].astype(int)
    np.testing.assert_array_equal(near.scales, down.scales)
    low, high = near.format.element.lo, near.format.element.hi
    quotient = (x / steps.astype(np.float32)).astype(np.float64)
    np.testing.assert_array_equal(down.codes, np.clip(np.floor(quotient) + zeros, low, high))
