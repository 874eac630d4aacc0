"""Tasks on the workers of a Dask cluster, by the rules of the local pool.

The driver hands out the tasks itself, one per worker process and pinned to it: at most as many
futures as workers are in flight, and nothing runs again unseen. A worker that dies keeps what it
had reported; the rest of its task goes to another, and the case that ended two workers is marked
failed. Workers may come and go while the sweep runs; each is inspected before it gets work.

What arrives is data: JSON texts of `cluster_worker.Report` over a connection that unpickles nothing
(`plain_comm`). A scheduler that is silent for `ClusterExecutor.answer_s` counts as lost.
"""

import queue
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import LoraqError, SchedulerLost
from loraq_sim.results.rows import Row
from loraq_sim.sweeps.cases import SweepTask
from loraq_sim.sweeps.cluster_worker import (
    Report,
    anywhere,
    inspect_worker,
    read_report,
    report_text,
    requirements,
    run_cluster_task,
)
from loraq_sim.sweeps.local import LossRecord, Results, WorkerLost
from loraq_sim.sweeps.worker import CaseResult, load_evaluate

if TYPE_CHECKING:
    from distributed import Client, Future

__all__ = [
    "ClusterExecutor",
]


_POLL_S = 0.5
_LEAVE_S = 2.0  # for the last words to a scheduler that may not listen any more


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
    answer_s : float
        Seconds a scheduler may take to answer before it counts as lost.
    """

    def __init__(
        self,
        client: "Client",
        *,
        max_workers: int | None = None,
        wait_s: float = 60.0,
        begin_s: float = 60.0,
        answer_s: float = 30.0,
    ) -> None:
        self._client = client
        self.answer_s = answer_s
        self._max_workers = max_workers
        self._wait_s, self._begin_s = wait_s, begin_s
        self.address = str(self._scheduler.address).removeprefix("plain+")
        self._reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._queue: deque[SweepTask] = deque()
        self._losses = LossRecord()
        self._n_assignments = 0

    @property
    def _scheduler(self) -> Any:
        # Dask types it as None until a client has connected, which this one has.
        return self._client.scheduler

    def run(self, tasks: Sequence[SweepTask], evaluate: str) -> Results:
        """Yield the result of every case as it finishes; take all futures back when closed.

        Raises
        ------
        InputError
            If `evaluate` cannot be imported.
        SchedulerLost
            If the scheduler is lost or silent for `answer_s`, or sends what is no report.
        LoraqError
            If every worker is refused, or none is there for `wait_s`.
        """
        load_evaluate(evaluate)
        self._queue = deque(anywhere(task) for task in tasks if task.cases)
        self._workers, self._losses = {}, LossRecord()
        self._topic = f"loraq-sim-{uuid.uuid4().hex}"
        self._needed = requirements(self._queue)
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

    def _listen(self, event: tuple[float, str]) -> None:
        self._reports.put(event[1])

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
                asked = self._scheduler.ncores
                return list(self._client.sync(asked, callback_timeout=self.answer_s))
        except (OSError, TimeoutError):
            pass
        raise self._lost("does not answer any more")

    def _lost(self, why: str) -> SchedulerLost:
        return SchedulerLost(
            f"the scheduler at {self.address} {why}; what is stored is safe: "
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
            # Its exception is a pickle, which is not looked into.
            why = "an exception" if finished.status == "error" else str(finished.status)
            self._reports.put(report_text(Report("raised", number, content=why)))

        future.add_done_callback(done)

    # ------------------------------------------------------------ reports

    def _take_reports(self, *, until_now: bool = False) -> Iterator[CaseResult | WorkerLost]:
        """Act on what workers said: wait a moment for it, or for all that was said until now."""
        if until_now:
            mark = Report("mark", 0, uuid.uuid4().hex)
            with suppress(OSError, TimeoutError):
                self._client.sync(
                    self._scheduler.log_event,
                    topic=self._topic,
                    msg=report_text(mark),
                    callback_timeout=self.answer_s,
                )
        deadline = time.monotonic() + (10 * _POLL_S if until_now else _POLL_S)
        while True:
            try:
                said = self._reports.get(timeout=max(deadline - time.monotonic(), 0.0))
                report = read_report(said)
            except queue.Empty:
                return
            except ValueError as error:
                raise self._lost(f"sends what is no report of loraq-sim ({error})") from None
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
            yield self._finished(worker, **report.content)
        elif report.kind == "raised" and not worker.process:
            why = f"cannot run loraq-sim ({report.content:.200})"
            yield from self._refuse(worker, f"{why}; install the same release there and here")
        else:
            yield from self._end(worker, report)

    def _finished(self, worker: _Worker, case_id: str, row: Row, is_unreadable: bool) -> CaseResult:
        """The result of a case that `worker` was asked for."""
        task = worker.task
        asked = [case for case in task.cases if case.case_id == case_id] if task else []
        if task is None or not asked or row["layer"] != task.layer:
            raise self._lost(f"sends the result of a case that {worker.address} was not asked for")
        left = tuple(case for case in task.cases if case.case_id != case_id)
        worker.task = replace(task, cases=left)
        return CaseResult(case=asked[0], row=row, is_unreadable=is_unreadable)

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
            yield from self._bury(worker, f"failed ({report.content:.200})")

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
            cancel = self._client._cancel
            self._client.sync(cancel, futures, force=True, callback_timeout=_LEAVE_S)
            self._client.unsubscribe_topic(self._topic)
