"""`benchmarks/layer_speed.py`: a row for every case, small products, a file if asked for."""

import importlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = ["--shape", "24x64x32", "--repeats", "1", "--quiet"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call `benchmarks/layer_speed.py` with one tiny layer and more words."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    app = typer.Typer()
    app.command()(importlib.import_module("layer_speed").layer_speed)
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(app, [*WORDS, *words])


def test_every_case_has_a_row_with_its_ratio_and_verdict(run, tmp_path):
    result = run("--no-gemms", "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) == 6
    assert all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)
    goals = [row for row in rows if row["must"] is not None]
    assert {row["verdict"] for row in goals} <= {"missed", "must", "stretch"}
    assert not list(tmp_path.iterdir())


def test_a_case_of_its_own_on_another_machine_goes_into_a_file(run, tmp_path):
    words = ("--case", "int W8A8+W8A8r4", "--hw", "aie2p", "--no-gemms", "--out", "found.md")
    result = run(*words)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "found.md").read_text(encoding="utf-8")
    assert text.startswith("**Emulated layers on aie2p")
    assert "| 24x64x32 | int W8A8+W8A8r4 |" in text
