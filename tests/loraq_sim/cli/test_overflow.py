"""Floats beyond their format, from the command line to the sentence that a user reads."""

import json
import math

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.results.store import ResultStore


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """A layer with outputs up to 1e5 and one like it of usual size."""
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((64, 128)) * 0.5).astype(np.float32)
    x = (rng.standard_normal((32, 128)) * 5000).astype(np.float32)
    path = tmp_path_factory.mktemp("dump") / "loud.npz"
    tensors = {"loud.weight": weight, "loud.activations": x}
    tensors |= {"quiet.weight": weight, "quiet.activations": x / 5000}
    np.savez(path, **tensors)
    assert set(lq.read_layer_dump(path)) == {"loud", "quiet"}
    return path


@pytest.fixture
def sweep(command, dump, tmp_path):
    def invoke(*words):
        return command(
            *("sweep", "--layer-dump", dump, "--split", "W8A8,W4A4", "--preset", "fast"),
            *("--jobs", 0, "--quiet", "--out", tmp_path / "run", *words),
        )

    return invoke


def test_a_sweep_row_is_that_of_evaluate_layer_and_null_in_json(sweep, dump, tmp_path):
    result = sweep("--hw", "t4", "--format", "json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    with ResultStore.open(tmp_path / "run" / "results.sqlite") as store:
        stored = {(row["layer"], row["split"]): row for row in store.rows()}
    loud = lq.read_layer_dump(dump)["loud"]
    for split in ("W8A8", "W4A4"):
        row = lq.evaluate_layer(loud, split, "t4", preset="fast")
        kept = stored["loud", split]
        own = set(row) - {"seconds", "pareto"}
        assert {n: kept[n] for n in own} == {n: row[n] for n in own}
        assert (row["status"], row["output_error"]) == ("overflow", math.inf)
        (line,) = [r for r in shown["rows"] if (r["layer"], r["split"]) == ("loud", split)]
        assert (line["status"], line["output_error"]) == ("overflow", None)
        assert line["clipped_count"] == row["clipped_count"] > 0
    for total in shown["model"]:
        assert (total["status"], total["output_error"], total["pareto"]) == (
            "overflow",
            None,
            False,
        )
        assert total["message"] == "the output of 1 of 2 layers is not finite: loud"
    assert shown["front"] == []
    note = shown["notes"][-1]
    assert note in result.stderr.replace("\n", "")
    assert "2 of 4 cases have values beyond their float format; the output of 2 is not" in note
    assert "loud in W8A8 on t4 (32 values, first y in fp16, row" in note


def test_a_sweep_resumes_without_running_such_cases_again(sweep):
    assert sweep("--hw", "t4").exit_code == 0
    again = sweep("--hw", "t4", "--dry-run", "--format", "json")
    assert json.loads(again.stdout)["to_run"] == 0


def test_the_machine_that_holds_the_values_is_on_the_front_alone(sweep):
    result = sweep("--hw", "t4,h100", "--format", "json")
    shown = json.loads(result.stdout)
    assert {row["accelerator"] for row in shown["front"]} == {"h100"}
    assert all(row["status"] == "ok" for row in shown["front"])


def test_a_plan_lets_a_kernel_clamp(sweep):
    result = sweep(
        *("--hw", "t4", "--set", 'datapath.float_overflow={fp16="saturate"}', "--format", "json")
    )
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    (row,) = [r for r in shown["rows"] if (r["layer"], r["split"]) == ("loud", "W8A8")]
    assert (row["status"], row["clipped_count"]) == ("ok", 32)
    assert 0.01 < row["output_error"] < 0.2
    assert "clamped to the largest fp16" in row["message"]
    assert '"float_overflow": {"fp16": "saturate"}' in row["options"]
    assert any(total["message"] for total in shown["model"])
    bad = sweep("--hw", "t4", "--set", 'datapath.float_overflow={fp16="clip"}')
    assert bad.exit_code == 2
    assert "unknown overflow rule of fp16 'clip'" in bad.stderr


def test_explain_names_the_tensor_and_gives_overflow_a_source_of_its_own(command, dump):
    words = ("explain", "--hw", "t4", "--layer-dump", dump, "--layer", "loud")
    options = ("--split", "W8A8", "--preset", "fast", "--format", "json")
    result = command(*words, *options)
    assert result.exit_code == 0
    case = json.loads(result.stdout)
    shares = {row["source"]: row["share"] for row in case["errors"]}
    assert shares["float_overflow"] == 1.0
    assert case["summary"]["total_error"] is None
    assert any("values of y overflow fp16 to infinity" in note for note in case["notes"])
    table = command(*words, "--split", "W8A8", "--preset", "fast")
    assert "float_overflow" in table.stdout


def test_emulate_shows_the_count(command, dump):
    result = command(
        *("emulate", "--hw", "t4", "--layer-dump", dump, "--split", "W8A8", "--quiet"),
    )
    assert result.exit_code == 0
    assert "overflow: the output is not finite: 32 of 2,048 values" in result.stdout
