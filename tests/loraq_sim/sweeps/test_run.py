import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.errors import StoreError
from loraq_sim.results.rows import COLUMN_NAMES
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import compose, run_sweep
from loraq_sim.sweeps.local import SerialExecutor
from loraq_sim.sweeps.run import _spread


def counts(outcome):
    return outcome.n_ok, outcome.n_failed, outcome.n_skipped, outcome.n_left


@pytest.fixture
def bad_dump(tmp_path):
    """A dump whose second layer holds NaN."""
    rng = np.random.default_rng(0)
    layers = {f"{name}.weight": rng.normal(size=(8, 16)).astype(np.float32) for name in "abc"}
    layers["b.weight"][3, 4] = np.nan
    np.savez(tmp_path / "bad.npz", **layers)
    return tmp_path / "bad.npz"


@pytest.mark.parametrize("jobs", [0, 2])
def test_a_sweep_fills_the_store_in_plan_order(make_dump, make_plan, fake, store, jobs):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    outcome = run_sweep(sweep, store, jobs=jobs, evaluate=fake)
    assert counts(outcome) == (6, 0, 0, 0)
    assert outcome.exit_code == 0
    rows = store.rows()
    assert [row["case_id"] for row in rows] == list(sweep.case_ids)
    assert [row["layer"] for row in rows] == list("aaabbb")
    assert {(row["dump"], row["family"], row["group_size"]) for row in rows} == {
        ("layers.safetensors", "int", 64)
    }


def test_the_same_sweep_again_runs_nothing(make_dump, make_plan, fake, store):
    plan = make_plan(make_dump(a="linear"))
    run_sweep(plan, store, jobs=0, evaluate=fake)
    before = store.rows()
    outcome = run_sweep(plan, store, jobs=2, evaluate="no_such_module:f")
    assert counts(outcome) == (0, 0, 3, 0)
    assert outcome.exit_code == 0
    assert store.rows() == before


def test_force_runs_everything_again(make_dump, make_plan, fake, store):
    plan = make_plan(make_dump(a="linear"))
    run_sweep(plan, store, jobs=0, evaluate=fake)
    assert counts(run_sweep(plan, store, jobs=0, evaluate=fake, force=True)) == (3, 0, 0, 0)
    assert len(store.rows()) == 3


def test_failed_cases_are_tried_again_and_the_others_are_not(make_dump, make_plan, fake, store):
    plan = make_plan(make_dump(a="refuses"))
    first = run_sweep(plan, store, jobs=0, evaluate=fake)
    assert counts(first) == (2, 1, 0, 0)
    assert (first.exit_code, first.first_failure) == (1, "rank 99 is too large for this layer")
    assert counts(run_sweep(plan, store, jobs=0, evaluate=fake)) == (0, 1, 2, 0)


@pytest.mark.parametrize("jobs", [0, 2])
def test_one_bad_layer_fails_and_the_others_finish(bad_dump, make_plan, fake, store, jobs):
    outcome = run_sweep(make_plan(bad_dump), store, jobs=jobs, evaluate=fake)
    assert counts(outcome) == (6, 3, 0, 0)
    assert outcome.exit_code == 1
    failed = [row for row in store.rows() if row["status"] == "failed"]
    assert {row["layer"] for row in failed} == {"b"}
    assert all("NaN" in row["message"] for row in failed)
    assert {(row["n"], row["k"], row["output_error"]) for row in failed} == {(8, 16, None)}


def test_a_sweep_whose_layers_all_fail_to_load_says_so(bad_dump, make_plan, fake, store):
    outcome = run_sweep(make_plan(bad_dump, layers=("b",)), store, jobs=0, evaluate=fake)
    assert outcome.is_unreadable
    assert outcome.exit_code == 2
    assert "NaN" in outcome.first_failure


def test_a_sweep_stopped_after_its_bad_layers_is_interrupted_not_unreadable(
    bad_dump, make_plan, fake, store
):
    def stop(event):
        if event.status == "failed" and event.failed == 3:
            raise KeyboardInterrupt

    sweep = compose(make_plan(bad_dump))
    sweep = replace(sweep, tasks=(sweep.tasks[1], sweep.tasks[0]))
    outcome = run_sweep(sweep, store, evaluate=fake, executor=SerialExecutor(), on_event=stop)
    assert (outcome.interrupted, outcome.is_unreadable, outcome.exit_code) == (True, False, 130)


def test_a_layer_that_cannot_even_be_described_fails_alone(tmp_path, make_plan, fake, store):
    good = np.ones((8, 16), np.float32)
    bad = np.ones((2, 3, 4), np.float32)
    path = tmp_path / "mixed.npz"
    np.savez(path, **{"a.weight": good, "b.weight": good, "b.bias": bad})
    sweep = compose(make_plan(path))
    assert [task.info is None for task in sweep.tasks] == [False, True]
    assert counts(run_sweep(sweep, store, jobs=0, evaluate=fake)) == (3, 3, 0, 0)


def test_events_count_up_to_the_total(make_dump, make_plan, fake, store):
    events = []
    plan = make_plan(make_dump(a="linear", b="refuses"))
    run_sweep(plan, store, jobs=0, evaluate=fake, on_event=events.append)
    assert [event.kind for event in events] == ["start", *["case"] * 6, "end"]
    assert [event.done for event in events] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert {event.total for event in events} == {6}
    assert events[0].eta_s is None
    assert all(event.eta_s >= 0 for event in events[2:])
    (failure,) = [event for event in events if event.status == "failed"]
    assert (failure.layer, failure.split, failure.failed) == ("b", "W4A8", 1)
    assert failure.message == "rank 99 is too large for this layer"


def test_a_row_is_stored_before_its_event(make_dump, make_plan, fake, store):
    seen = []

    def look(event):
        if event.kind == "case":
            seen.append((event.done, len(store.rows())))

    run_sweep(make_plan(make_dump(a="linear")), store, jobs=0, evaluate=fake, on_event=look)
    assert seen == [(1, 1), (2, 2), (3, 3)]


def test_what_the_evaluation_says_goes_before_what_was_asked_for(make_dump, make_plan, fake, store):
    plan = make_plan(make_dump(a="linear"), splits=("W4A4+W8A8r4",))
    evaluate = fake.replace(":evaluate", ":evaluate_by_rounding")
    run_sweep(plan, store, jobs=0, evaluate=evaluate)
    (row,) = store.rows()
    assert (row["method"], row["preset"]) == ("rtn", plan.preset)


def test_rows_of_the_front_are_marked(make_dump, make_plan, fake, store):
    # The fake's error is 1 / length of the split, its latency that length: all are on the front
    # but for the equal ones, and ties are kept.
    plan = make_plan(make_dump(a="linear"), splits=("W4A4", "W4A8", "W4A4+W8A8r4"))
    run_sweep(plan, store, jobs=0, evaluate=fake)
    assert [row["pareto"] for row in store.rows()] == [True, True, True]


def test_provenance_says_what_ran(make_dump, make_plan, fake, store):
    sweep = compose(make_plan(make_dump(a="linear"), seed=7))
    run_sweep(sweep, store, jobs=0, evaluate=fake)
    (facts,) = store.provenance()
    assert facts["seed"] == 7
    assert facts["plan"]["splits"] == ["W4A4", "W4A8", "W8A8"]
    assert facts["dump_digest"] == sweep.dump_digest
    assert facts["versions"]["numpy"] == np.__version__
    assert (facts["n_ok"], facts["interrupted"]) == (3, False)
    assert facts["started"] <= facts["ended"]


def test_a_store_that_fails_ends_the_sweep_at_once(make_dump, make_plan, fake, store, monkeypatch):
    class Watched(SerialExecutor):
        is_closed = False

        def run(self, tasks, evaluate):
            try:
                yield from super().run(tasks, evaluate)
            finally:
                self.is_closed = True

    def refuse(case_id, row):
        raise StoreError("disk is full")

    executor = Watched()
    monkeypatch.setattr(store, "add", refuse)
    plan = make_plan(make_dump(a="linear", b="slow"))
    with pytest.raises(StoreError, match="disk is full"):
        run_sweep(plan, store, evaluate=fake, executor=executor)
    assert executor.is_closed


@pytest.mark.parametrize(("jobs", "n_tasks"), [(1, 2), (2, 2), (3, 3), (6, 6), (50, 6)])
def test_tasks_are_split_until_every_worker_has_one(make_dump, make_plan, jobs, n_tasks):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    spread = _spread(sweep.tasks, jobs)
    assert len(spread) == n_tasks
    assert sorted(c.case_id for task in spread for c in task.cases) == sorted(sweep.case_ids)
    assert [task.work for task in spread] == sorted((t.work for t in spread), reverse=True)


# No test waits that long: it only keeps a hang from lasting for ever. The slow layer sleeps longer.
PATIENCE_S = 600

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[3])
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps import SweepPlan, run_sweep

def tell(event):
    if event.kind == "case":
        print(event.done, flush=True)

plan = SweepPlan(dump=sys.argv[1], accelerators=("aie2",), splits=("W4A4", "W4A8", "W8A8"))
with ResultStore.open(sys.argv[2], create=True) as store:
    outcome = run_sweep(
        plan, store, jobs=int(sys.argv[4]), evaluate="fake_evaluation:evaluate", on_event=tell
    )
print(outcome.interrupted, outcome.n_ok, outcome.n_left, flush=True)
sys.exit(outcome.exit_code)
"""


def start(dump, path, jobs):
    """A sweep in a process group of its own, after its first three rows are stored."""
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(dump), str(path), here, str(jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells let what runs in the background ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert [process.stdout.readline() for _ in range(3)] == ["1\n", "2\n", "3\n"]
    return process


def assert_group_ends(group):
    """Wait until no process of the group is alive; zombies, which only wait for init, are not."""
    deadline = time.monotonic() + PATIENCE_S
    while alive := list(map(living_group, Path("/proc").glob("[0-9]*"))).count(group):
        assert time.monotonic() < deadline, f"{alive} processes of the sweep are still alive"
        time.sleep(0.02)


def living_group(folder):
    """Process group of a living process, None for a zombie or one that has just gone."""
    try:
        state, _parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state == "Z" else int(group)


NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")


@NEEDS_PROC
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_stops_workers_and_keeps_rows(make_dump, tmp_path, jobs):
    dump = make_dump(a="linear", b="slow")
    process = start(dump, tmp_path / "r.sqlite", jobs)
    # To the whole group, as a terminal does; the slow layer sleeps for an hour.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (out, err, process.returncode) == ("True 3 3\n", "", 130)
    assert_group_ends(process.pid)
    with ResultStore.open(tmp_path / "r.sqlite") as store:
        assert [row["layer"] for row in store.rows()] == ["a", "a", "a"]
        assert store.provenance()[0]["interrupted"] is True


@NEEDS_PROC
def test_a_killed_driver_leaves_its_rows_and_no_workers(make_dump, make_plan, fake, tmp_path):
    dump = make_dump(a="linear", b="slow")
    process = start(dump, tmp_path / "r.sqlite", 1)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    # Workers notice that their parent is gone; nothing else would end the slow one in time.
    assert_group_ends(process.pid)
    with ResultStore.open(tmp_path / "r.sqlite", create=True) as store:
        assert len(store.rows()) == 3
        make_dump(a="linear", b="linear")
        outcome = run_sweep(make_plan(dump), store, jobs=0, evaluate=fake)
        # Layer b is another one now; what was done for layer a stays.
        assert counts(outcome) == (3, 0, 3, 0)


def test_a_real_layer_goes_the_whole_way(make_dump, make_plan, store):
    splits = ("W4A4", "W8A8", "W4A4+W8A8r4")
    plan = make_plan(make_dump(a="linear"), splits=splits, preset="fast", datapath={"acc_bits": 24})
    outcome = run_sweep(plan, store, jobs=1)
    assert counts(outcome) == (3, 0, 0, 0), outcome.first_failure
    narrow, wide, branch = store.rows()
    assert narrow["output_error"] > wide["output_error"] > 0
    assert narrow["output_error"] > branch["output_error"]
    assert (narrow["rank"], branch["rank"]) == (0, 4)
    assert {(row["acc_bits"], row["options"]) for row in store.rows()} == {(24, "")}
    # What the evaluation returns is what the table of columns knows.
    assert set(narrow) == {*COLUMN_NAMES, "case_id"}
