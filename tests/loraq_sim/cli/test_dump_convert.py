import json

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.dumps import read_layer_dump


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *words: CliRunner().invoke(app, ["dump", "convert", *map(str, words)])


def test_convert_keeps_what_the_dump_says(run, tmp_path):
    out = tmp_path / "a.safetensors"
    result = run("examples/tiny_pixart.pt", out, "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["layers"] == 20
    source, copy = read_layer_dump("examples/tiny_pixart.pt"), read_layer_dump(out)
    assert copy.meta == source.meta
    assert [copy[name].digest() for name in copy] == [source[name].digest() for name in source]


def test_convert_chooses_layers_and_dtype(run, tmp_path):
    out = tmp_path / "a.npz"
    words = ("--layers", "ffn_*", "--dtype", "float32", "--quiet")
    result = run("examples/tiny_pixart.pt", out, *words)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    dump = read_layer_dump(out)
    assert {dump[name].kind for name in dump} == {"ffn_up", "ffn_down"}
    assert {dump.info(name).dtype for name in dump} == {"float32"}


def test_tensors_left_behind_are_counted(run, tmp_path):
    import torch

    torch.save({"a.weight": torch.ones(2, 3), "table": torch.ones(4)}, tmp_path / "a.pt")
    result = run(tmp_path / "a.pt", tmp_path / "b.npz")
    assert "left behind: 1 tensor of no linear layer" in result.stderr


@pytest.mark.parametrize(
    ("target", "words", "message"),
    [
        ("a.bin", (), "unknown dump suffix '.bin'"),
        ("a.npz", ("--layers", "nothing"), "matches no layer name and no kind"),
        ("a.npz", ("--dtype", "float8"), "unknown storage dtype 'float8'"),
        ("a.npz", ("--dtype", "bfloat16"), ".npz has no bfloat16"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, target, words, message):
    result = run("examples/tiny_pixart.pt", tmp_path / target, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_needs_force(run, tmp_path):
    out = tmp_path / "a.npz"
    out.write_text("precious")
    assert "or --force" in run("examples/minilm.pt", out).stderr
    assert out.read_text() == "precious"
    assert run("examples/minilm.pt", out, "--force").exit_code == 0
