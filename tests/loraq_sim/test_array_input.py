"""Weights as they come: bfloat16 of ml_dtypes and of torch, parameters, and what is no array."""

import ml_dtypes
import numpy as np
import pytest
import torch

from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.quantizers import quantize
from loraq_sim.solvers import solve

VALUES = np.random.default_rng(3).standard_normal((24, 40)).astype(ml_dtypes.bfloat16)
TENSOR = torch.from_numpy(VALUES.astype(np.float32))

GIVEN = {
    "ml_dtypes bfloat16": VALUES,
    "torch bfloat16": TENSOR.bfloat16(),
    "torch float32": TENSOR,
    "parameter": torch.nn.Parameter(TENSOR.bfloat16()),
    "transposed tensor": TENSOR.T.contiguous().T,
    "float64": VALUES.astype(np.float64),
    "nothing masked": np.ma.masked_greater(VALUES.astype(np.float32), 1e9),
}
REFUSED = {
    "meta tensor": torch.empty(24, 40, device="meta"),
    "sparse tensor": TENSOR.to_sparse(),
    "integer tensor": TENSOR.int(),
    "raw bytes": np.zeros((24, 40), "V4"),
    "objects": np.full((24, 40), None),
    "text": np.full((24, 40), "a"),
    "small integers": np.zeros((24, 40), ml_dtypes.int4),
    "masked": np.ma.masked_greater(VALUES.astype(np.float32), 1.0),
}
DOORS = {
    "solve": lambda x: solve(x, rank=3, preset="fast").reconstruct(),
    "activations": lambda x: solve(
        TENSOR, rank=3, preset="fast", activations=x, smooth=0.5
    ).reconstruct(),
    "quantize": lambda x: quantize(x, "int4/g8").dequantize(),
    "Layer": lambda x: Layer(name="a", weight=x, activations=x).weight,
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("door", DOORS)
def test_every_floating_array_is_taken_and_means_the_same(door, given):
    expected = DOORS[door](VALUES.astype(np.float32))
    np.testing.assert_array_equal(DOORS[door](GIVEN[given]), expected)


@pytest.mark.parametrize("given", REFUSED)
@pytest.mark.parametrize("door", DOORS)
def test_what_holds_no_floats_is_refused_in_one_line(door, given):
    with pytest.raises(InputError) as refused:
        DOORS[door](REFUSED[given])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("door", DOORS)
def test_masked_values_are_counted_and_how_to_fill_them_is_said(door):
    masked = REFUSED["masked"]
    with pytest.raises(InputError, match=rf"{masked.mask.sum()} values are masked; .*filled\(0\)"):
        DOORS[door](masked)


def test_values_beyond_float32_are_named():
    weight = np.ones((2, 3))
    weight[1, 2] = 1e300
    with pytest.raises(InputError, match=r"1 NaN or Inf values; the first is inf at \(1, 2\)"):
        solve(weight, rank=1)
