"""``loraq-sim model``: quantized models listed, and in the layouts of other engines."""

import json
import re

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import loraq_sim as lq
from loraq_sim.nunchaku import read_nunchaku
from loraq_sim.quantized_model import read_quantized_model, write_quantized_model


@pytest.fixture
def ours(tmp_path):
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    solution = lq.solve(weight, main="int4/g64", branch="fp16", rank=4, preset="fast")
    return write_quantized_model(tmp_path / "ours.safetensors", {"block.fc": solution})


@pytest.mark.parametrize(
    ("layout", "name"), [("nunchaku", "n.safetensors"), ("deepcompressor", "d")]
)
def test_there_and_back_is_the_same_model(layout, name, ours, tmp_path, command):
    there, back = tmp_path / name, tmp_path / "back.safetensors"
    result = command("model", "convert", ours, there, "--to", layout, "--format", "json")
    assert result.exit_code == 0, result.stderr
    assert "holds no biases" in result.stderr
    assert json.loads(result.stdout)["layers"] == 1
    assert (
        command("model", "convert", there, back, "--from", layout, "--to", "loraq").exit_code == 0
    )
    before, after = read_quantized_model(ours), read_quantized_model(back)
    np.testing.assert_array_equal(before["block.fc"].reconstruct(), after["block.fc"].reconstruct())


def test_biases_come_from_the_dump(ours, tmp_path, command):
    bias = np.linspace(-1, 1, 128, dtype=np.float32)
    dump = tmp_path / "dump.npz"
    np.savez(dump, **{"block.fc.weight": np.ones((128, 128), np.float32), "block.fc.bias": bias})
    target = tmp_path / "n.safetensors"
    result = command(
        "model", "convert", ours, target, "--to", "nunchaku", "--layer-dump", dump, "--quiet"
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    np.testing.assert_array_equal(read_nunchaku(target)[1]["block.fc"], bias.astype(np.float16))


def test_info_lists_layers(ours, command):
    result = command("model", "info", ours, "--format", "json")
    assert result.exit_code == 0, result.stderr
    (layer,) = json.loads(result.stdout)["layers"]
    assert (layer["layer"], layer["n"], layer["rank"]) == ("block.fc", 128, 4)


def test_info_names_rotation_and_smoothing(tmp_path, command):
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(32, 64)).astype("f4"), rng.normal(size=(16, 64)).astype("f4")
    solution = lq.solve(
        weight, rank=4, preset="fast", activations=x, smooth=0.5, rotate="hadamard:16"
    )
    path = write_quantized_model(tmp_path / "turned.safetensors", {"fc": solution})
    (layer,) = json.loads(command("model", "info", path, "--format", "json").stdout)["layers"]
    assert (layer["rotation"], layer["smoothed"]) == ("hadamard:16", True)
    assert re.search(
        r"rotation +smoothed[\s\S]+hadamard:16 +yes", command("model", "info", path).stdout
    )


def test_a_missing_layer_in_the_dump_is_named(ours, tmp_path, command):
    dump = tmp_path / "dump.npz"
    np.savez(dump, **{"other.weight": np.ones((8, 8), np.float32)})
    target = tmp_path / "n.safetensors"
    result = command("model", "convert", ours, target, "--to", "nunchaku", "--layer-dump", dump)
    assert result.exit_code == 2
    assert "has no layer 'block.fc'" in result.stderr
    assert not target.exists()


def test_what_is_not_quantized_is_carried_along_with_the_config(tmp_path, command):
    rng = np.random.default_rng(0)
    names = {
        "blocks.0.ff.net.2.weight": (64, 64),
        "x_embedder.weight": (64, 64),
        "norm.weight": (64,),
    }
    names |= {"norm.weight": (64,), "table": (2, 3), "x_embedder.bias": (64,)}
    tensors = {name: rng.standard_normal(shape).astype("f4") for name, shape in names.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    words = ("solve", "--layer-dump", tmp_path / "model.safetensors", "--layers", "blocks.*")
    words += ("--split", "W4A4+W16A16r4", "--preset", "fast", "--save", tmp_path / "q.safetensors")
    assert command(*words).exit_code == 0
    words = ("model", "convert", tmp_path / "q.safetensors", tmp_path / "n.safetensors")
    result = command(*words, "--to", "nunchaku", "--layer-dump", tmp_path / "model.safetensors")
    assert result.exit_code == 0, result.output
    assert "4 tensors are not quantized and carried along" in result.stderr
    with safe_open(tmp_path / "n.safetensors", framework="numpy") as file:
        metadata, keys = file.metadata(), set(file.keys())
        for name in names.keys() - {"blocks.0.ff.net.2.weight"}:
            np.testing.assert_array_equal(file.get_tensor(name), tensors[name])
    assert "blocks.0.ff.net.2.qweight" in keys
    assert "blocks.0.ff.net.2.weight" not in keys
    assert metadata["model_class"] == "FluxTransformer2DModel"
    assert json.loads(metadata["quantization_config"])["weight"]["group_size"] == 64
    # Read back, it is the same one layer.
    result = command("model", "info", tmp_path / "n.safetensors", "--layout", "nunchaku")
    assert result.exit_code == 0, result.output
