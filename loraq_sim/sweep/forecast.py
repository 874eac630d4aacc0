"""How long a sweep will take: the work of its cases, scaled to this machine.

The work of a case is a formula (`loraq_sim.sweep.work`). A probe of some two seconds, a small real
solve and emulation, scales it to this machine; rows already in the store do so better.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraq_sim.sweep.memory import worker_bytes
from loraq_sim.sweep.probe import probe_machine
from loraq_sim.sweep.tasks import SweepCase

if TYPE_CHECKING:
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.plan import ComposedSweep

__all__ = ["SweepForecast", "estimate"]


@dataclass(frozen=True, kw_only=True)
class SweepForecast:
    """What a sweep would do; `seconds` is a rough estimate, and `basis` says what it rests on.

    `worker_bytes` is the expected peak memory of a worker; see `loraq_sim.sweep.memory`.
    """

    n_layers: int
    n_cases: int
    n_done: int
    seconds: float
    jobs: int
    basis: str
    worker_bytes: int = 0

    @property
    def n_to_run(self) -> int:
        """Cases that are not in the store yet."""
        return self.n_cases - self.n_done


def estimate(
    sweep: "ComposedSweep",
    store: "ResultStore | None" = None,
    *,
    jobs: int = 1,
    force: bool = False,
) -> SweepForecast:
    """Cases, those already in `store`, and the time the others would take with `jobs` workers."""
    done = set() if store is None or force else store.done(sweep.case_ids)
    waiting = [case for case in sweep.cases if case.case_id not in done]
    factor, basis = _machine_factor(sweep.cases, store)
    work = factor * sum(case.work for case in waiting)
    longest = max((factor * task.work for task in sweep.tasks), default=0.0)
    # No schedule beats the mean load, and none beats the longest task.
    seconds = max(work / max(jobs, 1), min(longest, work)) + (
        probe_machine().start_s if waiting else 0.0
    )
    return SweepForecast(
        n_layers=len(sweep.tasks),
        n_cases=len(sweep.cases),
        n_done=len(done),
        seconds=seconds,
        jobs=jobs,
        basis=basis,
        worker_bytes=worker_bytes(sweep.tasks),
    )


def _machine_factor(cases: Sequence[SweepCase], store: "ResultStore | None") -> tuple[float, str]:
    """How much longer cases take here than the formula says, and how that is known."""
    if store is not None:
        expected = {case.case_id: case.work for case in cases}
        rows = [
            row
            for row in store.rows([case_id for case_id in store.done(expected)])
            if row["seconds"]
        ]
        if rows:
            # Long cases weigh as much as they take.
            work = sum(expected[row["case_id"]] for row in rows)
            factor = sum(row["seconds"] for row in rows) / work
            return factor, f"{len(rows)} cases of this sweep already stored"
    probe = probe_machine()
    return probe.factor, probe.basis
