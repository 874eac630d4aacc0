import json
import math
from fractions import Fraction
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest

from loraq_sim.errors import InputError
from loraq_sim.results.front import mark_front
from loraq_sim.results.rows import ResultRow
from loraq_sim.results.totals import (
    ERROR_FORMULA,
    MODEL_COLUMNS,
    WEIGHT_ERROR_FORMULA,
    ModelRow,
    model_totals,
)


def result(layer, split="W4A4", **values):
    row = {
        "layer": layer,
        "split": split,
        "method": "loraq",
        "preset": "fast",
        "accelerator": "aie2",
        "dump": "d.npz",
        "seed": 0,
        "m": 4,
        "n": 8,
        "k": 16,
        "calls_per_step": 1,
        "weight_bytes": 64,
        "weight_error": 0.5,
        "output_error": 0.25,
        "overflow_count": 3,
        "safe_acc_bits": 12,
        "latency_s": 1.0,
        "cycles": 100,
        "energy_j": 2.0,
        "dram_bytes": 10,
        "peak_activation_bytes": 7,
        "utilization": 0.5,
        "bound": "compute",
        "status": "ok",
        "message": "",
    }
    return row | values


def failed(layer, split="W4A4"):
    row = dict.fromkeys(result("x"))
    known = {key: result(layer, split)[key] for key in ("method", "preset", "accelerator", "dump")}
    return row | known | {"layer": layer, "split": split, "seed": 0, "status": "failed"}


TWO = [
    result("a", calls_per_step=3, latency_s=2.0, output_error=0.1, bound="dram", utilization=0.1),
    result("b", n=32, weight_bytes=400, output_error=0.2, weight_error=0.25, safe_acc_bits=17),
]


def test_costs_are_sums_of_calls_and_weights_count_once():
    (total,) = model_totals(TWO)
    assert total["latency_s"] == 3 * 2.0 + 1.0
    assert total["cycles"] == 400
    assert total["energy_j"] == 8.0
    assert total["dram_bytes"] == 40
    assert total["weight_bytes"] == 464
    assert total["overflow_count"] == 6
    assert total["safe_acc_bits"] == 17
    assert total["peak_activation_bytes"] == 7


def test_the_peak_of_activations_is_the_largest_layers():
    rows = [result("a"), result("b", peak_activation_bytes=900, calls_per_step=5)]
    assert model_totals(rows)[0]["peak_activation_bytes"] == 900


def test_errors_follow_the_stated_formulas():
    (total,) = model_totals(TWO)
    # Outputs of three calls of 4 x 8 and one of 4 x 32.
    output = (96 * Fraction(1, 10) ** 2 + 128 * Fraction(1, 5) ** 2) / 224
    weight = (128 * Fraction(1, 2) ** 2 + 512 * Fraction(1, 4) ** 2) / 640
    bits = Fraction(8 * 464, 8 * 16 + 32 * 16)
    # A few float64 operations, each within half an ulp: 1e-14 is ample.
    np.testing.assert_allclose(total["output_error"], float(output) ** 0.5, rtol=1e-14)
    np.testing.assert_allclose(total["weight_error"], float(weight) ** 0.5, rtol=1e-14)
    np.testing.assert_allclose(total["bits_per_weight"], float(bits), rtol=1e-14)
    np.testing.assert_allclose(total["sqnr_db"], -10 * np.log10(float(output)), rtol=1e-14)
    assert "c_l m_l n_l e_l^2" in ERROR_FORMULA
    assert "n_l k_l w_l^2" in WEIGHT_ERROR_FORMULA


def test_utilization_is_weighted_by_time_and_the_longest_bound_wins():
    (total,) = model_totals(TWO)
    np.testing.assert_allclose(total["utilization"], (0.1 * 6 + 0.5 * 1) / 7, rtol=1e-14)
    assert total["bound"] == "dram"


def test_the_bound_is_that_of_most_time_not_of_most_layers():
    few = [result(name, latency_s=1.0, calls_per_step=2, bound="vector") for name in "ab"]
    (total,) = model_totals([*few, result("c", latency_s=1.5, calls_per_step=3, bound="dram")])
    assert total["bound"] == "dram"


def test_a_frame_gives_a_frame_with_the_same_numbers():
    rows = [*TWO, failed("a", "W4A8"), result("b", "W4A8")]
    from_rows = model_totals(rows)
    from_frame = model_totals(pd.DataFrame(rows))
    assert list(from_frame.columns) == list(MODEL_COLUMNS) == list(from_rows[0])
    pd.testing.assert_frame_equal(from_frame, pd.DataFrame(from_rows), check_dtype=False)


def test_a_split_that_lacks_a_layer_others_have_is_incomplete_and_off_the_front():
    rows = [*TWO, result("a", "W8A8", output_error=0.0), failed("b", "W8A8")]
    full, partial = model_totals(rows)
    assert (full["status"], full["complete"], full["n_missing"]) == ("ok", True, 0)
    assert (partial["status"], partial["complete"], partial["n_missing"]) == (
        "incomplete",
        False,
        1,
    )
    assert (partial["n_layers"], partial["latency_s"]) == (1, None)
    assert partial["message"] == "1 of 2 layers missing"
    assert [row["pareto"] for row in mark_front([full, partial])] == [True, False]


def test_a_layer_that_failed_everywhere_is_left_out_everywhere():
    rows = [*TWO, failed("bad"), result("a", "W4A8"), result("b", "W4A8"), failed("bad", "W4A8")]
    for total in model_totals(rows):
        assert (total["status"], total["n_layers"], total["n_missing"]) == ("ok", 2, 1)
        assert total["complete"] is False
        assert total["latency_s"] is not None


def test_layers_without_any_row_are_missing():
    (total,) = model_totals(TWO, layers=["a", "b", "c", "d"])
    assert (total["n_missing"], total["message"]) == (2, "2 of 4 layers missing")


def test_settings_are_kept_apart_and_in_order_of_appearance():
    rows = [result("a", "W8A8"), result("a", accelerator="a100"), result("a", method="lqer")]
    totals = model_totals(rows)
    assert [(t["split"], t["accelerator"], t["method"]) for t in totals] == [
        ("W8A8", "aie2", "loraq"),
        ("W4A4", "a100", "loraq"),
        ("W4A4", "aie2", "lqer"),
    ]


def test_an_unmeasured_error_makes_no_total():
    (total,) = model_totals([*TWO, result("c", output_error=None)])
    assert (total["output_error"], total["sqnr_db"]) == (None, None)
    assert total["latency_s"] == 8.0


def test_an_exact_result_has_no_sqnr():
    (total,) = model_totals([result("a", output_error=0.0)])
    assert (total["output_error"], total["sqnr_db"]) == (0.0, None)


def test_two_rows_of_one_layer_are_refused():
    with pytest.raises(InputError, match="layer 'a' has two rows for split W4A4"):
        model_totals([result("a"), result("a")])


@pytest.mark.parametrize("error", [math.inf, None])
def test_a_layer_whose_output_is_not_finite_makes_the_model_infinite_and_is_named(error):
    wild = {"status": "overflow", "output_error": error, "clipped_count": 32}
    rows = [
        result("a", clipped_count=0),
        result("b", **wild, first_clipped="y in fp16, row 3"),
        result("a", "W4A8", clipped_count=0, latency_s=9.0),
        result("b", "W4A8", clipped_count=2, first_clipped="P in bf16, row 1"),
    ]
    broken, whole = mark_front(model_totals(rows), by=("dump", "accelerator"))
    assert (broken["status"], broken["output_error"], broken["sqnr_db"]) == (
        *("overflow", math.inf, -math.inf),
    )
    assert broken["message"] == "the output of 1 of 2 layers is not finite: b"
    assert (broken["clipped_count"], broken["first_clipped"]) == (32, "b: y in fp16, row 3")
    assert broken["latency_s"] == 2.0
    assert not broken["pareto"]
    assert (whole["status"], whole["pareto"], whole["clipped_count"]) == ("ok", True, 2)
    assert whole["message"] == "values beyond a float format are clamped in b"
    (from_frame,) = model_totals(pd.DataFrame(rows[:2])).to_dict("records")
    assert from_frame["output_error"] == math.inf


def test_no_rows_give_no_totals():
    assert model_totals([]) == []
    assert len(model_totals(pd.DataFrame({"layer": []}))) == 0


def test_a_layer_that_does_something_else_counts_where_it_was_asked_for():
    asked = {"split": "W4A4+W8A8r8", "method": "loraq"}
    known = {"dump": "d", "status": "ok", "n": 4, "k": 4, "calls_per_step": 1, "latency_s": 1.0}
    rows = [
        known | {"layer": "a", **asked, "options": ""},
        known
        | {"layer": "b", "split": "W8A8", "method": "rtn", "options": json.dumps({"asked": asked})},
    ]
    (total,) = model_totals(rows)
    assert (total["split"], total["method"], total["options"]) == ("W4A4+W8A8r8", "loraq", "")
    assert (total["n_layers"], total["latency_s"]) == (2, 2.0)


def test_shares_of_the_squared_error_add_up_over_layers():
    rows = [
        result("a", output_error=0.1, p_error_share=0.8, wide_p_error=0.05, p_format="int4/g64"),
        result("b", output_error=0.2, p_error_share=0.2, wide_p_error=0.19, p_format="int4/g64"),
        # A layer that an override left without a branch.
        result("c", output_error=0.3),
    ]
    (total,) = model_totals(rows)
    squares = [0.1**2, 0.2**2, 0.3**2]
    share = (0.8 * squares[0] + 0.2 * squares[1]) / sum(squares)
    assert total["p_error_share"] == pytest.approx(share, rel=1e-12)
    wide = math.sqrt((0.05**2 + 0.19**2 + 0.3**2) / 3)
    assert total["wide_p_error"] == pytest.approx(wide, rel=1e-12)
    assert total["p_format"] == "int4/g64"
    assert total["activation_error_share"] is None
    (plain,) = model_totals([result("a")])
    assert plain["p_error_share"] is plain["wide_p_error"] is plain["p_format"] is None
    mixed = [rows[0], rows[1] | {"p_format": "fp16"}]
    assert model_totals(mixed)[0]["p_format"] is None


def test_where_rows_come_from_and_where_working_sets_fit():
    rows = [
        result("a", m_source="dump, 2 samples per call", fits_in="l1"),
        result("b", m_source="dump, 2 samples per call", fits_in="l2"),
    ]
    (total,) = model_totals(rows)
    assert (total["m_source"], total["fits_in"]) == ("dump, 2 samples per call", "l2")
    (total,) = model_totals([rows[0], rows[1] | {"m_source": "given", "fits_in": "dram"}])
    assert (total["m_source"], total["fits_in"]) == ("dump, 2 samples per call; given", "dram")
    (total,) = model_totals([rows[0], result("b")])
    assert total["fits_in"] is None


def test_the_type_of_a_total_has_every_column_of_the_totals_and_those_of_its_rows():
    hints = get_type_hints(ModelRow)
    assert tuple(hints) == (*MODEL_COLUMNS, "pareto")
    of_rows = get_type_hints(ResultRow)
    assert {name for name in hints if name in of_rows and hints[name] != of_rows[name]} == {
        *("status", "message", "pareto")
    }


@pytest.mark.parametrize("aggregate", ["outputs", "rms", "energy", "macs"])
@pytest.mark.parametrize("size", [1e308, 1e160, 3e-200, 1e-320])
def test_errors_whose_squares_are_no_floats_have_a_mean(aggregate, size):
    """Errors of 1, 1/2 and 0 times `size` in layers of equal weight."""
    rows = [
        result(name, output_error=factor * size, weight_error=factor * size, output_rms=2e200)
        for name, factor in (("a", 1.0), ("b", 0.5), ("c", 0.0))
    ]
    rows[0] |= {"p_error_share": 0.5, "wide_p_error": size / 2}
    (total,) = model_totals(rows, aggregate=aggregate)
    errors = [Fraction(row["output_error"]) for row in rows]
    square = sum(error**2 for error in errors) / 3
    for name in ("output_error", "weight_error"):
        # Half a unit in the last place, and that of a number without all its digits.
        assert abs(Fraction(total[name]) ** 2 / square - 1) < Fraction(1, 2**50) or size < 1e-300
        assert min(errors) <= total[name] <= max(errors)
    assert total["status"] == "ok"
    assert total["wide_p_error"] <= total["output_error"]
    # Squares of outputs of 2e200 are no floats, so that shares of them are not told.
    if aggregate != "energy" and size > 1e-300:
        share = Fraction(1, 2) * errors[0] ** 2 / sum(error**2 for error in errors)
        assert total["p_error_share"] == pytest.approx(float(share))


def test_an_infinite_error_stays_infinite_beside_large_ones():
    rows = [result("a", output_error=1e308), result("b", output_error=math.inf, status="overflow")]
    (total,) = model_totals(rows)
    assert (total["output_error"], total["status"]) == (math.inf, "overflow")
