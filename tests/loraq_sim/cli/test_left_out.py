"""What a checkpoint holds and no layer shows: convolutions, packed weights, adapters."""

import json

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
    shapes = {"fc.weight": (8, 8), "conv.weight": (8, 1, 3, 3), "norm.weight": (8,)}
    return saved(tmp_path, shapes | {"experts.gate_up": (2, 8, 8)})


def test_tensors_that_may_be_weights_are_said_with_their_share(unet):
    # 72 + 128 of 264 values; the vector is no weight.
    assert read_layer_dump(unet).left_out == (
        "left out: 2 tensors with 75.8 % of the weights, such as experts.gate_up: "
        "shape (2, 8, 8) is no linear or convolution weight"
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
    assert "left out: 2 tensors with 75.8 % of the weights" in result.output


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
    with pytest.raises(DumpError, match="without its adapter \\(LoRA\\), and nothing says how"):
        dump[base]
    assert f"2 factors of adapters (LoRA) are no layers, such as {down}" in dump.left_out


@pytest.mark.parametrize(
    "adapter",
    [
        {f"b.q.hada_w{i}_{part}": (8, 2) for i in (1, 2) for part in "ab"},
        {"b.q.lokr_w1": (2, 2), "b.q.lokr_w2": (4, 4)},
        {"b.q.lokr_w1": (2, 2), "b.q.lokr_w2_a": (4, 2), "b.q.lokr_w2_b": (2, 4)},
        {"b.q.hada_w1_a.default": (8, 2), "b.q.hada_w1_b.default": (2, 8)},
        {"b.q.lora_A.default.weight": (2, 8), "b.q.lora_magnitude_vector.default.weight": (8,)},
        {"b.q.dora_scale": (8, 1)},
        {"b.q.oft_blocks": (2, 4, 4)},
        {"b.q.oft_diag.weight": (8, 8)},
        {"b.q.ia3_l": (8, 1)},
        {"b.q.vera_lambda_b": (8,), "b.q.vera_lambda_d": (2,)},
        {"b.q.diff": (8, 8), "b.q.diff_b": (8,)},
        {f"b.q.{part}.weight": (2, 8) for part in ("a1", "a2", "b1", "b2")},
        {"lora_unet_b_q.lora_down.weight": (2, 8), "lora_unet_b_q.lora_up.weight": (8, 2)},
        {"lycoris_b_q.lokr_w1": (2, 2), "lycoris_b_q.lokr_w2": (4, 4)},
    ],
    ids=lambda adapter: next(iter(adapter)),
)
@pytest.mark.parametrize("base", ["b.q", "b.q.base_layer"])
def test_a_base_of_any_adapter_is_not_what_runs(command, tmp_path, adapter, base):
    """LoHa, LoKr, DoRA, OFT and the like change the weight as LoRA does."""
    shapes = {f"{base}.weight": (8, 8), "b.k.weight": (8, 8), "b.k2.weight": (8, 8)}
    path = saved(tmp_path, shapes | adapter)
    done = command("dump", "info", path, "--format", "json")
    assert done.exit_code == 1
    rows = {row["layer"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {base, "b.k", "b.k2"}
    assert "without its adapter" in rows[base]["message"]
    assert {rows["b.k"]["status"], rows["b.k2"]["status"]} == {"ok"}


def test_layers_named_a_little_like_an_adapter_are_layers(command, tmp_path):
    names = ("b.diff_proj", "b.ia3", "b.a1", "b.a2", "b.b1", "lora_unet.q", "b.hada")
    path = saved(tmp_path, {f"{name}.weight": (8, 8) for name in names})
    done = command("dump", "info", path, "--format", "json")
    assert done.exit_code == 0, done.output
    assert {row["layer"] for row in json.loads(done.stdout)["rows"]} == set(names)


def test_a_file_of_an_adapter_alone_is_refused(tmp_path):
    path = saved(tmp_path, {"q.lora_A.weight": (2, 8), "q.lora_B.weight": (8, 2)})
    with pytest.raises(DumpError, match="not the weights that it changes; give .* --lora"):
        read_layer_dump(path)


def test_tables_and_transposed_convolutions_are_no_layers(command, tmp_path):
    shapes = {
        "emb.embedding_table.weight": (11, 8),
        "up.weight": (8, 16, 2, 2),
        "up.bias": (16,),
        "conv.weight": (16, 8, 3, 3),
        "conv.bias": (16,),
        "time_embedding.weight": (8, 8),
    }
    done = command("dump", "info", saved(tmp_path, shapes), "--format", "json")
    assert done.exit_code == 0, done.output
    rows = {row["layer"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {"conv", "time_embedding"}
    assert rows["conv"]["k"] == 72
    assert "left out: 2 tensors" in done.stderr
    assert "1 convolution, such as conv, run as GEMMs" in done.stderr


@pytest.mark.parametrize("prefixes", [("model.", "ema."), ("net.", "unet.")])
def test_one_model_under_two_wrappers_is_read_once(tmp_path, prefixes):
    shapes = {f"{prefix}{name}.weight": (8, 8) for prefix in prefixes for name in ("q", "k")}
    dump = read_layer_dump(saved(tmp_path, shapes))
    assert set(dump) == {"q", "k"}
    kept = "ema." if "ema." in prefixes else prefixes[0]
    assert f"{kept}q" in dump
    assert "one of two copies of the model" in dump.left_out
    dump = read_layer_dump(saved(tmp_path, shapes | {f"{prefixes[0]}more.weight": (8, 8)}))
    assert len(dump) == 5
