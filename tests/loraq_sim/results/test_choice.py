"""The choice against a plain restatement of its rule, over random candidates."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.results.choice import WORST_ERROR, Candidate, Margins, choose, front_beyond_ties

# Few distinct values within and beyond the margins of each other, so that ties are the rule.
ERRORS = st.sampled_from([0.0, 0.01, 0.0101, 0.05, 0.1, 0.104, 0.2, 0.3, 0.5, math.inf])
COSTS = st.sampled_from([1.0, 1.05, 1.1, 1.2, 1.3, 2.0, 3.0])
BYTES = st.sampled_from([100.0, 120.0, 200.0])
MARGINS = st.sampled_from([0.0, 0.073, 0.19])


def candidate(number, error, latency, weights, spread=0.0):
    costs = {"latency_s": latency, "weight_bytes": weights}
    return Candidate(
        label=f"s{number}", split=f"s{number}", error=error, costs=costs, spread=spread
    )


def beats(first, second, cost_margin, error_margin):
    """Better beyond the margin in one, and no worse than the margin in the other."""
    e, c = first.error, first.costs["latency_s"]
    other_e, other_c = second.error, second.costs["latency_s"]
    no_dearer = c <= other_c * (1 + cost_margin)
    no_rougher = e <= other_e * (1 + error_margin)
    return (no_dearer and e * (1 + error_margin) < other_e) or (
        no_rougher and c * (1 + cost_margin) < other_c
    )


@st.composite
def candidates(draw):
    spread = draw(st.sampled_from([0.0, 0.03]))
    found = draw(st.lists(st.tuples(ERRORS, COSTS, BYTES), min_size=1, max_size=12))
    return [candidate(i, *values, spread) for i, values in enumerate(found)], spread


@settings(max_examples=600, deadline=None)
@given(candidates(), MARGINS)
def test_no_candidate_beats_the_choice_beyond_ties(drawn, margin):
    given, spread = drawn
    index = choose(given, "latency_s", margin)
    finite = [c for c in given if math.isfinite(c.error)]
    assert (index is None) == (not finite)
    if index is None:
        return
    best = given[index]
    fit = [c for c in finite if c.error <= WORST_ERROR]
    assert best in (fit or finite)
    # Those above 25 % are cheaper at most, and infinite errors beat nothing.
    assert not any(beats(other, best, margin, spread) for other in (fit or finite))
    for other in fit or finite:
        alike = not beats(other, best, margin, spread) and not beats(best, other, margin, spread)
        no_worse = all(other.value(n) <= best.value(n) for n in ("error", *best.costs))
        strictly = any(other.value(n) < best.value(n) for n in ("error", *best.costs))
        assert not (no_worse and strictly and alike)


@settings(max_examples=300, deadline=None)
@given(candidates(), MARGINS)
def test_the_front_beyond_ties_matches_comparing_all_pairs(drawn, margin):
    given, spread = drawn
    finite = [c for c in given if math.isfinite(c.error)]
    front = front_beyond_ties(finite, "latency_s", Margins(cost=margin, error=spread))
    by_hand = [
        i
        for i, c in enumerate(finite)
        if not any(beats(other, c, margin, spread) for other in finite)
    ]
    assert front == by_hand
    assert front or not finite


def test_without_margins_the_front_is_the_pareto_front():
    given = [candidate(0, 0.1, 2.0, 1), candidate(1, 0.2, 1.0, 1), candidate(2, 0.2, 1.5, 1)]
    assert front_beyond_ties(given, "latency_s", Margins()) == [0, 1]


@pytest.mark.parametrize(
    ("rows", "margin", "chosen"),
    [
        # All latencies tie: the least error, though it has the most bytes.
        (((0.2, 1.00, 100), (0.05, 1.02, 120), (0.01, 1.05, 200)), 0.073, 2),
        # They do not: the knee, by the logarithm of the error.
        (((0.2, 1.0, 100), (0.05, 1.1, 120), (0.04, 2.0, 200)), 0.0, 1),
        # Two ends and nothing between: the more accurate.
        (((0.2, 1.0, 100), (0.05, 2.0, 120)), 0.073, 1),
        # Equal errors, tied latencies: fewer bytes, though a little slower.
        (((0.05, 1.0, 200), (0.05, 1.05, 100)), 0.073, 1),
        # The same without a margin: the faster.
        (((0.05, 1.0, 200), (0.05, 1.05, 100)), 0.0, 0),
        # Above 25 % only where there is nothing else.
        (((0.26, 1.0, 100), (0.24, 9.0, 100)), 0.073, 1),
        (((0.40, 1.0, 100), (math.inf, 0.5, 100)), 0.073, 0),
    ],
)
def test_choices_by_hand(rows, margin, chosen):
    given = [candidate(i, *row) for i, row in enumerate(rows)]
    assert choose(given, "latency_s", margin) == chosen


def test_errors_within_the_spread_of_seeds_are_decided_by_bytes():
    rows = ((0.100, 1.0, 200, 0.03), (0.102, 1.0, 100, 0.0))
    given = [candidate(i, *row) for i, row in enumerate(rows)]
    assert choose(given, "latency_s", 0.0) == 1
    alone = [candidate(i, *row[:3]) for i, row in enumerate(rows)]
    assert choose(alone, "latency_s", 0.0) == 0


def test_without_a_cost_the_least_error_is_taken():
    given = [candidate(0, 0.2, 1.0, 1), candidate(1, 0.1, 9.0, 1)]
    assert choose(given, None) == 1
    assert choose([candidate(0, math.inf, 1.0, 1)], None) is None
