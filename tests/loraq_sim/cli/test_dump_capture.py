import json

import numpy as np
import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import read_layer_dump

ENTRY = "examples/capture_entry.py:two_layers"


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *words: CliRunner().invoke(app, ["dump", "capture", *map(str, words)])


def test_capture_writes_layers_that_reproduce_the_model(run, tmp_path):
    out = tmp_path / "new" / "a.safetensors"
    result = run(ENTRY, "--tokens", 2000, "--out", out, "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layers"], report["inputs"], report["tokens"]) == (2, 2, 10 * 4 * 32)
    assert "2 layers ran in 10 calls over 10 time steps" in result.stderr
    dump = read_layer_dump(out)
    up, down = dump["up"], dump["down"]
    hidden = up.activations.astype(np.float64) @ up.weight.T + up.bias
    # GELU is between max(x, 0) - 0.17 and max(x, 0).
    assert np.all(down.activations <= np.maximum(hidden, 0) + 1e-5)
    assert np.all(down.activations >= np.maximum(hidden, 0) - 0.1701)


def test_a_captured_pt_file_is_read_back(run, tmp_path):
    out = tmp_path / "a.pt"
    assert run(ENTRY, "--tokens", 8, "--out", out).exit_code == 0
    dump = read_layer_dump(out)
    assert dump["up"].activations.shape == (8, 65)
    assert type(dump.meta["torch"]) is str


def test_equal_seeds_write_equal_files(run, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        words = ("--seed", seed, "--tokens", 16, "--dtype", "float16", "--quiet")
        result = run(ENTRY, *words, "--out", path)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
    first, second, other = (path.read_bytes() for path in files)
    assert first == second
    assert first != other


def test_capture_reads_a_diffusers_folder(run, tmp_path):
    pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
    out = tmp_path / "a.safetensors"
    words = ("--steps", 2, "--images", 1, "--layers", "self_*", "--tokens", 8, "--seed", 3)
    result = run("examples/tiny_pixart", *words, "--out", out, "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == 16
    meta = read_layer_dump(out).meta
    assert meta["time_steps"]["values"] == [1000.0, 500.0]
    assert (meta["seed"], meta["images"]) == (3, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere: no such folder, and no entry point"),
        (("examples",), "has no config.json"),
        (("examples/capture_entry.py:three_layers",), "did you mean 'two_layers'"),
        ((ENTRY, "--layers", "ffn_*"), "matches no layer name and no kind"),
        ((ENTRY, "--tokens", "0"), "tokens must be 1 to"),
        (("examples/tiny_pixart", "--steps", "0"), "steps and images must be at least 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, words, message):
    result = run(*words, "--out", tmp_path / "a.safetensors")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_without_running_the_model(run, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    refused = run(ENTRY, "--out", out)
    assert refused.exit_code == 2
    assert "or --force" in refused.stderr
    assert out.read_text() == "precious"
    assert run(ENTRY, "--out", out, "--force").exit_code == 0
