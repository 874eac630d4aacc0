"""Several solutions of one weight, for the price of their differences."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from loraq_sim.solvers.shared_stages import SharedStages
from loraq_sim.solvers.solution import Solution
from loraq_sim.solvers.solve import solve

__all__ = ["solve_many"]


def solve_many(
    weight: np.ndarray, specs: Iterable[Mapping[str, Any]], **common: Any
) -> list[Solution]:
    """One `solve` of `weight` per mapping in `specs`, stages they have in common run once.

    Parameters
    ----------
    weight : ndarray of shape (N, K), floating
    specs : iterable of mappings
        Arguments of `solve`, such as ``{"branch": "int8/g64", "rank": 64}``.
    **common
        Arguments that all have in common.

    Returns
    -------
    solutions : list of Solution
        In the order of `specs`; each has the bytes that `solve` alone would give.
    """
    shared = SharedStages()
    return [solve(weight, **{**common, **spec}, shared=shared) for spec in specs]
