"""Quantization against a scalar oracle in exact arithmetic, and its stored bytes."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq_sim.errors import InputError
from loraq_sim.formats import ELEMENTS, parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.quantizers.quantize import INTEGER_RULES

INTEGERS = [name for name, e in ELEMENTS.items() if e.is_integer and e.block is None]
FLOATS = [name for name, element in ELEMENTS.items() if element.is_plain_float]


def rules_for(fmt):
    asymmetric = fmt.element.has_zero_point or fmt.scale is None or fmt.scale.name == "e8m0"
    return [rule for rule in INTEGER_RULES if not (asymmetric and rule.startswith("signed"))]


def random_matrix(seed, shape=(5, 70)):
    return np.random.default_rng(seed).standard_t(3, size=shape).astype(np.float32)


def absmax_codes_by_hand(row, group, bits):
    """Codes and scales of one row, one group at a time, rounding by Fractions (ties to even)."""
    hi = 2 ** (bits - 1) - 1
    codes, scales = [], []
    for start in range(0, len(row), group):
        values = row[start : start + group]
        step = np.float32(max(abs(v) for v in values)) / np.float32(hi)
        scale = np.float32(np.float16(step))
        scales.append(scale)
        for value in values:
            # The kernel divides in float32; the quotient is then rounded exactly.
            quotient = Fraction(float(np.float32(value) / scale)) if scale else Fraction(0)
            codes.append(max(-hi - 1, min(hi, round(quotient))))
    return codes, scales


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [1, 7, 64, 200])
def test_absmax_codes_match_exact_rounding(bits, group):
    x = random_matrix(bits)
    q = quantize(x, f"int{bits}/g{group}")
    for i, row in enumerate(x):
        codes, scales = absmax_codes_by_hand(row, group, bits)
        np.testing.assert_array_equal(q.codes[i], np.array(codes, dtype=np.int8))
        np.testing.assert_array_equal(q.scales[i], np.array(scales, dtype=np.float32))


@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("granularity", ["tensor", "row", "g1", "g16", "g64", "g1000"])
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16", "e8m0"])
def test_error_of_unclipped_values_is_at_most_half_a_step(element, granularity, scale):
    fmt = parse_format(f"{element}/{granularity}/{scale}")
    x = random_matrix(7)
    q = quantize(x, fmt)
    size = {"tensor": 70, "row": 70}.get(fmt.granularity, fmt.group_size)
    step = np.repeat(q.scales, size, axis=1)[:, :70]
    # Half a step; what rounding the scale down clips at the extreme code (relative 2**-9 for bf16,
    # the coarsest, of up to 2 hi steps); half a step for the rounding of a zero point.
    slack = 0.5 + (2.0**-9 * 2 * fmt.element.hi) + (0.5 if fmt.element.has_zero_point else 0.0)
    # Float32 arithmetic adds a few units in the last place of the value itself.
    assert (np.abs(q.dequantize() - x) <= slack * step + 1e-6 * np.abs(x)).all()


@pytest.mark.parametrize("element", [*INTEGERS, *FLOATS])
def test_pack_writes_exactly_nbytes_and_reads_back_the_same(element):
    fmt = element if element in FLOATS else f"{element}/g16/bf16"
    for shape in [(5, 70), (1, 1), (3, 8), (2, 3, 33)]:
        q = quantize(random_matrix(3, shape), fmt)
        data = q.pack()
        assert len(data) == q.nbytes == parse_format(fmt).storage_bytes(shape)
        back = QuantizedTensor.unpack(data, fmt, shape)
        np.testing.assert_array_equal(back.codes, q.codes)
        np.testing.assert_array_equal(back.dequantize(), q.dequantize())


@given(
    bits=st.integers(2, 8),
    group=st.integers(1, 9),
    scale=st.sampled_from(["fp32", "fp16", "bf16", "e8m0"]),
    rule=st.sampled_from(["absmax", "mse"]),
    signed=st.booleans(),
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_finite_values_quantize_to_codes_in_range_and_survive_packing(
    bits, group, scale, rule, signed, values
):
    fmt = parse_format(f"{'int' if signed else 'uint'}{bits}/g{group}/{scale}")
    x = np.array([values], dtype=np.float32)
    q = quantize(x, fmt, rule=rule)
    assert fmt.element.lo <= int(q.codes.min())
    assert int(q.codes.max()) <= fmt.element.hi
    assert np.isfinite(q.scales).all()
    back = QuantizedTensor.unpack(q.pack(), fmt, x.shape)
    np.testing.assert_array_equal(back.codes, q.codes)
    np.testing.assert_array_equal(back.scales, q.scales)


@pytest.mark.parametrize("value", [1.4e-45, -2.8e-45, 1e-44, 6e-8, 1e-40])
@pytest.mark.parametrize("scale", ["fp32", "fp16", "bf16", "e8m0", "e4m3"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_scale_search_among_the_smallest_numbers_there_are(value, scale, bits):
    # Factors below one make some candidates zero in the stored format; they are never tried.
    x = np.array([[1.0, 0.5, value, value / 2]], dtype=np.float32)
    for part in (x, x[:, 2:]):
        q = quantize(part, parse_format(f"int{bits}/g2/{scale}"), rule="mse")
        assert np.isfinite(q.dequantize()).all()
        assert np.abs(q.codes).max() <= 2 ** (bits - 1)


@pytest.mark.parametrize("element", [name for name in INTEGERS if name[-1] in "2348"])
def test_searched_scales_never_lose_to_absmax(element):
    fmt = parse_format(f"{element}/g64")
    x = random_matrix(11, (20, 256))
    errors = {
        rule: float(np.square(quantize(x, fmt, rule=rule).dequantize() - x).sum())
        for rule in rules_for(fmt)
    }
    assert errors["mse"] <= errors["absmax"]
    if "signed_mse" in errors:
        assert errors["signed_mse"] <= errors["mse"]


def test_signed_mse_uses_the_lowest_code_for_a_positive_extreme():
    # 8, -7 .. 7: an int4 grid with scale -1 holds every value exactly.
    x = np.array([[8, *range(-7, 8)]], dtype=np.float32)
    q = quantize(x, "int4/g64", rule="signed_mse")
    np.testing.assert_array_equal(q.dequantize(), x)
    assert q.scales[0, 0] == -1.0


def test_a_group_far_longer_than_the_row_is_one_scale_per_row():
    x = random_matrix(3)
    for element in ("int4", "uint4"):
        one, row = quantize(x, f"{element}/g99999999"), quantize(x, f"{element}/row")
        np.testing.assert_array_equal(one.dequantize(), row.dequantize())


def test_zero_groups_stay_zero():
    x = np.zeros((2, 40), dtype=np.float32)
    x[1, 20:] = 1.0
    for element in ("int4", "uint4"):
        for rule in ("absmax", "mse"):
            q = quantize(x, f"{element}/g20", rule=rule)
            np.testing.assert_array_equal(q.dequantize()[:, :20], np.zeros((2, 20)))


def test_scales_below_fp16_use_its_smallest_subnormal():
    q = quantize(np.full((1, 8), 1e-10, dtype=np.float32), "int4/g8/fp16")
    assert q.scales[0, 0] == np.float32(2.0**-24)
    np.testing.assert_array_equal(q.codes, np.zeros((1, 8), dtype=np.int8))


def test_scales_above_fp16_saturate_and_clip_the_values():
    q = quantize(np.full((1, 8), 1e9, dtype=np.float32), "int4/g8/fp16")
    assert q.scales[0, 0] == 65504.0
    np.testing.assert_array_equal(q.codes, np.full((1, 8), 7, dtype=np.int8))


def test_e8m0_scales_are_the_next_power_of_two():
    x = np.array([[7.0, -1.0], [7.001, 0.0], [3.5, 1.0]], dtype=np.float32)
    q = quantize(x, "int4/row/e8m0")
    np.testing.assert_array_equal(q.scales[:, 0], np.array([1.0, 2.0, 0.5], dtype=np.float32))


def test_fp16_rounds_to_nearest_even_and_saturates():
    x = np.array([1.0, 2049.0, 2051.0, 1e9, -1e9], dtype=np.float32)
    q = quantize(x, "fp16")
    np.testing.assert_array_equal(
        q.dequantize(), np.array([1.0, 2048.0, 2052.0, 65504.0, -65504.0], dtype=np.float32)
    )


def test_input_is_not_modified_and_other_dtypes_are_widened():
    x = random_matrix(5)
    kept = x.copy()
    for fmt in ("int4/g64", "uint4/g64", "fp16"):
        quantize(x, fmt)
    np.testing.assert_array_equal(x, kept)
    half = x.astype(np.float16)
    np.testing.assert_array_equal(
        quantize(half, "int4/g64").codes, quantize(half.astype(np.float32), "int4/g64").codes
    )


@pytest.mark.parametrize(
    ("x", "fmt", "rule", "message"),
    [
        (np.ones((2, 2), dtype=np.int32), "int4/g2", "absmax", r"floating array.*int32"),
        (np.ones((0, 2), dtype=np.float32), "int4/g2", "absmax", r"non-empty"),
        (np.float32(1.0), "int4/g2", "absmax", r"at least one axis"),
        (np.array([1.0, np.nan]), "int4/g2", "absmax", r"1 non-finite values; .* nan at \(1,\)"),
        (np.array([[1.0, np.inf]]), "fp16", "absmax", r"inf at \(0, 1\)"),
        (np.ones(2), "int4/g2", "mxe", r"unknown scale rule 'mxe'; did you mean 'mse'"),
        (np.ones(2), "int4/g2/e8m0", "signed_mse", r"e8m0 scales have no sign"),
        (
            np.ones(2),
            "int4/g2",
            "ocp",
            r"must be one of absmax, mse, signed_absmax, signed_mse, got 'ocp'",
        ),
        (np.ones(2), "mxfp4", "signed_mse", r"must be one of ocp, amd, absmax, mse"),
        (np.ones(2), "nvfp4", "amd", r"the rule 'amd' is for power-of-two scales"),
        (np.ones(2), "uint4/g2", "signed_mse", r"signed_mse is for symmetric integers"),
    ],
)
def test_quantize_says_what_is_wrong(x, fmt, rule, message):
    with pytest.raises(InputError, match=message):
        quantize(x, fmt, rule=rule)


def test_unpack_refuses_the_wrong_number_of_bytes():
    with pytest.raises(InputError, match=r"takes 6 bytes, got 5"):
        QuantizedTensor.unpack(b"12345", "int4/g8", (1, 8))


def test_e8m0_bytes_are_those_of_ocp():
    # OCP Microscaling Formats v1.0, section 5.4.1: 2**(byte - 127), 255 is NaN, no zero.
    codes = b"\x22" * 16
    for byte in range(255):
        stored = QuantizedTensor.unpack(codes + bytes([byte]), "mxfp4", (1, 32))
        assert stored.scales[0, 0] == np.float32(math.ldexp(1.0, byte - 127))
        assert stored.pack() == codes + bytes([byte])
    nan = QuantizedTensor.unpack(codes + b"\xff", "mxfp4", (1, 32))
    assert np.isnan(nan.dequantize()).all()
    assert nan.pack() == codes + b"\xff"


@pytest.mark.parametrize("fmt", ["mxfp4", "mxint4", "int4/g32/e8m0", "bfp16ebs8"])
def test_a_group_of_zeros_has_the_smallest_e8m0_scale_and_survives_packing(fmt):
    x = np.ones((1, 64), np.float32)
    x[0, :32] = 0
    stored = quantize(x, fmt)
    assert (stored.scales > 0).all()
    assert not stored.dequantize()[0, :32].any()
    back = QuantizedTensor.unpack(stored.pack(), fmt, (1, 64))
    np.testing.assert_array_equal(back.scales, stored.scales)
    np.testing.assert_array_equal(back.codes, stored.codes)
    assert stored.n_saturated_scales == stored.n_clipped == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_asymmetric_scales_are_the_correctly_rounded_quotient(bits):
    rng = np.random.default_rng(7)
    for _ in range(200):
        x = rng.standard_normal((4, 50)).astype(np.float32)
        span = Fraction(float(x.max())) - Fraction(float(x.min()))
        exact = span / (2**bits - 1)
        # Rounding the float64 quotient once more moves it only at a tie of float32.
        found = quantize(x, f"uint{bits}/tensor/fp32").scales.item()
        near = [np.nextafter(np.float32(found), np.float32(way)).item() for way in (0, 1e30)]
        assert all(abs(Fraction(found) - exact) <= abs(Fraction(n) - exact) for n in near)


def test_values_and_scales_that_were_clamped_are_counted():
    x = np.array([[65520, -65520, 65504, 1]], np.float32)
    assert quantize(x, "fp16").n_clipped == 3
    assert quantize(x / 2, "fp16").n_clipped == 0
    assert quantize(x, "fp32").n_clipped == 0
    assert quantize(x * 100, "int4/g2").n_clipped == 2
    assert quantize(x, "int4/g2").n_clipped == 0
    assert quantize(x, "nvfp4").n_clipped == 0
