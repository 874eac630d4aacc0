"""A sweep's row is what `evaluate_layer` gives for the same settings, whoever asks and wherever.

The settings are all different from their defaults, and each of them changes the numbers, so that
none can be lost between the plan and the row.
"""

import inspect
from dataclasses import fields, replace

import numpy as np
import pytest
from typer.testing import CliRunner

import hwmodels
import loraq_sim as lq
from loraq_sim.cli.app import app
from loraq_sim.dumps import write_layer_dump
from loraq_sim.layers import Layer
from loraq_sim.results.store import ResultStore
from loraq_sim.settings import CaseOptions, CaseSettings
from loraq_sim.sweeps import SolutionCache, SweepPlan, compose, run_sweep
from loraq_sim.sweeps import cases as case_grid
from loraq_sim.sweeps.digests import code_digests

SPLIT = "W4A4+W8A8r6"
SETTINGS = {
    "seed": 3,
    "tokens": 5,
    "smooth": 0.3,
    "rotate": "hadamard:32",
    "group": 32,
    "fused": False,
    "preset": "fast",
    "rows": 77,
    "kernel": "iree",
    "datapath": {"p_format": "fp16"},
}
FLAGS = (
    *("--seed", "3", "--tokens", "5", "--smooth", "0.3", "--rotate", "hadamard:32"),
    *("--group", "32", "--unfused", "--preset", "fast", "--rows", "77", "--p-format", "fp16"),
    *("--kernel", "iree"),
)
NOT_COMPARED = {"seconds", "pareto"}


@pytest.fixture
def layer():
    rng = np.random.default_rng(1)
    scales = np.exp(rng.normal(size=96)).astype(np.float32)
    return Layer(
        name="block.0.to_q",
        weight=rng.normal(size=(80, 96)).astype(np.float32),
        activations=rng.normal(size=(24, 96)).astype(np.float32) * scales,
        kind="self_q",
        rows_per_call=40,
    )


@pytest.fixture
def dump(tmp_path, layer):
    path = tmp_path / "layer.safetensors"
    write_layer_dump(path, [layer])
    return path


@pytest.fixture
def plan(dump):
    plain = SETTINGS | {"rows": {"*": SETTINGS["rows"]}}
    return SweepPlan(dump=str(dump), accelerators=("aie2",), splits=(SPLIT,), **plain)


def assert_same(row, expected):
    named = {name for name in expected if name not in NOT_COMPARED}
    assert {name: row[name] for name in named} == {name: expected[name] for name in named}


def only_row(path):
    with ResultStore.open(path) as store:
        (row,) = store.rows()
    return row


@pytest.mark.parametrize("jobs", [0, 1])
def test_a_row_of_a_sweep_is_that_of_evaluate_layer(plan, layer, tmp_path, jobs):
    with ResultStore.open(tmp_path / "results.sqlite", create=True) as store:
        outcome = run_sweep(plan, store, jobs=jobs)
    assert (outcome.n_ok, outcome.n_failed) == (1, 0), outcome.first_failure
    assert_same(
        only_row(tmp_path / "results.sqlite"), lq.evaluate_layer(layer, SPLIT, "aie2", **SETTINGS)
    )


@pytest.mark.parametrize("jobs", ["0", "1"])
def test_a_row_of_the_command_is_that_of_evaluate_layer(dump, layer, tmp_path, jobs):
    words = ["sweep", "--hw", "aie2", "--layer-dump", str(dump), "--split", SPLIT, *FLAGS]
    result = CliRunner().invoke(app, [*words, "--jobs", jobs, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    row = only_row(tmp_path / "out" / "results.sqlite")
    assert_same(row, lq.evaluate_layer(layer, SPLIT, "aie2", **SETTINGS))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_above_changes_the_row(layer, name):
    """Otherwise the tests above could not see that it was lost."""
    changed = {key: value for key, value in SETTINGS.items() if key != name}
    rows = [lq.evaluate_layer(layer, SPLIT, "aie2", **s) for s in (SETTINGS, changed)]
    columns = set(rows[0]) - NOT_COMPARED - {"seed", "preset", "smooth", "rotation", "message"}
    assert any(rows[0][column] != rows[1][column] for column in columns)


def test_evaluate_layer_takes_every_setting():
    """A new field of the record is a keyword of the public function, or it could not be compared"""
    taken = {*inspect.signature(lq.evaluate_layer).parameters, *CaseOptions.__annotations__}
    assert {field.name for field in fields(CaseSettings)} <= taken


OTHER = {
    "method": "svdquant",
    "preset": "best",
    "seed": 4,
    "smooth": 0.4,
    "rotate": "hadamard",
    "condition": "rms",
    "finish": "data",
    "tokens": 6,
    "rows": 78,
    "fused": True,
    "datapath": {"p_format": "bf16"},
    "group": 16,
    "kernel": "iron_gemm",
    "family": "mxint",
}
SOLVED = {"method", "preset", "seed", "smooth", "rotate", "group", "family", "condition", "finish"}


def changed_plan(plan, **changes):
    names = {"method": "methods", "rows": "rows"}
    values = {"method": lambda v: (v,), "rows": lambda v: {"*": v}}
    return replace(
        plan,
        **{names.get(key, key): values.get(key, lambda v: v)(v) for key, v in changes.items()},
    )


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_setting_gives_another_case_and_if_solved_another_solution(plan, name):
    (before,) = compose(plan).cases
    (after,) = compose(changed_plan(plan, **{name: OTHER[name]})).cases
    assert before.case_id != after.case_id
    assert (before.solution_key != after.solution_key) == (name in SOLVED)


def test_no_setting_is_missing_above():
    assert {field.name for field in fields(CaseSettings)} <= {*OTHER, "split"}


@pytest.mark.parametrize("subsystem", code_digests())
def test_changed_code_gives_another_case(plan, monkeypatch, subsystem):
    (before,) = compose(plan).cases
    changed = code_digests() | {subsystem: "other"}
    monkeypatch.setattr(case_grid, "code_digests", lambda: changed)
    (after,) = compose(plan).cases
    assert before.case_id != after.case_id
    assert (before.solution_key != after.solution_key) == (subsystem == "solver")


def test_a_solution_kept_for_other_settings_is_not_used(plan, layer, tmp_path):
    """One cache folder for sweeps that differ in one solver setting each."""
    cache = SolutionCache(folder=str(tmp_path / "cache"), least_seconds=0.0)
    for number, name in enumerate([None, *sorted(SOLVED - {"family"})]):
        changes = {} if name is None else {name: OTHER[name]}
        path = tmp_path / f"{number}.sqlite"
        with ResultStore.open(path, create=True) as store:
            run_sweep(changed_plan(plan, **changes), store, jobs=0, cache=cache)
        expected = lq.evaluate_layer(layer, SPLIT, "aie2", **(SETTINGS | changes))
        assert_same(only_row(path), expected)


@pytest.mark.parametrize("change", [{"group": 64}, {"p_bits": None}, {"transforms": ()}])
def test_the_cost_of_a_row_is_that_of_a_workload_written_by_hand(layer, change):
    """What plan and `evaluate_layer` share cannot be told apart by comparing them."""
    row = lq.evaluate_layer(layer, SPLIT, "aie2", **SETTINGS)
    aie2 = hwmodels.load_accelerator("aie2")
    work = hwmodels.GemmWorkload(
        m=77, n=80, k=96, main="W4A4", branch="W8A8", rank=6, fused=False, out_bits=16,
        family="int", group=32, scale_bits=16, p_bits=16, transforms=("smooth", "hadamard32"),
    )  # fmt: skip
    names = ("latency_s", "cycles", "energy_j", "dram_bytes", "utilization")
    by_hand = hwmodels.estimate_cost(work, aie2, kernel=SETTINGS["kernel"])
    assert {name: row[name] for name in names} == {name: getattr(by_hand, name) for name in names}
    other = hwmodels.estimate_cost(replace(work, **change), aie2, kernel=SETTINGS["kernel"])
    assert any(getattr(other, name) != row[name] for name in names)
