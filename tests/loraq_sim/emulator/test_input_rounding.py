"""Rounding of activations to codes, against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.formats import Rounding
from loraq_sim.quantizers import quantize
from loraq_sim.quantizers.quantize import quantize_rounded, round_values
from loraq_sim.solvers import solve
from loraq_sim.split import parse_split


def exactly(value, mode):
    """The rule of each mode in whole numbers, from its name."""
    x = Fraction(float(value))
    low = math.floor(x)
    if x == low:
        return low
    nearest = low if x - low < Fraction(1, 2) else low + 1
    is_tie = x - low == Fraction(1, 2)
    toward_zero, away = (low, low + 1) if x > 0 else (low + 1, low)
    even = low if low % 2 == 0 else low + 1
    directed = {
        "floor": low, "ceil": low + 1, "symmetric_floor": toward_zero, "symmetric_ceil": away,
    }  # fmt: skip
    ties = {
        "negative_inf": low, "positive_inf": low + 1, "symmetric_zero": toward_zero,
        "symmetric_inf": away, "conv_even": even, "conv_odd": 2 * low + 1 - even,
    }  # fmt: skip
    return directed[mode] if mode in directed else ties[mode] if is_tie else nearest


@pytest.mark.parametrize("mode", [mode.value for mode in Rounding])
def test_every_mode_rounds_ties_neighbors_of_ties_and_whole_numbers_by_its_rule(mode):
    halves = np.arange(-9, 9.5, 0.5, dtype=np.float32)
    values = np.concatenate([halves, np.nextafter(halves, 99), np.nextafter(halves, -99)])
    values = values.astype(np.float32)
    expected = [exactly(value, mode) for value in values]
    np.testing.assert_array_equal(round_values(values, mode), expected)


@pytest.mark.parametrize("fmt", ["int4/g8", "int8/row", "int6/tensor", "mxint8"])
def test_codes_are_the_rounded_quotients_within_their_range(fmt):
    x = np.random.default_rng(0).standard_normal((5, 37)).astype(np.float32)
    x[2, :8] = 0
    plain = quantize(x, fmt)
    for mode in ("floor", "symmetric_inf"):
        stored = quantize_rounded(x, fmt, mode)
        np.testing.assert_array_equal(stored.scales, plain.scales)
        group = plain.format.group_size if plain.format.granularity == "group" else 37
        scales = (
            np.broadcast_to(plain.scales, (5, plain.scales.shape[1]))
            if (plain.scales.shape[0] == 1)
            else plain.scales
        )
        for i, j in np.ndindex(x.shape):
            scale = scales[i, j // group]
            code = exactly(x[i, j] / scale, mode) if scale else 0
            code = min(max(code, plain.format.element.lo), plain.format.element.hi)
            assert stored.codes[i, j] == code


def test_nearest_even_is_what_quantize_does():
    x = np.random.default_rng(1).standard_normal((4, 20)).astype(np.float32)
    for fmt in ("int4/g8", "mxfp4", "fp16"):
        stored = quantize_rounded(x, fmt, "conv_even")
        np.testing.assert_array_equal(stored.codes, quantize(x, fmt).codes)
    floats = quantize_rounded(x, "mxfp4", "floor")
    np.testing.assert_array_equal(floats.codes, quantize(x, "mxfp4").codes)


def test_a_layer_is_rounded_in_the_mode_of_its_data_path():
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((24, 32)).astype(np.float32)
    x = rng.standard_normal((64, 32)).astype(np.float32)
    split = parse_split("W8A4+W8A8r4")
    stored = solve(weight, main=split.main_weight, branch=split.branch_weight, rank=4)
    errors = {}
    for mode in ("conv_even", "conv_odd", "floor"):
        y = run_layer(x, stored, split, Datapath(rounding=mode, out_format="fp32")).y
        errors[mode] = np.linalg.norm(y - x @ weight.T)
    # Truncation shifts every code down by half a step on average and doubles the rms of the error.
    assert errors["floor"] > 1.5 * errors["conv_even"]
    assert errors["conv_odd"] == pytest.approx(errors["conv_even"], rel=0.05)


def test_an_unknown_mode_is_refused():
    with pytest.raises(InputError, match="rounding"):
        Datapath(rounding="even")
