"""The best choice of one option a layer: exactly by integer programming, or fast by prices.

**Scaling.** The options of all layers stand in one row (`FlatProblem`), scaled so that a solver's
absolute tolerances mean little: budgets are written as what an option spends above the cheapest of
its layer, in units of what may be spent above the cheapest choice. An option that breaks a budget
with all other layers at their cheapest is left out, and so is one that is worse than a known choice
with all others at their best.

**Exactly** (HiGHS through `scipy.optimize.milp`). HiGHS may overstep a constraint by 1e-6. A choice
that does is cut off and the rest solved again, so that what is returned meets the limits in exact
sums.

**By prices** on the budgets in place of the budgets. With a price p_j >= 0 per unit of budget j the
layers no longer depend on each other:

    L(p) = sum_l min_i ( f_l[i] + sum_j p_j g_jl[i] ) - sum_j p_j limit_j

is a lower bound of the optimum for every p (Everett 1963), largest at the dual prices of the linear
relaxation. The choice at these prices is made to meet the limits by the swaps that cost least per
unit of excess, and then improved by single swaps while one fits.

With one budget the prices need no solver: the options of a layer that any price can pick form its
convex hull, and taking hull steps of all layers in order of their slope is the linear relaxation
(Sinha and Zoltners 1979). `hull_path` is the whole front of these choices, each of them optimal for
what it spends.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.allocation.problem import Choice, ChoiceProblem, Infeasible, Parts

__all__ = [
    "FlatProblem",
    "HullPath",
    "choose_by_prices",
    "choose_exactly",
    "flatten",
    "hull_path",
]


# HiGHS stops at an absolute gap of 1e-6: 1e-10 of this range of the objective.
_OBJECTIVE_RANGE = 1e4
_WHOLE = 1.0 + 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class FlatProblem:
    """F options of all layers.

    ``layer`` and ``option`` (F,) say which one each is; ``objective`` (F,) is scaled and starts at
    0 in each layer: the true one is ``base + size * sum``; ``shares`` (J, F) sum to at most 1.
    """

    n_layers: int
    layer: NDArray[np.intp]
    option: NDArray[np.intp]
    objective: NDArray[np.float64]
    base: float
    size: float
    shares: NDArray[np.float64]

    def picks(self, weights: NDArray[np.float64]) -> tuple[int, ...]:
        """In each layer the option of the largest weight (F,)."""
        order = np.lexsort((-weights, self.layer))
        first = np.searchsorted(self.layer[order], np.arange(self.n_layers))
        return tuple(int(index) for index in self.option[order[first]])

    def indicator(self, picks: Sequence[int]) -> NDArray[np.float64]:
        """1 where an option is taken, (F,)."""
        return (self.option == np.asarray(picks)[self.layer]).astype(np.float64)


def flatten(problem: ChoiceProblem, *, ceiling: float = np.inf) -> FlatProblem:
    """The options that can be part of a feasible choice of an objective up to `ceiling`.

    Raises
    ------
    Infeasible
        If a budget is less than the cheapest choice spends.
    """
    sizes = [len(part) for part in problem.objective]
    layer = np.repeat(np.arange(len(sizes)), sizes)
    option = np.concatenate([np.arange(size) for size in sizes])
    shares = np.array(
        [
            _shares(parts, limit)
            for parts, limit in zip(problem.budgets, problem.limits, strict=True)
        ],
        dtype=np.float64,
    ).reshape(len(problem.budgets), len(layer))
    kept = (shares <= _WHOLE).all(axis=0)
    objective, base = _above_least(problem.objective)
    kept &= objective <= (ceiling - base) * _WHOLE + abs(base) * (_WHOLE - 1)
    if len(np.unique(layer[kept])) < len(sizes):
        raise Infeasible
    size = float(objective[kept].max()) / _OBJECTIVE_RANGE or 1.0
    return FlatProblem(
        n_layers=len(sizes),
        layer=layer[kept],
        option=option[kept],
        objective=objective[kept] / size,
        base=base,
        size=size,
        shares=shares[:, kept],
    )


def _above_least(parts: Parts) -> tuple[NDArray[np.float64], float]:
    least = [float(part.min()) for part in parts]
    above = [part - low for part, low in zip(parts, least, strict=True)]
    return np.concatenate(above), math.fsum(least)


def _shares(parts: Parts, limit: float) -> NDArray[np.float64]:
    above, least = _above_least(parts)
    slack = limit - least
    if slack < 0:
        raise Infeasible
    if slack == 0:
        return np.where(above > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):
        return above / slack


_MAX_CUTS = 50
_FINER = 0.1
_INFEASIBLE, _OPTIMAL = 2, 0


def choose_exactly(
    problem: ChoiceProblem, *, time_limit_s: float = 60.0, start: Choice | None = None
) -> Choice:
    """The choice of least objective; with the time over, the best found and the bound reached.

    Parameters
    ----------
    problem : ChoiceProblem
    time_limit_s : float
        For each integer program; there is nearly always one.
    start : Choice, optional
        A feasible choice, returned if nothing better is found in time.

    Raises
    ------
    Infeasible
        If no choice meets the limits.
    TimeoutError
        If no choice was found in time and there is no `start`.
    """
    found = _solved(problem, time_limit_s, start)
    # What no longer can be optimal is dropped; where much goes, the rest is solved to more digits.
    while found.is_proven and _range(problem, found) < _FINER * _range(problem, start):
        start, found = found, _solved(problem, time_limit_s, found)
    return found


def _range(problem: ChoiceProblem, choice: Choice | None) -> float:
    return flatten(problem, ceiling=np.inf if choice is None else choice.value).size


def _solved(problem: ChoiceProblem, time_limit_s: float, start: Choice | None) -> Choice:
    flat = flatten(problem, ceiling=np.inf if start is None else start.value)
    cuts: list[np.ndarray] = []
    bound = flat.base
    while len(cuts) <= _MAX_CUTS:
        result = _integer_program(flat, cuts, time_limit_s)
        if result.status == _INFEASIBLE:
            if start is None:
                raise Infeasible
            break
        if result.mip_dual_bound is not None:
            bound = flat.base + flat.size * float(result.mip_dual_bound)
        if result.x is None:
            break
        picks = flat.picks(result.x)
        if problem.is_feasible(picks):
            value = problem.value(picks)
            if start is not None and start.value < value:
                picks, value = start.picks, start.value
            # Rounding of the scaled sums must not put the bound above what was reached.
            is_proven = result.status == _OPTIMAL
            return Choice(picks=picks, value=value, bound=min(bound, value), is_proven=is_proven)
        cuts.append(flat.indicator(picks))
    if start is None:
        raise TimeoutError(f"no choice was found in {time_limit_s:g} s")
    bound = min(bound, start.value)
    return Choice(picks=start.picks, value=start.value, bound=bound, is_proven=False)


def _integer_program(flat: FlatProblem, cuts: list[np.ndarray], time_limit_s: float):
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    n_options = len(flat.layer)
    one_each = csr_array((np.ones(n_options), (flat.layer, np.arange(n_options))))
    constraints = [LinearConstraint(one_each, 1.0, 1.0)]
    if len(flat.shares):
        constraints.append(LinearConstraint(flat.shares, -np.inf, 1.0))
    if cuts:
        constraints.append(LinearConstraint(np.stack(cuts), -np.inf, flat.n_layers - 1.0))
    return milp(
        flat.objective,
        integrality=np.ones(n_options),
        bounds=(0.0, 1.0),
        constraints=constraints,
        options={"time_limit": time_limit_s, "mip_rel_gap": 0.0},
    )


_ROOMS = (1.0 + 1e-12, 1.0 - 1e-9, 1.0 - 1e-6)


def choose_by_prices(problem: ChoiceProblem) -> Choice:
    """A feasible choice and a lower bound of the best one.

    Raises
    ------
    Infeasible
        If a single budget cannot be met, or, with several, no feasible choice was found.
    """
    flat = flatten(problem)
    prices = _one_price(flat) if len(flat.shares) == 1 else _several_prices(flat)
    reduced = flat.objective + prices @ flat.shares
    lowest = np.minimum.reduceat(reduced, np.flatnonzero(np.diff(flat.layer, prepend=-1)))
    bound = flat.base + flat.size * float(lowest.sum() - prices.sum())
    # Of options at one price the one that spends least, so that few have to be swapped back.
    spent = flat.shares.sum(axis=0)
    taken = _taken(flat, -reduced - 1e-12 * spent)
    # Sums of scaled shares differ from true sums in the last digits: first up to the limit, then,
    # if that was too much, safely below it.
    for room in _ROOMS:
        feasible = _improved(flat, _repaired(flat, taken, room), room)
        picks = tuple(int(pick) for pick in flat.option[feasible])
        if problem.is_feasible(picks):
            break
    else:
        raise Infeasible
    value = problem.value(picks)
    return Choice(picks=picks, value=value, bound=min(bound, value), is_proven=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class HullPath:
    """Choices from all-cheapest to all-best, each of least error for its cost.

    Attributes
    ----------
    start : ndarray of shape (layers,)
        The cheapest choice.
    layer, option : ndarray of shape (steps,)
        What each step takes where.
    cost, error : ndarray of shape (steps + 1,)
        Sums of the choices, to the last few digits of their range.
    """

    start: NDArray[np.intp]
    layer: NDArray[np.intp]
    option: NDArray[np.intp]
    cost: NDArray[np.float64]
    error: NDArray[np.float64]

    def picks(self, steps: int) -> tuple[int, ...]:
        """The choice after so many steps."""
        picks = self.start.copy()
        # Of several steps of a layer the last one stays.
        picks[self.layer[:steps]] = self.option[:steps]
        return tuple(picks.tolist())


def hull_path(cost: Parts, error: Parts) -> HullPath:
    """The choices that some price on `cost` makes best.

    Ties of cost go to the option of less error and the other way round; equal options to the first.
    """
    layer = np.repeat(np.arange(len(cost)), [len(part) for part in cost])
    option = np.concatenate([np.arange(len(part)) for part in cost])
    spent, left = np.concatenate(cost), np.concatenate(error)
    first = _cheapest(layer, spent, left)
    steps = _hull_steps(layer, spent, left)
    return HullPath(
        start=option[first],
        layer=layer[steps.after],
        option=option[steps.after],
        cost=_running(spent, first, steps),
        error=_running(left, first, steps),
    )


def _running(
    values: NDArray[np.float64], first: NDArray[np.intp], steps: "_Steps"
) -> NDArray[np.float64]:
    """Sum of `values` at the start and after each step."""
    changes = values[steps.after] - values[steps.before]
    return np.cumsum(np.append(values[first].sum(), changes))


def _cheapest(
    layer: NDArray[np.intp], cost: NDArray[np.float64], error: NDArray[np.float64]
) -> NDArray[np.intp]:
    order = np.lexsort((error, cost, layer))
    return order[np.flatnonzero(np.diff(layer[order], prepend=-1))]


class _Steps(NamedTuple):
    """Options left and taken, as indices into the flat arrays, and error saved per cost added."""

    before: NDArray[np.intp]
    after: NDArray[np.intp]
    slope: NDArray[np.float64]


def _hull_steps(
    layer: NDArray[np.intp], cost: NDArray[np.float64], error: NDArray[np.float64]
) -> _Steps:
    """Steepest first; in one layer in order of cost."""
    order = np.lexsort((error, cost, layer))
    hull = order[_improving(layer[order], error[order])]
    while True:
        slope = _slopes(layer, cost, error, hull)
        # A point no steeper left than right lies above the line through its neighbors. Dropping
        # all such points at once is safe, as each of them is above a line through options.
        is_above = np.zeros(len(hull), dtype=bool)
        is_above[1:-1] = (slope[:-1] <= slope[1:]) & (slope[:-1] > -np.inf)
        if not is_above.any():
            break
        hull = hull[~is_above]
    inside = np.flatnonzero(slope > -np.inf)
    # Stable: steps of one layer have falling slopes and stay in order where they are equal.
    inside = inside[np.argsort(-slope[inside], kind="stable")]
    return _Steps(before=hull[inside], after=hull[inside + 1], slope=slope[inside])


def _improving(layer: NDArray[np.intp], error: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether an option errs less than all cheaper ones of its layer; others are on no hull."""
    kept = np.empty(len(layer), dtype=bool)
    starts = np.flatnonzero(np.diff(layer, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(layer)], strict=True):
        own = error[start:end]
        kept[start] = True
        kept[start + 1 : end] = own[1:] < np.minimum.accumulate(own)[:-1]
    return kept


def _slopes(
    layer: NDArray[np.intp],
    cost: NDArray[np.float64],
    error: NDArray[np.float64],
    hull: NDArray[np.intp],
) -> NDArray[np.float64]:
    """From each point to the next; minus infinity where the next one is of another layer."""
    before, after = hull[:-1], hull[1:]
    rise, saved = cost[after] - cost[before], error[before] - error[after]
    with np.errstate(over="ignore"):
        slope = np.divide(saved, rise, out=np.full(len(rise), np.inf), where=rise > 0)
    return np.where(layer[before] == layer[after], slope, -np.inf)


def _one_price(flat: FlatProblem) -> NDArray[np.float64]:
    """The slope of the hull step that no longer fits as a whole; 0 if all fit."""
    share = flat.shares[0]
    steps = _hull_steps(flat.layer, share, flat.objective)
    spent = _running(share, _cheapest(flat.layer, share, flat.objective), steps)[1:]
    beyond = np.flatnonzero(spent > 1.0)
    return steps.slope[beyond[:1]] if len(beyond) else np.zeros(1)


def _several_prices(flat: FlatProblem) -> NDArray[np.float64]:
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    if not len(flat.shares):
        return np.zeros(0)
    n_options = len(flat.layer)
    one_each = csr_array((np.ones(n_options), (flat.layer, np.arange(n_options))))
    result = linprog(
        flat.objective,
        A_ub=flat.shares,
        b_ub=np.ones(len(flat.shares)),
        A_eq=one_each,
        b_eq=np.ones(flat.n_layers),
        method="highs",
    )
    if result.status == 2:
        raise Infeasible
    return np.maximum(0.0, -result.ineqlin.marginals)


def _taken(flat: FlatProblem, weights: NDArray[np.float64]) -> NDArray[np.intp]:
    """Index into the flat arrays of the option of the largest weight, (layers,)."""
    order = np.lexsort((-weights, flat.layer))
    return order[np.flatnonzero(np.diff(flat.layer[order], prepend=-1))]


def _repaired(flat: FlatProblem, taken: NDArray[np.intp], room: float) -> NDArray[np.intp]:
    """`taken` with swaps that end the excess over the budgets, cheapest per unit of it first."""
    taken = taken.copy()
    while True:
        spent = flat.shares[:, taken].sum(axis=1)
        excess = np.maximum(spent - room, 0.0)
        if not excess.any():
            return taken
        change = flat.shares - flat.shares[:, taken][:, flat.layer]
        left = np.maximum(spent[:, None] + change - room, 0.0).sum(axis=0)
        relief = excess.sum() - left
        worse = flat.objective - flat.objective[taken][flat.layer]
        rates = np.where(
            relief > 0, np.maximum(worse, 0.0) / np.where(relief > 0, relief, 1), np.inf
        )
        best = int(rates.argmin())
        if not np.isfinite(rates[best]):
            raise Infeasible
        taken[flat.layer[best]] = best


def _improved(flat: FlatProblem, taken: NDArray[np.intp], room: float) -> NDArray[np.intp]:
    """`taken` with every single swap that lowers the objective and fits, the largest gain first."""
    taken = taken.copy()
    while True:
        spent = flat.shares[:, taken].sum(axis=1)
        change = flat.shares - flat.shares[:, taken][:, flat.layer]
        fits = (spent[:, None] + change <= room).all(axis=0)
        gain = np.where(fits, flat.objective[taken][flat.layer] - flat.objective, 0.0)
        best = int(gain.argmax())
        if not gain[best] > 0:
            return taken
        taken[flat.layer[best]] = best
