"""Where tasks run: in this process, or in worker processes, whose death a sweep survives.

An executor takes tasks and yields `CaseResult` as each case finishes and `WorkerLost` when a
worker dies. Closing what it yields from, or an exception inside it, stops all work at once.

Each worker process has a pipe of its own: a worker killed while it holds a shared queue's lock
would block all others. It asks for a task, sends a result per case, and asks again. When one dies,
what it had finished is kept and the rest of its task goes to a fresh worker. The case that was
running is suspected; one that two workers died of is marked failed, and the rest of its task goes
on (`LossRecord`, which holds for clusters too).
"""

import os
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Protocol

from loraq_sim.errors import InputError, LoraqError
from loraq_sim.sweeps.cases import SweepCase, SweepTask
from loraq_sim.sweeps.worker import (
    ONE_THREAD,
    CaseResult,
    environment,
    failed_result,
    forget_files,
    load_evaluate,
    run_task,
    serve,
)

__all__ = [
    "Executor",
    "LossRecord",
    "ProcessExecutor",
    "Results",
    "SerialExecutor",
    "WorkerLost",
    "available_cpus",
    "executor_for",
]


_MAX_KILLS = 2
_MAX_FAILED_STARTS = 3
_JOIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class WorkerLost:
    """A worker process died; `message` says of what, and whether its layer is tried again."""

    layer: str
    message: str


Results = Generator[CaseResult | WorkerLost, None, None]
"""What an executor yields; closing it stops all work."""


class Executor(Protocol):
    """Runs tasks; results come in any order."""

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Results:
        """Yield the result of every case of every task, once each."""
        ...


def executor_for(jobs: int) -> Executor:
    """Serial for ``jobs=0``, else that many worker processes.

    One job is a worker process too: Ctrl-C can stop it inside a compiled kernel, which would
    finish first in this process.
    """
    return ProcessExecutor(jobs=jobs) if jobs else SerialExecutor()


def available_cpus() -> int:
    """CPUs this process may use; containers and batch systems often grant fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class SerialExecutor:
    """Everything in this process: for debugging, and where processes cannot be started."""

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Results:
        """Yield the result of every case, in order."""
        forget_files()
        function = load_evaluate(evaluate)
        for task in tasks:
            yield from run_task(task, function)


class LossRecord:
    """Which cases workers died of, in one run."""

    def __init__(self) -> None:
        self._kills: dict[str, int] = {}

    def bury(
        self, task: SweepTask, *, has_loaded: bool, reason: str
    ) -> tuple[SweepTask | None, list[CaseResult | WorkerLost]]:
        """What is to be run again, if anything, and what to report.

        Parameters
        ----------
        task : SweepTask
            With the cases that were not finished, at least one.
        has_loaded : bool
            Whether the worker had loaded the layer. If not, loading it is to blame.
        reason : str
            What happened to the worker, such as "was killed by SIGKILL".
        """
        # Cases run in order, so the first one left is the one that was running.
        suspect = f"{task.layer}\0{task.cases[0].case_id if has_loaded else ''}"
        self._kills[suspect] = self._kills.get(suspect, 0) + 1
        if self._kills[suspect] < _MAX_KILLS:
            text = f"a worker {reason}; trying again"
            return task, [WorkerLost(layer=task.layer, message=text)]
        blamed = task.cases[:1] if has_loaded else task.cases
        left = task.cases[len(blamed) :]
        text = f"a second worker {reason}; giving up on it"
        reports: list[CaseResult | WorkerLost] = [WorkerLost(layer=task.layer, message=text)]
        reports += [_killer(case, reason, has_loaded) for case in blamed]
        return (replace(task, cases=left) if left else None), reports


def _killer(case: SweepCase, reason: str, has_loaded: bool) -> CaseResult:
    what = "this case" if has_loaded else "loading this layer"
    return failed_result(case, f"{what} ended {_MAX_KILLS} worker processes: the last one {reason}")


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: SweepTask | None = None
    has_started: bool = False
    is_idle: bool = False
    has_loaded: bool = False


class ProcessExecutor:
    """Runs tasks in `jobs` spawned processes with one BLAS and Numba thread each."""

    def __init__(self, *, jobs: int) -> None:
        if jobs < 1:
            raise InputError(f"jobs must be at least 1, got {jobs}")
        self._jobs = jobs
        self._workers: list[_Worker] = []
        self._queue: deque[SweepTask] = deque()
        self._losses = LossRecord()
        self._failed_starts = 0

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Results:
        """Yield the result of every case as it finishes; stop the workers when closed.

        Raises
        ------
        InputError
            If `evaluate` cannot be imported.
        LoraqError
            If workers cannot be started.
        """
        self._queue = deque(task for task in tasks if task.cases)
        self._losses = LossRecord()
        self._failed_starts = 0
        try:
            while self._queue or any(worker.task for worker in self._workers):
                self._fill(evaluate)
                self._assign()
                for worker in self._ready():
                    yield from self._listen(worker)
        finally:
            _kill(self._workers)
            self._workers = []

    def _fill(self, evaluate: str) -> None:
        """Start workers until there are enough for the tasks that wait or run."""
        n_busy = sum(worker.task is not None for worker in self._workers)
        while len(self._workers) < min(self._jobs, n_busy + len(self._queue)):
            # A Ctrl-C in this moment is seen when the new worker is on the list of those to kill.
            with _signals_held():
                self._workers.append(_start(evaluate))

    def _assign(self) -> None:
        """Give waiting tasks to idle workers."""
        for worker in self._workers:
            if worker.is_idle and self._queue:
                worker.task = self._queue.popleft()
                worker.is_idle, worker.has_loaded = False, False
                # A worker that just died is found by `_ready`, which queues its task again.
                with suppress(OSError):
                    worker.pipe.send(worker.task)

    def _ready(self) -> list[_Worker]:
        """Workers that sent something or died; blocks until there is one."""
        # Also the sentinel: a grandchild may keep the pipe open after the worker's death.
        pipes = [worker.pipe for worker in self._workers]
        ready = wait([*pipes, *(worker.process.sentinel for worker in self._workers)])
        return [w for w in self._workers if w.pipe in ready or w.process.sentinel in ready]

    def _listen(self, worker: _Worker) -> Iterator[CaseResult | WorkerLost]:
        """Take all that `worker` has sent, and notice if it died."""
        is_dead = not worker.process.is_alive()
        try:
            while worker.pipe.poll():
                yield from self._receive(worker, worker.pipe.recv())
        except (EOFError, OSError):
            is_dead = True
        if is_dead:
            yield from self._bury(worker)

    def _receive(self, worker: _Worker, message: tuple) -> Iterator[CaseResult]:
        kind, *content = message
        if kind == "result" and worker.task is not None:
            (result,) = content
            left = tuple(c for c in worker.task.cases if c.case_id != result.case.case_id)
            worker.task = replace(worker.task, cases=left)
            yield result
        elif kind == "loaded":
            worker.has_loaded = True
        elif kind == "broken":
            raise InputError(content[0])
        elif kind == "idle":
            worker.is_idle, worker.task = True, None
            worker.has_started = True
            self._failed_starts = 0

    def _bury(self, worker: _Worker) -> Iterator[CaseResult | WorkerLost]:
        """Drop a dead worker; queue what is left of its task, or give up on what kills workers."""
        self._workers.remove(worker)
        _kill([worker])
        reason = _cause_of_death(worker.process)
        task = worker.task
        if not worker.has_started:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise LoraqError(f"worker processes {reason} before their first task")
        if task is None or not task.cases:
            return
        left, reports = self._losses.bury(task, has_loaded=worker.has_loaded, reason=reason)
        if left is not None:
            self._queue.appendleft(left)
        yield from reports


def _cause_of_death(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {code}"


def _start(evaluate: str) -> _Worker:
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(
        target=serve, args=(theirs, evaluate), name="loraq-sim worker", daemon=True
    )
    with environment(ONE_THREAD), _without_main():
        process.start()
    # Our copy of their end must go, or the pipe never reports the worker's death.
    theirs.close()
    return _Worker(process=process, pipe=mine)


def _kill(workers: Sequence[_Worker]) -> None:
    """End the processes at once. They hold nothing that needs saving: only the driver writes."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join(_JOIN_S)
        worker.pipe.close()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Hold SIGINT back here and, by inheritance, in the process that is started meanwhile.

    A terminal sends Ctrl-C to the whole group; a worker that is still starting up would print a
    traceback. Held rather than ignored, so that a Ctrl-C in this moment still reaches us.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Started by the first spawn otherwise, and it unblocks SIGINT when it has started.
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep spawned processes from running the user's script again.

    They import what they need by name. Otherwise a script without a ``__main__`` guard would start
    a sweep in every worker, and one read from standard input could not start any.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
