"""What travels to a worker and back: paths, names and settings, never arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraq_sim.case_settings import CaseSettings
from loraq_sim.dumps import LayerInfo
from loraq_sim.rows import Row, failed_row
from loraq_sim.sweep.solution_cache import SolutionCache

__all__ = ["CaseResult", "SweepCase", "SweepTask", "WorkerLost", "case_row", "failed_result"]


@dataclass(frozen=True, kw_only=True)
class SweepCase:
    """One layer with one combination of settings on one accelerator.

    `accelerator` is the name or path to load, `labels` are the columns of the row known before it
    is evaluated, and `work` is in units of its `effort` (`loraq_sim.sweep.work`).
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
