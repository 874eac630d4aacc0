"""Tasks on the workers of a Dask cluster, by the rules of the local pool.

The driver hands out the tasks itself, one per worker process and pinned to it: at most as many
futures as workers are in flight, and nothing runs again unseen. A worker that dies keeps what it
had reported; the rest of its task goes to another, and the case that ended two workers is marked
failed. Workers may come and go while the sweep runs; each is inspected before it gets work.
"""

import pickle
import queue
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import LoraqError
from loraq_sim.sweep.cluster_worker import (
    Report,
    Requirements,
    describe_code,
    inspect_worker,
    run_cluster_task,
)
from loraq_sim.sweep.lost_tasks import LossRecord
from loraq_sim.sweep.tasks import CaseResult, SweepTask, WorkerLost
from loraq_sim.sweep.worker import load_evaluate

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = ["ClusterExecutor"]

_POLL_S = 0.5


@dataclass(kw_only=True)
class _Worker:
    """A worker process as the driver sees it; `assignment` numbers what it was asked last."""

    address: str
    assignment: int
    future: "Future"
    process: str = ""
    task: SweepTask | None = None
    has_begun: bool = False
    has_loaded: bool = False
    is_refused: bool = False
    asked_at: float = 0.0

    @property
    def is_idle(self) -> bool:
        return bool(self.process) and self.task is None and not self.is_refused


class ClusterExecutor:
    """Runs tasks on the workers of a connected Dask client.

    Parameters
    ----------
    client : distributed.Client
    max_workers : int, optional
        How many workers to use at most.
    wait_s : float
        Seconds to go on without any worker before giving up.
    begin_s : float
        Seconds after which a worker that has not begun its task loses it to another: it may be
        paused for lack of memory, or busy with other people's work.

    Attributes
    ----------
    address : str
        Of the scheduler.
    """

    def __init__(
        self,
        client: "Client",
        *,
        max_workers: int | None = None,
        wait_s: float = 60.0,
        begin_s: float = 60.0,
    ) -> None:
        self._client = client
        self._max_workers = max_workers
        self._wait_s, self._begin_s = wait_s, begin_s
        self.address = client.scheduler.address
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._queue: deque[SweepTask] = deque()
        self._losses = LossRecord()
        self._n_assignments = 0

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Iterator[CaseResult | WorkerLost]:
        """Yield the result of every case as it finishes; take all futures back when closed.

        Raises
        ------
        InputError
            If `evaluate` cannot be imported.
        LoraqError
            If the scheduler is lost, every worker is refused, or none is there for `wait_s`.
        """
        load_evaluate(evaluate)
        self._queue = deque(_anywhere(task) for task in tasks if task.cases)
        self._workers, self._losses = {}, LossRecord()
        self._topic = f"loraq-sim-{uuid.uuid4().hex}"
        self._needed = _requirements(self._queue)
        self._client.subscribe_topic(self._topic, self._listen)
        lonely_since = time.monotonic()
        try:
            while self._queue or any(worker.task for worker in self._workers.values()):
                yield from self._follow_workers()
                self._assign(evaluate)
                yield from self._take_reports()
                if any(w.process and not w.is_refused for w in self._workers.values()):
                    lonely_since = time.monotonic()
                self._check_for_help(time.monotonic() - lonely_since)
        finally:
            self._stop()

    def _listen(self, event: tuple[float, bytes]) -> None:
        self._reports.put(pickle.loads(event[1]))

    # ------------------------------------------------------------ workers

    def _follow_workers(self) -> Iterator[CaseResult | WorkerLost]:
        """Inspect workers that came, bury those that went."""
        present = self._present()
        gone = [worker for address, worker in self._workers.items() if address not in present]
        if gone:
            # What they said before they went comes first.
            yield from self._take_reports(until_now=True)
        for worker in gone:
            if self._workers.get(worker.address) is worker:
                del self._workers[worker.address]
                yield from self._bury(worker, "was lost (its process or machine died)")
        for address in present:
            n_used = sum(not worker.is_refused for worker in self._workers.values())
            if self._max_workers is not None and n_used >= self._max_workers:
                break
            if address not in self._workers:
                self._inspect(address)

    def _present(self) -> list[str]:
        try:
            if self._client.status == "running":
                return list(self._client.nthreads())
        except (OSError, TimeoutError):
            pass
        raise LoraqError(
            f"the scheduler at {self.address} does not answer any more; what is stored is safe: "
            "run the same command again"
        )

    def _inspect(self, address: str) -> None:
        self._n_assignments += 1
        number = self._n_assignments
        future = self._submit(address, inspect_worker, self._topic, number, self._needed)
        self._workers[address] = _Worker(address=address, assignment=number, future=future)
        self._watch(future, number)

    def _assign(self, evaluate: str) -> None:
        """Give waiting tasks to idle workers."""
        for worker in self._workers.values():
            if worker.is_idle and self._queue:
                self._n_assignments += 1
                worker.assignment = self._n_assignments
                worker.task = self._queue.popleft()
                worker.has_begun = worker.has_loaded = False
                worker.asked_at = time.monotonic()
                worker.future = self._submit(
                    *(worker.address, run_cluster_task, self._topic, worker.assignment),
                    *(worker.process, worker.task, evaluate),
                )
                self._watch(worker.future, worker.assignment)

    def _submit(self, address: str, function: Any, *arguments: Any) -> "Future":
        # Pinned: when the worker dies, the future waits instead of killing the next one.
        return self._client.submit(
            function, *arguments, pure=False, workers=[address], allow_other_workers=False
        )

    def _watch(self, future: "Future", number: int) -> None:
        def done(finished: "Future") -> None:
            if finished.status == "finished":
                return  # it has said so itself
            why = finished.exception() if finished.status == "error" else finished.status
            self._reports.put(Report(kind="raised", assignment=number, process="", content=why))

        future.add_done_callback(done)

    # ------------------------------------------------------------ reports

    def _take_reports(self, *, until_now: bool = False) -> Iterator[CaseResult | WorkerLost]:
        """Act on what workers said: wait a moment for it, or for all that was said until now."""
        if until_now:
            mark = Report(kind="mark", assignment=0, process=uuid.uuid4().hex)
            self._client.log_event(self._topic, pickle.dumps(mark))
        deadline = time.monotonic() + (10 * _POLL_S if until_now else _POLL_S)
        while True:
            try:
                report = self._reports.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                return
            if report.kind == "mark":
                if until_now and report.process == mark.process:
                    return
                continue
            yield from self._receive(report)
            if not until_now and self._reports.empty():
                return

    def _receive(self, report: Report) -> Iterator[CaseResult | WorkerLost]:
        asked = [w for w in self._workers.values() if w.assignment == report.assignment]
        if not asked:
            return  # of a worker that was buried meanwhile
        (worker,) = asked
        if report.kind == "inspected":
            worker.process = report.process
            yield from self._refuse(worker, report.content)
        elif report.kind in ("begun", "loaded"):
            worker.has_begun = True
            worker.has_loaded = report.kind == "loaded"
        elif report.kind == "result":
            result = report.content
            left = tuple(c for c in worker.task.cases if c.case_id != result.case.case_id)
            worker.task = replace(worker.task, cases=left)
            yield result
        elif report.kind == "raised" and not worker.process:
            why = f"cannot run loraq-sim ({report.content!r:.200})"
            yield from self._refuse(worker, f"{why}; install the same release there and here")
        else:
            yield from self._end(worker, report)

    def _refuse(self, worker: _Worker, why: str) -> Iterator[WorkerLost]:
        if why:
            worker.is_refused = True
            text = " ".join(why.split())
            yield WorkerLost(layer="", message=f"worker {worker.address} is not used: it {text}")

    def _end(self, worker: _Worker, report: Report) -> Iterator[CaseResult | WorkerLost]:
        """A task is over: done, or given back by a process that is not the one that was asked."""
        if report.kind == "ended":
            worker.task = None
            return
        del self._workers[worker.address]
        if report.kind == "displaced":
            yield from self._bury(worker, "was restarted (its process died)")
        else:
            worker.has_begun = True
            yield from self._bury(worker, f"failed ({report.content!r:.200})")

    def _bury(self, worker: _Worker, reason: str) -> Iterator[CaseResult | WorkerLost]:
        """Queue what is left of a dead worker's task, or give up on what kills workers."""
        worker.future.cancel()
        task = worker.task
        if task is None or not task.cases:
            return
        if not worker.has_begun:
            self._queue.appendleft(task)
            return
        left, reports = self._losses.bury(task, has_loaded=worker.has_loaded, reason=reason)
        if left is not None:
            self._queue.appendleft(left)
        yield from reports

    # ------------------------------------------------------------ ends

    def _check_for_help(self, lonely_s: float) -> None:
        """Take tasks back from workers that do not begin; give up where nobody can help."""
        refused = [worker for worker in self._workers.values() if worker.is_refused]
        if refused and len(refused) == len(self._workers) and lonely_s > 2 * _POLL_S:
            raise LoraqError(f"none of the {len(refused)} workers of {self.address} can be used")
        if lonely_s > self._wait_s:
            raise LoraqError(
                f"no worker has been connected to {self.address} for {self._wait_s:.0f} s; "
                f"start some with: dask worker {self.address} --nthreads 1"
            )
        now = time.monotonic()
        for worker in [*self._workers.values()]:
            is_late = now - worker.asked_at > self._begin_s
            if worker.task and not worker.has_begun and is_late:
                others = [w for w in self._workers.values() if w.is_idle]
                if others:
                    self._queue.append(worker.task)
                    worker.future.cancel()
                    del self._workers[worker.address]

    def _stop(self) -> None:
        """Cancel what is running and leave the scheduler as it was."""
        futures = [worker.future for worker in self._workers.values()]
        self._workers = {}
        with suppress(Exception):  # the scheduler may be what was lost
            self._client.cancel(futures, force=True)
            self._client.unsubscribe_topic(self._topic)


def _anywhere(task: SweepTask) -> SweepTask:
    """`task` with absolute paths: a worker runs in a folder of its own."""
    cases = tuple(replace(case, accelerator=_absolute(case.accelerator)) for case in task.cases)
    return replace(task, dump=str(Path(task.dump).absolute()), cases=cases)


def _absolute(reference: str) -> str:
    is_path = "/" in reference or reference.endswith((".yaml", ".yml"))
    return str(Path(reference).absolute()) if is_path else reference


def _requirements(tasks: Sequence[SweepTask]) -> Requirements:
    import hwmodels

    code, versions = describe_code()
    references = {case.accelerator for task in tasks for case in task.cases}
    return Requirements(
        code=code,
        versions=versions,
        dumps={dump: Path(dump).stat().st_size for dump in {task.dump for task in tasks}},
        accelerators={name: hwmodels.load_accelerator(name).digest() for name in references},
    )
