"""Counts, measured and guaranteed widths, and the messages for operands that break a rule."""

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError


def random_codes(shape, seed, low=-128, high=128):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int8)


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("accumulators", [1, 3])
def test_the_safe_width_is_the_first_without_overflow(overflow, accumulators):
    a, w = random_codes((4, 200), 0), random_codes((6, 200), 1)
    fields = {"overflow": overflow, "products_per_add": 4, "accumulators": accumulators}
    safe = emulate_gemm_report(a, w, MacArray(**fields)).safe_acc_bits
    assert emulate_gemm_report(a, w, MacArray(acc_bits=safe, **fields)).overflow_count == 0
    assert emulate_gemm_report(a, w, MacArray(acc_bits=safe - 1, **fields)).overflow_count > 0


def test_the_safe_width_does_not_depend_on_the_accumulator_that_is_there():
    a, w = random_codes((4, 200), 2), random_codes((6, 200), 3)
    widths = {
        emulate_gemm_report(a, w, MacArray(acc_bits=bits, overflow="saturate")).safe_acc_bits
        for bits in (8, 16, 24, 31, 32, 64)
    }
    assert len(widths) == 1


def test_the_guaranteed_width_is_reached_by_the_worst_activations():
    w = random_codes((5, 60), 4)
    worst = np.where(w > 0, 127, -128)  # row j maximizes output j
    report = emulate_gemm_report(worst, w, MacArray(acc_bits=64))
    assert report.safe_acc_bits == report.guaranteed_acc_bits
    calm = emulate_gemm_report(np.ones_like(w), w, MacArray(acc_bits=64))
    assert calm.guaranteed_acc_bits == report.guaranteed_acc_bits
    assert calm.safe_acc_bits < report.guaranteed_acc_bits


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_guaranteed_width_follows_the_activation_width(bits):
    w = np.full((1, 16), -1)
    report = emulate_gemm_report(np.zeros((1, 16), np.int8), w, MacArray(), a_bits=bits)
    # 16 * 2**(bits-1) = 2**(bits+3), one more than a (bits+4)-bit register holds.
    assert report.guaranteed_acc_bits == bits + 5


def test_the_guaranteed_width_of_unsigned_activations_uses_their_range():
    w = np.array([[1, 1, 1, 1]])
    unsigned = emulate_gemm_report(np.zeros((1, 4), np.uint8), w, MacArray())
    assert unsigned.guaranteed_acc_bits == 11  # 4 * 255 = 1020
    signed = emulate_gemm_report(np.zeros((1, 4), np.int8), w, MacArray())
    assert signed.guaranteed_acc_bits == 10  # 4 * -128 = -512


def test_the_guaranteed_width_includes_the_initial_value():
    w = np.array([[1, 1, 1, 1]])
    report = emulate_gemm_report(np.zeros((1, 4), np.int8), w, MacArray(), init=np.array([1000]))
    assert report.guaranteed_acc_bits == 12  # 1000 + 508


def test_reports_without_statistics_only_state_what_is_known():
    a, w = random_codes((3, 90), 5), random_codes((4, 90), 6)
    safe = emulate_gemm_report(a, w, MacArray(), statistics=False)
    assert (safe.overflow_count, safe.outputs_affected, safe.safe_acc_bits) == (0, 0, None)
    narrow = emulate_gemm_report(a, w, MacArray(acc_bits=12), statistics=False)
    assert (narrow.overflow_count, narrow.safe_acc_bits) == (None, None)


@pytest.mark.parametrize(
    ("mac", "statistics", "route"),
    [
        (MacArray(), False, "exact"),
        (MacArray(acc_bits=12), False, "exact"),
        (MacArray(acc_bits=28, overflow="saturate"), False, "exact"),
        (MacArray(acc_bits=12, overflow="saturate"), False, "tiles"),
        (MacArray(acc_bits=12), True, "tiles"),
        (MacArray(acc_bits=12, tree_bits=8), False, "tiles"),
        (MacArray(acc_bits=12, tree_bits=8), True, "tiles"),
        (MacArray(acc_bits=12, tree_bits=8, accumulators=2), True, "lanes"),
    ],
    ids=str,
)
def test_the_route_is_the_fastest_that_is_proved_exact(mac, statistics, route):
    a, w = random_codes((3, 90), 7), random_codes((4, 90), 8)
    assert emulate_gemm_report(a, w, mac, statistics=statistics).route == route


OK = np.zeros((2, 3), np.int8)


@pytest.mark.parametrize(
    ("a", "w", "message"),
    [
        (OK[0], OK, r"a must be a matrix \(rows, K\), got shape \(3,\)"),
        (OK.astype(np.float32), OK, "a must hold integer codes, got dtype float32"),
        (OK, OK > 0, "w must hold integer codes, got dtype bool"),
        (OK[:, :2], OK, r"same K, got K=2 and K=3"),
        (OK + np.int64(256), OK, r"a holds codes from 256 to 256; .* 0..255 \(unsigned\)"),
        (np.array([[-1, 200, 0]]), OK, "a holds codes from -1 to 200"),
        (OK, np.array([[0, 0, 128]]), "w holds codes from 0 to 128; .* -128..127"),
    ],
)
def test_operands_that_are_not_codes_are_refused(a, w, message):
    with pytest.raises(InputError, match=message):
        emulate_gemm(a, w, MacArray())


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (np.zeros(2, np.float64), "init must hold integers, got dtype float64"),
        (np.array([128]), r"init holds values from 128 to 128, outside the 8-bit accumulator"),
        (np.zeros((3, 2), np.int8), r"shape \(3, 2\), which does not broadcast to .* = \(2, 2\)"),
        (np.array([2**64 - 1], np.uint64), "init holds values from 18446744073709551615"),
    ],
)
def test_initial_values_that_do_not_fit_are_refused(init, message):
    with pytest.raises(InputError, match=message):
        emulate_gemm(OK, OK, MacArray(acc_bits=8), init=init)


@pytest.mark.parametrize("a_bits", [1, 9, 4.0, True])
def test_an_activation_width_outside_2_to_8_is_refused(a_bits):
    with pytest.raises(InputError, match="a_bits must be an integer from 2 to 8"):
        emulate_gemm_report(OK, OK, MacArray(), a_bits=a_bits)


def test_codes_that_do_not_fit_the_stated_width_are_refused():
    with pytest.raises(InputError, match=r"a holds codes from 0 to 8, outside a_bits=4 \(-8..7\)"):
        emulate_gemm_report(np.array([[0, 8, 0]]), OK, MacArray(), a_bits=4)
