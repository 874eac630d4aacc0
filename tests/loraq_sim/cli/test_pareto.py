"""`pareto` on stored rows: limits, groups, and what the fronts say."""

import json

import pytest
from typer.testing import CliRunner

from loraq_sim.cli.app import app
from loraq_sim.results.store import ResultStore

# Error and latency of two layers under three splits: fast and rough, in between, slow and fine.
SPLITS = {"W4A4": (0.2, 1e-3), "W4A8": (0.05, 1.1e-3), "W8A8": (0.01, 2e-3)}


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "results.sqlite"
    with ResultStore.open(path, create=True) as opened:
        for name, slow in (("aie2", 1.0), ("a100", 0.1)):
            for layer, kind in (("a", "self_q"), ("b", "ffn_up")):
                for split, (error, latency) in SPLITS.items():
                    scale = 2.0 if kind == "ffn_up" else 1.0
                    row = {
                        "layer": layer, "kind": kind, "m": 1, "n": 2, "k": 2, "split": split,
                        "accelerator": name, "output_error": error, "status": "ok", "dump": "d",
                        "latency_s": latency * slow * scale, "weight_bytes": 100,
                    }  # fmt: skip
                    opened.add(f"{name}{layer}{split}", row)
    return path


def invoke(*words):
    return CliRunner().invoke(app, ["pareto", *(str(word) for word in words)])


def rows_of(done):
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["rows"]


def test_the_best_under_a_limit_comes_first_for_each_accelerator(store):
    rows = rows_of(invoke(store, "--under", "latency_s=4ms", "--format", "json"))
    best = {row["accelerator"]: row["split"] for row in rows if row["best_under"]}
    assert best == {"aie2": "W4A8", "a100": "W8A8"}
    assert [row["best_under"] for row in rows[:3]] == [True, True, False]
    assert all(row["latency_s"] <= 0.004 for row in rows)
    table = invoke(store, "--under", "latency_s=4ms,weight_bytes=1kB").stdout
    asked = "Least output_error of the model with latency_s <= 0.004 and weight_bytes <= 1000"
    assert asked in " ".join(table.split())


def test_limits_that_nothing_meets_name_the_least_there_is(store):
    done = invoke(store, "--under", "latency_s=1us")
    assert done.exit_code == 2
    assert "no row is within latency_s <= 1e-06 (least: 0.0003)" in done.stderr
    done = invoke(store, "--under", "latency_s=1ms", "--format", "json")
    assert {row["accelerator"] for row in rows_of(done)} == {"a100"}
    assert "aie2: no row is within latency_s <= 0.001 (least: 0.003)" in done.stderr
    assert invoke(store, "--under", "latency=1ms").exit_code == 2
    assert invoke(store, "--reference", "weight_bytes=1").exit_code == 2


@pytest.mark.parametrize(("by", "fronts"), [("model", 2), ("kind", 4), ("layer", 4)])
def test_fronts_of_models_kinds_and_layers(store, by, fronts):
    rows = rows_of(invoke(store, "--by", by, "--format", "json"))
    assert len(rows) == 3 * fronts
    assert sum(row["is_knee"] for row in rows) == fronts
    assert {row["split"] for row in rows if row["is_knee"]} == {"W4A8"}
    assert all(row["latency_lo_s"] < row["latency_s"] < row["latency_hi_s"] for row in rows)
    # (2 - 1.1) / (2 - 1) of the latencies times (0.2 - 0.05) / (0.2 - 0.01) of the errors.
    assert all(row["hypervolume"] == pytest.approx(0.9 * 0.15 / 0.19) for row in rows)
    if by == "layer":
        assert rows_of(invoke(store, "--per-layer", "--format", "json")) == rows


def test_the_table_says_what_the_cost_model_cannot_tell_apart(store):
    done = invoke(store)
    assert done.exit_code == 0
    assert "verdict" in done.stdout
    assert "knee" in invoke(store, "--by", "kind").stdout
    # 1.0 and 1.1 differ by more than 7.3 %, on AIE2, but not by more than 19.3 %, on A100.
    assert done.stdout.count("0 of 3") == 1
    assert done.stdout.count("2 of 3") == 1
    assert "GEMMs measured on aie2" in done.stdout


def test_any_number_of_objectives_and_the_figure_of_the_model_only(store, tmp_path):
    words = ("--minimize", "output_error,latency_s,weight_bytes", "--maximize", "sqnr_db")
    assert len(rows_of(invoke(store, *words, "--format", "json"))) == 6
    assert invoke(store, "--figure", tmp_path / "f.svg").exit_code == 0
    refused = invoke(store, "--by", "kind", "--figure", tmp_path / "g.svg")
    assert refused.exit_code == 2
    assert "leave out --by kind" in refused.stderr
