"""Block formats, element by element: every code, every rounding boundary, every scale rule.

The oracle decodes bit patterns by the definition of the format (sign, exponent, mantissa) in exact
fractions; it uses no small float library.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.formats import ELEMENTS, parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.quantizers.quantize import BLOCK_RULES

# Exponent bits, mantissa bits, bias, and codes at the top that are Inf or NaN (OCP FP8, MX v1.0).
LAYOUTS = {
    "mxfp4": (2, 1, 1, 0),
    "nvfp4": (2, 1, 1, 0),
    "mxfp6_e2m3": (2, 3, 1, 0),
    "mxfp6_e3m2": (3, 2, 3, 0),
    "mxfp8_e4m3": (4, 3, 7, 1),
    "mxfp8_e5m2": (5, 2, 15, 4),
}
BLOCKS = [name for name, element in ELEMENTS.items() if element.block is not None]
POWERS = [name for name in BLOCKS if name != "nvfp4"]
FIXED = {"mxint4": 4, "mxint6": 6, "mxint8": 8, "bfp16ebs8": 8}


def magnitudes(name):
    """Every finite magnitude of an element under scale 1, ascending, by code."""
    if name in FIXED:
        bits = FIXED[name]
        return [Fraction(code, 2 ** (bits - 2)) for code in range(2 ** (bits - 1))]
    exponent_bits, mantissa_bits, bias, n_special = LAYOUTS[name]
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - n_special):
        exponent, mantissa = code >> mantissa_bits, code & (2**mantissa_bits - 1)
        implied = 1 if exponent else 0
        fraction = implied + Fraction(mantissa, 2**mantissa_bits)
        values.append(fraction * Fraction(2) ** (max(exponent, 1) - bias))
    return values


def nearest(value, grid):
    """Closest magnitude; ties to the even code; beyond the grid, its end."""
    distances = [abs(value - entry) for entry in grid]
    best = min(distances)
    codes = [code for code, distance in enumerate(distances) if distance == best]
    return grid[next((code for code in codes if code % 2 == 0), codes[0])]


def boundary_values(grid):
    """Every magnitude, every midpoint, and both neighbors of each midpoint, as float32."""
    middles = [(a + b) / 2 for a, b in zip(grid[:-1], grid[1:], strict=True)]
    exact = np.array([float(v) for v in (*grid, *middles)], dtype=np.float32)
    around = np.array([float(v) for v in middles], dtype=np.float32)
    above = np.nextafter(around, np.float32(np.inf))
    return np.concatenate([exact, above, np.nextafter(around, np.float32(0))])


@pytest.mark.parametrize("name", POWERS)
def test_every_value_and_boundary_rounds_to_the_nearest_code_ties_to_even(name):
    fmt = parse_format(name)
    grid = magnitudes(name)
    # A leader of 2**emax makes the shared scale 1; then one value per block, of either sign.
    values = boundary_values(grid)
    values = values[values < np.float32(2.0 ** (fmt.element.emax + 1))]
    blocks = np.zeros((2 * len(values), fmt.group_size), dtype=np.float32)
    blocks[:, 0] = 2.0**fmt.element.emax
    blocks[:, 1] = np.concatenate([values, -values])
    rounded = quantize(blocks, fmt).dequantize()[:, 1]
    expected = [float(nearest(Fraction(float(v)), grid)) for v in values]
    np.testing.assert_array_equal(rounded, np.array(expected + [-e for e in expected]))


@pytest.mark.parametrize("name", POWERS)
def test_ocp_rule_is_the_floor_and_saturates_beyond_the_largest_value(name):
    fmt = parse_format(name)
    largest = float(magnitudes(name)[-1])
    emax = fmt.element.emax
    for amax in (2.0**emax, largest, np.nextafter(np.float32(2.0 ** (emax + 1)), np.float32(0))):
        block = np.full((1, fmt.group_size), amax, dtype=np.float32)
        np.testing.assert_array_equal(
            quantize(block, fmt).dequantize(), np.full_like(block, min(float(amax), largest))
        )


def test_amd_rule_adds_one_from_seven_quarters_on():
    blocks = np.zeros((3, 32), dtype=np.float32)
    blocks[:, 0] = [6.0, np.nextafter(np.float32(7), np.float32(0)), 7.0]
    for rule, scales in (("ocp", [1, 1, 1]), ("amd", [1, 1, 2]), ("absmax", [1, 2, 2])):
        np.testing.assert_array_equal(
            quantize(blocks, "mxfp4", rule=rule).scales[:, 0], np.array(scales, dtype=np.float32)
        )


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(3, 64), (5, 33), (1, 1), (2, 7)])
def test_pack_writes_exactly_nbytes_and_reads_back_the_same(name, shape):
    x = np.random.default_rng(3).standard_t(3, size=shape).astype(np.float32)
    x[0, 0] = 0.0
    q = quantize(x, name)
    data = q.pack()
    assert len(data) == q.nbytes == parse_format(name).storage_bytes(shape)
    back = QuantizedTensor.unpack(data, name, shape)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())
    np.testing.assert_array_equal(back.scales, q.scales)


@pytest.mark.parametrize("name", BLOCKS)
def test_searched_scales_never_lose_to_the_default(name):
    x = np.random.default_rng(5).standard_normal((20, 96)).astype(np.float32)
    errors = {
        rule: float(
            np.square(quantize(x, name, rule=rule).dequantize().astype(np.float64) - x).sum()
        )
        for rule in BLOCK_RULES
        if name != "nvfp4" or rule in ("absmax", "mse")
    }
    assert errors["mse"] <= min(errors.values()) * (1 + 1e-12)


def test_nvfp4_scales_are_e4m3_times_one_tensor_scale():
    x = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    q = quantize(x, "nvfp4")
    assert q.tensor_scale == np.float32(np.abs(x).max() / (448.0 * 6.0))
    stored = q.scales / q.tensor_scale
    e4m3 = np.array([float(v) for v in magnitudes("mxfp8_e4m3")])
    assert np.abs(stored[..., None] - e4m3).min(axis=-1).max() < 1e-4 * stored.max()
    # 6 is the largest e2m1 value: the extreme of a block lands within half an e4m3 step of it.
    assert float(np.abs(q.codes.astype(np.float32)).max()) == 6.0


def test_bfp16_is_eight_values_and_an_exponent_in_nine_bytes():
    x = np.array([[1.0, -0.5, 0.25, 1.984375, 0.0, 1 / 64, -1.0, 0.75]], dtype=np.float32)
    q = quantize(x, "bfp16ebs8")
    assert q.nbytes == 9
    np.testing.assert_array_equal(q.dequantize(), x)
    assert q.pack()[-1] == 127


def test_scaling_by_a_power_of_two_moves_only_the_exponents():
    x = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    for name in POWERS:
        one, eight = quantize(x, name), quantize(8 * x, name)
        np.testing.assert_array_equal(one.codes, eight.codes)
        np.testing.assert_array_equal(8 * one.scales, eight.scales)


@given(
    name=st.sampled_from(BLOCKS),
    rule=st.sampled_from(["absmax", "mse"]),
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_finite_values_quantize_to_finite_ones_and_survive_packing(name, rule, values):
    x = np.array([values], dtype=np.float32)
    q = quantize(x, name, rule=rule)
    assert np.isfinite(q.dequantize()).all()
    # Saturation keeps magnitudes from growing beyond half a step, at most a quarter of a power.
    largest = float(np.abs(x).max())
    assert float(np.abs(q.dequantize()).max()) <= 1.25 * largest + 2.0**-126
    back = QuantizedTensor.unpack(q.pack(), name, x.shape)
    np.testing.assert_array_equal(back.dequantize(), q.dequantize())


@pytest.mark.parametrize(
    ("name", "extreme", "rest", "step"),
    [
        # 31 small values pay for one clipped extreme: half the scale of `ocp`.
        ("mxfp4", 4.0, 0.25, 0.5),
        ("mxint4", 1.0, 0.125, 0.5),
        # The extreme alone: nothing may be clipped, 7 rounds down to 6 under the scale of `ocp`.
        ("mxfp4", 7.0, 0.0, 1.0),
        # Everything near the end saturates under the scale of `ocp`: twice that scale.
        ("mxfp4", 7.9, 7.9, 2.0),
    ],
)
def test_mse_tries_the_exponents_around_the_published_one(name, extreme, rest, step):
    x = np.full((1, 32), rest, np.float32)
    x[0, 0] = extreme
    stored = quantize(x, name, rule="mse")
    published = quantize(x, name, rule="ocp")
    assert (stored.scales / published.scales).item() == step
    miss = [np.square(q.dequantize().astype(np.float64) - x).sum() for q in (stored, published)]
    assert miss[0] <= miss[1]
    assert (miss[0] < miss[1]) == (step != 1.0)
