import subprocess
import sys

import pytest

from loraq_sim.errors import InputError
from loraq_sim.sweeps import compose
from loraq_sim.sweeps.local import (
    ProcessExecutor,
    SerialExecutor,
    WorkerLost,
    available_cpus,
    executor_for,
)
from loraq_sim.sweeps.worker import CaseResult


def run(executor, sweep, fake):
    found = list(executor.run(sweep.tasks, fake))
    results = {(r.row["layer"], r.row["split"]): r for r in found if isinstance(r, CaseResult)}
    assert len(results) == sum(isinstance(r, CaseResult) for r in found), "a case came twice"
    return results, [r for r in found if isinstance(r, WorkerLost)]


def statuses(results):
    return {key: result.row["status"] for key, result in results.items()}


@pytest.mark.parametrize("jobs", [0, 1, 3])
def test_every_case_gives_one_result(make_dump, make_plan, fake, jobs):
    sweep = compose(make_plan(make_dump(a="linear", b="linear")))
    results, lost = run(executor_for(jobs), sweep, fake)
    assert {r.case.case_id for r in results.values()} == set(sweep.case_ids)
    assert set(statuses(results).values()) == {"ok"}
    assert lost == []


def test_workers_run_with_one_thread_and_are_other_processes(make_dump, make_plan, fake):
    import os

    before = dict(os.environ)
    results, _ = run(ProcessExecutor(jobs=1), compose(make_plan(make_dump(a="linear"))), fake)
    assert {r.row["threads"] for r in results.values()} == {"1"}
    assert os.getpid() not in {r.row["pid"] for r in results.values()}
    assert dict(os.environ) == before


@pytest.mark.parametrize("executor", [SerialExecutor(), ProcessExecutor(jobs=1)])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("crashes", r"ZeroDivisionError: division by zero \(fake_evaluation\.py:\d+\)"),
        ("refuses", "^rank 99 is too large for this layer$"),
    ],
)
def test_a_case_that_raises_fails_alone(make_dump, make_plan, fake, executor, kind, message):
    results, lost = run(executor, compose(make_plan(make_dump(a=kind))), fake)
    assert statuses(results) == {("a", "W4A4"): "ok", ("a", "W4A8"): "failed", ("a", "W8A8"): "ok"}
    row = results["a", "W4A8"].row
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(row["message"])
    assert (row["n"], row["k"], row["output_error"]) == (8, 16, None)
    assert lost == []


def test_a_killed_worker_is_replaced_and_its_layer_finished(make_dump, make_plan, fake, tmp_path):
    dump = make_dump(marker=tmp_path / "killed", a="kills_once", b="linear")
    results, lost = run(ProcessExecutor(jobs=2), compose(make_plan(dump)), fake)
    assert set(statuses(results).values()) == {"ok"}
    assert len(results) == 6
    (event,) = lost
    assert event.layer == "a"
    assert "killed by SIGKILL (out of memory?); trying again" in event.message
    # What the first worker had finished was kept, the rest was done by another.
    assert results["a", "W4A4"].row["pid"] != results["a", "W4A8"].row["pid"]


@pytest.mark.parametrize(
    ("kind", "reason"), [("kills_always", "was killed by SIGKILL"), ("exits", "exit code 7")]
)
def test_a_case_that_ends_two_workers_is_failed_and_the_rest_goes_on(
    make_dump, make_plan, fake, kind, reason
):
    sweep = compose(make_plan(make_dump(a=kind, b="linear")))
    results, lost = run(ProcessExecutor(jobs=1), sweep, fake)
    assert [key for key, status in statuses(results).items() if status == "failed"] == [
        ("a", "W4A8")
    ]
    assert len(results) == 6
    assert "this case ended 2 worker processes" in results["a", "W4A8"].row["message"]
    assert reason in results["a", "W4A8"].row["message"]
    assert len(lost) == 2


def test_an_idle_worker_takes_over_from_a_killed_one(make_dump, make_plan, fake, tmp_path):
    # One task: the second worker has nothing to do until the first one dies.
    dump = make_dump(marker=tmp_path / "killed", a="kills_once")
    pool = ProcessExecutor(jobs=2)
    results, _ = run(pool, compose(make_plan(dump)), fake)
    assert set(statuses(results).values()) == {"ok"}


def test_closing_the_iterator_ends_the_workers(make_dump, make_plan, fake):
    pool = ProcessExecutor(jobs=2)
    results = pool.run(compose(make_plan(make_dump(a="linear", b="slow"))).tasks, fake)
    next(results)
    processes = [worker.process for worker in pool._workers]
    assert processes
    results.close()
    assert not any(process.is_alive() for process in processes)


def test_an_evaluation_that_cannot_be_imported_is_an_error(make_dump, make_plan):
    tasks = compose(make_plan(make_dump(a="linear"))).tasks
    for executor in (SerialExecutor(), ProcessExecutor(jobs=1)):
        with pytest.raises(InputError, match="cannot load the evaluation 'no_such_module:f'"):
            list(executor.run(tasks, "no_such_module:f"))


def test_a_script_needs_no_main_guard(make_dump, make_plan, fake, tmp_path):
    # Read from standard input: there is no file a worker could import again.
    script = f"""
import sys
sys.path.insert(0, {str(next(p for p in sys.path if p.endswith("sweeps")))!r})
from loraq_sim.sweeps import SweepPlan, compose
from loraq_sim.sweeps.local import ProcessExecutor
print("begin")
plan = SweepPlan(dump={str(make_dump(a="linear"))!r}, accelerators=("aie2",), splits=("W4A4",))
print(len(list(ProcessExecutor(jobs=1).run(compose(plan).tasks, {fake!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-"], input=script, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("begin\n1\n", "")


def test_at_least_one_job_is_needed():
    with pytest.raises(InputError, match="jobs must be at least 1, got -1"):
        executor_for(-1)
    assert available_cpus() >= 1
