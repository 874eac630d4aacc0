"""What travels to a worker and back: paths, names and settings, never arrays.

What becomes of a task whose worker died: once more, or failed with the reason.

A case that was running when a worker died is suspected; one that two workers died of is marked
failed, and the rest of its task goes on. The same rule holds for local processes and clusters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from loraq_sim.dumps import LayerInfo
from loraq_sim.results.rows import Row, failed_row
from loraq_sim.settings import CaseSettings
from loraq_sim.sweeps.digests import SolutionCache

__all__ = [
    "CaseResult",
    "LossRecord",
    "SweepCase",
    "SweepTask",
    "WorkerLost",
    "case_row",
    "failed_result",
]


@dataclass(frozen=True, kw_only=True)
class SweepCase:
    """One layer with one combination of settings on one accelerator.

    `accelerator` is the name or path to load, `labels` are the columns of the row known before it
    is evaluated, and `work` is in units of its `effort` (`loraq_sim.sweeps.cases`).
    Cases of equal `solution_key` have the same solution, which `cache` may hold. `asked` says what
    the plan named where an override changed it: a label, not a setting.
    """

    case_id: str
    accelerator: str
    settings: CaseSettings
    solution_key: str
    cache: SolutionCache | None = None
    asked: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    work: float = 1.0
    effort: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepTask:
    """All cases of one layer, so that a worker loads the layer once.

    `digest` is what the content of the layer was when the sweep was planned, empty if unknown;
    `position` is the place of the first case among all cases of the plan.
    """

    dump: str
    layer: str
    info: LayerInfo | None
    digest: str = ""
    position: int = 0
    cases: tuple[SweepCase, ...]

    @property
    def work(self) -> float:
        """Units of work of all its cases, to order tasks by."""
        return sum(case.work for case in self.cases)


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A finished case. `is_unreadable`: it failed because its layer could not be loaded."""

    case: SweepCase
    row: Row
    is_unreadable: bool = False


@dataclass(frozen=True, kw_only=True)
class WorkerLost:
    """A worker process died; `message` says of what, and whether its layer is tried again."""

    layer: str
    message: str


def case_row(case: SweepCase, row: Mapping[str, Any]) -> Row:
    """The row to store: what the evaluation returned, completed by the labels of the case."""
    completed = {name: v for name, v in case.labels.items() if row.get(name) is None}
    # To the evaluation all rows of the plan are given; the plan knows by whom.
    return dict(row) | completed | {"m_source": case.labels.get("m_source", row.get("m_source"))}


def failed_result(case: SweepCase, message: str, *, is_unreadable: bool = False) -> CaseResult:
    """Result of a case that gave no row; `message` is kept on one line."""
    row = failed_row(" ".join(message.split()), case.labels)
    return CaseResult(case=case, row=row, is_unreadable=is_unreadable)


_MAX_KILLS = 2


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
