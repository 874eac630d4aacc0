"""Shift-round-saturate against exact fractions, every mode, and compiled against plain."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraq_sim.kernels.shift_round as kernels
from loraq_sim.emulator.reference import reference_srs
from loraq_sim.emulator.requantize import output_limits, srs
from loraq_sim.errors import InputError
from loraq_sim.formats import Rounding, Saturation


def edge_values(shift, out_bits):
    """Values around every place where an SRS changes its mind, int64."""
    step = 2 ** max(shift, 0)
    centers = [0, 2**31, 2**32, 2**33, 2**62, 2**63 - 1]
    centers += [step * 2**power for power in (out_bits - 1, out_bits) if step * 2**power < 2**63]
    offsets = [0, 1, step // 2 - 1, step // 2, step // 2 + 1, step - 1, step, 3 * step // 2]
    values = {
        sign * c + s * o for c in centers for o in offsets for sign in (1, -1) for s in (1, -1)
    }
    values |= {-(2**63), 2**63 - 1}
    return np.array(sorted(v for v in values if -(2**63) <= v < 2**63), dtype=np.int64)


@pytest.mark.parametrize("saturation", list(Saturation))
@pytest.mark.parametrize("rounding", list(Rounding))
def test_every_mode_matches_exact_fractions(rounding, saturation):
    for shift in (-4, -1, 0, 1, 2, 8, 31, 32, 59):
        for out_bits in (2, 8, 13, 16, 32):
            acc = edge_values(shift, out_bits)
            for signed in (True, False):
                options = {
                    "out_bits": out_bits,
                    "signed": signed,
                    "rounding": rounding.value,
                    "saturation": saturation.value,
                }
                got = srs(acc, shift, **options)
                np.testing.assert_array_equal(
                    got.astype(np.int64), reference_srs(acc, shift, **options)
                )


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    acc=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-4096, 4096), min_size=1),
    shift=st.integers(-4, 59),
    out_bits=st.integers(2, 32),
    signed=st.booleans(),
    rounding=st.sampled_from([mode.value for mode in Rounding]),
    saturation=st.sampled_from([mode.value for mode in Saturation]),
)
def test_any_srs_matches_exact_fractions(acc, shift, out_bits, signed, rounding, saturation):
    options = {
        "out_bits": out_bits,
        "signed": signed,
        "rounding": rounding,
        "saturation": saturation,
    }
    values = np.array(acc, dtype=np.int64)
    expected = reference_srs(values, shift, **options)
    np.testing.assert_array_equal(srs(values, shift, **options).astype(np.int64), expected)


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_every_integer_dtype_is_accepted(dtype):
    info = np.iinfo(dtype)
    acc = np.array([info.min, 0, 5, min(info.max, 2**63 - 1)], dtype=dtype)
    expected = reference_srs(acc, 1, out_bits=16)
    np.testing.assert_array_equal(srs(acc, 1, out_bits=16), expected)


@pytest.mark.parametrize("name", ["shift_right_round", "shift_left"])
@pytest.mark.parametrize("saturation", list(Saturation))
def test_compiled_and_plain_agree(monkeypatch, name, saturation):
    kernel = getattr(kernels, name)
    shifts = (-4, -1) if name == "shift_left" else (0, 1, 7, 59)
    for shift in shifts:
        for rounding in Rounding:
            acc = edge_values(shift, 8)
            compiled = srs(acc, shift, rounding=rounding, saturation=saturation)
            monkeypatch.setattr(kernels, name, kernel.py_func)
            plain = srs(acc, shift, rounding=rounding, saturation=saturation)
            monkeypatch.setattr(kernels, name, kernel)
            np.testing.assert_array_equal(compiled, plain)


@pytest.mark.parametrize(
    ("out_bits", "signed", "dtype"),
    [
        (4, True, np.int8),
        (8, True, np.int8),
        (8, False, np.uint8),
        (9, True, np.int16),
        (16, False, np.uint16),
        (17, False, np.uint32),
        (32, True, np.int32),
    ],
)
def test_the_result_has_the_smallest_dtype_and_the_input_shape(out_bits, signed, dtype):
    out = srs(np.zeros((2, 3, 4), np.int32), 1, out_bits=out_bits, signed=signed)
    assert out.dtype == dtype
    assert out.shape == (2, 3, 4)


def test_a_strided_accumulator_is_read_in_place():
    acc = np.arange(-40, 40, dtype=np.int32).reshape(8, 10)[:, ::3]
    before = acc.copy()
    np.testing.assert_array_equal(srs(acc, 2), reference_srs(acc, 2))
    np.testing.assert_array_equal(acc, before)


def test_limits_are_those_of_the_output():
    assert output_limits(8) == (-128, 127)
    assert output_limits(8, saturation="symmetric") == (-127, 127)
    assert output_limits(16, signed=False) == (0, 65535)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": 60}, "shift must be an integer from -4 to 59, got 60"),
        ({"shift": -5}, "shift must be an integer from -4 to 59, got -5"),
        ({"shift": 2.0}, "shift must be an integer from -4 to 59, got 2.0"),
        ({"out_bits": 33}, "out_bits must be an integer from 2 to 32, got 33"),
        ({"out_bits": 1}, "out_bits must be an integer from 2 to 32, got 1"),
        ({"rounding": "conv_evn"}, "unknown rounding 'conv_evn'; did you mean 'conv_even'"),
        ({"saturation": "symetric"}, "unknown saturation 'symetric'; did you mean 'symmetric'"),
        ({"acc": np.zeros(2)}, "acc must hold integers, got dtype float64"),
        ({"acc": np.array([2**63], np.uint64)}, "acc holds 9223372036854775808"),
    ],
)
def test_arguments_outside_the_hardware_are_refused(arguments, message):
    given_arguments = {"acc": np.zeros(2, np.int32), "shift": 1} | arguments
    with pytest.raises(InputError, match=message):
        srs(**given_arguments)
