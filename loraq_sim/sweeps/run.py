"""Run a sweep: tasks to the executor, rows to the store, progress to the caller.

Only this process writes the store, one transaction per case, so whatever stops the sweep leaves
every finished row behind and the same command continues. The store also keeps where its results
come from: versions, machine, command, and digests of everything read.
"""

import os
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraq_sim.errors import SchedulerLost
from loraq_sim.results.choice import objectives_of
from loraq_sim.results.front import per_layer_front
from loraq_sim.results.planned import planned_text
from loraq_sim.results.rows import EVALUATED, Row
from loraq_sim.results.store import ResultStore
from loraq_sim.sweeps.cases import SweepCase, SweepTask
from loraq_sim.sweeps.digests import SolutionCache
from loraq_sim.sweeps.forecast import ProgressClock
from loraq_sim.sweeps.local import Executor, WorkerLost, available_cpus, executor_for
from loraq_sim.sweeps.plan import ComposedSweep, compose
from loraq_sim.sweeps.plan_file import SweepPlan
from loraq_sim.sweeps.progress import EventKind, OnEvent, SweepEvent
from loraq_sim.sweeps.worker import EVALUATE, CaseResult

__all__ = [
    "SweepOutcome",
    "run_sweep",
    "utc_now",
]


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended.

    `n_failed` of the cases run gave no result, `n_skipped` were in the store, `n_left` were not
    reached. `is_unreadable`: no layer could be loaded at all. `first_failure` is a message;
    `stopped` says why a sweep ended before its cases did, if something but Ctrl-C ended it.
    """

    n_ok: int
    n_failed: int
    n_skipped: int
    n_left: int
    interrupted: bool
    is_unreadable: bool
    seconds: float
    first_failure: str = ""
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """130 if interrupted, 2 if no layer could be loaded, 1 if some case failed or is left."""
        if self.interrupted:
            return 130
        if self.is_unreadable:
            return 2
        return 1 if self.n_failed or self.stopped else 0


_PACKAGES = ("loraq-sim", "numpy", "numba", "scipy", "torch", "ml-dtypes", "safetensors", "pandas")


def _collect_provenance(
    sweep: "ComposedSweep", *, jobs: int, scheduler: str = ""
) -> dict[str, Any]:
    """Facts about a sweep that is about to start, as values JSON can hold."""
    return {
        "started": utc_now(),
        "versions": {"python": platform.python_version()} | _versions(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "jobs": jobs,
        **({"scheduler": scheduler} if scheduler else {}),
        "command": list(sys.argv),
        "seed": sweep.plan.seed,
        **sweep.describe(),
    }


def utc_now() -> str:
    """Time of day in UTC, ISO 8601, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def run_sweep(
    sweep: SweepPlan | ComposedSweep,
    store: ResultStore,
    *,
    jobs: int | None = None,
    on_event: OnEvent | None = None,
    force: bool = False,
    evaluate: str = EVALUATE,
    executor: Executor | None = None,
    cache: SolutionCache | None = None,
) -> SweepOutcome:
    """Evaluate the cases of `sweep` that `store` does not hold yet.

    Parameters
    ----------
    sweep : SweepPlan or ComposedSweep
    store : ResultStore
        Open for writing. Rows are there as soon as their ``case`` event is sent.
    jobs : int, optional
        Worker processes; 0 for none (this process). Default: the CPUs this process may use.
    on_event : callable, optional
        Called in this process with a `SweepEvent` per step.
    force : bool
        Evaluate again what the store holds.
    evaluate : str
        ``module:function`` that takes a `Layer` and a `SweepCase` and returns a row.
    executor : Executor, optional
        Where tasks run; chosen by `jobs` by default.
    cache : SolutionCache, optional
        Where solutions are kept between sweeps.

    Returns
    -------
    SweepOutcome
        Also after Ctrl-C (``interrupted``), which ends the workers at once, and after the loss of
        a cluster's scheduler (``stopped``). Failed cases are
        rows with status ``failed`` and are tried again by the next run.

    Raises
    ------
    LoraqError
        If the plan breaks a rule, the store cannot be written, or no worker can be started.
    """
    sweep = compose(sweep) if isinstance(sweep, SweepPlan) else sweep
    jobs = available_cpus() if jobs is None else jobs
    damaged = store.drop_damaged()
    run = _Run(sweep, store, on_event, force, cache, jobs)
    facts = _collect_provenance(sweep, jobs=jobs, scheduler=getattr(executor, "address", ""))
    whole = sweep.whole
    plan = planned_text(case.labels for case in whole.cases)
    number = store.begin_run(facts, whole.case_ids, plan=plan)
    # Names of files and groups are no part of a case's identity; rows follow the latest.
    store.relabel({case.case_id: _loose_labels(case) for case in sweep.cases})
    interrupted, stopped = False, ""
    try:
        run.report("start")
        for name in damaged:
            run.report("note", message=f"the stored row of {name} was damaged and is removed")
        results = (executor or executor_for(jobs)).run(run.tasks, evaluate)
        with closing(results):
            for result in results:
                run.take(result)
    except KeyboardInterrupt:
        interrupted = True
    except SchedulerLost as error:
        stopped = str(error)
    _mark_pareto(store, sweep.case_ids)
    outcome = replace(run.outcome(interrupted), stopped=stopped)
    facts = {"ended": utc_now(), "seconds": outcome.seconds, "interrupted": interrupted}
    facts |= {"stopped": stopped} if stopped else {}
    facts |= {"n_ok": outcome.n_ok, "n_failed": outcome.n_failed, "n_skipped": outcome.n_skipped}
    store.end_run(number, facts)
    run.report("end")
    return outcome


class _Run:
    """Counts of one run, and what is done with each result."""

    def __init__(
        self,
        sweep: ComposedSweep,
        store: ResultStore,
        on_event: OnEvent | None,
        force: bool,
        cache: SolutionCache | None,
        jobs: int,
    ) -> None:
        done = set() if force else store.done(sweep.case_ids)
        self.tasks = [_prepared(task, done, cache) for task in sweep.tasks]
        self.tasks = _spread([task for task in self.tasks if task.cases], jobs)
        self._store = store
        self._on_event = on_event
        self._clock = ProgressClock.of_tasks(self.tasks, jobs=jobs)
        self._ids = {task.layer: [case.case_id for case in task.cases] for task in sweep.tasks}
        self._left = Counter(task.layer for task in self.tasks for _ in task.cases)
        self._n_layers = sum(layer not in self._left for layer in self._ids)
        self._total = sum(len(task.cases) for task in self.tasks)
        self._n_skipped = len(done)
        self._n_ok = self._n_failed = self._n_unreadable = 0
        self._first_failure = ""

    def take(self, result: CaseResult | WorkerLost) -> None:
        """Store a finished case, count it and report it."""
        if isinstance(result, WorkerLost):
            self.report("worker_lost", layer=result.layer, message=result.message)
            return
        row = result.row
        self._store.add(result.case.case_id, row)
        self._clock.finish(result.case, row.get("seconds"))
        self._left[row["layer"]] -= 1
        self._n_layers += self._left[row["layer"]] == 0
        if row["status"] in EVALUATED:
            self._n_ok += 1
        else:
            self._n_failed += 1
            self._n_unreadable += result.is_unreadable
            self._first_failure = self._first_failure or row["message"]
        self.report(
            "case",
            layer=row["layer"],
            split=row["split"],
            status=row["status"],
            message=row["message"] or "",
        )

    def report(self, kind: EventKind, **facts: str) -> None:
        """Send an event with the counts so far."""
        if self._on_event is None:
            return
        self._on_event(
            SweepEvent(
                kind=kind,
                total=self._total,
                done=self._n_ok + self._n_failed,
                failed=self._n_failed,
                skipped=self._n_skipped,
                elapsed_s=self._clock.elapsed_s,
                eta_s=self._clock.eta_s,
                n_layers=self._n_layers,
                of_layers=len(self._ids),
                finished=self._finished,
                **facts,
            )
        )

    def _finished(self) -> list[Row]:
        """Rows of the layers that have all of them."""
        layers = [layer for layer in self._ids if self._left[layer] <= 0]
        return self._store.rows([case_id for layer in layers for case_id in self._ids[layer]])

    def outcome(self, interrupted: bool) -> SweepOutcome:
        """Counts at the end."""
        n_done = self._n_ok + self._n_failed
        return SweepOutcome(
            n_ok=self._n_ok,
            n_failed=self._n_failed,
            n_skipped=self._n_skipped,
            n_left=self._total - n_done,
            interrupted=interrupted,
            is_unreadable=0 < self._n_unreadable == self._total and not self._n_skipped,
            seconds=self._clock.elapsed_s,
            first_failure=self._first_failure,
        )


def _loose_labels(case: SweepCase) -> dict[str, Any]:
    return {name: case.labels.get(name) for name in ("dump", "group")}


def _prepared(task: SweepTask, done: set[str], cache: SolutionCache | None) -> SweepTask:
    """`task` without what is done, cases of one solution in a row, each told of the cache."""
    by_solution: dict[str, list[SweepCase]] = {}
    for case in task.cases:
        if case.case_id not in done:
            by_solution.setdefault(case.solution_key, []).append(replace(case, cache=cache))
    return replace(task, cases=tuple(case for group in by_solution.values() for case in group))


def _spread(tasks: Sequence[SweepTask], jobs: int) -> list[SweepTask]:
    """Longest tasks first, so that none is left running alone at the end; for fewer tasks than
    workers the longest are halved, at the price of loading their layer twice.
    """
    spread = list(tasks)
    while 0 < len(spread) < jobs:
        largest = max(spread, key=lambda task: len(task.cases))
        middle = len(largest.cases) // 2
        if middle == 0:
            break
        spread.remove(largest)
        spread.append(replace(largest, cases=largest.cases[:middle]))
        spread.append(replace(largest, cases=largest.cases[middle:]))
    return sorted(spread, key=lambda task: -task.work)


def _mark_pareto(store: ResultStore, case_ids: Sequence[str]) -> None:
    """Mark the rows of this sweep that are on their layer's front of what is known of it."""
    by_layer: dict[str, list[Row]] = {}
    for row in store.rows(case_ids):
        by_layer.setdefault(row["layer"], []).append(row)
    alike: dict[tuple[str, ...], list[Row]] = {}
    for rows in by_layer.values():
        alike.setdefault(tuple(filter(None, objectives_of(rows))), []).extend(rows)
    front = [row for names, rows in alike.items() for row in per_layer_front(rows, names)]
    store.set_pareto([row["case_id"] for row in front], among=case_ids)
