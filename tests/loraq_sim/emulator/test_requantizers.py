"""Requantizers against exact Python integers and Fractions, jitted and plain; bad input."""

import math
from fractions import Fraction

import numpy as np
import pytest

from loraq_sim.emulator.gemm import emulate_gemm_requantize
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.requantizers import (
    REQUANTIZE_RULES,
    DoubleScale,
    FixedPoint,
    FloatSteps,
    NvdlaStages,
    Srs,
    XmosTransform,
)
from loraq_sim.emulator.runtimes import (
    dynamic_quantize_linear,
    list_runtimes,
    runtime_of,
    runtime_requantizer,
)
from loraq_sim.errors import InputError
from loraq_sim.kernels import shift_round as kernels

N = 5
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# The oracle: exact values, one at a time.


def up(x):
    return math.floor(x + Fraction(1, 2))


def away(x):
    return int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x))


def clip(x, lo, hi):
    return min(max(x, lo), hi)


def f32(x):
    """A Fraction rounded to float32 once, as a Fraction (float64 first where it is exact)."""
    if x == 0:
        return Fraction(0)
    exponent = max(math.floor(math.log2(abs(x))), -126)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent and exponent > -126:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(x / unit) * unit


def exact_fixed(by, acc, multiplier, shift):
    if by == "single_rounding":
        return clip(up(Fraction(acc * multiplier, 2**shift)), INT32_MIN, INT32_MAX)
    if by == "reduced_multiplier":
        reduced = min((multiplier + 2**15) // 2**16, 0x7FFF)
        return clip(up(Fraction(acc * reduced, 2 ** (shift - 16))), INT32_MIN, INT32_MAX)
    left, right = max(31 - shift, 0), max(shift - 31, 0)
    high = up(Fraction(acc * 2**left * multiplier, 2**31))
    rounding = away if by == "gemmlowp" else up
    return rounding(Fraction(high, 2**right))


def exact_float(acc, steps, j):
    value = f32(Fraction(acc))
    for name, operand in steps:
        term = np.ravel(operand)[j % np.size(operand)]
        term = Fraction(float(term if name == "fused_add" else np.float32(term)))
        value = f32(value * term if name == "multiply" else value + term)
    return round(value)


def exact_nvdla(acc, q, j):
    def at(values):
        return int(np.broadcast_to(values, (N,))[j])

    whole = acc >> q.truncate
    # 16 bits below the point decide; a negative tie goes down, which is away from zero.
    rest = ((acc - (whole << q.truncate)) << 16) >> q.truncate
    x = whole + int(rest > 2**15 or (rest == 2**15 and acc >= 0))
    x = clip(x, INT32_MIN, INT32_MAX)
    x = away(Fraction((x + at(q.bias)) * at(q.multiplier), 2 ** at(q.shift)))
    x = clip(x, INT32_MIN, INT32_MAX)
    x = away(Fraction((x - q.offset) * q.scale, 2**q.out_shift))
    return clip(x, -(2**16), 2**16 - 1)


def exact_xmos(acc, q, j):
    def at(values):
        return int(np.broadcast_to(values, (N,))[j])

    def sat(x):
        return clip(x, -32767, 32767)

    def shifted(x, shift):
        if shift >= 15:
            return -1 if x < 0 else 0
        return sat(up(Fraction(x, 2**shift)) if shift > 0 else x * 2**-shift)

    first = at(q.initial_shift)
    x = sat(up(Fraction(acc, 2**first))) if first > 0 else shifted(sat(acc), first)
    x = sat(up(Fraction(x * at(q.multiplier), 2**14)))
    x = shifted(sat(x + at(q.bias)), q.final_shift)
    return up(Fraction(x, 2**8))


def expected(q, acc, one):
    zero, lo, hi = q._finish()
    out = [
        [clip(one(int(acc[i, j]), j) + zero, lo, hi) for j in range(acc.shape[1])]
        for i in range(len(acc))
    ]
    return np.array(out).reshape(acc.shape)


def accumulators(rng, bits, rows=24):
    """Random magnitudes of up to `bits` bits, both ends and small values."""
    size = (rows, N)
    magnitude = 2.0 ** rng.uniform(0, bits - 1, size)
    acc = (magnitude * rng.choice([-1, 1], size)).astype(np.int64)
    acc[0] = -(2 ** (bits - 1))
    acc[1] = 2 ** (bits - 1) - 1
    acc[2] = np.arange(N) - 2
    return acc


def output_of(rng, signed_only=False):
    bits = int(rng.choice([4, 8, 16]))
    signed = signed_only or bool(rng.integers(2))
    lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    ends = sorted(int(v) for v in rng.integers(lo, hi + 1, 2))
    return {
        "out_bits": bits,
        "signed": signed,
        "zero_point": int(rng.integers(lo, hi + 1)),
        "clamp": tuple(ends) if rng.integers(2) else None,
    }


def columns(rng, low, high):
    """One integer or one for each column."""
    return rng.integers(low, high + 1, (N,) if rng.integers(2) else ())


@pytest.mark.parametrize("by", ["gemmlowp", "ruy", "single_rounding", "reduced_multiplier"])
@pytest.mark.parametrize("seed", range(12))
def test_fixed_point_is_exact_integer_arithmetic(by, seed):
    rng = np.random.default_rng([seed, *by.encode()])
    bits = {"reduced_multiplier": 48, "single_rounding": [32, 64][seed % 2]}.get(by, 32)
    low = {"reduced_multiplier": 24, "single_rounding": 1}.get(by, 31)
    multiplier = columns(rng, 2**30, 2**31 - 1) if seed % 3 else columns(rng, 0, 2**16)
    if seed % 4 == 0:
        multiplier = np.array([0, 1, 2**30, 2**31 - 1, 2**31 - 2**16])
    q = FixedPoint(by=by, multiplier=multiplier, shift=columns(rng, low, 62), **output_of(rng))
    acc = accumulators(rng, bits)
    m, s = (np.broadcast_to(v, (N,)) for v in (q.multiplier, q.shift))
    want = expected(q, acc, lambda x, j: exact_fixed(by, x, int(m[j]), int(s[j])))
    np.testing.assert_array_equal(q(acc), want)


def test_left_shifts_of_fixed_point_are_exact_or_refused():
    for by in ("gemmlowp", "ruy"):
        q = FixedPoint(by=by, multiplier=[2**30, 3 * 2**29], shift=[27, 30], out_bits=16)
        acc = np.array([[-1000, 777], [5, -3]])
        scales = [Fraction(2**30, 2**27), Fraction(3 * 2**29, 2**30)]
        want = [[up(int(v) * s) for v, s in zip(row, scales, strict=True)] for row in acc]
        np.testing.assert_array_equal(q(acc), want)
        with pytest.raises(InputError, match="must fit int32"):
            q(np.array([[2**28, 0]]))


@pytest.mark.parametrize("seed", range(12))
def test_float_steps_round_every_step_to_float32(seed):
    rng = np.random.default_rng([seed, 77])
    scale = rng.uniform(0.001, 0.9, N).astype(np.float32)
    if seed % 3 == 0:
        scale = np.float32(0.5) ** rng.integers(1, 9, N)
    steps = (("multiply", scale), ("multiply", np.float32(0.37)), ("add", np.float32(3)))[
        seed % 3 :
    ]
    q = FloatSteps(steps=steps, **output_of(rng))
    acc = accumulators(rng, [26, 40][seed % 2])
    want = expected(q, acc, lambda x, j: exact_float(x, steps, j))
    np.testing.assert_array_equal(q(acc), want)


def test_a_fused_add_rounds_the_exact_sum_once():
    # 2**24 + 1 lies halfway between two float32; a term that float64 swallows decides.
    for sign in (-1, 1):
        q = FloatSteps(steps=(("fused_add", 1 + sign * 2.0**-40),), out_bits=32)
        assert q([[2**24]])[0, 0] == (2**24 + 2 if sign > 0 else 2**24)
    q = FloatSteps(steps=(("fused_add", 1.0),), out_bits=32)
    assert q([[2**24]])[0, 0] == 2**24
    rng = np.random.default_rng(9)
    terms = rng.standard_normal(N) * 2.0 ** rng.integers(-20, 20, N)
    terms[0] = 0.5 + 2.0**-45
    steps = (("fused_add", terms), ("multiply", np.float32(0.001)))
    q = FloatSteps(steps=steps, out_bits=16)
    acc = accumulators(rng, 26)
    np.testing.assert_array_equal(q(acc), expected(q, acc, lambda x, j: exact_float(x, steps, j)))


def test_float_steps_beyond_int32_clamp_or_give_the_lowest_code():
    steps = (("multiply", np.float32(2.0**20)),)
    acc = np.array([[2**20], [-(2**20)], [1]])
    got = FloatSteps(steps=steps, signed=False, zero_point=7)(acc)
    np.testing.assert_array_equal(got, [[255], [0], [255]])
    got = FloatSteps(steps=steps, signed=False, zero_point=7, beyond_int32="lowest")(acc)
    np.testing.assert_array_equal(got, [[0], [0], [255]])
    huge = FloatSteps(steps=(("multiply", 3e38), ("multiply", 3e38)), out_bits=16)
    np.testing.assert_array_equal(huge([[1], [-1], [0]]), [[32767], [-32768], [0]])


@pytest.mark.parametrize("seed", range(8))
def test_double_scale_rounds_half_away_from_zero(seed):
    rng = np.random.default_rng([seed, 5])
    scale = 2.0 ** -rng.integers(1, 9, N) if seed % 2 else rng.uniform(1e-6, 0.1, N)
    q = DoubleScale(scale=scale, **output_of(rng))
    acc = accumulators(rng, [32, 50][seed % 2])
    # The float64 product is what rounds: take it as it is.
    want = expected(q, acc, lambda x, j: away(Fraction(float(np.float64(x) * scale[j]))))
    np.testing.assert_array_equal(q(acc), want)


@pytest.mark.parametrize("seed", range(12))
def test_nvdla_stages_are_exact(seed):
    rng = np.random.default_rng([seed, 34])
    output = {"out_bits": int(rng.choice([8, 16]))}
    q = NvdlaStages(
        truncate=int(rng.integers(0, 32)) if seed % 2 else int(rng.integers(0, 8)),
        bias=columns(rng, -(2**20), 2**20),
        multiplier=columns(rng, -(2**15), 2**15 - 1),
        shift=columns(rng, 0, 20),
        offset=int(rng.integers(-1000, 1000)),
        scale=int(rng.integers(-(2**15), 2**15)),
        out_shift=int(rng.integers(0, 40)),
        **output,
    )
    acc = accumulators(rng, 34)
    want = expected(q, acc, lambda x, j: exact_nvdla(x, q, j))
    np.testing.assert_array_equal(q(acc), want)


@pytest.mark.parametrize("seed", range(12))
def test_xmos_transform_is_exact(seed):
    rng = np.random.default_rng([seed, 16])
    q = XmosTransform(
        initial_shift=columns(rng, -16, 31) if seed % 2 else columns(rng, 0, 12),
        multiplier=columns(rng, -(2**15), 2**15 - 1),
        bias=columns(rng, -(2**15), 2**15 - 1),
        final_shift=int(rng.integers(-16, 32)) if seed % 3 else int(rng.integers(-2, 4)),
    )
    acc = accumulators(rng, 32)
    want = expected(q, acc, lambda x, j: exact_xmos(x, q, j))
    np.testing.assert_array_equal(q(acc), want)


@pytest.mark.parametrize("by", ["ruy", "single_rounding", "reduced_multiplier", *"fdnx"])
def test_compiled_and_plain_loops_agree(by, monkeypatch):
    rng = np.random.default_rng(21)
    kinds = {
        "f": FloatSteps(steps=(("multiply", 0.01), ("add", 2.5), ("fused_add", 0.1)), out_bits=16),
        "d": DoubleScale(scale=0.013),
        "n": NvdlaStages(truncate=3, multiplier=-77, shift=9, offset=5, scale=3),
        "x": XmosTransform(initial_shift=[5, -2, 0, 9, 20], multiplier=9000, bias=-40),
    }
    q = kinds.get(by) or FixedPoint(by=by, multiplier=2**30 + 12345, shift=41, out_bits=16)
    acc = accumulators(rng, 32)
    compiled = q(acc)
    for name in kernels.__all__:
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, getattr(kernel, "py_func", kernel))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(q(acc), compiled)


def test_rules_have_names_and_shapes_are_kept():
    kinds = [
        Srs(shift=3),
        *(FixedPoint(by=b, multiplier=2**30, shift=40) for b in REQUANTIZE_RULES[1:5]),
        FloatSteps(steps=(("multiply", 0.5),)),
        DoubleScale(scale=0.5),
        NvdlaStages(),
        XmosTransform(),
    ]
    assert tuple(kind.rule for kind in kinds) == REQUANTIZE_RULES
    for kind in kinds:
        assert kind(np.zeros((2, 0, 3), np.int32)).shape == (2, 0, 3)
        assert kind(np.int32(0)).shape == ()
        assert kind(np.zeros((2, 3), np.int64)).dtype == np.int8


@pytest.mark.parametrize("name", list_runtimes())
@pytest.mark.parametrize("k", [0, 1, 63, 1000])
def test_fused_call_is_the_two_steps(name, k):
    rng = np.random.default_rng([k, *name.encode()])
    a = rng.integers(-128, 128, (3, k)).astype(np.int8)
    w = rng.integers(-127, 128, (N, k)).astype(np.int8)
    bias = rng.integers(-1000, 1000, N)
    q = runtime_requantizer(
        name, a_scale=0.02, w_scale=rng.uniform(0.01, 0.02, N), out_scale=0.5 + k / 100
    )
    mac = MacArray(acc_bits=32)
    acc = a.astype(np.int64) @ w.astype(np.int64).T + bias
    for weight in (w, pack_weight(w)):
        got = emulate_gemm_requantize(a, weight, mac, q, bias=bias)
        np.testing.assert_array_equal(got, q(acc))
        assert got.dtype == np.int8
    assert q.rule == runtime_of(name).rule


def test_fused_call_overflows_before_it_rounds():
    ones = np.full((1, 300), 127, np.int8)
    q = FloatSteps(steps=(("multiply", 2.0**-8),), out_bits=16)
    got = emulate_gemm_requantize(ones, ones, MacArray(acc_bits=20, overflow="saturate"), q)
    assert got[0, 0] == 2048
    srs = Srs(shift=8, out_bits=16, rounding="floor")
    got = emulate_gemm_requantize(ones, ones, MacArray(acc_bits=20, overflow="saturate"), srs)
    assert got[0, 0] == 2047


def test_a_real_bias_enters_where_the_runtime_adds_it():
    acc = np.array([[3]])
    scales = {"a_scale": 1.0, "w_scale": [1.0], "out_scale": 2.0, "bias": [0.5], "signed": False}
    # (3 + 0.5) / 2 = 1.75; with the zero point first 1.75 + 3 rounds the same way.
    assert runtime_requantizer("fbgemm", **scales)(acc) == 2
    # 1.5 rounds to 2 and 4.5 to 4: the zero point before the rounding changes a tie.
    tie = scales | {"bias": [0.0], "zero_point": 3}
    assert runtime_requantizer("fbgemm", **tie)(acc) == 5
    assert runtime_requantizer("onednn", **tie)(acc) == 4


def test_a_zero_tensor_has_scale_one_and_empty_tensors_have_codes():
    codes, scale, zero = dynamic_quantize_linear(np.zeros((2, 3)))
    assert (scale, zero) == (1, 0)
    assert not codes.any()
    assert dynamic_quantize_linear(np.zeros((0, 3)))[0].shape == (0, 3)
    codes, scale, zero = dynamic_quantize_linear([-1.0, 0.0, 4.0])
    assert scale == np.float32(5) / np.float32(255)
    np.testing.assert_array_equal(codes, [0, 51, 255])
    assert zero == 51


SCALES = {"a_scale": 0.1, "w_scale": 0.1, "out_scale": 1.0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: runtime_of("onnxrt"), "unknown runtime 'onnxrt'; did you mean 'onnxruntime'"),
        (lambda: runtime_requantizer("ruy", **SCALES | {"w_scale": [0.1, -1]}), "w_scale must be"),
        (lambda: runtime_requantizer("ruy", **SCALES | {"a_scale": np.nan}), "a_scale must be"),
        (lambda: runtime_requantizer("ruy", **SCALES | {"a_scale": [1, 2]}), "a_scale must be one"),
        (lambda: runtime_requantizer("ruy", **SCALES, bias=[1.0]), "ruy adds integers .* bias="),
        (lambda: runtime_requantizer("xnnpack", **SCALES | {"out_scale": 1e-9}), "below 256, got"),
        (lambda: FixedPoint(by="gemlowp"), "unknown fixed-point rule 'gemlowp'"),
        (lambda: FixedPoint(multiplier=-1)([[1]]), "multiplier must be from 0 to 2147483647"),
        (lambda: FixedPoint(shift=[1, 2])([[1]]), r"shift has shape \(2,\)"),
        (lambda: FixedPoint(by="ruy")([[2**31]]), "acc must fit int32, got 2147483648"),
        (
            lambda: FixedPoint(by="reduced_multiplier")([[2**47]]),
            "acc must fit 48 bits, got 140737488355328; .*single_rounding",
        ),
        (lambda: FloatSteps(steps=(("divide", 2),)), "unknown float step 'divide'"),
        (lambda: FloatSteps(steps=(("multiply", np.inf),)), "multiply must be finite"),
        (lambda: FloatSteps(beyond_int32="wrap"), "unknown beyond_int32 'wrap'"),
        (lambda: DoubleScale(scale=np.nan), "scale must be finite"),
        (lambda: Srs(shift=1, zero_point=3), "srs has no zero point"),
        (lambda: NvdlaStages(zero_point=1), "NVDLA gives signed codes"),
        (lambda: NvdlaStages(truncate=32), "truncate must be an integer from 0 to 31, got 32"),
        (lambda: NvdlaStages()([[2**33]]), "acc must fit 34 bits, got 8589934592"),
        (lambda: XmosTransform(out_bits=16), "XMOS gives int8"),
        (lambda: XmosTransform(bias=2**15)([[1]]), "bias must be from -32768 to 32767"),
        (lambda: FloatSteps(zero_point=200), "zero_point must be an integer from -128 to 127"),
        (lambda: dynamic_quantize_linear([np.inf]), "x must be finite"),
        (
            lambda: emulate_gemm_requantize([[1]], [[1]], MacArray(), 0.5),
            "requantizer must be a Requantizer, got 0.5; make one with",
        ),
    ],
)
def test_bad_input_gets_one_line_with_value_and_rule(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
