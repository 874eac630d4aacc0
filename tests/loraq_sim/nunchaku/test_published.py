"""nunchaku files as they are published: bf16, newer key names, layers of other kinds beside."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.errors import InputError
from loraq_sim.nunchaku import read_nunchaku, write_nunchaku

NAME = "transformer_blocks.0.ff.net.2"
NEWER = {"lora_down": "proj_down", "lora_up": "proj_up", "smooth": "smooth_factor"}
HALF = np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """The tensors of a file in fp16 whose values bf16 holds, too."""
    weight = np.random.default_rng(0).standard_normal((130, 192)).astype(np.float32) * 0.05
    options = {"main": "int4/g64", "branch": "fp16", "rank": 8, "preset": "fast"}
    path = tmp_path_factory.mktemp("nunchaku") / "n.safetensors"
    bias = np.arange(130, dtype=np.float32)
    write_nunchaku(path, {NAME: lq.solve(weight, **options)}, biases={NAME: bias})
    found = load_file(path)
    for key, values in found.items():
        if values.dtype == np.float16:
            # Nothing below 2^-14, where fp16 has fewer digits than bf16.
            kept = np.where(np.abs(values) < 2.0**-14, 0, values).astype(np.float16)
            found[key] = kept.astype(HALF).astype(np.float16)
    scales = found[f"{NAME}.wscales"]
    found[f"{NAME}.wscales"] = np.where(scales == 0, np.float16(1), scales)
    return found


def bfloat16(tensors):
    return {k: v.astype(HALF) if v.dtype == np.float16 else v for k, v in tensors.items()}


def renamed(tensors):
    parts = {key: key.rpartition(".")[2] for key in tensors}
    return {key[: -len(part)] + NEWER.get(part, part): tensors[key] for key, part in parts.items()}


def awq(tensors):
    name = "transformer_blocks.0.norm1.linear"
    more = {
        f"{name}.qweight": np.zeros((8, 8), np.int32),
        f"{name}.wscales": np.ones((1, 8), HALF),
        f"{name}.wzeros": np.ones((1, 8), HALF),
    }
    return tensors | more | {"x_embedder.weight": np.ones((4, 4), HALF)}


@pytest.mark.parametrize("is_newer", [False, True])
@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_a_published_file_has_the_values_of_ours(tensors, tmp_path, is_newer, is_bfloat16):
    save_file(tensors, tmp_path / "ours.safetensors")
    (ours,), biases = (list(x.values()) for x in read_nunchaku(tmp_path / "ours.safetensors"))
    content = bfloat16(tensors) if is_bfloat16 else tensors
    content = awq(renamed(content) if is_newer else content)
    save_file(content, tmp_path / "published.safetensors")
    left_out: list[str] = []
    found, found_biases = read_nunchaku(tmp_path / "published.safetensors", left_out=left_out)
    assert list(found) == [NAME]
    assert left_out == ["transformer_blocks.0.norm1.linear"]
    solution = found[NAME]
    np.testing.assert_array_equal(solution.main.codes, ours.main.codes)
    np.testing.assert_array_equal(solution.main.scales, ours.main.scales)
    np.testing.assert_array_equal(found_biases[NAME], biases[0])
    half = "bf16" if is_bfloat16 else "fp16"
    for part in ("left", "right"):
        assert str(getattr(solution, part).format) == half
        found_part = getattr(solution, part).dequantize()
        np.testing.assert_array_equal(found_part, getattr(ours, part).dequantize())
    assert str(solution.main.format) == str(lq.parse_format(f"int4/g64/{half}"))
    np.testing.assert_array_equal(solution.reconstruct(), ours.reconstruct())


def test_the_command_says_what_it_leaves_out(tensors, tmp_path):
    save_file(awq(bfloat16(tensors)), tmp_path / "p.safetensors")
    words = ["model", "info", str(tmp_path / "p.safetensors"), "--layout", "nunchaku"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "left out: 1 layer of AWQ (weights alone), such as" in result.output


def test_files_in_two_dtypes_and_of_awq_alone_are_refused_in_one_line(tensors, tmp_path):
    mixed = tensors | {f"{NAME}.wscales": tensors[f"{NAME}.wscales"].astype(HALF)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    with pytest.raises(InputError, match="bias is float16 of shape .* expected bfloat16"):
        read_nunchaku(tmp_path / "mixed.safetensors")
    save_file(awq({}), tmp_path / "awq.safetensors")
    with pytest.raises(InputError, match="its 1 layers, .* quantize weights alone .AWQ."):
        read_nunchaku(tmp_path / "awq.safetensors")
