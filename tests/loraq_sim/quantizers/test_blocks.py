"""One scale per block of rows and columns, so that one stored matrix serves both contractions."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.walk import run_layer
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import solve


def _values(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.gamma(1.0, size=(shape[0], 1))).astype(np.float32)


@pytest.mark.parametrize("text", ["int8/b64", "int4/b5/fp32", "uint4/b16", "int6/b64/e4m3"])
@pytest.mark.parametrize("shape", [(64, 64), (1, 7), (65, 130), (31, 200), (128, 1)])
def test_a_block_is_rounded_as_a_tensor_of_its_own(text, shape):
    x = _values(shape)
    stored = lq.quantize(x, text)
    size = stored.format.group_size
    assert stored.scales.shape == tuple(-(-side // size) for side in shape)
    if not stored.format.has_tensor_scale:
        alone = text.replace(f"b{size}", "tensor/fp16" if text.count("/") == 1 else "tensor")
        for top in range(0, shape[0], size):
            for left in range(0, shape[1], size):
                block = (slice(top, top + size), slice(left, left + size))
                expected = lq.quantize(x[block], alone)
                np.testing.assert_array_equal(stored.codes[block], expected.codes)
                assert stored.scales[top // size, left // size] == expected.scales[0, 0]
    unpacked = QuantizedTensor.unpack(stored.pack(), text, shape)
    np.testing.assert_array_equal(unpacked.dequantize(), stored.dequantize())
    assert len(stored.pack()) == stored.nbytes


@pytest.mark.parametrize("text", ["int8/b64", "uint4/b16"])
def test_a_transposed_block_tensor_holds_the_same_values(text):
    stored = lq.quantize(_values((31, 200)), text)
    np.testing.assert_array_equal(stored.T.dequantize(), stored.dequantize().T)
    np.testing.assert_array_equal(stored.by_rows().dequantize(), stored.dequantize())
    assert stored.by_rows().format == lq.parse_format(text.replace("/b", "/g"))


def test_scales_along_rows_have_no_transposed_tensor():
    with pytest.raises(ValueError, match="int8/g64/fp16 run along one axis"):
        _ = lq.quantize(_values((4, 64)), "int8/g64").T


def test_blocks_need_a_matrix():
    with pytest.raises(lq.InputError, match=r"blocks of rows and columns.*shape \(64,\)"):
        lq.quantize(np.ones(64, np.float32), "int8/b64")


@pytest.mark.parametrize("main", ["int4/b64", "int4/g64"])
def test_solver_and_data_path_take_blocks(main):
    weight, x = _values((96, 160)), _values((5, 160), seed=1)
    solution = solve(weight, main=main, branch="int8/b64", rank=8, preset="fast")
    assert solution.weight_error < solve(weight, method="rtn", main=main).weight_error
    out = run_layer(x, solution, lq.parse_split("W4A8+W8A8r8"), Datapath())
    exact = x @ solution.reconstruct().T
    miss = np.linalg.norm(out.y - exact) / np.linalg.norm(exact)
    # Eight bits of X, twice, and an output in fp16.
    assert miss < 0.02
