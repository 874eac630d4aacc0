"""How long a sweep will take: units of work, times what a unit takes on this machine.

Seconds per unit are learned by effort (`loraq_sim.sweep.work`): from rows that the store has, and
for other efforts from a probe, which runs one real case of each on a small layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraq_sim.sweep.memory import worker_bytes
from loraq_sim.sweep.probe import probe_machine
from loraq_sim.sweep.tasks import SweepCase
from loraq_sim.sweep.work import seconds_of, units_by_effort

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
    rates, basis, start_s = _rates(sweep.cases, waiting, store)
    work = _seconds(waiting, rates)
    longest = max((_seconds(task.cases, rates) for task in sweep.tasks), default=0.0)
    # No schedule beats the mean load, and none beats the longest task.
    seconds = max(work / max(jobs, 1), min(longest, work)) + start_s
    return SweepForecast(
        n_layers=len(sweep.tasks),
        n_cases=len(sweep.cases),
        n_done=len(done),
        seconds=seconds,
        jobs=jobs,
        basis=basis,
        worker_bytes=worker_bytes(sweep.tasks),
    )


def _seconds(cases: Iterable[SweepCase], rates: Mapping[str, float]) -> float:
    units = units_by_effort((case.effort, case.work) for case in cases)
    known = {effort: amount for effort, amount in units.items() if effort in rates}
    return seconds_of(known, rates) or 0.0


def _rates(
    cases: Sequence[SweepCase], waiting: Sequence[SweepCase], store: "ResultStore | None"
) -> tuple[dict[str, float], str, float]:
    """Seconds per unit of every effort there is, how that is known, and seconds to start."""
    rates: dict[str, float] = {}
    n_rows = 0
    if store is not None:
        by_id = {case.case_id: case for case in cases}
        rows = [row for row in store.rows(list(store.done(by_id))) if row["seconds"]]
        n_rows = len(rows)
        done = [(by_id[row["case_id"]], row["seconds"]) for row in rows]
        units = units_by_effort((case.effort, case.work) for case, _ in done)
        seconds = units_by_effort((case.effort, spent) for case, spent in done)
        # Long cases weigh as much as they take.
        rates = {effort: seconds[effort] / amount for effort, amount in units.items()}
    if not waiting:
        return rates, "nothing left to run", 0.0
    missing = tuple(sorted({case.effort for case in waiting} - rates.keys()))
    probe = probe_machine(missing)
    known = f"{n_rows} cases of this sweep already stored"
    if not missing:
        return rates, known, probe.start_s
    return (
        {**probe.rates, **rates},
        f"{known}, and {probe.basis}" if n_rows else probe.basis,
        probe.start_s,
    )
