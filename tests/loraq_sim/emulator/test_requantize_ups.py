"""Upshift against exact integers, and the out-of-range count of a shift-round-saturate."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraq_sim.kernels.shift_round as shift_round
import loraq_sim.kernels.shift_round as shift_up
from loraq_sim.emulator.reference import reference_ups
from loraq_sim.emulator.requantize import CLAMP_ORDERS, output_limits, srs, srs_report, ups
from loraq_sim.errors import InputError
from loraq_sim.formats import Rounding, Saturation

MODES = [(False, "after"), (True, "after"), (True, "before")]


@pytest.mark.parametrize(("saturate", "clamp"), MODES)
@pytest.mark.parametrize("acc_bits", [8, 20, 32, 48, 64])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64])
def test_every_width_and_shift_matches_exact_integers(dtype, acc_bits, saturate, clamp):
    info = np.iinfo(dtype)
    x = np.array([info.min, info.max, 0, 1, 2, 3, 100, 127, max(info.min, -1), max(info.min, -64)])
    x = x.astype(dtype)
    for shift in range(64):
        options = {"acc_bits": acc_bits, "saturate": saturate, "clamp": clamp}
        expected = [reference_ups(int(v), shift, **options) for v in x]
        np.testing.assert_array_equal(ups(x, shift, **options), expected, err_msg=f"shift {shift}")


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    x=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-300, 300), min_size=1),
    shift=st.integers(0, 63),
    acc_bits=st.integers(8, 64),
    saturate=st.booleans(),
    clamp=st.sampled_from(CLAMP_ORDERS),
)
def test_any_upshift_matches_exact_integers(x, shift, acc_bits, saturate, clamp):
    options = {"acc_bits": acc_bits, "saturate": saturate, "clamp": clamp}
    got = ups(np.array(x, dtype=np.int64), shift, **options)
    np.testing.assert_array_equal(got, [reference_ups(v, shift, **options) for v in x])


def test_the_two_clamp_orders_differ_in_low_bits_only_after_overflow():
    x = np.array([127, -128, 3], np.int8)
    np.testing.assert_array_equal(
        ups(x, 24, saturate=True), ups(x, 24, saturate=True, clamp="before")
    )
    np.testing.assert_array_equal(ups(x, 26, saturate=True), [2**31 - 1, -(2**31), 3 << 26])
    before = ups(x, 26, saturate=True, clamp="before")
    np.testing.assert_array_equal(before, [2**31 - 2**26, -(2**31), 3 << 26])
    np.testing.assert_array_equal(ups(x, 26), [-(2**26), 0, 3 << 26])


@pytest.mark.parametrize(("acc_bits", "dtype"), [(8, np.int32), (32, np.int32), (33, np.int64)])
def test_the_accumulator_dtype_and_the_input_shape_are_kept(acc_bits, dtype):
    out = ups(np.zeros((2, 3), np.int16), 1, acc_bits=acc_bits)
    assert out.dtype == dtype
    assert out.shape == (2, 3)


def test_srs_undoes_ups():
    x = np.arange(-128, 128, dtype=np.int8)
    np.testing.assert_array_equal(srs(ups(x, 11), 11, rounding="floor"), x)


@pytest.mark.parametrize(("saturate", "clamp"), MODES)
def test_compiled_and_plain_upshift_agree(monkeypatch, saturate, clamp):
    x = np.array([-128, -3, 0, 5, 127], np.int64)
    options = {"acc_bits": 20, "saturate": saturate, "clamp": clamp}
    compiled = [ups(x, shift, **options) for shift in (0, 12, 15, 40)]
    monkeypatch.setattr(shift_up, "shift_up", shift_up.shift_up.py_func)
    plain = [ups(x, shift, **options) for shift in (0, 12, 15, 40)]
    np.testing.assert_array_equal(plain, compiled)


@pytest.mark.parametrize("saturation", list(Saturation))
@pytest.mark.parametrize("rounding", list(Rounding))
def test_the_report_counts_what_left_the_output_range(monkeypatch, rounding, saturation):
    acc = np.random.default_rng(5).integers(-4096, 4096, (30, 20)).astype(np.int32)
    for kernel in (shift_round.count_outside, shift_round.count_outside.py_func):
        monkeypatch.setattr(shift_round, "count_outside", kernel)
        for shift in (-4, -1, 0, 1, 5):
            for signed in (True, False):
                options = {"rounding": rounding, "saturation": saturation, "signed": signed}
                report = srs_report(acc, shift, **options)
                np.testing.assert_array_equal(report.out, srs(acc, shift, **options))
                wide = srs(acc, shift, out_bits=32, rounding=rounding).astype(np.int64)
                low, high = output_limits(8, signed=signed, saturation=saturation)
                outside = np.count_nonzero((wide < low) | (wide > high))
                assert report.out_of_range_count == outside


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": 64}, "shift must be an integer from 0 to 63, got 64"),
        ({"shift": -1}, "shift must be an integer from 0 to 63, got -1"),
        ({"acc_bits": 7}, "acc_bits must be an integer from 8 to 64, got 7"),
        ({"clamp": "befor"}, "unknown clamp 'befor'; did you mean 'before'"),
        ({"x": [0.5]}, "x must hold integers, got dtype float64"),
    ],
)
def test_upshift_arguments_outside_the_hardware_are_refused(arguments, message):
    given_arguments = {"x": np.zeros(2, np.int8), "shift": 1} | arguments
    with pytest.raises(InputError, match=message):
        ups(**given_arguments)
