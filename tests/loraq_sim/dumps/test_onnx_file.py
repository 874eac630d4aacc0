"""ONNX models: stored weights of MatMul, Gemm and Conv, under names that people know."""

import re

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.errors import DumpError

RNG = np.random.default_rng(9)
W = RNG.standard_normal((6, 4)).astype(np.float32)  # (N, K)
B = np.arange(6, dtype=np.float32)


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx")


def save(onnx, path, nodes, stored, shape=("batch", 5, 4), **how):
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [
            x if hasattr(x, "dims") else onnx.numpy_helper.from_array(x, n)
            for n, x in stored.items()
        ],
    )
    model = helper.make_model(graph, producer_name="tests")
    onnx.save(model, str(path), **how)
    return path


def node(kind, inputs, output="y", name="", **facts):
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=name, **facts)


def test_matmul_with_its_add_is_a_layer_named_as_its_node(onnx, tmp_path):
    nodes = [
        node("MatMul", ["x", "onnx::MatMul_7"], "h", "/blocks.0/attn1/to_q/MatMul"),
        node("Add", ["b", "h"]),
    ]
    path = save(onnx, tmp_path / "m.onnx", nodes, {"onnx::MatMul_7": W.T.copy(), "b": B})
    dump = lq.read_layer_dump(path)
    assert list(dump) == ["blocks.0.attn1.to_q"]
    layer = dump["blocks.0.attn1.to_q"]
    np.testing.assert_array_equal(layer.weight, W)
    np.testing.assert_array_equal(layer.bias, B)
    assert (layer.kind, layer.m) == ("self_q", None)


@pytest.mark.parametrize("is_transposed", [0, 1])
@pytest.mark.parametrize("suffix", [".onnx", ".bin"])
def test_gemm_is_a_layer_named_as_its_tensor(onnx, tmp_path, is_transposed, suffix):
    facts = {"transB": is_transposed, "alpha": 0.5}
    nodes = [node("Gemm", ["x", "proj_out.weight", "proj_out.bias"], **facts)]
    weight = W if is_transposed else W.T.copy()
    stored = {"proj_out.weight": weight, "proj_out.bias": B}
    dump = lq.read_layer_dump(save(onnx, tmp_path / f"m{suffix}", nodes, stored, (7, 4)))
    np.testing.assert_array_equal(dump["proj_out"].weight, W * np.float32(0.5))
    np.testing.assert_array_equal(dump["proj_out"].bias, B)
    assert (dump.info("proj_out").m, dump.info("proj_out").m_source) == (
        7,
        "shapes in the ONNX model",
    )


def test_a_1x1_convolution_is_a_layer_and_others_are_said(onnx, tmp_path):
    nodes = [
        node("Conv", ["x", "ff.conv_inverted.weight", "c"], "h"),
        node("Conv", ["h", "ff.conv_depth.weight"], group=6),
    ]
    deep = np.ones((6, 1, 3, 3), np.float32)
    stored = {"ff.conv_inverted.weight": W[:, :, None, None], "c": B, "ff.conv_depth.weight": deep}
    dump = lq.read_layer_dump(save(onnx, tmp_path / "m.onnx", nodes, stored, (2, 4, 8, 3)))
    assert list(dump) == ["ff.conv_inverted"]
    assert dump.info("ff.conv_inverted").m == 2 * 8 * 3
    np.testing.assert_array_equal(dump["ff.conv_inverted"].weight, W)
    assert "1 weight of no single product, such as ff.conv_depth.weight" in dump.left_out


def test_a_convolution_is_the_gemm_of_im2col_with_a_row_for_each_output(onnx, tmp_path):
    from onnx import TensorProto, helper

    kernel = RNG.standard_normal((6, 4, 3, 3)).astype(np.float32)
    grouped = np.ones((6, 2, 3, 3), np.float32)
    nodes = [
        node("Conv", ["x", "down.weight", "c"], "h", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["x", "wide.weight"], "g", group=2),
    ]
    stored = {"down.weight": kernel, "c": B, "wide.weight": grouped}
    path = save(onnx, tmp_path / "m.onnx", nodes, stored, ("batch", 4, 8, 6))
    dump = lq.read_layer_dump(path)
    assert list(dump) == ["down"]
    np.testing.assert_array_equal(dump["down"].weight, kernel.reshape(6, 36))
    assert dump.info("down").m is None
    assert "1 weight of no single product, such as wide.weight" in dump.left_out
    # Stated by the model, or following from the shape of its input.
    model = onnx.load(str(path))
    shape = helper.make_tensor_value_info("h", TensorProto.FLOAT, (2, 6, 4, 3))
    model.graph.value_info.append(shape)
    onnx.save(model, str(path))
    assert lq.read_layer_dump(path).info("down").m == 2 * 4 * 3
    path = save(onnx, tmp_path / "static.onnx", nodes, stored, (2, 4, 8, 6))
    assert lq.read_layer_dump(path).info("down").m == 2 * 4 * 3


def test_rows_follow_through_operators_that_change_shapes(onnx, tmp_path):
    nodes = [
        node("MatMul", ["x", "a"], "h", "/up/MatMul"),
        node("Reshape", ["h", "sizes"], "r"),
        node("MatMul", ["r", "b"], "y", "/down/MatMul"),
    ]
    stored = {"a": W.T.copy(), "sizes": np.array([15, -1], np.int64)}
    stored["b"] = RNG.standard_normal((4, 3)).astype(np.float32)
    dump = lq.read_layer_dump(save(onnx, tmp_path / "m.onnx", nodes, stored, (2, 5, 4)))
    assert (dump.info("up").m, dump.info("down").m) == (10, 15)


def test_casts_transposes_and_scales_before_a_node_are_followed(onnx, tmp_path):
    codes = RNG.integers(-128, 128, (6, 4)).astype(np.int8)
    scale = RNG.uniform(0.1, 1, 6).astype(np.float32)
    zero = RNG.integers(-3, 4, 6).astype(np.int8)
    nodes = [
        node("DequantizeLinear", ["q", "s", "z"], "d", axis=0),
        node("Transpose", ["d"], "t", perm=[1, 0]),
        node("MatMul", ["x", "t"], "h", "/up/MatMul"),
        node("Cast", ["w16"], "w", to=1),
        node("MatMul", ["h", "w"], "y", "/down/MatMul"),
    ]
    half = RNG.standard_normal((6, 4)).astype(np.float16)
    stored = {"q": codes, "s": scale, "z": zero, "w16": half}
    dump = lq.read_layer_dump(save(onnx, tmp_path / "m.onnx", nodes, stored))
    expected = (codes.astype(np.float32) - zero[:, None]) * scale[:, None]
    np.testing.assert_array_equal(dump["up"].weight, expected)
    np.testing.assert_array_equal(dump["down"].weight, half.T.astype(np.float32))
    assert (dump.info("up").dtype, dump.info("down").dtype) == ("int8 x scale", "float16")


def test_a_weight_used_twice_is_one_layer_of_two_calls(onnx, tmp_path):
    square = RNG.standard_normal((4, 4)).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "w"], "h", "/a/MatMul"),
        node("MatMul", ["h", "w"], "y", "/b/MatMul"),
    ]
    dump = lq.read_layer_dump(save(onnx, tmp_path / "m.onnx", nodes, {"w": square}))
    assert list(dump) == ["a"]
    assert dump.info("a").calls_per_step == 2


def test_external_data_is_read_beside_the_model_and_nowhere_else(onnx, tmp_path):
    nodes = [node("MatMul", ["x", "w"], "y", "/fc/MatMul")]
    how = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    path = save(onnx, tmp_path / "m.onnx", nodes, {"w": W.T.copy()}, **how)
    dump = lq.read_layer_dump(path)
    assert dump.files == (path, tmp_path / "w.bin")
    np.testing.assert_array_equal(dump["fc"].weight, W)
    (tmp_path / "in").mkdir()
    moved = tmp_path / "in" / "m.onnx"
    moved.write_bytes(path.read_bytes().replace(b"w.bin", b"../wx"))
    with pytest.raises(DumpError, match="external data that lies not beside it"):
        lq.read_layer_dump(moved)["fc"]
    (tmp_path / "w.bin").write_bytes(b"")
    with pytest.raises(DumpError, match="missing or too short for 'w'"):
        lq.read_layer_dump(path)["fc"]


def test_a_model_without_stored_weights_is_refused(onnx, tmp_path):
    path = save(onnx, tmp_path / "m.onnx", [node("Relu", ["x"])], {})
    with pytest.raises(DumpError, match="without stored weights of MatMul, Gemm or Conv"):
        lq.read_layer_dump(path)


def test_without_the_package_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    for name in ("m.onnx", "m.bin"):
        path = tmp_path / name
        path.write_bytes(b"\x08\x0a\x12\x05tests:\x00")
        with pytest.raises(DumpError, match=re.escape("this is an ONNX model; pip install 'loraq")):
            lq.read_layer_dump(path)
