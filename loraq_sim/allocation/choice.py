"""The choice problem as plain numbers, and what a solver of it returns.

Of each layer l exactly one option i is taken. Minimize sum_l f_l[i_l] subject to
sum_l g_jl[i_l] <= limit_j for every budget j: a multiple-choice knapsack problem.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "ChoiceProblem", "Infeasible"]

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
