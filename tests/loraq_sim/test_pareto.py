import math

import moocore
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.errors import InputError
from loraq_sim.results.front import mark_front, non_dominated, pareto_front, per_layer_front

# Few distinct values, so that ties and duplicates are the rule.
VALUES = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0, 2.0, math.inf])


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(
        x < y for x, y in zip(a, b, strict=True)
    )


def front_by_comparing_all(points):
    return [not any(dominates(other, point) for other in points) for point in points]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 40))
def test_non_dominated_matches_comparing_all_pairs(data, n_objectives, n_points):
    points = data.draw(
        st.lists(st.tuples(*[VALUES] * n_objectives), min_size=n_points, max_size=n_points)
    )
    array = np.array(points, dtype=np.float64).reshape(n_points, n_objectives)
    np.testing.assert_array_equal(non_dominated(array), front_by_comparing_all(points))


@pytest.mark.parametrize("n_objectives", [1, 2, 3, 5])
def test_non_dominated_matches_comparing_all_pairs_across_blocks(n_objectives):
    # More points than one block holds; rounded so that ties occur.
    rng = np.random.default_rng(n_objectives)
    points = np.round(rng.normal(size=(700, n_objectives)), 1)
    np.testing.assert_array_equal(
        non_dominated(points), front_by_comparing_all([tuple(p) for p in points])
    )


@pytest.mark.parametrize("n_objectives", [2, 3, 4, 6])
@pytest.mark.parametrize("digits", [1, 15])
def test_non_dominated_matches_an_independent_library(n_objectives, digits):
    # moocore (C) keeps equal points like this program when asked to keep weakly dominated ones
    # that no point dominates: `keep_weakly` keeps duplicates of front members.
    rng = np.random.default_rng(10 * n_objectives + digits)
    points = np.round(rng.normal(size=(600, n_objectives)), digits)
    expected = moocore.is_nondominated(points, keep_weakly=True)
    np.testing.assert_array_equal(non_dominated(points), expected)


def test_two_objectives_by_hand():
    rows = [
        {"id": 0, "e": 1.0, "t": 5.0},
        {"id": 1, "e": 2.0, "t": 2.0},
        {"id": 2, "e": 2.0, "t": 2.0},
        {"id": 3, "e": 2.0, "t": 3.0},
        {"id": 4, "e": 5.0, "t": 1.0},
        {"id": 5, "e": 6.0, "t": 1.0},
    ]
    # By the second objective; equal rows keep their order.
    assert [row["id"] for row in pareto_front(rows, ["e", "t"])] == [4, 1, 2, 0]
    assert [row["id"] for row in pareto_front(rows[::-1], ["e", "t"])] == [4, 2, 1, 0]
    frame = pareto_front(pd.DataFrame(rows), ["e", "t"])
    assert frame["id"].tolist() == frame.index.tolist() == [4, 1, 2, 0]


def test_maximize_turns_an_objective_around():
    rows = [{"db": 20.0, "t": 2.0}, {"db": 30.0, "t": 2.0}, {"db": 10.0, "t": 1.0}]
    assert pareto_front(rows, minimize=["t"], maximize=["db"]) == rows[1:]


@pytest.mark.parametrize("missing", [None, math.nan, pd.NA], ids=["None", "NaN", "NA"])
def test_rows_without_an_objective_are_never_on_the_front(missing):
    rows = [{"e": missing, "t": 0.0}, {"e": 1.0, "t": 1.0}]
    assert pareto_front(rows, ["e", "t"]) == rows[1:]


def test_failed_rows_are_never_on_the_front_and_dominate_nothing():
    rows = [{"e": 0.0, "t": 0.0, "status": "failed"}, {"e": 1.0, "t": 1.0, "status": "ok"}]
    assert pareto_front(rows, ["e", "t"]) == rows[1:]


def test_a_frame_gives_a_frame_with_its_index():
    frame = pd.DataFrame({"e": [3.0, 1.0, 2.0], "t": [1, 2, 2]}, index=["a", "b", "c"])
    front = pareto_front(frame, minimize=["e", "t"])
    assert list(front.index) == ["a", "b"]
    assert list(front.columns) == ["e", "t"]


def test_marking_does_not_touch_the_input():
    frame = pd.DataFrame({"e": [1.0, 2.0], "t": [1.0, 2.0]})
    marked = mark_front(frame, ["e", "t"], by=())
    assert list(marked["pareto"]) == [True, False]
    assert list(frame.columns) == ["e", "t"]
    rows = frame.to_dict("records")
    assert [row["pareto"] for row in mark_front(rows, ["e", "t"], by=())] == [True, False]
    assert "pareto" not in rows[0]


def test_layers_and_accelerators_compete_among_themselves_only():
    rows = [
        {"layer": layer, "accelerator": hw, "split": split, "output_error": e, "latency_s": t}
        for layer, hw, split, e, t in [
            ("a", "x", "s", 0.1, 1.0),
            ("a", "x", "t", 0.2, 1.0),
            ("b", "x", "s", 9.0, 9.0),
            ("a", "y", "s", 8.0, 8.0),
        ]
    ]
    assert per_layer_front(rows) == [rows[0], rows[2], rows[3]]
    assert per_layer_front(pd.DataFrame(rows)).index.tolist() == [0, 2, 3]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), max_size=12), st.randoms(use_true_random=False))
def test_the_front_does_not_depend_on_the_order_of_rows(points, random):
    rows = [{"id": i, "e": e, "t": t} for i, (e, t) in enumerate(points)]
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert {r["id"] for r in pareto_front(rows, ["e", "t"])} == {
        r["id"] for r in pareto_front(shuffled, ["e", "t"])
    }


@pytest.mark.parametrize("rows", [[], pd.DataFrame({"e": [], "t": []})], ids=["list", "frame"])
def test_no_rows_give_no_front(rows):
    assert len(pareto_front(rows, ["e", "t"])) == 0


def test_unknown_objectives_name_the_nearest_column():
    with pytest.raises(InputError, match="unknown column 'latncy_s'; did you mean 'latency_s'"):
        pareto_front([{"latency_s": 1.0}], ["latncy_s"])


def test_objectives_must_be_numbers_and_at_least_one():
    with pytest.raises(InputError, match="column 'bound' is not numeric"):
        pareto_front([{"bound": "dram"}], ["bound"])
    with pytest.raises(InputError, match="at least one column"):
        pareto_front([{"e": 1.0}], [])


def test_an_infinite_error_is_on_no_front_whatever_it_costs():
    rows = [
        {"output_error": math.inf, "latency_s": 1.0, "status": "ok"},
        {"output_error": 0.5, "latency_s": 2.0, "status": "ok"},
        {"output_error": math.inf, "latency_s": 0.5, "status": "overflow"},
    ]
    assert pareto_front(rows) == rows[1:2]
    assert pareto_front(rows[:1]) == []
    assert pareto_front(rows, minimize=["latency_s"]) == rows[:1]
