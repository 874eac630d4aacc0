"""The options of all layers in one row, scaled so that a solver's absolute tolerances mean little.

Budgets are written as what an option spends above the cheapest of its layer, in units of what may
be spent above the cheapest choice. An option that breaks a budget with all other layers at their
cheapest is left out, and so is one that is worse than a known choice with all others at their best.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.allocation.choice import ChoiceProblem, Infeasible, Parts

__all__ = ["FlatProblem", "flatten"]

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
