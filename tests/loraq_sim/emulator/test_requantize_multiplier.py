"""Multiplier and float requantization against exact fractions, and compiled against plain."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loraq_sim.kernels.shift_round as kernels
from loraq_sim.emulator.reference import (
    reference_float,
    reference_gemmlowp,
    reference_single_rounding,
)
from loraq_sim.emulator.requantize import (
    float_requantize,
    gemmlowp_requantize,
    output_limits,
    quantize_multiplier,
    single_rounding_requantize,
)
from loraq_sim.errors import InputError

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
EDGES = np.array(
    [0, 1, -1, 2, -2, 3, -3, 127, -128, 2**15, 2**24 - 1, 2**24 + 1, -(2**24) - 3]
    + [2**30, -(2**30), INT32_MAX, INT32_MIN, INT32_MAX - 1, INT32_MIN + 1]
    + list(range(-70, 70)),
    dtype=np.int64,
)
OUTPUTS = [
    (8, True, 0),
    (8, False, 128),
    (8, True, -128),
    (16, True, 5),
    (32, True, 7),
    (4, True, 1),
]


def expected(reference, acc, *arguments, zero_point, out_bits, signed):
    low, high = output_limits(out_bits, signed=signed)
    options = {"zero_point": zero_point, "low": low, "high": high}
    return [reference(int(value), *arguments, **options) for value in acc]


@pytest.mark.parametrize(("out_bits", "signed", "zero_point"), OUTPUTS)
@pytest.mark.parametrize(
    ("multiplier", "exponent"),
    [
        *((2**30, 0), (2**30, -1), (2**31 - 1, -31), (1_518_500_250, -7), (3, 0), (0, -3)),
        *((-(2**31), 0), (-(2**30), -2), (2**30 + 1, -30)),
    ],
)
def test_gemmlowp_matches_exact_fractions(multiplier, exponent, out_bits, signed, zero_point):
    options = {"zero_point": zero_point, "out_bits": out_bits, "signed": signed}
    got = gemmlowp_requantize(EDGES, multiplier, exponent, **options)
    np.testing.assert_array_equal(
        got, expected(reference_gemmlowp, EDGES, multiplier, exponent, **options)
    )


def test_gemmlowp_shifts_left_before_it_multiplies():
    acc = np.arange(-8, 8) * 2**20 + 1
    got = gemmlowp_requantize(acc, 1_234_567_891, 7, out_bits=32)
    options = {"zero_point": 0, "out_bits": 32, "signed": True}
    np.testing.assert_array_equal(
        got, expected(reference_gemmlowp, acc, 1_234_567_891, 7, **options)
    )


@pytest.mark.parametrize(
    ("acc", "multiplier", "exponent", "out"),
    [
        # Worked by hand from fixedpoint.h; a multiplier of 2**30 is one half.
        (1, 2**30, 0, 1),  # 0.5, up
        (-1, 2**30, 0, 0),  # -0.5, up
        (-3, 2**30, 0, -1),  # -1.5, up
        (1, 2**30, -1, 1),  # 0.25 becomes 1 by rounding twice; once would give 0
        (6, 2**30, -1, 2),  # 3 / 2, away from zero
        (-6, 2**30, -1, -2),  # -3 / 2, away from zero
    ],
)
def test_gemmlowp_rounds_ties_as_the_source_does(acc, multiplier, exponent, out):
    assert gemmlowp_requantize([acc], multiplier, exponent)[0] == out


def test_the_one_product_beyond_int32_saturates():
    out = gemmlowp_requantize([INT32_MIN], INT32_MIN, 0, out_bits=32)
    np.testing.assert_array_equal(out, [INT32_MAX])


@pytest.mark.parametrize(("out_bits", "signed", "zero_point"), OUTPUTS)
@pytest.mark.parametrize(
    ("multiplier", "shift"),
    [(2**30, 31), (2**31 - 1, 62), (2**31 - 1, 1), (1_518_500_250, 38), (1, 1), (0, 31), (5, 3)],
)
def test_single_rounding_matches_exact_fractions(multiplier, shift, out_bits, signed, zero_point):
    options = {"zero_point": zero_point, "out_bits": out_bits, "signed": signed}
    got = single_rounding_requantize(EDGES, multiplier, shift, **options)
    np.testing.assert_array_equal(
        got, expected(reference_single_rounding, EDGES, multiplier, shift, **options)
    )


def test_single_and_double_rounding_differ_where_the_first_rounding_makes_a_tie():
    assert single_rounding_requantize([1], 2**30, 32)[0] == 0
    assert gemmlowp_requantize([1], 2**30, -1)[0] == 1


@pytest.mark.parametrize(("out_bits", "signed", "zero_point"), OUTPUTS)
@pytest.mark.parametrize("scale", [0.5, 0.25, 0.1, 1.0, 1.5, 3e-9, -0.5, 0.0, 3e38, 1e-45])
def test_float_scale_matches_exact_fractions(scale, out_bits, signed, zero_point):
    options = {"zero_point": zero_point, "out_bits": out_bits, "signed": signed}
    exact = Fraction(float(np.float32(scale)))
    got = float_requantize(EDGES, scale, **options)
    np.testing.assert_array_equal(got, expected(reference_float, EDGES, exact, **options))


def test_float_scale_rounds_ties_to_even_after_rounding_the_accumulator():
    np.testing.assert_array_equal(
        float_requantize([1, 3, 5, -1, -3, -5], 0.5), [0, 2, 2, 0, -2, -2]
    )
    # 2**24 + 1 becomes 2**24 as a float32.
    assert float_requantize([2**24 + 1], 1.0, out_bits=32)[0] == 2**24


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_any_columns_match_exact_fractions(data):
    n = data.draw(st.integers(1, 4))
    columns = st.lists(st.integers(INT32_MIN, INT32_MAX) | st.integers(-300, 300), min_size=n)
    acc = np.array([row[:n] for row in data.draw(st.lists(columns, min_size=1, max_size=4))])
    out_bits, signed = data.draw(st.integers(2, 32)), data.draw(st.booleans())
    low, high = output_limits(out_bits, signed=signed)
    zero_point = data.draw(st.integers(low, high))
    options = {"zero_point": zero_point, "out_bits": out_bits, "signed": signed}

    def draw_columns(low, high):
        return data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))

    multiplier, exponent = draw_columns(INT32_MIN, INT32_MAX), draw_columns(-31, 0)
    positive, shift = draw_columns(0, INT32_MAX), draw_columns(1, 62)
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    scale = data.draw(st.lists(finite, min_size=n, max_size=n))
    for got, reference, parameters in (
        (
            gemmlowp_requantize(acc, multiplier, exponent, **options),
            reference_gemmlowp,
            list(zip(multiplier, exponent, strict=True)),
        ),
        (
            single_rounding_requantize(acc, positive, shift, **options),
            reference_single_rounding,
            list(zip(positive, shift, strict=True)),
        ),
        (float_requantize(acc, scale, **options), reference_float, [(Fraction(s),) for s in scale]),
    ):
        for j, arguments in enumerate(parameters):
            np.testing.assert_array_equal(
                got[:, j], expected(reference, acc[:, j], *arguments, **options)
            )


def test_columns_broadcast_over_rows_and_leading_axes():
    acc = np.arange(-12, 12, dtype=np.int32).reshape(2, 3, 4) * 1000
    multiplier, exponent = quantize_multiplier([0.001, 0.01, 0.1, 0.0])
    got = gemmlowp_requantize(acc, multiplier, exponent)
    assert got.shape == acc.shape
    assert got.dtype == np.int8
    for j in range(4):
        np.testing.assert_array_equal(
            got[..., j], gemmlowp_requantize(acc[..., j], multiplier[j], exponent[j])
        )
    assert gemmlowp_requantize(np.int32(7), 2**30, 0).shape == ()
    assert float_requantize(np.zeros((3, 0), np.int32), 1.0).shape == (3, 0)


def test_a_fused_activation_narrows_the_output():
    out = float_requantize([-50, 0, 50], 1.0, clamp=(0, 6))
    np.testing.assert_array_equal(out, [0, 0, 6])


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 1e-9, 0.0072476327, 2.0**-31, 123.456, 2.0**29])
def test_a_quantized_multiplier_is_the_nearest(scale):
    multiplier, exponent = (int(v) for v in quantize_multiplier(scale))
    assert 2**30 <= multiplier < 2**31
    held = Fraction(multiplier) * Fraction(2) ** (exponent - 31)
    assert abs(held - Fraction(scale)) <= Fraction(2) ** (exponent - 32)


def test_scales_at_the_ends_are_held_as_tflite_holds_them():
    multiplier, exponent = quantize_multiplier(
        [0.0, 1e-12, 2.0**-32, 1 - 2.0**-40, 2.0**30 - 2.0**-22]
    )
    np.testing.assert_array_equal(multiplier, [0, 0, 2**30, 2**30, 2**31 - 1])
    np.testing.assert_array_equal(exponent, [0, 0, -31, 1, 30])


@pytest.mark.parametrize("name", ["gemmlowp", "single_rounding", "float_scale"])
def test_compiled_and_plain_agree(monkeypatch, name):
    acc = np.resize(EDGES, (40, 4))
    call = {
        "gemmlowp": lambda: gemmlowp_requantize(acc, [2**30, 2**31 - 1, -5, 77], [0, -9, -31, -1]),
        "single_rounding": lambda: single_rounding_requantize(
            acc, [3, 2**31 - 1, 9, 0], [1, 62, 7, 31]
        ),
        "float_scale": lambda: float_requantize(acc, [0.5, 1e-3, -7.25, 3e38], zero_point=-3),
    }[name]
    compiled = call()
    monkeypatch.setattr(kernels, name, getattr(kernels, name).py_func)
    # Python warns of the float32 infinity that the clamp then takes away.
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(call(), compiled)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gemmlowp_requantize([2**31], 1, 0), "acc must fit int32, got 2147483648"),
        (lambda: gemmlowp_requantize([1.5], 1, 0), "acc must hold integers, got dtype float64"),
        (lambda: gemmlowp_requantize([1], 2**31, 0), "multiplier must be from .* got 2147483648"),
        (lambda: gemmlowp_requantize([1], 1, -32), "exponent must be from -31 to 30, got -32"),
        (lambda: gemmlowp_requantize([2**28], 1, 8), "reaches 68719476736 .* must fit int32"),
        (lambda: gemmlowp_requantize([[1, 2]], [1, 2, 3], 0), r"multiplier has shape \(3,\)"),
        (lambda: single_rounding_requantize([1], -1, 4), "multiplier must be from 0 .* got -1"),
        (lambda: single_rounding_requantize([1], 1, 0), "shift must be from 1 to 62, got 0"),
        (lambda: float_requantize([1], np.nan), "scale must be finite in float32, got .nan"),
        (lambda: float_requantize([1], 1e39), "scale must be finite in float32"),
        (
            lambda: float_requantize([1], 1.0, zero_point=200),
            "zero_point must be an integer from -128",
        ),
        (
            lambda: float_requantize([1], 1.0, clamp=(5, 3)),
            r"clamp\[1\] must be .* from 5 to 127, got 3",
        ),
        (
            lambda: float_requantize([1], 1.0, out_bits=33),
            "out_bits must be an integer from 2 to 32",
        ),
        (lambda: quantize_multiplier(-0.5), "scale must be finite, at least 0 .* got -0.5"),
        (lambda: quantize_multiplier([0.5, np.inf]), "scale must be finite, .* got inf"),
    ],
)
def test_arguments_outside_the_rules_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
