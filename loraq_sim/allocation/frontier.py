"""All allocations worth having, and what they save against one split for the whole model."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraq_sim.allocation.choice import Choice
from loraq_sim.allocation.lagrangian import hull_path
from loraq_sim.allocation.model import Allocation, choice_problem, choose
from loraq_sim.allocation.problem import COSTS, ERRORS, AllocationProblem
from loraq_sim.rows import Row
from loraq_sim.totals import as_asked

__all__ = ["axes_of", "compare_with_uniform", "frontier_rows", "spread"]

_UNIFORM = (*("split", "family", "group_size", "rotation", "smooth", "method", "preset", "seed"),)


def axes_of(allocation: Allocation) -> tuple[str, str]:
    """The cost and the error a budget and an objective trade off, else latency and output error."""
    named = (*allocation.budget, allocation.minimize)
    cost = next((name for name in named if name in COSTS), "latency_s")
    error = next((name for name in named if name in ERRORS), "output_error")
    return cost, error


def frontier_rows(problem: AllocationProblem, cost: str, error: str) -> list[dict[str, Any]]:
    """Totals of the allocations from all-cheapest to all-best.

    Each has the least error any allocation reaches at its cost; between two neighbors there may be
    others, above the line that joins them (in squared error). Cost rises and error falls strictly.
    ``mix`` says how many layers run in which split.
    """
    rows: list[dict[str, Any]] = []
    for picks in hull_path(problem.contributions[cost], problem.contributions[error]):
        totals = problem.totals(picks)
        if rows and not totals[error] < rows[-1][error]:
            continue
        rows.append({**_place(problem), **totals, "mix": _mix(problem, picks)})
    return rows


def spread(rows: Sequence[dict[str, Any]], cost: str, error: str, count: int) -> list[dict]:
    """At most `count` of the rows of a front, evenly along it, both ends kept."""
    if len(rows) <= count:
        return list(rows)
    points = np.array([[row[cost], row[error]] for row in rows], dtype=np.float64)
    steps = np.abs(np.diff(points, axis=0)) / np.maximum(np.ptp(points, axis=0), 1e-300)
    along = np.concatenate([[0.0], steps.sum(axis=1).cumsum()])
    places = np.searchsorted(along, np.linspace(0.0, along[-1], count))
    return [rows[index] for index in np.unique(np.minimum(places, len(rows) - 1))]


def compare_with_uniform(
    allocation: Allocation, *, time_limit_s: float = 10.0
) -> list[dict[str, Any]]:
    """What choosing per layer saves against each split that could run in every layer.

    One row per split (with its method, preset, family, group and seed), cheapest first:
    ``mixed_error`` is the least error at no more than its cost and ``error_ratio`` that over its
    own; ``mixed_cost`` is the least cost at no more than its error and ``cost_ratio`` that over its
    own. Neither ratio is above 1. ``in_budget`` says whether the split alone meets the budgets.
    """
    problem = allocation.problem
    cost, error = axes_of(allocation)
    if not {cost, error} <= problem.contributions.keys():
        return []
    rows = []
    for settings, picks in _uniform_picks(problem):
        own = problem.totals(picks)
        best = _best(allocation, {cost: own[cost]}, error, picks, time_limit_s)
        cheapest = _best(allocation, {error: own[error]}, cost, picks, time_limit_s)
        rows.append(
            {
                **_place(problem),
                **settings,
                **own,
                f"mixed_{error}": best,
                "error_ratio": best / own[error] if own[error] else 1.0,
                f"mixed_{cost}": cheapest,
                "cost_ratio": cheapest / own[cost] if own[cost] else 1.0,
                "in_budget": all(own[c] <= v * (1 + 1e-9) for c, v in allocation.budget.items()),
            }
        )
    return sorted(rows, key=lambda row: (row[cost], row[error]))


def _best(
    allocation: Allocation,
    limits: dict[str, float],
    minimize: str,
    uniform: tuple[int, ...],
    time_limit_s: float,
) -> float:
    problem = allocation.problem
    numbers = choice_problem(problem, limits, minimize)
    # The uniform split itself is a choice, so nothing worse can come out.
    value = numbers.value(uniform)
    start = Choice(picks=uniform, value=value, bound=-np.inf, is_proven=False)
    found = choose(problem, limits, minimize, "lagrangian", time_limit_s)
    if found.value < value:
        start = found
    if allocation.method == "exact":
        start = choose(problem, limits, minimize, "exact", time_limit_s, start=start)
    return problem.total(minimize, start.picks)


def _uniform_picks(
    problem: AllocationProblem,
) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Settings that every layer has a row of, and where."""
    places: dict[tuple, dict[int, int]] = {}
    for layer, options in enumerate(problem.options):
        for index, row in enumerate(options):
            asked = as_asked(row)
            key = tuple(asked.get(name) for name in _UNIFORM)
            places.setdefault(key, {})[layer] = index
    return [
        (
            dict(zip(_UNIFORM, key, strict=True)),
            tuple(found[layer] for layer in range(len(problem.layers))),
        )
        for key, found in places.items()
        if len(found) == len(problem.layers)
    ]


def _place(problem: AllocationProblem) -> dict[str, Any]:
    return {name: problem.machine.get(name) for name in ("dump", "accelerator")}


def _mix(problem: AllocationProblem, picks: Sequence[int]) -> str:
    taken: list[Row] = [rows[pick] for rows, pick in zip(problem.options, picks, strict=True)]
    counts = Counter(row["split"] for row in taken)
    return ", ".join(f"{count} {split}" for split, count in counts.most_common())
