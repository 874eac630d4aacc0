"""The reference itself, against sums worked out by hand."""

from fractions import Fraction

import numpy as np
import pytest

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.reference import (
    reference_float,
    reference_gemm,
    reference_gemmlowp,
    reference_report,
    reference_single_rounding,
    reference_srs,
    reference_two_level,
    reference_ups,
)


def accumulate(products, init=0, **fields):
    """Accumulate the given values as products with ones; returns a Python integer."""
    a, w = np.array([products]), np.ones((1, len(products)), np.int64)
    return int(reference_gemm(a, w, MacArray(acc_bits=8, **fields), np.array(init))[0, 0])


def test_saturation_forgets_what_was_clamped():
    assert accumulate([100, 100, -50], overflow="saturate") == 77
    assert accumulate([100, 100, -50], overflow="wrap") == 150 - 256


def test_the_order_of_k_matters_when_saturating():
    assert accumulate([-50, 100, 100], overflow="saturate") == 127


def test_a_chunk_is_summed_exactly_before_the_add():
    assert accumulate([100, 100, -100, 0], overflow="saturate", products_per_add=2) == 27
    assert accumulate([100, -100, 100, 0], overflow="saturate", products_per_add=2) == 100
    assert accumulate([100, 100, -100], overflow="saturate", products_per_add=4) == 100


def test_a_narrow_tree_limits_the_chunk_by_its_own_rule():
    chunk = {"products_per_add": 2, "tree_bits": 7}
    assert accumulate([60, 10], overflow="saturate", **chunk) == 63
    assert accumulate([60, 10], overflow="saturate", tree_overflow="wrap", **chunk) == 70 - 128
    assert accumulate([-60, -10], overflow="saturate_symmetric", **chunk) == -63


def test_chunks_go_to_the_accumulators_in_turn_and_merge_in_order():
    # Accumulator 0 gets 100 and 100 (clamped to 127), accumulator 1 gets -100 and -100 (-128).
    assert accumulate([100, -100, 100, -100], overflow="saturate", accumulators=2) == -1
    # Three accumulators hold 100, 100, -100: merged in order 127, then 27.
    assert accumulate([100, 100, -100], overflow="saturate", accumulators=3) == 27


def test_init_starts_accumulator_zero_only():
    assert accumulate([100, 10], init=100, overflow="saturate", accumulators=2) == 127
    assert accumulate([-100, 10], init=100, overflow="saturate", accumulators=2) == 10


def test_symmetric_saturation_has_no_most_negative_value():
    assert accumulate([-100, -100], overflow="saturate_symmetric") == -127
    assert accumulate([-127, -1], overflow="saturate_symmetric") == -127


def test_no_products_leave_the_initial_value():
    assert accumulate([], init=-5) == -5


def test_report_counts_adds_merges_and_outputs():
    a = np.array([[100, 100, 100, 100], [1, 1, 1, 1]])
    w = np.ones((1, 4), np.int64)
    report = reference_report(a, w, MacArray(acc_bits=8, overflow="saturate", accumulators=2))
    # Row 0: one add into each accumulator and the merge; row 1: none.
    assert report.overflow_count == 3
    assert report.outputs_affected == 1
    assert report.first_overflow_k == 2
    assert report.safe_acc_bits == 10  # 400 needs ten bits


@pytest.mark.parametrize(
    ("value", "bits"), [(0, 1), (1, 2), (-1, 1), (127, 8), (-128, 8), (128, 9), (-129, 9)]
)
def test_safe_width_is_the_twos_complement_width(value, bits):
    report = reference_report([[value]], [[1]], MacArray())
    assert report.safe_acc_bits == bits


# AMD UG1583 and aie_api: accumulators 5, 7, -5, -7 shifted by one are 2.5, 3.5, -2.5, -3.5.
SRS_TABLE = {
    "floor": [2, 3, -3, -4],
    "ceil": [3, 4, -2, -3],
    "symmetric_floor": [2, 3, -2, -3],
    "symmetric_ceil": [3, 4, -3, -4],
    "negative_inf": [2, 3, -3, -4],
    "positive_inf": [3, 4, -2, -3],
    "symmetric_zero": [2, 3, -2, -3],
    "symmetric_inf": [3, 4, -3, -4],
    "conv_even": [2, 4, -2, -4],
    "conv_odd": [3, 3, -3, -3],
}


@pytest.mark.parametrize("rounding", SRS_TABLE)
def test_srs_reference_matches_the_vendor_table(rounding):
    got = reference_srs([5, 7, -5, -7], 1, rounding=rounding)
    np.testing.assert_array_equal(got, SRS_TABLE[rounding])


def test_srs_reference_saturates_or_keeps_low_bits():
    acc = [300, -300]
    np.testing.assert_array_equal(reference_srs(acc, 0), [127, -128])
    np.testing.assert_array_equal(reference_srs(acc, 0, saturation="symmetric"), [127, -127])
    np.testing.assert_array_equal(reference_srs(acc, 0, saturation="none"), [44, -44])
    np.testing.assert_array_equal(reference_srs(acc, 0, signed=False), [255, 0])
    np.testing.assert_array_equal(reference_srs(acc, 0, signed=False, saturation="none"), [44, 212])
    np.testing.assert_array_equal(reference_srs([3, -3], -4), [48, -48])


def two_levels(products, init=0, **wide):
    """Sum tiles of two products in a saturating 8-bit column, then in a wide accumulator."""
    array = TwoLevelArray(column=MacArray(acc_bits=8, overflow="saturate"), column_k=2, **wide)
    ones = np.ones((1, len(products)), np.int64)
    return reference_two_level(np.array([products]), ones, array, np.array(init))


def test_columns_start_from_zero_and_saturate_on_their_own():
    # Tiles 100 + 100 -> 127, -100 + 50 -> -50, 7 -> 7.
    report = two_levels([100, 100, -100, 50, 7], acc_bits=16)
    assert int(report.acc[0, 0]) == 84
    assert (report.column_overflow_count, report.partials_affected) == (1, 1)
    assert (report.overflow_count, report.first_overflow_k) == (0, None)
    assert report.safe_column_bits == 9  # 200
    assert report.safe_acc_bits == 8  # 127, 77, 84


def test_the_wide_accumulator_applies_its_own_rule_per_tile():
    # 100 + 127 leaves 8 bits at the first tile and 127 + 127 at the second.
    saturated = two_levels([100, 100, 100, 100], init=100, acc_bits=8, overflow="saturate")
    assert int(saturated.acc[0, 0]) == 127
    assert (saturated.overflow_count, saturated.first_overflow_k) == (2, 0)
    wrapped = two_levels([100, 100, 100, 100], init=100, acc_bits=8)
    assert int(wrapped.acc[0, 0]) == 100 + 127 + 127 - 256
    assert (wrapped.overflow_count, wrapped.outputs_affected) == (1, 1)


def test_upshift_reference_clamps_where_it_is_told():
    saturating = {"acc_bits": 8, "saturate": True}
    assert reference_ups(3, 2, acc_bits=8, saturate=False, clamp="after") == 12
    assert reference_ups(40, 2, acc_bits=8, saturate=False, clamp="after") == 160 - 256
    assert reference_ups(40, 2, clamp="after", **saturating) == 127
    assert reference_ups(40, 2, clamp="before", **saturating) == 124  # 31 << 2
    assert reference_ups(-40, 2, clamp="before", **saturating) == -128  # -32 << 2


@pytest.mark.parametrize(
    ("acc", "twice", "once"),
    # One quarter, as half times half and as 2**30 * 2**-32: 0.25, 0.5, 1.5 and their negatives.
    [(1, 1, 0), (2, 1, 1), (6, 2, 2), (-1, 0, 0), (-2, -1, 0), (-6, -2, -1)],
)
def test_multiplier_references_round_ties_their_way(acc, twice, once):
    limits = {"zero_point": 0, "low": -128, "high": 127}
    assert reference_gemmlowp(acc, 2**30, -1, **limits) == twice
    assert reference_single_rounding(acc, 2**30, 32, **limits) == once


def test_float_reference_rounds_three_times():
    limits = {"zero_point": 0, "low": -(2**31), "high": 2**31 - 1}
    assert reference_float(2**24 + 1, Fraction(1), **limits) == 2**24
    assert reference_float(2**24 + 3, Fraction(1), **limits) == 2**24 + 4
    # 0.1 as a float32 is a little more than 0.1; times 25 it rounds to 2.5, a tie to even.
    assert reference_float(25, Fraction(float(np.float32(0.1))), **limits) == 2
    assert reference_float(7, Fraction(1, 2), **(limits | {"zero_point": 3, "high": 6})) == 6
