"""A good choice fast, with a lower bound: prices on the budgets in place of the budgets.

With a price p_j >= 0 per unit of budget j the layers no longer depend on each other:

    L(p) = sum_l min_i ( f_l[i] + sum_j p_j g_jl[i] ) - sum_j p_j limit_j

is a lower bound of the optimum for every p (Everett 1963), largest at the dual prices of the linear
relaxation. The choice at these prices is made to meet the limits by the swaps that cost least per
unit of excess, and then improved by single swaps while one fits.

With one budget the prices need no solver: the options of a layer that any price can pick form its
convex hull, and taking hull steps of all layers in order of their slope is the linear relaxation
(Sinha and Zoltners 1979). `hull_path` is the whole front of these choices, each of them optimal for
what it spends.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loraq_sim.allocation.choice import Choice, ChoiceProblem, Infeasible, Parts
from loraq_sim.allocation.flat import FlatProblem, flatten

__all__ = ["choose_by_prices", "hull_path"]

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


def hull_path(cost: Parts, error: Parts) -> Iterator[tuple[int, ...]]:
    """Choices from all-cheapest to all-best, each of least error for its cost.

    Ties of cost go to the option of less error and the other way round; equal options to the first.
    """
    flat = flatten(ChoiceProblem(objective=error, budgets=(cost,), limits=(np.inf,)))
    above = np.concatenate([part - part.min() for part in cost])
    steps = _hull_steps(flat.layer, above, flat.objective)
    current = _cheapest(flat.layer, above, flat.objective)
    yield tuple(int(pick) for pick in flat.option[current])
    for layer, index in steps:
        current[layer] = index
        yield tuple(int(pick) for pick in flat.option[current])


def _cheapest(
    layer: NDArray[np.intp], cost: NDArray[np.float64], error: NDArray[np.float64]
) -> NDArray[np.intp]:
    order = np.lexsort((error, cost, layer))
    return order[np.flatnonzero(np.diff(layer[order], prepend=-1))]


def _hull_steps(
    layer: NDArray[np.intp], cost: NDArray[np.float64], error: NDArray[np.float64]
) -> list[tuple[int, int]]:
    """(layer, index of the option stepped to), steepest first; in one layer in order of cost."""
    order = np.lexsort((error, cost, layer))
    found = []
    for number, members in enumerate(np.split(order, np.flatnonzero(np.diff(layer[order])) + 1)):
        # An option that errs no less than a cheaper one is on no hull.
        least = np.minimum.accumulate(error[members])
        is_better = np.append(True, error[members[1:]] < least[:-1])
        hull: list[int] = []
        for index in members[is_better].tolist():
            while len(hull) > 1 and _slope(cost, error, hull[-2], hull[-1]) <= _slope(
                cost, error, hull[-1], index
            ):
                hull.pop()
            hull.append(index)
        for before, after in zip(hull[:-1], hull[1:], strict=True):
            found.append((_slope(cost, error, before, after), number, after))
    # Stable: steps of one layer have falling slopes and stay in order where they are equal.
    found.sort(key=lambda step: -step[0])
    return [(number, after) for _, number, after in found]


def _slope(cost: NDArray[np.float64], error: NDArray[np.float64], before: int, after: int) -> float:
    """Error saved per cost added; `after` costs more and errs less."""
    rise = float(cost[after] - cost[before])
    return float(error[before] - error[after]) / rise if rise > 0 else np.inf


def _one_price(flat: FlatProblem) -> NDArray[np.float64]:
    """The slope of the hull step that no longer fits as a whole; 0 if all fit."""
    share = flat.shares[0]
    current = _cheapest(flat.layer, share, flat.objective)
    spent = float(share[current].sum())
    for layer, index in _hull_steps(flat.layer, share, flat.objective):
        spent += float(share[index] - share[current[layer]])
        if spent > 1.0:
            return np.array([_slope(share, flat.objective, int(current[layer]), index)])
        current[layer] = index
    return np.zeros(1)


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
