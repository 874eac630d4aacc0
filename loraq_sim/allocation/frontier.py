"""What is made of allocations: all of those worth having, what they save, and recipes of them.

A front is compared with one split for the whole model. A recipe is a file that
``loraq-sim solve --recipe`` takes.
"""

import glob
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import ValidationError

from loraq_sim.allocation.model import Allocation, choose
from loraq_sim.allocation.problem import COSTS, ERRORS, AllocationProblem
from loraq_sim.allocation.solve import hull_path
from loraq_sim.errors import InputError
from loraq_sim.recipe import Recipe
from loraq_sim.results.rows import Row, cells_of
from loraq_sim.results.totals import as_asked
from loraq_sim.settings import NONE
from loraq_sim.split import WITHOUT_BRANCH, parse_split

__all__ = [
    "allocation_recipe",
    "axes_of",
    "compare_with_uniform",
    "frontier_rows",
    "recipe_of_rows",
    "spread",
]


_UNIFORM = (
    *("split", "family", "group_size", "rotation", "smooth", "condition", "finish", "method"),
    *("preset", "seed"),
)


def axes_of(allocation: Allocation) -> tuple[str, str]:
    """The cost and the error a budget and an objective trade off, else latency and output error."""
    named = (*allocation.budget, allocation.minimize)
    cost = next((name for name in named if name in COSTS), "latency_s")
    error = next((name for name in named if name in ERRORS), "output_error")
    return cost, error


def frontier_rows(
    problem: AllocationProblem, cost: str, error: str, *, most: int | None = None
) -> list[dict[str, Any]]:
    """Totals of the allocations from all-cheapest to all-best.

    Each has the least error any allocation reaches at its cost; between two neighbors there may be
    others, above the line that joins them (in squared error). Cost rises and error falls strictly.
    ``mix`` says how many layers run in which split. Of more than `most` allocations those that
    `spread` takes.
    """
    problem = problem.between(cost, error)
    path = hull_path(problem.contributions[cost], problem.contributions[error])
    ends = [
        {cost: one, error: other, "steps": steps}
        for steps, (one, other) in enumerate(
            zip(path.cost, np.sqrt(np.maximum(path.error, 0.0)), strict=True)
        )
    ]
    rows: list[dict[str, Any]] = []
    for end in ends if most is None else spread(ends, cost, error, most):
        picks = path.picks(end["steps"])
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
    allocation: Allocation, *, time_limit_s: float = 10.0, on_front: bool = False
) -> list[dict[str, Any]]:
    """What choosing per layer saves against each split that could run in every layer.

    One row per split (with its method, preset, family, group and seed), cheapest first:
    ``mixed_error`` is the least error at no more than its cost and ``error_ratio`` that over its
    own; ``mixed_cost`` is the least cost at no more than its error and ``cost_ratio`` that over its
    own. Neither ratio is above 1. ``in_budget`` says whether the split alone meets the budgets.

    With `on_front` the mixes are allocations of `frontier_rows`, all of them from one pass. With
    hundreds of layers some lies just below every budget; a search for each would gain little.
    """
    problem = allocation.problem
    cost, error = axes_of(allocation)
    if not {cost, error} <= problem.contributions.keys():
        return []
    rows = []
    useful = replace(allocation, problem=problem.between(cost, error))
    front = _Front(useful.problem, cost, error) if on_front else None

    def least(limit: str, minimize: str, own: Mapping[str, float]) -> float:
        if front is not None:
            return min(front.least(limit, minimize, own[limit]), own[minimize])
        return _best(useful, {limit: own[limit]}, minimize, own[minimize], time_limit_s)

    for settings, picks in _uniform_picks(problem):
        own = problem.totals(picks)
        best, cheapest = least(cost, error, own), least(error, cost, own)
        rows.append(
            {
                **_place(problem),
                **settings,
                **own,
                f"mixed_{error}": best,
                "error_ratio": best / own[error] if own[error] else 1.0,
                f"mixed_{cost}": cheapest,
                "cost_ratio": cheapest / own[cost] if own[cost] else 1.0,
                "in_budget": all(
                    # Every option was on an array within a budget of area.
                    own[c] <= v * (1 + 1e-9)
                    for c, v in allocation.budget.items()
                    if c in own
                ),
            }
        )
    return sorted(rows, key=lambda row: (row[cost], row[error]))


class _Front:
    """Allocations of `frontier_rows`, by what they spend."""

    def __init__(self, problem: AllocationProblem, cost: str, error: str) -> None:
        self._problem = problem
        self._path = hull_path(problem.contributions[cost], problem.contributions[error])
        self._cost = cost

    def least(self, limit: str, minimize: str, most: float) -> float:
        """The total of `minimize` of the last allocation within the limit."""
        if limit == self._cost:
            steps = int(np.searchsorted(self._path.cost, most, side="right")) - 1
        else:
            steps = int(np.searchsorted(-self._path.error, -most * most, side="left"))
        steps = min(max(steps, 0), len(self._path.layer))
        return self._problem.total(minimize, self._path.picks(steps))


def _best(
    allocation: Allocation,
    limits: dict[str, float],
    minimize: str,
    uniform: float,
    time_limit_s: float,
) -> float:
    """The least total within `limits`; that of the uniform split, which meets them, at most."""
    problem = allocation.problem
    found = choose(problem, limits, minimize, "lagrangian", time_limit_s)
    if allocation.method == "exact":
        found = choose(problem, limits, minimize, "exact", time_limit_s, start=found)
    return min(problem.total(minimize, found.picks), uniform)


def _uniform_picks(
    problem: AllocationProblem,
) -> list[tuple[dict[str, Any], tuple[int, ...]]]:
    """Settings that every layer has a row of, and where."""
    places: dict[tuple, dict[int, int]] = {}
    for layer, options in enumerate(problem.options):
        for index, key in enumerate(cells_of(list(map(as_asked, options)), _UNIFORM)):
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
    counts = Counter(names[pick] for names, pick in zip(problem.labels, picks, strict=True))
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


_SETTINGS = {
    "method": "method",
    "preset": "preset",
    "family": "family",
    "group": "group_size",
    "seed": "seed",
    "smooth": "smooth",
    "rotate": "rotation",
    "condition": "condition",
    "finish": "finish",
}
_OF_BRANCHES = ("method", "preset", "seed")


def allocation_recipe(
    allocation: Allocation, provenance: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe of an allocation: what most layers share under defaults, the rest by layer.

    `provenance` is added to what the allocation knows of itself: model, accelerator, budget,
    objective, totals and gap.
    """
    return recipe_of_rows(allocation.rows, _facts(allocation) | dict(provenance or {}))


def recipe_of_rows(rows: Sequence[Row], provenance: Mapping[str, Any]) -> Recipe:
    """The recipe of one row a layer: what most of them share under defaults, the rest by layer."""
    settings = {row["layer"]: _settings(row) for row in rows}
    defaults = {
        key: Counter(values).most_common(1)[0][0]
        for key in _SETTINGS
        if (values := [own[key] for own in settings.values() if own.get(key) is not None])
    }
    layers = {
        # Brackets and stars of a name are not to be read as a pattern.
        glob.escape(layer): {
            key: value
            for key, value in (own | _ended(own, defaults)).items()
            if value is not None and defaults.get(key) != value
        }
        for layer, own in settings.items()
    }
    content = {"provenance": dict(provenance), "defaults": defaults, "layers": layers}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(
            f"the rows have no recipe: {key}: {first['msg']}, got {first['input']!r:.80}; "
            "the rows of that setting are no sweep's, leave them out"
        ) from None


def _ended(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What most layers do and this one does not."""
    can_end = ("smooth", "rotate", "condition", "finish")
    ended = {key: NONE for key in can_end if key in defaults and own[key] is None}
    if own["method"] is None and defaults.get("method") in WITHOUT_BRANCH:
        ended["method"] = "rtn"
    return ended


def _settings(row: Row) -> dict[str, Any]:
    own = {"split": row["split"]}
    own |= {key: row.get(column) for key, column in _SETTINGS.items()}
    family, group = own["family"] or "int", own["group"] or 64
    if not parse_split(row["split"], family=family, group=group).has_branch:
        # Rounded to nearest whatever the solver is, but for one that makes no branch of its own.
        method = own["method"] if own["method"] in WITHOUT_BRANCH[1:] else None
        own |= dict.fromkeys(_OF_BRANCHES) | {"method": method}
    return own


def _facts(allocation: Allocation) -> dict[str, Any]:
    machine = {key: value for key, value in allocation.problem.machine.items() if value}
    facts: dict[str, Any] = {"model": machine.pop("dump", None), "layers": len(allocation.picks)}
    facts |= {"accelerator": machine.pop("accelerator", None), "machine": machine}
    facts |= {"budget": dict(allocation.budget), "minimized": allocation.minimize}
    facts |= {"aggregate": allocation.problem.aggregate, "method": allocation.method}
    facts |= {"totals": allocation.totals, "bound": allocation.bound, "gap": allocation.gap}
    return facts
