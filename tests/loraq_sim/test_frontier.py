"""Knee, hypervolume and the best within limits, against an independent library and by hand."""

import math

import moocore
import numpy as np
import pandas as pd
import pytest

from loraq_sim.errors import InputError
from loraq_sim.results.front import (
    best_under,
    dominated_volume,
    hypervolume,
    knee_point,
    least_possible,
    survey_front,
    within,
)


@pytest.mark.parametrize("n_objectives", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("digits", [1, 15])
def test_the_dominated_volume_matches_an_independent_library(n_objectives, digits):
    rng = np.random.default_rng(n_objectives)
    # Some points beyond the reference, some equal to others.
    points = np.round(rng.uniform(0.0, 1.2, size=(60, n_objectives)), digits)
    reference = np.ones(n_objectives)
    expected = moocore.hypervolume(points, ref=reference)
    # Sums of at most 60 ** (D - 1) terms in another order; far below 1e-12 of the volume here.
    assert dominated_volume(points, reference) == pytest.approx(expected, rel=1e-12)


def test_the_hypervolume_is_the_dominated_share_of_the_box():
    rows = [{"e": e, "t": t} for e, t in ((1.0, 3.0), (2.0, 1.0), (3.0, 3.0), (2.5, 2.0))]
    # The box (1, 1) to (3, 3): (1, 3) lies on its edge, (2, 1) dominates half of it.
    assert hypervolume(rows, ["e", "t"]) == pytest.approx(0.5)
    # To (5, 3): (2, 1) dominates 3 * 2 of 4 * 2.
    assert hypervolume(rows, ["e", "t"], reference={"e": 5.0}) == pytest.approx(6 / 8)
    # To (5, 5): 4 * 2 right of (1, 3) and 3 * 4 right of (2, 1), 3 * 2 of it twice, of 4 * 4.
    assert hypervolume(rows, ["e", "t"], reference={"e": 5.0, "t": 5.0}) == pytest.approx(14 / 16)
    assert hypervolume(rows, ["e"], ["t"]) == pytest.approx(1.0)
    assert hypervolume([{"e": 1.0, "t": 2.0}], ["e", "t"]) is None
    assert hypervolume([{"e": None, "t": 2.0}], ["e", "t"]) is None
    with pytest.raises(InputError, match="unknown column 'x'"):
        hypervolume(rows, ["e", "t"], reference={"x": 1.0})


def test_the_knee_lies_farthest_below_the_line_between_the_ends():
    front = np.array([[0.0, 100.0], [1.0, 30.0], [2.0, 20.0], [10.0, 0.0]])
    # Scaled sums: 1, 0.1 + 0.3, 0.2 + 0.2 (equal: the first is taken), 1.
    assert knee_point(front) == 1
    assert knee_point(front[[0, 2, 3]]) == 1
    # Seconds or milliseconds make no difference.
    assert knee_point(front * [1e-3, 1.0]) == 1


def test_relative_errors_count_by_their_logarithm():
    # Linear in the error, the second point lies farthest below the chord; in decibels the third.
    errors = {1.0: 0.16, 2.0: 0.04, 4.0: 0.012, 8.0: 0.01}
    rows = [{"latency_s": x, "output_error": e} for x, e in errors.items()]
    assert knee_point(np.array([[e, x] for x, e in errors.items()])) == 1
    front = survey_front(rows, ("output_error", "latency_s"))
    assert [row["is_knee"] for row in front] == [False, False, True, False]


def test_where_no_member_lies_below_the_knee_is_the_best_in_the_first_objective():
    assert knee_point(np.array([[1.0, 0.0], [0.6, 0.6], [0.0, 1.0]])) == 2
    assert knee_point(np.array([[0.0, 1.0], [1.0, 0.0]])) == 0
    assert knee_point(np.array([[0.0, 1.0], [0.0, 0.5]])) == 1
    assert knee_point(np.array([[5.0, 7.0]])) == 0
    assert knee_point(np.array([[5.0, 7.0], [5.0, 7.0]])) == 0
    assert knee_point(np.zeros((0, 2))) is None
    assert knee_point(np.array([[math.inf, 0.0], [3.0, 1.0]])) == 1
    assert knee_point(np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [0.5, 0.5, 0.0]])) == 2


ROWS = [
    {"hw": "a", "e": 0.3, "t": 1.0, "status": "ok"},
    {"hw": "a", "e": 0.1, "t": 2.0, "status": "ok"},
    {"hw": "a", "e": 0.1, "t": 1.9, "status": "ok"},
    {"hw": "a", "e": 0.0, "t": 1.0, "status": "failed"},
    {"hw": "b", "e": 0.2, "t": 5.0, "status": "ok"},
    {"hw": "b", "e": None, "t": 1.0, "status": "ok"},
]


def test_the_best_under_limits_is_found_in_each_group():
    assert best_under(ROWS, {"t": 2.0}, "e") == [ROWS[1]]
    assert best_under(ROWS, {"t": 1.5}, "e", by="hw") == [ROWS[0]]
    assert best_under(ROWS, {"t": 5.0}, "e", by="hw") == [ROWS[1], ROWS[4]]
    assert best_under(ROWS, {"e": 0.15}, "t") == [ROWS[2]]
    frame = pd.DataFrame(ROWS)
    assert best_under(frame, {"t": 1.95}, "e").index.tolist() == [2]
    assert best_under(ROWS, {"t": 0.1}, "e") == []


def test_limits_are_met_up_to_a_billionth_and_never_by_a_missing_value():
    assert within(ROWS, {"t": 1.0 - 1e-10}).tolist() == [True, False, False, True, False, True]
    assert within(ROWS, {"e": 9.0}).tolist() == [True] * 5 + [False]
    assert least_possible(ROWS, {"t": 0.5, "e": 0.01}) == (
        "no row is within t <= 0.5 (least: 1) and e <= 0.01 (least: 0.1)"
    )
    with pytest.raises(InputError, match="unknown column 'q'"):
        within(ROWS, {"q": 1.0})


def test_the_survey_marks_knee_and_volume_of_each_group():
    rows = [{"g": g, "e": e, "t": t} for g in "ab" for e, t in ((0, 4), (1, 1), (4, 0), (4, 4))]
    front = survey_front(rows, ["e", "t"], by="g")
    assert [(row["g"], row["e"], row["is_knee"]) for row in front] == [
        *(("a", 4, False), ("a", 1, True), ("a", 0, False)),
        *(("b", 4, False), ("b", 1, True), ("b", 0, False)),
    ]
    assert all(row["hypervolume"] == pytest.approx(9 / 16) for row in front)
    assert survey_front([], ["e"]) == []
