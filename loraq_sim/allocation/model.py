"""`allocate`: rows of a sweep and budgets in, a split for every layer out."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loraq_sim.allocation.problem import (
    AREAS,
    QUANTITIES,
    AllocationProblem,
    Choice,
    ChoiceProblem,
    Infeasible,
    Parts,
    build_problem,
    is_error,
    machines_of,
)
from loraq_sim.allocation.solve import choose_by_prices, choose_exactly
from loraq_sim.errors import InputError, counted, named_options, unknown_name
from loraq_sim.metrics import DEFAULT_AGGREGATE
from loraq_sim.results.columns import Limits, checked_limits
from loraq_sim.results.rows import AnyRow, Row
from loraq_sim.results.totals import records_of

if TYPE_CHECKING:
    import pandas

__all__ = ["METHODS", "Allocation", "allocate", "allocate_each", "choose"]

METHODS = ("exact", "lagrangian")
# A budget counts as met up to this fraction of it: totals are sums of rounded numbers.
_TOLERANCE = 1e-9
_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Allocation:
    """One choice for a whole model on one machine.

    Attributes
    ----------
    problem : AllocationProblem
        Layers and their options.
    picks : tuple of int
        Index of the option taken in each layer.
    budget : mapping
        Limits asked for, by column.
    minimize : str
        Column made small.
    value, bound : float
        Total of that column, and what no choice can be below.
    method : str
        ``exact`` or ``lagrangian``.
    is_proven : bool
        Whether the exact solver ran to its end.
    """

    problem: AllocationProblem = field(repr=False)
    picks: tuple[int, ...] = field(repr=False)
    budget: Limits
    minimize: str
    value: float
    bound: float
    method: str
    is_proven: bool

    @property
    def gap(self) -> float:
        """(value - bound) / value: at most this fraction could still be saved; 0 if value is 0."""
        return (self.value - self.bound) / self.value if self.value else 0.0

    @property
    def rows(self) -> list[Row]:
        """The result row taken for each layer, in the order of the sweep."""
        return [
            dict(options[pick])
            for options, pick in zip(self.problem.options, self.picks, strict=True)
        ]

    @property
    def totals(self) -> dict[str, float]:
        """Every quantity of the whole model; under a budget on area the largest array, too."""
        areas = {name: max(row[name] for row in self.rows) for name in AREAS if name in self.budget}
        return self.problem.totals(self.picks) | areas

    @property
    def accelerator(self) -> str:
        """The accelerator allocated for."""
        return self.problem.machine["accelerator"]

    @property
    def splits(self) -> dict[str, str]:
        """Split of each layer."""
        return {row["layer"]: row["split"] for row in self.rows}

    def __repr__(self) -> str:
        totals = ", ".join(f"{name}={value:.4g}" for name, value in self.totals.items())
        limits = ", ".join(f"{name} <= {limit:.4g}" for name, limit in self.budget.items())
        mix = Counter(self.splits.values()).most_common(_MOST_SHOWN)
        used = ", ".join(f"{count} in {split}" for split, count in mix)
        proof = "proven optimal" if self.is_proven and not self.gap else f"gap {self.gap:.2%}"
        return (
            f"Allocation of {counted(len(self.picks), 'layer')} on {self.accelerator}: {used}\n"
            f"least {self.minimize} with {limits} ({self.method}, {proof})\n{totals}"
        )

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import allocation_card

        return allocation_card(self)


@named_options
def allocate(
    frame: "pandas.DataFrame | Sequence[AnyRow]",
    budget: Limits,
    *,
    minimize: str | None = None,
    method: str = "exact",
    accelerator: str | None = None,
    aggregate: str = DEFAULT_AGGREGATE,
    time_limit_s: float = 60.0,
) -> Allocation:
    """Choose a row for each layer so that the whole model is best within budgets.

    Parameters
    ----------
    frame : DataFrame or sequence of dict
        Result rows of a sweep. All ``ok`` rows of a layer are its options; see
        `loraq_sim.allocation.problem`.
    budget : mapping
        Largest total of each column, in base units, such as ``{"latency_s": 0.003}``; columns are
        `QUANTITIES`, and ``area_ge`` and ``area_mm2`` of the array that all layers run on: of the
        arrays within it the one of the best allocation. A limit counts as met up to 1e-9 of it.
    minimize : str, optional
        Column to make small: by default the output error, or the latency where the output error
        has a budget.
    method : str
        ``exact`` (integer programming) or ``lagrangian`` (prices; fast, with a lower bound).
    accelerator : str, optional
        Needed where the rows are of several.
    aggregate : str
        How output errors become one; see `loraq_sim.metrics`.
    time_limit_s : float
        Of the integer program. With the time over, the best choice found is returned, with its gap.

    Raises
    ------
    InputError
        If a name is unknown, no choice meets the budgets (the message says what is possible), or
        the rows are of several machines.
    """
    found = allocate_each(
        frame,
        budget,
        minimize=minimize,
        method=method,
        accelerator=accelerator,
        aggregate=aggregate,
        time_limit_s=time_limit_s,
    )
    if len(found) > 1:
        what = ", ".join(dict.fromkeys(one.accelerator for one in found))
        raise InputError(
            f"the rows are of {len(found)} machines or settings of them ({what}); choose by "
            "accelerator=..., select rows, or use allocate_each"
        )
    return found[0]


@named_options
def allocate_each(
    frame: "pandas.DataFrame | Sequence[AnyRow]",
    budget: Limits,
    *,
    minimize: str | None = None,
    method: str = "exact",
    accelerator: str | None = None,
    aggregate: str = DEFAULT_AGGREGATE,
    time_limit_s: float = 60.0,
) -> list[Allocation]:
    """As `allocate`, one allocation for each dump, accelerator and setting of its data path."""
    rows = _records(frame)
    limits = checked_limits(budget, (*QUANTITIES, *AREAS))
    if not limits:
        raise InputError("an allocation needs a budget, such as latency_s=0.003")
    minimize = minimize or ("latency_s" if "output_error" in limits else "output_error")
    if minimize not in QUANTITIES:
        raise InputError(unknown_name("column to minimize", minimize, QUANTITIES))
    if minimize in limits:
        raise InputError(f"{minimize} is minimized; a budget on it says nothing")
    if method not in METHODS:
        raise InputError(unknown_name("allocation method", method, METHODS))
    if not time_limit_s > 0:
        raise InputError(f"the time limit must be positive, got {time_limit_s} s")
    if accelerator is not None:
        names = list(dict.fromkeys(str(row.get("accelerator")) for row in rows))
        if accelerator not in names:
            raise InputError(unknown_name("accelerator", accelerator, names))
        rows = [row for row in rows if row.get("accelerator") == accelerator]
    if not rows:
        raise InputError("there are no rows to allocate from")
    areas = {name: limits.pop(name) for name in AREAS if name in limits}
    if not areas:
        needed = (minimize, *limits)
        problems = [build_problem(rows, one, needed, aggregate) for one in machines_of(rows)]
        return [_allocated(problem, limits, minimize, method, time_limit_s) for problem in problems]
    within = [row for row in rows if _fits(row, areas)]
    if not within:
        raise InputError(_why_no_array(rows, areas))
    found: list[Allocation] = []
    why: list[str] = []
    n_layers = len({row["layer"] for row in rows if row.get("status") == "ok"})
    for one in machines_of(within):
        try:
            problem = build_problem(within, one, (minimize, *limits), aggregate)
            if len(problem.layers) < n_layers:
                continue  # An array that not all layers can run on is no machine for them.
            done = _allocated(problem, limits, minimize, method, time_limit_s)
            found.append(replace(done, budget=dict(limits) | areas))
        except InputError as error:
            why.append(str(error))
    if not found:
        raise InputError(why[0] if why else _why_no_array(rows, areas))
    return _best_arrays(found, next(iter(areas)))


def _fits(row: AnyRow, areas: Limits) -> bool:
    values = [(row.get(name), limit * (1 + _TOLERANCE)) for name, limit in areas.items()]
    return all(isinstance(value, int | float) and value <= limit for value, limit in values)


def _why_no_array(rows: Sequence[AnyRow], areas: Limits) -> str:
    """The smallest array that runs every layer, of each column that was limited."""
    told = []
    for name, limit in areas.items():
        arrays = machines_of(rows)
        known = [(row, row.get(name)) for row in rows if row.get("status") == "ok"]
        if not any(isinstance(value, int | float) for _, value in known):
            return (
                f"no row knows {name}: a store of an earlier release, a float mode, or no figures"
            )
        least = math.inf
        for machine in arrays:
            smallest: dict[str, float] = {}
            for row, value in known:
                same = all(row.get(k) == v for k, v in machine.items() if k != "options")
                if same and isinstance(value, int | float):
                    layer = row["layer"]
                    smallest[layer] = min(value, smallest.get(layer, math.inf))
            least = min(least, max(smallest.values(), default=math.inf))
        told.append(f"{name}={limit:.6g} (the smallest that runs every layer: {least:.6g})")
    return f"no array is within {' and '.join(told)}"


def _best_arrays(found: Sequence[Allocation], area: str) -> list[Allocation]:
    """Of allocations that differ in the array alone, the one of least objective, then of area."""
    best: dict[tuple, Allocation] = {}
    for one in found:
        machine = one.problem.machine
        place = tuple(machine.get(name) for name in ("dump", "accelerator", "token_limit"))
        rank = (one.value, one.totals[area])
        if place not in best or rank < (best[place].value, best[place].totals[area]):
            best[place] = one
    return list(best.values())


def choose(
    problem: AllocationProblem,
    limits: Limits,
    minimize: str,
    method: str,
    time_limit_s: float,
    *,
    start: Choice | None = None,
) -> Choice:
    """The choice for a problem, objective and bound as sums (squares for errors)."""
    numbers = choice_problem(problem, limits, minimize)
    if method == "lagrangian":
        return choose_by_prices(numbers)
    try:
        start = start or choose_by_prices(numbers)
    except Infeasible:
        # Swaps found nothing for several budgets at once; that proves nothing.
        start = None
    return choose_exactly(numbers, time_limit_s=time_limit_s, start=start)


def choice_problem(problem: AllocationProblem, limits: Limits, minimize: str) -> ChoiceProblem:
    """The numbers of a problem; limits of errors squared, as their contributions are."""
    budgets: list[Parts] = [problem.contributions[column] for column in limits]
    loose = {column: limit * (1 + _TOLERANCE) for column, limit in limits.items()}
    return ChoiceProblem(
        objective=problem.contributions[minimize],
        budgets=tuple(budgets),
        limits=tuple(value**2 if is_error(column) else value for column, value in loose.items()),
    )


def _allocated(
    problem: AllocationProblem, limits: Limits, minimize: str, method: str, time_limit_s: float
) -> Allocation:
    for column, limit in limits.items():
        least = problem.least(column)
        if least > limit * (1 + _TOLERANCE) or limit < 0:
            raise InputError(
                f"{_place(problem)}{column}={limit:.6g} cannot be met: the least possible of "
                f"{counted(len(problem.layers), 'layer')} is {least:.6g}"
            )
    try:
        choice = choose(problem, limits, minimize, method, time_limit_s)
    except (Infeasible, TimeoutError):
        raise InputError(_why_not(problem, limits, method, time_limit_s)) from None
    root = 0.5 if is_error(minimize) else 1.0
    return Allocation(
        problem=problem,
        picks=choice.picks,
        budget=dict(limits),
        minimize=minimize,
        value=problem.total(minimize, choice.picks),
        bound=max(0.0, choice.bound) ** root,
        method=method,
        is_proven=choice.is_proven,
    )


def _why_not(
    problem: AllocationProblem, limits: Mapping[str, float], method: str, time_limit_s: float
) -> str:
    """Each budget can be met alone; what the first can be at least when the others are."""
    first, *others = limits
    rest = {column: limits[column] for column in others}
    try:
        choice = choose(problem, rest, first, "exact", time_limit_s)
        least = problem.total(first, choice.picks)
    except (Infeasible, TimeoutError):
        least = None
    if least is not None and least <= limits[first] * (1 + _TOLERANCE):
        return f"{_place(problem)}no choice was found by method {method!r}; use 'exact'"
    met = ", ".join(f"{column}={limit:.6g}" for column, limit in rest.items())
    text = f"{_place(problem)}the budgets cannot be met together"
    if least is None:
        return f"{text}: {met} alone cannot"
    return f"{text}: with {met} the least possible {first} is {least:.6g}, over {limits[first]:.6g}"


def _place(problem: AllocationProblem) -> str:
    accelerator = problem.machine.get("accelerator")
    return f"{accelerator}: " if accelerator else ""


def _records(frame: "pandas.DataFrame | Sequence[AnyRow]") -> Sequence[AnyRow]:
    if not isinstance(frame, Sequence):
        return records_of(frame)
    for row in frame:
        if "layer" not in row:
            raise InputError(f"a result row needs a layer, got the columns {', '.join(row)}")
    return frame
