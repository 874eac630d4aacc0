"""Block formats and aligned shifts through the group-scaled GEMM, against exact fractions."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest

from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.scaled_gemm import (
    BIT_EXACT,
    BLOCK_MODEL,
    COMBINES,
    FLOAT_MODEL,
    rounded,
    scaled_gemm,
)
from loraq_sim.errors import InputError
from loraq_sim.quantizers import quantize


def matrix(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_dot(x, w):
    """x w^T of dequantized values in fractions, rounded once to float32 at the end."""
    a, b = x.dequantize(), w.dequantize()
    rows = [[Fraction(float(v)) for v in row] for row in a]
    columns = [[Fraction(float(v)) for v in row] for row in b]
    sums = [[sum(p * q for p, q in zip(r, c, strict=True)) for c in columns] for r in rows]
    # A Fraction with a power-of-two denominator and at most 53 bits converts exactly to float64.
    return np.array([[np.float32(float(total)) for total in row] for row in sums])


@pytest.mark.parametrize("fmt", ["mxint4", "mxint8", "bfp16ebs8", "int8/g32/e8m0"])
def test_shift_combination_is_the_exact_dot_product_rounded_once(fmt):
    scales = np.exp2(np.random.default_rng(0).integers(-6, 6, size=(1, 70))).astype(np.float32)
    x, w = quantize(matrix(1, (4, 70)) * scales, fmt), quantize(matrix(2, (5, 70)) / scales, fmt)
    y, statistics = scaled_gemm(x, w, MacArray(), "shift")
    np.testing.assert_array_equal(y, exact_dot(x, w))
    assert statistics.arithmetic == BIT_EXACT


def test_shift_skips_zero_groups_and_rows():
    values = matrix(1, (4, 96))
    values[0] = 0.0
    values[1, :32] = 0.0
    x, w = quantize(values, "mxint8"), quantize(matrix(2, (5, 96)), "mxint8")
    y, _ = scaled_gemm(x, w, MacArray(), "shift")
    np.testing.assert_array_equal(y, exact_dot(x, w))


def test_shift_refuses_scales_that_are_no_powers_of_two_or_too_far_apart():
    x, w = quantize(matrix(1, (4, 64)), "int8/g32"), quantize(matrix(2, (5, 64)), "mxint8")
    with pytest.raises(InputError, match=r"power-of-two \(e8m0\) scales, got int8/g32/fp16"):
        scaled_gemm(x, w, MacArray(), "shift")
    far = matrix(1, (4, 64))
    far[:, :32] *= np.float32(2.0**60)
    x = quantize(far, "mxint8")
    with pytest.raises(InputError, match=r"aligned sum of \d+ bits, more than the 63 emulated"):
        scaled_gemm(x, w, MacArray(), "shift")


def levels(tensor, row, places):
    """Code less zero point, as fractions."""
    zeros = tensor.zero_points
    return [
        Fraction(float(tensor.codes[row, t]))
        - (0 if zeros is None else int(zeros[row, t // tensor.format.group_size]))
        for t in places
    ]


@pytest.mark.parametrize(
    "formats",
    [
        ("mxfp8_e4m3", "mxfp4"),
        ("nvfp4", "nvfp4"),
        ("mxfp6_e2m3", "mxfp6_e3m2"),
        ("mxfp8_e4m3", "uint4/g32"),
        ("uint4/g16", "mxfp4"),
    ],
)
def test_block_sums_are_exact_then_rounded_and_scaled_in_order(formats):
    x, w = quantize(matrix(1, (3, 70)), formats[0]), quantize(matrix(2, (4, 70)), formats[1])
    group = min(x.format.group_size, w.format.group_size)
    expected = np.zeros((3, 4), dtype=np.float32)
    for i in range(3):
        for j in range(4):
            total = np.float32(0)
            for start in range(0, 70, group):
                block = range(start, min(start + group, 70))
                pairs = zip(levels(x, i, block), levels(w, j, block), strict=True)
                exact = sum(a * b for a, b in pairs)
                scale = np.float32(
                    x.scales[i, start // x.format.group_size]
                    * w.scales[j, start // w.format.group_size]
                )
                total = np.float32(total + np.float32(np.float32(float(exact)) * scale))
            expected[i, j] = total
    y, statistics = scaled_gemm(x, w, MacArray())
    np.testing.assert_array_equal(y, expected)
    assert statistics.arithmetic == BLOCK_MODEL
    assert statistics.safe_acc_bits is None


def test_fp22_keeps_fourteen_significant_bits_toward_zero():
    values = np.array([1 + 2**-13, 1 + 2**-14, -(1 + 2**-14), 3.9999, 0.0], dtype=np.float32)
    expected = np.array([1 + 2**-13, 1.0, -1.0, 4 - 2**-12, 0.0], dtype=np.float32)
    np.testing.assert_array_equal(rounded(values, "fp22"), expected)


def test_narrower_combination_is_less_accurate():
    x, w = quantize(matrix(1, (8, 1024)), "mxfp8_e4m3"), quantize(matrix(2, (8, 1024)), "mxfp4")
    exact = x.dequantize().astype(np.float64) @ w.dequantize().astype(np.float64).T
    errors = [
        np.linalg.norm(scaled_gemm(x, w, MacArray(), combine)[0] - exact)
        for combine in ("fp32", "fp22", "bf16")
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] < errors[2]


def test_integer_block_formats_run_through_the_mac_array():
    x, w = quantize(matrix(1, (6, 64)), "mxint8"), quantize(matrix(2, (7, 64)), "mxint8")
    _, wide = scaled_gemm(x, w, MacArray())
    _, narrow = scaled_gemm(x, w, MacArray(acc_bits=wide.safe_acc_bits - 1, overflow="saturate"))
    assert wide.overflow_count == 0
    assert narrow.overflow_count > 0


@pytest.mark.parametrize("combine", [c for c in COMBINES if c != "shift"])
def test_plain_floats_are_a_float32_model_whatever_the_rule(combine):
    x, w = quantize(matrix(1, (3, 40)), "bf16"), quantize(matrix(2, (4, 40)), "mxfp4")
    y, statistics = scaled_gemm(x, w, MacArray(), combine)
    np.testing.assert_array_equal(y, x.dequantize() @ w.dequantize().T)
    assert statistics.arithmetic == FLOAT_MODEL


def test_a_group_of_zeros_does_not_count_in_the_alignment_of_shifts():
    x = np.zeros((1, 64), np.float32)
    x[0, 32:] = 1
    w = np.ones((1, 64), np.float32)
    # The scale of the zeros is 2**-127; aligned with the ones it would take 127 bits.
    y, _ = scaled_gemm(quantize(x, "mxint8"), quantize(w, "mxint8"), MacArray(), "shift")
    assert y[0, 0] == 32


def test_the_width_that_is_safe_is_that_of_the_widest_group():
    # Codes of 7 in the first group and of 1 in the second: 32 * 49 = 1568 against 32.
    values = np.repeat([[7.0, 1.0]], 32, axis=1).reshape(1, 64).astype(np.float32)
    values[0, 32] = 7.0
    x = quantize(values, "int4/g32/e8m0")
    codes = np.where(np.arange(64) < 32, 7, 1)[None].astype(np.int8)
    x = dataclasses.replace(x, codes=codes)
    for combine in ("fp32", "bf16"):
        _, statistics = scaled_gemm(x, x, MacArray(), combine)
        assert statistics.safe_acc_bits == 12
