"""The entry point that runs an ONNX U-Net in torch, on a graph of its operators."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="needs the extra [dev]")

FILE = Path(__file__).parents[1] / "examples" / "terrain_unet.py"


@pytest.fixture(scope="module")
def terrain():
    spec = importlib.util.spec_from_file_location("terrain_unet", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def graph():
    """A small U-Net-like graph: convolutions of two sizes, norm, gate, attention, pool, resize."""
    node, rng = onnx.helper.make_node, np.random.default_rng(0)
    values = {
        "narrow": rng.standard_normal((64, 1, 3, 3)),
        "wide": rng.standard_normal((64, 64, 3, 3)) / 24,
        "qkv.weight": rng.standard_normal((192, 64, 1, 1)) / 8,
        "last": rng.standard_normal((1, 64, 3, 3)) / 24,
        "embed": rng.standard_normal((64, 1)),
    }
    values |= {f"{name}.bias": rng.standard_normal(x.shape[0]) / 9 for name, x in values.items()}
    values |= {
        "ones": np.ones(4),
        "zeros": np.zeros(4),
        "low": np.array(-9.0),
        "high": np.array(9.0),
    }
    values = {name: x.astype(np.float32) for name, x in values.items()}
    values |= {
        "grouped": np.array([0, 4, -1]),
        "flat": np.array([0, 192, -1]),
        "axes": np.array([2, 3]),
    }
    values["scales"] = np.array([1, 1, 2, 2], np.float32)
    same = {"pads": [1, 1, 1, 1], "strides": [1, 1], "group": 1, "kernel_shape": [3, 3]}
    one = {**same, "pads": [0, 0, 0, 0], "kernel_shape": [1, 1]}
    sizes = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        node("Conv", ["x", "narrow", "narrow.bias"], ["a"], **same),
        node("Shape", ["a"], ["a_shape"]),
        node("Reshape", ["a", "grouped"], ["a_groups"]),
        node("InstanceNormalization", ["a_groups", "ones", "zeros"], ["a_norm"], epsilon=1e-5),
        node("Reshape", ["a_norm", "a_shape"], ["b"]),
        node("Sigmoid", ["b"], ["gate"]),
        node("Mul", ["b", "gate"], ["c"]),
        node("Conv", ["c", "wide", "wide.bias"], ["d"], **same),
        node("Gemm", ["t", "embed", "embed.bias"], ["shift"], transB=1),
        node("Unsqueeze", ["shift", "axes"], ["shift_4d"]),
        node("Add", ["d", "shift_4d"], ["e"]),
        node("AveragePool", ["e"], ["f"], **sizes),
        node("Conv", ["f", "qkv.weight", "qkv.weight.bias"], ["qkv"], **one),
        node("Reshape", ["qkv", "flat"], ["rows"]),
        node("Split", ["rows"], ["q", "k", "v"], axis=1, num_outputs=3),
        node("Einsum", ["q", "k"], ["scores"], equation="bct,bcs->bts"),
        node("Softmax", ["scores"], ["weights"], axis=-1),
        node("Einsum", ["weights", "v"], ["mixed"], equation="bts,bcs->bct"),
        node("Shape", ["f"], ["f_shape"]),
        node("Reshape", ["mixed", "f_shape"], ["g"]),
        node(
            "Resize", ["g", "", "scales"], ["h"], mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        ),
        node("Conv", ["h", "last", "last.bias"], ["i"], **same),
        node("Clip", ["i", "low", "high"], ["y"]),
    ]  # fmt: skip
    info = onnx.helper.make_tensor_value_info
    kept = [onnx.numpy_helper.from_array(x, name) for name, x in values.items()]
    made = onnx.helper.make_graph(
        nodes, "unet",
        [info("x", 1, [2, 1, 8, 8]), info("t", 1, [2, 1])], [info("y", 1, [2, 1, 8, 8])], kept,
    )  # fmt: skip
    return onnx.helper.make_model(made, opset_imports=[onnx.helper.make_opsetid("", 18)])


def test_a_graph_runs_as_the_reference_evaluator_runs_it(terrain):
    from onnx.reference import ReferenceEvaluator

    model, rng = graph(), np.random.default_rng(1)
    inputs = {"x": rng.standard_normal((2, 1, 8, 8)), "t": rng.standard_normal((2, 1))}
    inputs = {name: x.astype(np.float32) for name, x in inputs.items()}
    (expected,) = ReferenceEvaluator(model).run(None, inputs)
    ours = terrain.GraphModel(model)
    with torch.no_grad():
        found = ours(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 0.05 < expected.std() < 8
    # Only wide convolutions are GEMMs, and they are emulated: coarse ones change the picture.
    names = [n for n, m in ours.named_modules() if isinstance(m, torch.nn.Linear)]
    assert names == ["wide.gemm", "qkv.gemm"]


def test_a_graph_of_other_operators_is_refused(terrain):
    model = graph()
    model.graph.node[5].op_type = "Erf"
    with pytest.raises(ValueError, match="operator Erf"):
        terrain.GraphModel(model)


def test_heightfields_are_drawn_in_one_step_of_their_own_noise(terrain):
    def asked(first, images, steps=1):
        calls = terrain.draw(steps=steps, images=images, guidance=1.0, seed=3, first=first)
        return next(calls)[1]

    both, second = asked(0, 2), asked(1, 1)
    torch.testing.assert_close(both["noisy"][1:], second["noisy"], rtol=0, atol=0)
    torch.testing.assert_close(both["difficulty"][1:], second["difficulty"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="give --steps 1"):
        asked(0, 1, steps=4)
