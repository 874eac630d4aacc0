"""Where tasks run: in this process, or in worker processes.

An executor takes tasks and yields `CaseResult` as each case finishes and `WorkerLost` when a
worker dies. Closing the iterator, or an exception inside it, stops all work at once.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Protocol

from loraq_sim.sweep.process_pool import ProcessExecutor
from loraq_sim.sweep.tasks import CaseResult, SweepTask, WorkerLost
from loraq_sim.sweep.worker import forget_files, load_evaluate, run_task

__all__ = ["Executor", "SerialExecutor", "available_cpus", "executor_for"]


class Executor(Protocol):
    """Runs tasks; results come in any order."""

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Iterator[CaseResult | WorkerLost]:
        """Yield the result of every case of every task, once each."""
        ...


class SerialExecutor:
    """Everything in this process: for debugging, and where processes cannot be started."""

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Iterator[CaseResult | WorkerLost]:
        """Yield the result of every case, in order."""
        forget_files()
        function = load_evaluate(evaluate)
        for task in tasks:
            yield from run_task(task, function)


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
