"""What every executor promises, wherever its tasks run: this process, workers of it, a cluster."""

import re
from dataclasses import replace

import numpy as np
import pytest

from loraq_sim.dumps import write_layer_dump
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.cluster import ClusterExecutor
from loraq_sim.sweeps.local import ProcessExecutor, SerialExecutor, WorkerLost
from loraq_sim.sweeps.worker import CaseResult

ELSEWHERE = ("processes", "dask")
# What tells where and when a row was made.
NOT_COMPARED = ("seconds", "pid", "threads")


@pytest.fixture
def executor(request):
    name = request.param
    if name == "dask":
        return ClusterExecutor(request.getfixturevalue("client"))
    return ProcessExecutor(jobs=2) if name == "processes" else SerialExecutor()


everywhere = pytest.mark.parametrize("executor", ["serial", *ELSEWHERE], indirect=True)
where_workers_die = pytest.mark.parametrize("executor", ELSEWHERE, indirect=True)


def run(executor, sweep, fake):
    found = list(executor.run(sweep.tasks, fake))
    results = [r for r in found if isinstance(r, CaseResult)]
    # Every case of every task, once each.
    assert sorted(r.case.case_id for r in results) == sorted(sweep.case_ids)
    lost = [r for r in found if isinstance(r, WorkerLost)]
    return {(r.row["layer"], r.row["split"]): r for r in results}, lost


def failed(results):
    return {key for key, result in results.items() if result.row["status"] == "failed"}


@everywhere
def test_every_case_gives_the_row_it_gives_in_this_process(make_dump, make_plan, fake, executor):
    sweep = compose(make_plan(make_dump(a="linear", b="linear", c="linear")))
    results, lost = run(executor, sweep, fake)
    expected, _ = run(SerialExecutor(), sweep, fake)
    assert lost == []
    for key, result in expected.items():
        own = results[key].row
        assert {k: v for k, v in own.items() if k not in NOT_COMPARED} == {
            k: v for k, v in result.row.items() if k not in NOT_COMPARED
        }


@everywhere
def test_without_tasks_there_is_nothing(executor, fake):
    assert list(executor.run([], fake)) == []


@everywhere
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crashes", r"ZeroDivisionError: division by zero \(fake_evaluation\.py:\d+\)"),
        ("refuses", r"rank 99 is too large for this layer"),
    ],
)
def test_a_case_that_raises_fails_alone(make_dump, make_plan, fake, executor, kind, message):
    results, lost = run(executor, compose(make_plan(make_dump(a=kind, b="linear"))), fake)
    assert failed(results) == {("a", "W4A8")}
    row = results["a", "W4A8"].row
    assert re.fullmatch(message, row["message"])
    # What the plan knows of the case is there all the same.
    assert (row["n"], row["k"], row["accelerator"], row["output_error"]) == (8, 16, "aie2", None)
    assert not results["a", "W4A8"].is_unreadable
    assert lost == []


@everywhere
def test_a_layer_that_cannot_be_loaded_fails_alone(tmp_path, make_plan, fake, executor):
    weights = {f"{name}.weight": np.ones((8, 16), np.float32) for name in "abc"}
    weights["b.weight"][3, 4] = np.nan
    np.savez(tmp_path / "bad.npz", **weights)
    results, lost = run(executor, compose(make_plan(tmp_path / "bad.npz")), fake)
    assert failed(results) == {("b", split) for split in ("W4A4", "W4A8", "W8A8")}
    for (layer, _), result in results.items():
        assert result.is_unreadable == (layer == "b")
        assert ("NaN" in result.row["message"]) == (layer == "b")
    assert lost == []


@everywhere
def test_a_layer_that_changed_since_the_plan_is_refused(make_dump, make_plan, fake, executor):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    changed = replace(sweep.tasks[0], digest="0" * 64)
    results, _ = run(executor, replace(sweep, tasks=(changed, sweep.tasks[1])), fake)
    assert failed(results) == {("a", split) for split in ("W4A4", "W4A8", "W8A8")}
    assert "'a' changed since the sweep was planned" in results["a", "W4A4"].row["message"]


@everywhere
def test_an_evaluation_that_cannot_be_imported_is_an_error(make_dump, make_plan, executor):
    tasks = compose(make_plan(make_dump(a="linear"))).tasks
    with pytest.raises(InputError, match="cannot load the evaluation 'no_such_module:f'"):
        list(executor.run(tasks, "no_such_module:f"))


@everywhere
def test_it_can_be_stopped_after_any_case_and_used_again(make_dump, make_plan, fake, executor):
    sweep = compose(make_plan(make_dump(**dict.fromkeys("abcdef", "steady"))))
    results = executor.run(sweep.tasks, fake)
    assert isinstance(next(results), CaseResult)
    results.close()
    assert list(results) == []
    results, _ = run(executor, sweep, fake)
    assert failed(results) == set()


@everywhere
def test_stored_rows_of_real_layers_are_the_same(tmp_path, make_plan, monkeypatch, executor):
    rng = np.random.default_rng(0)
    layers = [
        Layer(
            name=name,
            weight=rng.normal(size=(48, 64)).astype(np.float32),
            activations=rng.normal(size=(32, 64)).astype(np.float32),
            kind="linear",
        )
        for name in "abc"
    ]
    write_layer_dump(tmp_path / "dump.safetensors", layers)
    # A path that only this process's folder makes right: workers run in folders of their own.
    monkeypatch.chdir(tmp_path)
    sweep = compose(make_plan("dump.safetensors", splits=("W4A4", "W4A4+W8A8r8"), preset="fast"))
    tables = []
    for name, where in (("here", SerialExecutor()), ("there", executor)):
        with ResultStore.open(tmp_path / f"{name}.sqlite", create=True) as store:
            outcome = run_sweep(sweep, store, jobs=1, executor=where)
            assert (outcome.n_ok, outcome.n_failed, outcome.exit_code) == (6, 0, 0)
            tables.append([row | {"seconds": 0} for row in store.rows()])
    assert tables[0] == tables[1]


@where_workers_die
def test_a_killed_worker_is_survived(make_dump, make_plan, fake, tmp_path, executor):
    dump = make_dump(marker=tmp_path / "killed", a="kills_once", b="linear", c="linear")
    results, lost = run(executor, compose(make_plan(dump)), fake)
    assert failed(results) == set()
    (event,) = lost
    # A cluster's worker is gone without a word; of a process of ours it is known how it ended.
    assert re.fullmatch(
        r"a worker was (killed by SIGKILL|lost) \(.*\); trying again", event.message
    )
    # What the first worker had finished was kept, the rest was done by another.
    assert results["a", "W4A4"].row["pid"] != results["a", "W4A8"].row["pid"]


@where_workers_die
@pytest.mark.parametrize("kind", ["kills_always", "exits"])
def test_a_case_that_ends_two_workers_is_failed_and_the_rest_goes_on(
    make_dump, make_plan, fake, executor, kind
):
    results, lost = run(executor, compose(make_plan(make_dump(a=kind, b="linear"))), fake)
    assert failed(results) == {("a", "W4A8")}
    message = results["a", "W4A8"].row["message"]
    assert message.startswith("this case ended 2 worker processes: the last one ")
    assert [event.message.partition("; ")[2] for event in lost] == [
        "trying again",
        "giving up on it",
    ]
