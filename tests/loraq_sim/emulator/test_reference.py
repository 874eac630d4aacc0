"""The reference itself, against sums worked out by hand."""

import numpy as np
import pytest

from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.reference import reference_gemm, reference_report, reference_srs


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
