"""The best choice by integer programming (HiGHS through `scipy.optimize.milp`).

HiGHS may overstep a constraint by 1e-6. A choice that does is cut off and the rest solved again, so
that what is returned meets the limits in exact sums.
"""

import numpy as np

from loraq_sim.allocation.choice import Choice, ChoiceProblem, Infeasible
from loraq_sim.allocation.flat import FlatProblem, flatten

__all__ = ["choose_exactly"]

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
