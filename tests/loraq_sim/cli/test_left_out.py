"""What a checkpoint holds and no layer shows: convolutions, packed weights, adapters."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.errors import DumpError


def saved(tmp_path, shapes):
    path = tmp_path / "model.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, path)
    return path


@pytest.fixture
def unet(tmp_path):
    shapes = {"fc.weight": (8, 8), "conv.weight": (8, 4, 3, 3), "norm.weight": (8,)}
    return saved(tmp_path, shapes | {"experts.gate_up": (2, 8, 8)})


def test_tensors_that_may_be_weights_are_said_with_their_share(unet):
    # 288 + 128 of 480 values; the vector is no weight.
    assert read_layer_dump(unet).left_out == (
        "left out: 2 tensors with 86.7 % of the weights, such as conv.weight: "
        "shape (8, 4, 3, 3) is no linear or 1x1 convolution weight"
    )


def test_nothing_is_said_of_vectors_and_of_chosen_layers(unet, tmp_path):
    assert read_layer_dump(unet).select("fc").left_out == ""
    plain = saved(tmp_path, {"fc.weight": (8, 8), "norm.weight": (8,)})
    assert read_layer_dump(plain).left_out == ""


@pytest.mark.parametrize("name", ["conv", "conv.weight", "experts.gate_up"])
def test_a_left_out_name_is_refused_with_the_reason(unet, name):
    dump = read_layer_dump(unet)
    for ask in (lambda: dump.select(name), lambda: dump[name]):
        with pytest.raises(DumpError, match=f"'{name}' is no layer: shape"):
            ask()


@pytest.mark.parametrize(
    "words", [("dump", "info"), ("solve", "--split", "W4A4", "--layer-dump"), ("sweep",)]
)
def test_commands_say_what_they_leave_out(command, unet, tmp_path, words):
    if words == ("sweep",):
        words = ("sweep", "--hw", "aie2", "--dry-run", "--out", tmp_path / "o", "--layer-dump")
    result = command(*words, unet)
    assert result.exit_code == 0, result.output
    assert "left out: 2 tensors with 86.7 % of the weights" in result.output


@pytest.mark.parametrize(
    ("base", "factors"),
    [
        ("b.q.base_layer", ("b.q.lora_A.default", "b.q.lora_B.default")),
        ("b.q", ("b.q.lora_A", "b.q.lora_B")),
        ("b.q", ("b.processor.q_lora.down", "b.processor.q_lora.up")),
        ("b.q", ("b.q.lora.down", "b.q.lora.up")),
        ("b.q", ("b.q.lora_linear_layer.down", "b.q.lora_linear_layer.up")),
        ("b.q", ("b.q.lora_down", "b.q.lora_up")),
    ],
)
def test_an_adapter_is_no_layer_and_its_base_is_not_what_runs(tmp_path, base, factors):
    down, up = factors
    shapes = {base: (8, 8), down: (2, 8), up: (8, 2), "b.k": (8, 8)}
    dump = read_layer_dump(saved(tmp_path, {f"{name}.weight": s for name, s in shapes.items()}))
    assert set(dump) == {base, "b.k"}
    assert dump["b.k"].n == 8
    with pytest.raises(DumpError, match="without its adapter \\(LoRA\\); merge the adapter"):
        dump[base]
    assert f"2 factors of adapters (LoRA) are no layers, such as {down}" in dump.left_out


def test_a_file_of_an_adapter_alone_is_refused(tmp_path):
    path = saved(tmp_path, {"q.lora_A.weight": (2, 8), "q.lora_B.weight": (8, 2)})
    with pytest.raises(DumpError, match="holds no layers .2 other tensors: 2 factors of adapters"):
        read_layer_dump(path)
