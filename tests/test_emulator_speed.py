"""`benchmarks/emulator_speed.py`: every goal, peers that are there, a file if asked for."""

import importlib
import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WORDS = ["--shape", "12x32x16", "--repeats", "1"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Call `benchmarks/emulator_speed.py` with one tiny GEMM and more words."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    app = typer.Typer()
    app.command()(importlib.import_module("emulator_speed").emulator_speed)
    monkeypatch.chdir(tmp_path)

    def call(*words):
        return CliRunner().invoke(app, [*WORDS, *words])

    return call


def test_the_table_has_a_row_for_every_goal(run, tmp_path):
    result = run("--no-peers", "--format", "json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert len(rows) >= 16
    assert all(row["ratio"] > 0 for row in rows)
    goals = [row for row in rows if row["must"] is not None]
    assert {row["verdict"] for row in goals} <= {"missed", "must", "stretch"}
    assert not list(tmp_path.iterdir())


def test_the_sections_time_two_threads_and_every_rounding_mode(run):
    result = run("--no-peers", "--format", "json")
    assert result.exit_code == 0, result.output
    names = [row["what"] for row in json.loads(result.stdout)["rows"]]
    if (os.cpu_count() or 1) > 1:
        assert names.count("emulate_gemm_srs, 2 threads / 1") >= 5
        assert names.count("torch._int_mm, 2 threads / 1") == 1
    assert sum(name.startswith("srs int32 to int8") for name in names) == 10
    without = run("--no-peers", "--no-sections", "--format", "json")
    assert not any(
        "threads" in row["what"] or row["what"].startswith("srs")
        for row in json.loads(without.stdout)["rows"]
    )


def test_peers_stand_beside_the_goals_and_absent_ones_are_noted(run):
    result = run("--format", "json")
    assert result.exit_code == 0, result.output
    names = " ".join(row["what"] for row in json.loads(result.stdout)["rows"])
    for peer in ("torch k loop", "NumPy k loop", "naive Numba"):
        assert peer in names
    for optional in ("onnxruntime", "apytypes"):
        assert optional in names or f"skipped {optional}" in result.stderr


def test_out_writes_the_table_as_markdown(run, tmp_path):
    result = run("--no-peers", "--out", "speed.md")
    assert result.exit_code == 0, result.output
    assert "| 12x32x16" in (tmp_path / "speed.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "nowhere/speed.md"), "the folder nowhere does not exist"),
        (("--shape", "12x32"), "--shape must be MxKxN"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    result = run("--no-peers", *words)
    assert result.exit_code == 2
    assert message in result.stderr
