"""Methods side by side: bytes are equal, each is solved as published, gains are ratios."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.solve_report import compare_methods, comparison_means, comparison_table_rows

METHODS = ("rtn", "lqer", "svdquant", "loraq")


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((96, 128)).astype(np.float32)
    return lq.Layer(
        name="a", weight=weight, activations=rng.standard_normal((8, 128)).astype(np.float32)
    )


@pytest.fixture(scope="module")
def rows(layer):
    return compare_methods(layer, lq.parse_split("W4A4+W8A8r16"), METHODS, preset="fast")


def test_no_method_takes_more_bytes_than_the_split(rows):
    by_method = {row["method"]: row for row in rows}
    assert tuple(by_method) == METHODS
    budget = by_method["loraq"]["weight_bytes"]
    assert all(row["weight_bytes"] <= budget for row in rows)
    # 8-bit factors with fp16 scales per 64: L (96, 16) 1536 + 192, R (16, 128) 2048 + 64 bytes;
    # a rank of fp16 takes 2 (96 + 128) = 448 of these 3840: 8 ranks.
    assert by_method["svdquant"]["rank"] == 8
    assert by_method["svdquant"]["branch"] == "fp16"
    assert by_method["lqer"]["rank"] == by_method["loraq"]["rank"] == 16
    assert by_method["rtn"]["rank"] == 0


def test_each_row_is_what_solve_gives(layer, rows):
    by_method = {row["method"]: row for row in rows}
    plain = lq.solve(
        layer.weight, "svdquant", main="int4/g64", branch="fp16", rank=8, preset="fast"
    )
    assert by_method["svdquant"]["weight_error"] == plain.weight_error
    plain = lq.solve(
        layer.weight, "lqer", main="int4/g64", branch="int8/g64", rank=16, preset="fast"
    )
    assert by_method["lqer"]["weight_error"] == plain.weight_error
    for row in rows:
        assert row["gain"] == row["weight_error"] / by_method["loraq"]["weight_error"]
        assert row["output_gain"] == row["output_error"] / by_method["loraq"]["output_error"]


def test_the_wide_table_and_the_means_hold_the_same_numbers(rows):
    (wide,) = comparison_table_rows(rows)
    assert wide["gain_over_rtn"] == rows[0]["gain"]
    assert wide["svdquant_error"] == rows[2]["weight_error"]
    assert "gain_over_loraq" not in wide
    double = [row | {"gain": 4 * row["gain"], "layer": "b"} for row in rows]
    means = {row["method"]: row for row in comparison_means(rows + double)}
    # Geometric mean of g and 4 g.
    assert means["rtn"]["mean_gain"] == pytest.approx(2 * rows[0]["gain"], rel=1e-14)
    assert means["rtn"]["least_gain"] == rows[0]["gain"]
    assert means["rtn"]["layers"] == 2


def test_a_split_without_branch_or_too_small_for_a_baseline_says_so(layer):
    with pytest.raises(lq.InputError, match=r"needs a split with a branch, got W4A4; .*W8A8@fp16"):
        compare_methods(layer, lq.parse_split("W4A4"), METHODS)
    with pytest.raises(lq.InputError, match=r"layer 'a'.*less than the 448 of the 16-bit rank-1"):
        compare_methods(layer, lq.parse_split("W4A4+W4A4r1"), ("svdquant", "loraq"))


def test_methods_with_a_residual_input_are_compared_with_those_without(layer):
    split = lq.parse_split("W4A4~W8A8r8")
    rows = compare_methods(layer, split, ("rtn", "svdquant", "lrc", "resq", "loraq"), preset="fast")
    ranks = [row["rank"] for row in rows]
    assert (ranks[0], *ranks[3:]) == (0, 8, 8)
    assert 0 < ranks[1] == ranks[2] < 8
    # At most the bytes of the branch that the split says.
    assert all(row["weight_bytes"] <= rows[-1]["weight_bytes"] for row in rows)
