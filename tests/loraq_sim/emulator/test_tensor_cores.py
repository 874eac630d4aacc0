"""Fused dot-adds of tensor cores against exact Fractions, and MMA-Sim itself where installed."""

import importlib.util
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.mac_array import TENSOR_CORES, MacArray, fused_dot_of
from loraq_sim.emulator.scaled_gemm import BIT_EXACT, BLOCK_MODEL, FUSED_DOT, scaled_gemm
from loraq_sim.emulator.tensor_cores import fused_gemm
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize

# The published rules, written down again: element -> (fraction bits, lowest exponent).
FIELDS = {
    "fp16": (10, -14),
    "bf16": (7, -126),
    "mxfp8_e4m3": (3, -6),
    "mxfp8_e5m2": (2, -14),
    "mxfp6_e2m3": (3, 0),
    "mxfp6_e3m2": (2, -2),
    "mxfp4": (1, 0),
    "nvfp4": (1, 0),
}
# Generation, elements -> F, chunk, exponent of zero, fraction bits kept.
PUBLISHED = {
    ("turing", "fp16", "fp16"): (24, 8, -132, 23),
    ("ampere", "fp16", "fp16"): (24, 8, -132, 23),
    ("ampere", "bf16", "bf16"): (24, 8, -132, 23),
    ("ada", "bf16", "bf16"): (24, 8, -132, 23),
    ("ada", "mxfp8_e4m3", "mxfp8_e5m2"): (13, 16, -132, 13),
    ("hopper", "fp16", "fp16"): (25, 16, -133, 23),
    ("hopper", "mxfp8_e4m3", "mxfp8_e4m3"): (13, 32, -133, 13),
    ("hopper", "mxfp8_e5m2", "mxfp8_e4m3"): (13, 32, -133, 13),
    ("blackwell", "bf16", "bf16"): (25, 16, -133, 23),
}
BLOCKS = [
    ("mxfp8_e4m3", "mxfp8_e5m2"),
    ("mxfp8_e4m3", "mxfp4"),
    ("mxfp6_e2m3", "mxfp6_e3m2"),
    ("mxfp4", "mxfp4"),
    ("nvfp4", "nvfp4"),
]


# The oracle: Fractions, one output at a time.


def place(value, lowest):
    """Exponent of a Fraction's leading place, no less than `lowest`."""
    size = abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    return max(exponent, lowest)


def cut(value, exponent, bits):
    """Toward zero at `bits` bits below 2**exponent."""
    unit = Fraction(2) ** (exponent - bits)
    return Fraction(math.trunc(value / unit)) * unit


def added(terms, c, bits, zero, kept):
    """c plus terms of (value, exponent), all cut alike; then the sum, cut to `kept` bits."""
    terms = [*terms, (c, place(c, -126) if c else zero)]
    top = max(exponent for _, exponent in terms)
    total = sum(cut(value, top, bits) for value, _ in terms)
    return cut(total, place(total, -126), kept) if total else Fraction(0)


def products(a, b, a_fields, b_fields, zero, scale=0):
    for x, y in zip(a, b, strict=True):
        x, y = Fraction(float(x)), Fraction(float(y))
        if x and y:
            where = place(x, a_fields[1]) + place(y, b_fields[1]) + scale
            yield x * y * Fraction(2) ** scale, where
        else:
            yield Fraction(0), zero


def oracle_dot(x, w, rule, names, scales=None):
    """Every output of a GEMM, chunk after chunk of K."""
    bits, chunk, zero, kept = rule
    out = np.zeros((len(x), len(w)))
    for i, j in np.ndindex(out.shape):
        c = Fraction(0)
        for start in range(0, x.shape[1], chunk):
            part = slice(start, start + chunk)
            scale = 0 if scales is None else scales[0][i, start // 32] + scales[1][j, start // 32]
            terms = products(
                x[i, part], w[j, part], FIELDS[names[0]], FIELDS[names[1]], zero, int(scale)
            )
            c = added(terms, c, bits, zero, kept)
        out[i, j] = float(c)
    return out


def oracle_groups(x, w, scales, scale_lowest):
    """e2m1 with scales inside: exact sums of 16, aligned by the exponents of their scales."""
    out = np.zeros((len(x), len(w)))
    width = x.shape[1] // scales[0].shape[1]
    for i, j in np.ndindex(out.shape):
        c = Fraction(0)
        for start in range(0, x.shape[1], 64):
            terms = []
            for k in range(start, min(start + 64, x.shape[1]), 16):
                part = slice(k, k + 16)
                pairs = [
                    Fraction(float(u)) * Fraction(float(v))
                    for u, v in zip(x[i, part], w[j, part], strict=True)
                ]
                one, other = (
                    Fraction(float(scales[n][r, k // width])) for n, r in ((0, i), (1, j))
                )
                if any(pairs) and one and other:
                    where = place(one, scale_lowest) + place(other, scale_lowest)
                else:
                    where = -139
                terms.append((sum(pairs) * one * other, where))
            c = added(terms, c, 35, -139, 23)
        out[i, j] = float(c)
    return out


def drawn(rng, rows, k, spread):
    """Values of wide range, some zero, some that cancel."""
    x = rng.standard_normal((rows, k)) * 2.0 ** rng.integers(-spread, spread // 2 + 1, (rows, k))
    x[rng.random(x.shape) < 0.1] = 0
    half = k // 2
    x[0, :half] = -x[0, half : 2 * half]
    return x


def plain(values, name):
    dtype = np.float16 if name == "fp16" else ml_dtypes.bfloat16
    return QuantizedTensor(
        codes=np.clip(values, -60000, 60000).astype(dtype), scales=None, format=parse_format(name)
    )


def element(values, name):
    """A tensor of one element; small floats with one scale of 1 for each row."""
    if name in ("fp16", "bf16"):
        return plain(values, name)
    fmt = parse_format(f"{name}/g512")
    codes = np.clip(values, -448, 448).astype(getattr(ml_dtypes, fmt.element.minifloat))
    return QuantizedTensor(codes=codes, scales=np.ones((len(values), 1), np.float32), format=fmt)


@pytest.mark.parametrize("case", PUBLISHED, ids=" ".join)
@pytest.mark.parametrize("seed", range(3))
def test_one_instruction_after_the_other_is_the_published_rule(case, seed):
    generation, *names = case
    rng = np.random.default_rng([seed, *generation.encode()])
    k = int(rng.integers(1, 100))
    x, w = (
        element(drawn(rng, rows, k, (2, 12, 30)[seed]), n)
        for rows, n in zip((3, 4), names, strict=True)
    )
    y, seen = scaled_gemm(x, w, MacArray(), generation)
    assert seen.arithmetic == FUSED_DOT
    np.testing.assert_array_equal(y, oracle_dot(x.codes, w.codes, PUBLISHED[case], names))


@pytest.mark.parametrize("names", BLOCKS, ids=" ".join)
@pytest.mark.parametrize("seed", range(3))
def test_blackwell_applies_block_scales_inside(names, seed):
    rng = np.random.default_rng([seed, *"".join(names).encode()])
    k = (32, 96, 160)[seed]
    tensors = [
        quantize(drawn(rng, rows, k, 6).astype(np.float32), parse_format(name))
        for rows, name in zip((3, 4), names, strict=True)
    ]
    if names[0] != "nvfp4":
        tensors = [
            QuantizedTensor(
                codes=t.codes,
                scales=(2.0 ** rng.integers(-40, 40, t.scales.shape)).astype(np.float32),
                format=t.format,
            )
            for t in tensors
        ]
    x, w = tensors
    y, seen = scaled_gemm(x, w, MacArray(), "blackwell")
    assert seen.arithmetic == FUSED_DOT
    if names == ("mxfp4", "mxfp4"):
        want = oracle_groups(x.codes, w.codes, (x.scales, w.scales), -127)
    elif names[0] == "nvfp4":
        scales = [
            (t.scales / t.tensor_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
            for t in tensors
        ]
        want = oracle_groups(x.codes, w.codes, scales, -6).astype(np.float32)
        want = want * np.float32(x.tensor_scale * w.tensor_scale)
    else:
        scales = [np.log2(t.scales).astype(int) for t in tensors]
        want = oracle_dot(x.codes, w.codes, (25, 32, -133, 23), names, scales)
    np.testing.assert_array_equal(y, want)


def test_cdna3_rounds_sums_down_and_results_to_even():
    # One product: 24 bits of it meet c = 0 and round to even; a sum of a chunk rounds down first.
    one = np.float16(1 + 2**-10)
    x = plain(np.array([[one, 2.0**-14, 0, 0, 0, 0, 0, 0]]), "fp16")
    w = plain(np.array([[one, -(2.0**-14), 0, 0, 0, 0, 0, 0]]), "fp16")
    # -2**-28 lies below the 24 bits of the largest product and is cut to zero.
    assert fused_gemm(x, w, "cdna3")[0, 0] == np.float32(float(one) ** 2)
    # As a chunk of its own it moves the sum down by one bit of the 31.
    x = plain(np.array([[one] + [0] * 7 + [2.0**-14]]), "fp16")
    w = plain(np.array([[one] + [0] * 7 + [-(2.0**-14)]]), "fp16")
    exact = Fraction(float(one)) ** 2 - Fraction(2) ** -28
    assert fused_gemm(x, w, "cdna3")[0, 0] == np.float32(float(exact))


def test_compiled_and_plain_loops_agree(monkeypatch):
    from loraq_sim.kernels import float_passes as kernels

    rng = np.random.default_rng(6)
    fp16 = [plain(drawn(rng, rows, 20, 12), "fp16") for rows in (2, 3)]
    fp4 = [
        quantize(drawn(rng, rows, 40, 4).astype(np.float32), parse_format("nvfp4"))
        for rows in (2, 3)
    ]
    cases = [(fp16, "hopper"), (fp16, "cdna3"), (fp4, "blackwell")]
    compiled = [fused_gemm(*pair, generation) for pair, generation in cases]
    for name in ("fused_dot_add", "fused_group_add", "fused_dot_round_down"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, getattr(kernel, "py_func", kernel))
    for (pair, generation), want in zip(cases, compiled, strict=True):
        np.testing.assert_array_equal(fused_gemm(*pair, generation), want)


def test_what_a_generation_lacks_stays_a_model_and_integers_stay_exact():
    rng = np.random.default_rng(1)
    x, w = (rng.standard_normal((3, 64)).astype(np.float32) for _ in range(2))
    for generation in TENSOR_CORES:
        ints = [quantize(v, parse_format("int8/g32")) for v in (x, w)]
        y, seen = scaled_gemm(*ints, MacArray(), generation)
        assert seen.arithmetic == BIT_EXACT
        np.testing.assert_array_equal(y, scaled_gemm(*ints, MacArray(), "fp32")[0])
    fp4 = [quantize(v, parse_format("mxfp4")) for v in (x, w)]
    assert fused_dot_of("hopper", fp4[0].format, fp4[1].format) is None
    y, seen = scaled_gemm(*fp4, MacArray(), "hopper")
    assert seen.arithmetic == BLOCK_MODEL
    np.testing.assert_array_equal(y, scaled_gemm(*fp4, MacArray(), "fp32")[0])
    assert fused_dot_of("blackwell", parse_format("fp16"), parse_format("bf16")) is None


def test_scales_outside_the_instruction_multiply_stretches():
    # Hopper has no block scales: each stretch of 32 from zero, scaled, added in float32.
    rng = np.random.default_rng(2)
    x, w = (
        quantize(rng.standard_normal((2, 96)).astype(np.float32), parse_format("mxfp8_e4m3"))
        for _ in range(2)
    )
    want = np.zeros((2, 2), np.float32)
    for g in range(3):
        part = slice(32 * g, 32 * g + 32)
        names = ["mxfp8_e4m3"] * 2
        sums = oracle_dot(x.codes[:, part], w.codes[:, part], (13, 32, -133, 13), names)
        want = want + sums.astype(np.float32) * (x.scales[:, g : g + 1] * w.scales[:, g])
    np.testing.assert_array_equal(scaled_gemm(x, w, MacArray(), "hopper")[0], want)


@pytest.mark.parametrize("k", [0, 1, 70_000])
def test_any_depth_and_infinities(k):
    for name, generation in (("fp16", "hopper"), ("mxfp4", "blackwell"), ("bf16", "cdna3")):
        fmt = parse_format(name)
        ones = quantize(np.ones((2, max(k, 1)), np.float32), fmt)
        if k == 0:
            scales = None if ones.scales is None else ones.scales[:, :0]
            ones = QuantizedTensor(codes=ones.codes[:, :0], scales=scales, format=fmt)
        y, seen = scaled_gemm(ones, ones, MacArray(), generation)
        np.testing.assert_array_equal(y, np.full((2, 2), k, np.float32))
        assert seen.clipped_count == 0
    huge = plain(np.full((1, max(k, 1)), 1.0), "bf16")
    huge = QuantizedTensor(
        codes=np.full(huge.shape, 3e38, ml_dtypes.bfloat16), scales=None, format=huge.format
    )
    y, seen = scaled_gemm(huge, huge, MacArray(), "blackwell")
    assert np.isinf(y).all()
    assert seen.clipped_count == 1
    y, seen = scaled_gemm(huge, huge, MacArray(), "blackwell", saturate=True)
    assert y[0, 0] == np.finfo(np.float32).max
    nan = plain(np.array([[np.nan, 1.0]]), "fp16")
    assert np.isnan(fused_gemm(nan, nan, "hopper")[0, 0])


def test_a_data_path_takes_a_tensor_core_as_its_combine_step():
    rng = np.random.default_rng(3)
    layer = lq.Layer(
        name="q",
        weight=rng.standard_normal((32, 64)).astype(np.float32),
        activations=rng.standard_normal((8, 64)).astype(np.float32),
    )
    options = {"family": "nvfp", "preset": "fast"}
    row = lq.evaluate_layer(layer, "W4A4", "b200", datapath={"combine": "blackwell"}, **options)
    model = lq.evaluate_layer(layer, "W4A4", "b200", **options)
    assert row["arithmetic"] == FUSED_DOT
    assert model["arithmetic"] == BLOCK_MODEL
    assert row["output_error"] == pytest.approx(model["output_error"], rel=1e-4)
    with pytest.raises(lq.InputError, match="unknown combine rule 'blackwel'; did you mean"):
        lq.Datapath(combine="blackwel")


@pytest.mark.parametrize("generation", ["ampere", "hopper", "cdna3"])
def test_mma_sim_gives_the_same_bits(generation):
    if importlib.util.find_spec("mmasim") is None:
        pytest.skip("mmasim is not installed (pip install 'loraq-sim[runtimes]')")
    import torch
    from mmasim.arithmetic import fdpa

    operation, chunk = {
        "ampere": (fdpa.MMA_T_FDPA(24, "RZ-FP32", 8, -132, "", ""), 8),
        "hopper": (fdpa.MMA_T_FDPA(25, "RZ-FP32", 16, -133, "", ""), 16),
        "cdna3": (fdpa.MMA_TR_FDPA(24, 31, "RNE-FP32", 8), 8),
    }[generation]
    rng = np.random.default_rng(4)
    for _ in range(30):
        k = chunk * int(rng.integers(1, 12))
        x, w = (plain(drawn(rng, rows, k, 20), "fp16") for rows in (5, 6))
        zeros = torch.zeros(5, 6)
        theirs = operation(torch.from_numpy(x.codes), torch.from_numpy(w.codes.T.copy()), zeros)
        np.testing.assert_array_equal(fused_gemm(x, w, generation), theirs.numpy())
