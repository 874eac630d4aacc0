"""`explain` on a bundled layer."""

import csv
import json

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.results.wording import glossary

WORDS = (
    *("explain", "--hw", "aie2", "--layer-dump", "examples/tiny_pixart.pt", "--preset", "fast"),
    *("--layer", "transformer_blocks.0.attn1.to_q", "--tokens", "16"),
)


@pytest.fixture
def run(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_the_tables_name_every_source_and_part(run):
    done = run(*WORDS, "--split", "W4A4+W8A8r8")
    assert done.exit_code == 0, done.output
    for word in ("main_weight", "p_rounding", "interaction", "branch_up", "dispatch", "static"):
        assert word in done.stdout


def test_json_and_files_hold_the_same_numbers(run, tmp_path):
    words = (*WORDS, "--split", "W4A4", "--out", tmp_path)
    view = json.loads(run(*words, "--format", "json").stdout)
    assert view["case"]["split"] == "W4A4"
    assert sum(row["share"] for row in view["errors"]) == pytest.approx(1.0)
    assert json.loads((tmp_path / "explanation.json").read_text()) == {"cases": view["cases"]}
    assert view["cases"] == [{name: view[name] for name in view["cases"][0]}]
    with (tmp_path / "errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == [row["source"] for row in view["errors"]]
    assert (tmp_path / "costs.csv").exists()
    assert run(*words).exit_code == 2
    assert run(*words, "--force").exit_code == 0


def test_several_splits_and_machines_are_explained_one_after_the_other(run):
    done = run(*WORDS, "--hw", "a100", "--split", "W4A4,W8A8", "--format", "csv")
    rows = list(csv.DictReader(done.stdout.splitlines()))
    cases = {(row["accelerator"], row["split"]) for row in rows}
    assert cases == {(a, s) for a in ("aie2", "a100") for s in ("W4A4", "W8A8")}


def test_bad_input_is_one_line(run):
    for words, message in (
        (("--split", "W4"), "not understood"),
        (("--split", "W4A4", "--acc-bits", "4"), "acc_bits"),
        (("--hw", "aie3"), "unknown accelerator"),
    ):
        done = run(*WORDS, *words)
        assert done.exit_code == 2, done.output
        assert message in done.stderr
    done = run(*WORDS[:7], "--layer", "nothing", "--split", "W4A4")
    assert done.exit_code == 2
    assert "nothing" in done.stderr


@pytest.mark.parametrize("term", ["hypervolume", "Working_Set", "working-set", "sqnr", "launch"])
def test_a_word_is_explained_without_a_layer(run, term):
    result = run("explain", term)
    assert result.exit_code == 0, result.output
    word, _, meaning = result.stdout.strip().partition(": ")
    assert word.lower() == term.lower().replace("_", " ").replace("-", " ")
    assert len(meaning) > 20
    assert meaning == glossary()[word]


def test_the_glossary_lists_every_word_and_refuses_others(run):
    rows = json.loads(run("explain", "list", "--format", "json").stdout)["rows"]
    assert {row["term"]: row["meaning"] for row in rows} == glossary()
    words = glossary()
    # What a bound may be called, and what tables and verdicts name, is explained.
    assert {"dispatch", "bound", "stall", "fill", "gain", "roofline", "hypervolume"} <= set(words)
    wrong = run("explain", "hypervolum")
    assert (wrong.exit_code, wrong.stdout) == (2, "")
    assert "did you mean 'hypervolume'" in wrong.stderr
    bare = run("explain", "--hw", "aie2")
    assert bare.exit_code == 2
    assert "explain needs --hw, --layer-dump and --layer" in bare.stderr
