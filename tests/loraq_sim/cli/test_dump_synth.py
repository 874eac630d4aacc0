import json

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import read_layer_dump


@pytest.fixture
def run():
    return lambda *words: CliRunner().invoke(app, ["dump", *map(str, words)])


def synth(run, out, *words):
    names = ("--layers", "transformer_blocks.0.attn1.*", "--tokens", 8)
    return run("synth", "--model", "sana-0.6b", *names, "--out", out, *words)


def test_synth_writes_the_chosen_layers_and_says_so(run, tmp_path):
    out = tmp_path / "new" / "a.safetensors"
    result = synth(run, out, "--format", "json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["layers"], report["inputs"], report["tokens"]) == (4, 2, 8)
    assert report["bytes"] == out.stat().st_size
    assert "4 layers" in result.stderr
    assert len(read_layer_dump(out)) == 4


def test_equal_seeds_write_equal_files(run, tmp_path):
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        assert synth(run, path, "--seed", seed, "--quiet").exit_code == 0
    first, second, other = (path.read_bytes() for path in files)
    assert first == second
    assert other != first


def test_a_file_is_replaced_only_when_asked(run, tmp_path):
    out = tmp_path / "a.safetensors"
    out.write_text("precious")
    refused = synth(run, out)
    assert refused.exit_code == 2
    assert "is there already; choose another name, or --force" in refused.stderr
    assert out.read_text() == "precious"
    assert synth(run, out, "--force").exit_code == 0


def test_text_layers_come_with_all(run, tmp_path):
    words = ("synth", "--model", "sana-0.6b", "--layers", "cross_k", "--tokens", 2)
    missing = run(*words, "--out", tmp_path / "a.npz")
    assert missing.exit_code == 2
    assert "matches no layer name and no kind" in missing.stderr
    words = (*words[:3], "--all", "--layers", "*.0.attn2.to_k", "--dtype", "float32")
    result = run(*words, "--resolution", 512, "--out", tmp_path / "a.npz")
    assert result.exit_code == 0, result.output
    (layer,) = read_layer_dump(tmp_path / "a.npz").values()
    assert (layer.kind, layer.rows_per_call) == ("cross_k", 600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "pixart"), "unknown model 'pixart'; did you mean 'pixart-sigma'?"),
        (("--model", "sana-0.6b", "--tokens", "0"), "tokens must be 1 to"),
        (("--model", "sana-0.6b", "--resolution", "768"), "resolution must be 512 or 1024"),
        (("--model", "sana-0.6b", "--dtype", "int4"), "unknown storage dtype 'int4'"),
        (("--model", "sana-0.6b", "--seed", "-3"), "seed must be at least 0"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, words, message):
    result = run("synth", *words, "--out", tmp_path / "a.safetensors")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
