"""Result rows as a choice problem: which row of each layer, when all quantities add up.

Of each layer l exactly one option i is taken. Minimize sum_l f_l[i_l] subject to
sum_l g_jl[i_l] <= limit_j for every budget j: a multiple-choice knapsack problem.

Costs add over layers and calls. An aggregate error is the root of a weighted mean square, so its
square adds up: the contribution of layer l is w_l e_l^2 / sum w. Totals of errors are roots of the
sums again.

The options of a layer are all its rows with status ``ok`` and every quantity known, whatever their
split, method, preset, seed, family and group: each of them is a choice of the compiler. What the
hardware or the measurement fixes (`MACHINE`) is one for the whole model.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, counted
from loraq_sim.metrics import aggregate_of
from loraq_sim.results.rows import AnyRow, cells_of
from loraq_sim.results.wording import labels_of

__all__ = [
    "AREAS",
    "AllocationProblem",
    "COSTS",
    "Choice",
    "ChoiceProblem",
    "ERRORS",
    "Infeasible",
    "MACHINE",
    "QUANTITIES",
    "build_problem",
    "is_error",
    "machines_of",
]


Parts = tuple[NDArray[np.float64], ...]
"""What each option of each layer adds: one ndarray of shape (options,) a layer."""


class Infeasible(Exception):
    """No choice meets the limits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ChoiceProblem:
    """`objective` to minimize, `budgets` with their `limits`."""

    objective: Parts
    budgets: tuple[Parts, ...]
    limits: tuple[float, ...]

    def value(self, picks: Sequence[int]) -> float:
        """The objective of a choice."""
        return _sum(self.objective, picks)

    def is_feasible(self, picks: Sequence[int]) -> bool:
        """Whether a choice meets every limit."""
        return all(
            _sum(parts, picks) <= limit
            for parts, limit in zip(self.budgets, self.limits, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`picks`: index of the option taken in each layer; `bound`: no choice has a lower objective;
    `is_proven`: whether the solver ran to its end."""

    picks: tuple[int, ...]
    value: float
    bound: float
    is_proven: bool


def _sum(parts: Parts, picks: Sequence[int]) -> float:
    return math.fsum(float(part[pick]) for part, pick in zip(parts, picks, strict=True))


COSTS = ("latency_s", "energy_j", "weight_bytes", "dram_bytes", "cycles")
ERRORS = ("output_error", "weight_error")
QUANTITIES = (*COSTS, *ERRORS)
"""Columns that add up over layers: what can be limited or minimized."""

AREAS = ("area_ge", "area_mm2")
"""Columns that do not add up: the array of a chip is as large as its largest layer asks for."""

_PER_MODEL = ("weight_bytes",)
# Its square, times calls per step, over all layers, is a float64.
_LARGEST = 1e140
MACHINE = (
    *("dump", "accelerator", "token_limit", "acc_bits", "overflow", "products_per_add"),
    *("accumulators", "options"),
)
"""Columns that are one for the whole model: the dump, the machine and how errors were measured."""


def is_error(column: str) -> bool:
    """Whether the column is an error, whose squares add up."""
    return column in ERRORS


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AllocationProblem:
    """Layers, their options and what each contributes.

    ``contributions[c]`` holds for each layer an ndarray of shape (options,): what the option adds
    to the sum of column c (for an error, to its square). ``notes`` say what was left out.
    """

    machine: dict[str, Any]
    layers: tuple[str, ...]
    options: tuple[tuple[AnyRow, ...], ...]
    contributions: dict[str, tuple[NDArray[np.float64], ...]]
    aggregate: str
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        n_options = sum(map(len, self.options))
        return f"AllocationProblem({len(self.layers)} layers, {n_options} options)"

    @cached_property
    def _flat(self) -> tuple[NDArray[np.intp], dict[str, NDArray[np.float64]]]:
        """Where each layer starts, and all contributions of each column in one array."""
        starts = np.cumsum([0, *map(len, self.options[:-1])])
        return starts, {name: np.concatenate(parts) for name, parts in self.contributions.items()}

    @cached_property
    def labels(self) -> tuple[tuple[str, ...], ...]:
        """What the options of each layer are called: their split, and what tells them apart."""
        names = iter(labels_of([row for rows in self.options for row in rows]))
        return tuple(tuple(next(names) for _ in rows) for rows in self.options)

    def total(self, column: str, picks: Sequence[int]) -> float:
        """Value of a column for the whole model, in its own unit."""
        starts, parts = self._flat
        value = math.fsum(parts[column][starts + np.asarray(picks)].tolist())
        return math.sqrt(value) if is_error(column) else value

    def least(self, column: str) -> float:
        """Smallest total any choice can reach."""
        return self.total(column, [int(part.argmin()) for part in self.contributions[column]])

    def totals(self, picks: Sequence[int]) -> dict[str, float]:
        """Every quantity known for all options."""
        return {column: self.total(column, picks) for column in self.contributions}

    def between(self, first: str, second: str) -> "AllocationProblem":
        """The problem of two columns: without options that another one is no worse than in both.

        A choice for a budget on one of them and little of the other needs no more: of 60 options
        of a layer about ten are left.
        """
        kept = [
            _undominated(one, other)
            for one, other in zip(
                self.contributions[first], self.contributions[second], strict=True
            )
        ]
        return replace(
            self,
            options=tuple(
                tuple(rows[place] for place in places)
                for rows, places in zip(self.options, kept, strict=True)
            ),
            contributions={
                name: tuple(part[places] for part, places in zip(parts, kept, strict=True))
                for name, parts in self.contributions.items()
            },
        )


def machines_of(rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
    """The distinct values of `MACHINE` in `rows`, in order of appearance."""
    found: dict[tuple, dict[str, Any]] = {}
    # Rows of a sweep are of a few machines.
    for own in dict.fromkeys(cells_of(rows, MACHINE)):
        machine = _machine(dict(zip(MACHINE, own, strict=True)))
        found.setdefault(tuple(machine.values()), machine)
    return list(found.values())


def build_problem(
    rows: Sequence[AnyRow], machine: dict[str, Any], needed: Sequence[str], aggregate: str
) -> AllocationProblem:
    """The problem of one machine; every column of `needed` is known for every option kept.

    Raises
    ------
    InputError
        If no layer has an option, or no row knows a needed column.
    """
    alike = {
        own: _machine(dict(zip(MACHINE, own, strict=True))) == machine
        for own in dict.fromkeys(cells_of(rows, MACHINE))
    }
    own = [row for row, key in zip(rows, cells_of(rows, MACHINE), strict=True) if alike[key]]
    by_layer: dict[str, list[AnyRow]] = {row["layer"]: [] for row in own}
    wanted = ("layer", "status", *needed)
    for row, (layer, status, *known) in zip(own, cells_of(own, wanted), strict=True):
        if status == "ok" and all(map(_is_number, known)):
            by_layer[layer].append(row)
    layers = tuple(name for name, options in by_layer.items() if options)
    if not layers:
        raise InputError(_why_none(own, needed))
    options = tuple(tuple(by_layer[name]) for name in layers)
    contributions = {
        column: parts
        for column in QUANTITIES
        if (parts := _contributions(options, column, aggregate)) is not None
    }
    for column in needed:
        if column not in contributions:
            raise InputError(f"{column} cannot be aggregated: a row lacks what {aggregate!r} needs")
    return AllocationProblem(
        machine=machine,
        layers=layers,
        options=options,
        contributions=contributions,
        aggregate=aggregate,
        notes=tuple(_notes(own, by_layer)),
    )


def _undominated(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.intp]:
    """Places of the options that no other is at most equal to in both; of equal ones the first."""
    order = np.lexsort((second, first))
    least = np.minimum.accumulate(second[order])
    return np.sort(order[np.append(True, second[order][1:] < least[:-1])])


def _machine(row: AnyRow) -> dict[str, Any]:
    machine = {name: row.get(name) for name in MACHINE}
    if machine["options"]:
        # Which override a layer's row came from is no property of the machine.
        others = {k: v for k, v in json.loads(machine["options"]).items() if k != "asked"}
        machine["options"] = json.dumps(others, sort_keys=True) if others else ""
    return machine


def _is_number(value: Any) -> bool:
    """Whether it is known and small enough to be squared and added up in float64."""
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _why_none(rows: Sequence[AnyRow], needed: Sequence[str]) -> str:
    done = [row for row in rows if row.get("status") == "ok"]
    for column in needed:
        if done and not any(_is_number(row.get(column)) for row in done):
            hint = "the dump has no activations; " if column == "output_error" else ""
            other = "weight_error" if column == "output_error" else "another column"
            return f"no row knows {column}: {hint}use {other}"
    wild = sum(row.get("status") == "overflow" for row in rows)
    failed = len(rows) - len(done) - wild
    beyond = f", the output of {wild} is not finite (values beyond a float format)" if wild else ""
    return f"none of {counted(len(rows), 'row')} can be used: {failed} failed{beyond}"


def _notes(rows: Sequence[AnyRow], by_layer: dict[str, list[AnyRow]]) -> list[str]:
    notes = []
    missing = [name for name, options in by_layer.items() if not options]
    if missing:
        notes.append(
            f"{len(missing)} of {counted(len(by_layer), 'layer')} left out of all sums without a "
            f"usable row, such as {missing[0]}"
        )
    wild = [row for row in rows if row.get("status") == "overflow"]
    if wild:
        notes.append(
            f"not chosen from, for an output that is not finite: {counted(len(wild), 'row')}, "
            "such as "
            f"{wild[0]['split']} of {wild[0]['layer']}"
        )
    most = max(map(len, by_layer.values()))
    fewer = [name for name, options in by_layer.items() if 0 < len(options) < most]
    if fewer:
        notes.append(
            f"{counted(len(fewer), 'layer', 'has')} less than {most} usable rows to choose from, "
            f"such as {fewer[0]} with {len(by_layer[fewer[0]])}"
        )
    return notes


def _contributions(
    options: tuple[tuple[AnyRow, ...], ...], column: str, aggregate: str
) -> tuple[NDArray[np.float64], ...] | None:
    columns = [list(cells_of(rows, (column, "calls_per_step"))) for rows in options]
    if not all(_is_number(value) for values in columns for value, _ in values):
        return None
    if is_error(column):
        weigh = aggregate_of(column, aggregate).weight
        try:
            # The weight is the layer's, whichever row it is read from.
            weights = [float(weigh(rows[0])) for rows in options]
            whole = math.fsum(weights)
        except (TypeError, KeyError, OverflowError):
            return None
        if not 0 < whole < math.inf:
            return None
        shares = [weight / whole for weight in weights]
        return tuple(
            np.array([share * value**2 for value, _ in values], dtype=np.float64)
            for share, values in zip(shares, columns, strict=True)
        )
    once = column in _PER_MODEL
    return tuple(
        np.array([value * (1 if once else calls or 1) for value, calls in values], dtype=np.float64)
        for values in columns
    )
