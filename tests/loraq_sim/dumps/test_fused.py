"""Weights that no ``<layer>.weight`` of (N, K) holds: attention, Conv1D, experts, convolutions."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import loraq_sim as lq

RNG = np.random.default_rng(5)


def values(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def save(path, tensors):
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    else:
        torch.save({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_fused_input_projection_is_a_layer_that_computes_what_torch_does(tmp_path, suffix):
    model = torch.nn.MultiheadAttention(8, 2)
    state = {f"attn.{k}": v.detach().numpy() for k, v in model.state_dict().items()}
    dump = lq.read_layer_dump(save(tmp_path / f"m{suffix}", state))
    assert set(dump) == {"attn.in_proj", "attn.out_proj"}
    assert dump.left_out == ""
    x = torch.randn(3, 8)
    wanted = torch.nn.functional.linear(x, model.in_proj_weight, model.in_proj_bias)
    layer = dump["attn.in_proj"]
    found = x.numpy() @ layer.weight.T + layer.bias
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
    apart = torch.nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
    state = {f"attn.{k}": v.detach().numpy() for k, v in apart.state_dict().items()}
    dump = lq.read_layer_dump(save(tmp_path / f"n{suffix}", state))
    assert {name: dump.info(name).k for name in dump} == {
        "attn.q_proj": 8, "attn.k_proj": 4, "attn.v_proj": 6, "attn.out_proj": 8
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_conv1d_of_transformers_is_turned_its_square_ones_too(tmp_path, suffix):
    state = {
        "h.0.attn.c_attn.weight": values(4, 12), "h.0.attn.c_attn.bias": values(12),
        "h.0.attn.c_proj.weight": values(4, 4), "h.0.attn.c_proj.bias": values(4),
        "h.0.mlp.c_proj.weight": values(16, 4), "h.0.mlp.c_proj.bias": values(4),
        "head.weight": values(4, 4), "head.bias": values(4),
        "up.weight": values(12, 4), "up.bias": values(12),
    }  # fmt: skip
    dump = lq.read_layer_dump(save(tmp_path / f"gpt2{suffix}", state))
    for name in ("h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"):
        np.testing.assert_array_equal(dump[name].weight, state[f"{name}.weight"].T)
    for name in ("head", "up"):
        np.testing.assert_array_equal(dump[name].weight, state[f"{name}.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("inputs_first", [False, True])
@pytest.mark.parametrize("has_router", [False, True])
def test_experts_are_layers_each(tmp_path, suffix, inputs_first, has_router):
    up, down = values(3, 20, 8), values(3, 8, 10)  # (E, N, K)
    turn = (0, 2, 1) if inputs_first else (0, 1, 2)
    state = {
        "mlp.experts.gate_up_proj": up.transpose(turn),
        "mlp.experts.down_proj": down.transpose(turn),
    }
    if has_router:
        state["mlp.router.weight"] = values(3, 8)
    dump = lq.read_layer_dump(save(tmp_path / f"moe{suffix}", state))
    assert len(dump) == 6 + has_router
    assert dump.left_out == ""
    for i in range(3):
        np.testing.assert_array_equal(dump[f"mlp.experts.gate_up_proj.{i}"].weight, up[i])
        np.testing.assert_array_equal(dump[f"mlp.experts.down_proj.{i}"].weight, down[i])
    assert dump.info("mlp.experts.down_proj.1").nbytes == 8 * 10 * 4


def test_a_router_tells_the_side_of_experts_that_are_apart(tmp_path):
    w1, w2 = values(3, 8, 10), values(3, 10, 8)  # (E, K, N)
    state = {"ffn.experts.w1": w1, "ffn.experts.w2": w2, "ffn.gate.weight": values(3, 8)}
    dump = lq.read_layer_dump(save(tmp_path / "moe.safetensors", state))
    np.testing.assert_array_equal(dump["ffn.experts.w1.2"].weight, w1[2].T)
    np.testing.assert_array_equal(dump["ffn.experts.w2.0"].weight, w2[0].T)
    del state["ffn.gate.weight"]
    state["fc.weight"] = values(4, 4)
    dump = lq.read_layer_dump(save(tmp_path / "alone.safetensors", state))
    assert list(dump) == ["fc"]
    assert "left out: 2 tensors with 96.8 % of the weights" in dump.left_out


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0)])
def test_a_convolution_is_the_gemm_of_im2col(tmp_path, stride, padding):
    conv = torch.nn.Conv2d(4, 6, 3, stride=stride, padding=padding)
    state = {f"conv1.{k}": v.detach().numpy() for k, v in conv.state_dict().items()}
    state["depth.weight"] = values(6, 1, 3, 3)
    dump = lq.read_layer_dump(save(tmp_path / "unet.safetensors", state))
    assert list(dump) == ["conv1"]
    assert "1 convolution, such as conv1, run as GEMMs of im2col" in dump.left_out
    assert "left out: 1 tensor with 20 % of the weights, such as depth.weight" in dump.left_out
    layer = dump["conv1"]
    assert (layer.n, layer.k) == (6, 36)
    x = torch.randn(2, 4, 9, 7)
    rows = torch.nn.functional.unfold(x, 3, stride=stride, padding=padding).transpose(1, 2)
    found = rows.numpy() @ layer.weight.T + layer.bias
    wanted = conv(x).flatten(2).transpose(1, 2).detach().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
