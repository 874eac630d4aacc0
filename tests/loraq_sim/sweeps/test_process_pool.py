import subprocess
import sys

import pytest

from loraq_sim.errors import InputError
from loraq_sim.sweeps import compose
from loraq_sim.sweeps.local import (
    ProcessExecutor,
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


def test_workers_run_with_one_thread_and_are_other_processes(make_dump, make_plan, fake):
    import os

    before = dict(os.environ)
    results, _ = run(ProcessExecutor(jobs=1), compose(make_plan(make_dump(a="linear"))), fake)
    assert {r.row["threads"] for r in results.values()} == {"1"}
    assert os.getpid() not in {r.row["pid"] for r in results.values()}
    assert dict(os.environ) == before


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


def test_a_worker_has_not_loaded_numba_before_it_knows_its_threads():
    script = (
        "import sys, loraq_sim.sweeps.worker, loraq_sim.sweeps.cluster_worker; "
        "print('numba' in sys.modules, 'loraq_sim.emulator' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False False\n"
