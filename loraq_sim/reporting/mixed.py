"""Allocations a report shows: one split per layer, and what that saves against uniform splits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from reports.report_data import MixedModel, ReportData

__all__ = ["mixed_models"]

_COSTS = ("latency_s", "weight_bytes")
_MOST_POINTS = 200
_MANY_LAYERS = 100
_UNIFORM = (*("split", "family", "group_size", "rotation", "smooth", "method", "preset", "seed"),)

Row = dict[str, Any]


def mixed_models(data: "ReportData") -> list["MixedModel"]:
    """Frontiers of each context on the data path its answer was found on, one for each cost.

    Prices (Lagrangian) choose the allocations, which takes a fraction of a second for a whole
    model; each frontier point is then optimal, and what is said to be saved is a lower bound.
    """
    from reports.answers import answers

    found = []
    for answer in answers(data):
        if answer.best is None:
            continue
        rows = _rows_beside(data, answer.best)
        if len({row["split"] for row in rows}) > 1:
            found += filter(None, (_mixed(data, answer.context, rows, cost) for cost in _COSTS))
    return found


def _rows_beside(data: "ReportData", best: Row) -> list[Row]:
    """Rows that could run beside the answer: same dump, machine and measurement."""
    from loraq_sim.allocation.problem import MACHINE

    keys = [name for name in MACHINE if name != "options"]
    return [
        row
        for row in data.rows
        if all(row.get(key) == best.get(key) for key in keys)
        and (row.get("options") or "") == (best.get("options") or "")
    ]


def _mixed(data: "ReportData", context: str, rows: Sequence[Row], cost: str) -> "MixedModel | None":
    from loraq_sim.allocation import allocate
    from loraq_sim.allocation.frontier import compare_with_uniform, frontier_rows
    from reports.report_data import MixedModel

    try:
        allocation = allocate(rows, {cost: _ample(rows, cost)}, data.error, "lagrangian")
        frontier = frontier_rows(allocation.problem, cost, data.error, most=_MOST_POINTS)
        uniform = compare_with_uniform(
            allocation, on_front=len(allocation.problem.layers) > _MANY_LAYERS
        )
    except InputError:
        # No layer knows both columns: there is nothing to trade.
        return None
    if len(frontier) < 2:
        return None
    labels = {_settings(row): row["label"] for row in rows}
    gains = [
        {**row, "label": labels[_settings(row)], "mixed_error": row[f"mixed_{data.error}"]}
        for row in uniform
        if _settings(row) in labels
    ]
    return MixedModel(
        context=context,
        cost=cost,
        error=data.error,
        frontier=frontier,
        gains=gains,
    )


def _ample(rows: Sequence[Row], cost: str) -> float:
    """A budget that every allocation meets."""
    return 1.0 + sum((row.get(cost) or 0) * (row.get("calls_per_step") or 1) for row in rows)


def _settings(row: Row) -> tuple:
    return tuple(row.get(key) for key in _UNIFORM)
