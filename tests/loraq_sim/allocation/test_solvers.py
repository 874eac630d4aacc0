"""Both solvers of the choice problem against trying every choice."""

import itertools

import numpy as np
import pytest

from loraq_sim.allocation.problem import Choice, ChoiceProblem, Infeasible
from loraq_sim.allocation.solve import choose_by_prices, choose_exactly, hull_path

# Values are sums of at most 5 numbers in another order than the oracle's: some ulps.
RTOL = 1e-12


def random_problem(seed):
    """Up to 5 layers of up to 5 options, 1 to 3 budgets; small integers (ties) or wide ranges."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=rng.integers(1, 6))

    def parts(kind):
        if kind == "ties":
            return tuple(rng.integers(0, 9, size).astype(np.float64) for size in sizes)
        if kind == "wide":
            return tuple(rng.random(size) * 10.0 ** rng.uniform(-9, 9) for size in sizes)
        return tuple(rng.random(size) for size in sizes)

    kinds = ("ties", "wide", "plain")
    budgets = tuple(parts(kinds[(seed + 2 * j) % 3]) for j in range(rng.integers(1, 4)))
    limits = tuple(
        float(sum(p.min() for p in b) + rng.random() * sum(p.max() - p.min() for p in b))
        for b in budgets
    )
    return ChoiceProblem(objective=parts(kinds[seed % 3]), budgets=budgets, limits=limits)


def best_of_all(problem):
    choices = itertools.product(*(range(len(part)) for part in problem.objective))
    return min((problem.value(c) for c in choices if problem.is_feasible(c)), default=None)


@pytest.mark.parametrize("seed", range(60))
def test_exact_is_the_best_of_all_choices_and_the_prices_bracket_it(seed):
    problem = random_problem(seed)
    best = best_of_all(problem)
    if best is None:
        for solver in (choose_exactly, choose_by_prices):
            with pytest.raises(Infeasible):
                solver(problem)
        return
    exact = choose_exactly(problem)
    assert problem.is_feasible(exact.picks)
    assert exact.is_proven
    # Where layers differ by eighteen orders of magnitude, to the 1e-10 HiGHS can tell.
    rel = 1e-9 if seed % 3 == 1 else RTOL
    assert exact.value == problem.value(exact.picks) == pytest.approx(best, rel=rel, abs=0)
    fast = choose_by_prices(problem)
    assert problem.is_feasible(fast.picks)
    assert fast.bound <= best * (1 + RTOL) + 1e-15
    assert fast.value >= best * (1 - RTOL)


def test_a_budget_of_exactly_what_is_needed_is_met():
    cost = (np.array([0.1, 0.3]), np.array([0.2, 0.7]))
    error = (np.array([1.0, 0.0]), np.array([1.0, 0.0]))
    least = ChoiceProblem(objective=error, budgets=(cost,), limits=(0.1 + 0.2,))
    assert choose_exactly(least).picks == choose_by_prices(least).picks == (0, 0)
    one_more = ChoiceProblem(objective=error, budgets=(cost,), limits=(0.3 + 0.2,))
    assert choose_exactly(one_more).picks == choose_by_prices(one_more).picks == (1, 0)
    nothing = ChoiceProblem(objective=error, budgets=(cost,), limits=(0.29,))
    with pytest.raises(Infeasible):
        choose_exactly(nothing)


def test_a_choice_that_oversteps_by_less_than_the_solver_can_see_is_cut_off():
    # Taking both second options spends 1e-7 of the slack too much, a tenth of HiGHS's tolerance.
    cost = (np.array([0.0, 0.5]), np.array([0.0, 0.5 + 1e-7]))
    error = (np.array([3.0, 0.0]), np.array([2.0, 0.0]))
    problem = ChoiceProblem(objective=error, budgets=(cost,), limits=(1.0,))
    assert choose_exactly(problem).picks == (1, 0)


def test_with_no_time_the_start_is_returned_with_a_bound():
    problem = random_problem(1)
    start = choose_by_prices(problem)
    found = choose_exactly(problem, time_limit_s=1e-9, start=start)
    assert found.value <= start.value
    assert found.bound <= best_of_all(problem) * (1 + RTOL)


def test_an_option_without_alternative_is_taken():
    problem = ChoiceProblem(
        objective=(np.array([2.0]),), budgets=((np.array([1.0]),),), limits=(1.0,)
    )
    assert choose_exactly(problem) == Choice(picks=(0,), value=2.0, bound=2.0, is_proven=True)
    assert choose_by_prices(problem).value == 2.0


@pytest.mark.parametrize("seed", [seed for seed in range(30) if seed % 3 != 1])
def test_every_choice_on_the_hull_path_is_best_for_what_it_spends(seed):
    problem = random_problem(seed)
    cost, error = problem.budgets[0], problem.objective
    found = hull_path(cost, error)
    path = [found.picks(steps) for steps in range(len(found.cost))]
    spent = [sum(part[p] for part, p in zip(cost, picks, strict=True)) for picks in path]
    erred = [problem.value(picks) for picks in path]
    # A step may be less than an ulp of the sum.
    assert all(a <= b for a, b in itertools.pairwise(spent))
    assert all(a >= b for a, b in itertools.pairwise(erred))
    assert spent[0] == pytest.approx(sum(part.min() for part in cost), rel=RTOL)
    assert erred[-1] == pytest.approx(sum(part.min() for part in error), rel=RTOL, abs=1e-300)
    for limit, value in zip(spent, erred, strict=True):
        alone = ChoiceProblem(objective=error, budgets=(cost,), limits=(limit * (1 + RTOL),))
        assert value == pytest.approx(best_of_all(alone), rel=1e-9, abs=1e-300)
