"""Which of several candidates to take, when costs and errors are known only up to a margin.

**Beats.** Of two candidates U beats V if it has less error and costs no more, or costs less and has
no more error, where *less* is beyond the margin and *no more* is up to it: U / V < 1 / (1 + margin)
against U / V <= 1 + margin. The margin of a modelled cost is the error its model was seen to have,
that of the error the spread over seeds, that of bytes is zero. With zero margins this is Pareto
dominance. It has no circles: with distances in units of log(1 + margin), each step from a candidate
to one that beats it lowers the sum of log error and log cost. So some candidates are never beaten:
the front beyond ties.

**Choice.** The knee (`loraq_sim.frontier.knee_point`) of the Pareto front, errors as logarithms,
taken among the members of the front beyond ties. Of those that tie with the knee in both, the one
with the fewest bytes is taken, then with the least error, energy and DRAM traffic. Candidates of at
most `WORST_ERROR` come first: others are chosen only where there is no better one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loraq_sim.frontier import knee_of
from loraq_sim.pareto import non_dominated

__all__ = [
    *("COSTS", "WORST_ERROR", "Candidate", "Margins"),
    *("choose", "front_beyond_ties", "margins_of"),
]

COSTS = ("latency_s", "weight_bytes", "energy_j", "dram_bytes")
"""Costs of a candidate; the first that all of them have is the one the choice is made by."""

WORST_ERROR = 0.25
"""Relative error above which nothing is recommended without a word."""

_MODELLED = ("latency_s", "energy_j")
_TIE_BREAKERS = ("weight_bytes", "error", "energy_j", "dram_bytes", "latency_s")
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to build: `label` and `split` name it, `error` and `costs` are what it is judged by.

    `costs` holds those of `COSTS` that are known; `spread` is by how much the error differs between
    seeds, largest / smallest - 1.
    """

    label: str
    split: str
    error: float
    costs: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0

    def value(self, name: str) -> float:
        """The error, or a cost; infinite where it is not known."""
        return self.error if name == "error" else self.costs.get(name, math.inf)


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Relative differences that are none: of modelled costs (latency, energy) and of errors."""

    cost: float = 0.0
    error: float = 0.0

    def of(self, name: str) -> float:
        """The margin of ``error`` or of a cost; bytes are counted, not modelled."""
        if name == "error":
            return self.error
        return self.cost if name in _MODELLED else 0.0

    def ties(self, name: str, first: float, second: float) -> bool:
        """Whether two values of `name` do not differ beyond the margin."""
        return max(first, second) <= min(first, second) * self._factor(name)

    def _factor(self, name: str) -> float:
        return (1 + self.of(name)) * (1 + _ROUNDING)


def front_beyond_ties(
    candidates: Sequence[Candidate], cost: str | None, margins: Margins
) -> list[int]:
    """Indices of the candidates that none beats, in their order; `cost` None: by error alone.

    In O(C log C). Errors must be finite.
    """
    errors = np.array([c.error for c in candidates], dtype=np.float64)
    costs = np.array([c.value(cost) if cost else 0.0 for c in candidates], dtype=np.float64)
    order = np.argsort(costs, kind="stable")
    least = np.minimum.accumulate(errors[order])
    cost_factor = (1 + (margins.of(cost) if cost else 0.0)) * (1 + _ROUNDING)
    error_factor = (1 + margins.error) * (1 + _ROUNDING)

    def least_error_of(last: NDArray[np.intp]) -> NDArray[np.float64]:
        """Least error of the `last` cheapest candidates; infinite of none."""
        return np.where(last > 0, least[np.maximum(last, 1) - 1], np.inf)

    no_dearer = np.searchsorted(costs[order], costs * cost_factor, side="right")
    cheaper = np.searchsorted(costs[order], costs / cost_factor, side="left")
    beaten = least_error_of(no_dearer) * error_factor < errors
    beaten |= least_error_of(cheaper) <= errors * error_factor
    return np.flatnonzero(~beaten).tolist()


def margins_of(candidates: Sequence[Candidate], cost_margin: float) -> Margins:
    """Margins among these candidates: the errors of all are as sure as those of the least sure."""
    spreads = [c.spread for c in candidates if math.isfinite(c.spread)]
    return Margins(cost=cost_margin, error=max(spreads, default=0.0))


def choose(
    candidates: Sequence[Candidate], cost: str | None, cost_margin: float = 0.0
) -> int | None:
    """Index of the candidate to take, None if no error is finite; see the module for the rule."""
    margins = margins_of(candidates, cost_margin)
    finite = [i for i, c in enumerate(candidates) if math.isfinite(c.error)]
    fit = [i for i in finite if candidates[i].error <= WORST_ERROR] or finite
    if not fit:
        return None
    members = [candidates[i] for i in fit]
    front = front_beyond_ties(members, cost, margins)
    points = np.array([[c.error, c.value(cost) if cost else 0.0] for c in members])
    # The scale is that of the whole front: its cheap end may tie with better ones and be beaten.
    spanning = sorted({*np.flatnonzero(non_dominated(points)).tolist(), *front})
    among = [spanning.index(i) for i in front]
    chosen = spanning[knee_of(points[spanning], ("output_error", cost or "cost"), among)]
    return fit[_last_tie(members, front, chosen, cost, margins)]


def _last_tie(
    members: Sequence[Candidate],
    front: Sequence[int],
    chosen: int,
    cost: str | None,
    margins: Margins,
) -> int:
    """The member of the front that is taken among those that tie with the chosen one."""

    def rank(index: int) -> tuple[float, ...]:
        return tuple(members[index].value(name) for name in _TIE_BREAKERS)

    names = ("error", cost) if cost else ("error",)
    while True:
        tied = [
            index
            for index in front
            if all(
                margins.ties(name, members[index].value(name), members[chosen].value(name))
                for name in names
            )
        ]
        best = min(tied, key=rank)
        if rank(best) >= rank(chosen):
            return chosen
        chosen = best
