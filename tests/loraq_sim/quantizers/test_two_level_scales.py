"""e4m3 scales of integers: one fp32 scale of the tensor on top, as NVFP4 has it."""

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers import solve

FORMATS = ("int4/g32/e4m3", "int8/row/e4m3", "int3/tensor/e4m3", "uint4/g16/e4m3")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error(x, fmt, rule=None):
    return float(np.linalg.norm(x - quantize(x, fmt, rule=rule).dequantize()) / np.linalg.norm(x))


@pytest.mark.parametrize("size", [1e-9, 2e-3, 1.0, 3e5, 1e15])
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_error_does_not_depend_on_the_size_of_the_tensor(fmt, size):
    x = normal(32, 100)
    # Sizes that are no power of two move some roundings: a tenth of a percent of 3200 codes.
    assert error(x * np.float32(size), fmt) == pytest.approx(error(x, fmt), rel=0.02)


def test_small_weights_lose_no_more_than_with_wider_scales():
    x = 0.02 * normal(64, 128)
    # Half an e4m3 step of the scale, 6 %, moves codes by less than it: some 5 % of the error.
    assert error(x, "int4/g32/e4m3", "mse") < 1.06 * error(x, "int4/g32/fp32", "mse")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_four_bytes_are_counted_packed_and_read_back(fmt, rule):
    stored = quantize(0.01 * normal(6, 70), fmt, rule=rule)
    data, parsed = stored.pack(), parse_format(fmt)
    codes = 6 * -(-70 * parsed.element.bits // 8)
    scales = int(np.prod(parsed.scale_shape((6, 70))))
    zeros = 0
    if parsed.element.has_zero_point:
        rows, groups = parsed.scale_shape((6, 70))
        zeros = rows * -(-groups * parsed.element.bits // 8)
    assert len(data) == stored.nbytes == codes + scales + 4 + zeros
    read = QuantizedTensor.unpack(data, fmt, (6, 70))
    np.testing.assert_array_equal(read.dequantize(), stored.dequantize())
    assert read.tensor_scale == stored.tensor_scale
    # By the bytes alone: e4m3 scales follow the codes, then the fp32 one.
    e4m3 = np.frombuffer(data[codes : codes + scales], ml_dtypes.float8_e4m3fn).astype(np.float32)
    unit = np.frombuffer(data[codes + scales : codes + scales + 4], "<f4")[0]
    np.testing.assert_array_equal(e4m3 * unit, stored.scales.reshape(-1))


def test_the_largest_group_has_the_largest_scale_and_counts_as_no_loss():
    stored = quantize(normal(8, 64), "int4/g32/e4m3")
    assert np.abs(stored.scales).max() / stored.tensor_scale == pytest.approx(448.0, rel=1e-6)
    assert stored.n_saturated_scales == 0
    assert not quantize(np.zeros((2, 8), np.float32), "int4/g4/e4m3").dequantize().any()


def test_solutions_on_such_grids_are_as_good_as_on_wider_scales():
    weight = 0.02 * normal(64, 96)
    errors = {
        scale: solve(
            weight, main=f"int4/g32/{scale}", branch=f"int8/g32/{scale}", rank=8, preset="fast"
        ).weight_error
        for scale in ("e4m3", "fp16")
    }
    # The grain of the scales costs some 15 %; a clipped range would cost a factor of two.
    assert errors["e4m3"] < 1.25 * errors["fp16"]
