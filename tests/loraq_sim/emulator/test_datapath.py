"""The layer data path against a scalar oracle: Python integers in a group, float32 steps after."""

import dataclasses
import itertools

import ml_dtypes
import numpy as np
import pytest

from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.float_overflow import rounded_tensor
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.scaled_gemm import scaled_gemm
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers import solve
from loraq_sim.split import parse_split


def matrix(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def clamp(value, bits):
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, value))


def wrap(value, bits):
    return (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def scalar_gemm(x, w, group, *, acc_bits, overflow, combine):
    """One output at a time: integer accumulator per group of K, then rounded combine steps."""
    rule = {"wrap": wrap, "saturate": clamp}[overflow]
    dtype = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16}[combine]
    m, k = x.shape
    y = np.zeros((m, w.shape[0]), dtype=np.float32)
    overflows = 0
    for i, j in itertools.product(range(m), range(w.shape[0])):
        total = np.float32(0)
        for g, start in enumerate(range(0, k, group)):
            acc = 0
            for t in range(start, min(start + group, k)):
                exact = acc + int(x.codes[i, t]) * int(w.codes[j, t])
                acc = rule(exact, acc_bits)
                overflows += acc != exact
            scale = np.float32(x.scales[i, g] * w.scales[j, g])
            partial = np.float32(np.float32(acc) * scale).astype(dtype).astype(np.float32)
            total = np.float32(total + partial).astype(dtype).astype(np.float32)
        y[i, j] = total
    return y, overflows


@pytest.mark.parametrize("combine", ["fp32", "bf16"])
@pytest.mark.parametrize(("acc_bits", "overflow"), [(32, "wrap"), (12, "wrap"), (12, "saturate")])
def test_scaled_gemm_matches_the_scalar_oracle_bit_for_bit(acc_bits, overflow, combine):
    x = quantize(matrix(1, (4, 70)), "int8/g32")
    w = quantize(matrix(2, (5, 70)), "int4/g32", rule="signed_mse")
    mac = MacArray(acc_bits=acc_bits, overflow=overflow)
    y, statistics = scaled_gemm(x, w, mac, combine)
    expected, overflows = scalar_gemm(
        x, w, 32, acc_bits=acc_bits, overflow=overflow, combine=combine
    )
    np.testing.assert_array_equal(y, expected)
    assert statistics.overflow_count == overflows
    assert (overflows > 0) == (acc_bits == 12)


def test_groups_of_different_sizes_split_k_where_either_scale_changes():
    x = quantize(matrix(1, (3, 60)), "int8/g24")
    w = quantize(matrix(2, (4, 60)), "int4/g20")
    y, _ = scaled_gemm(x, w, MacArray())
    # Exact value of the stored operands; float32 combines at most 6 partials with 3 roundings each.
    expected = x.dequantize().astype(np.float64) @ w.dequantize().astype(np.float64).T
    bound = np.abs(x.dequantize()).astype(np.float64) @ np.abs(w.dequantize()).astype(np.float64).T
    assert (np.abs(y - expected) <= 18 * np.finfo(np.float32).eps * bound).all()


@pytest.mark.parametrize("formats", [("int8/row", "int4/row"), ("int8/tensor", "int4/g16")])
def test_row_and_tensor_scales_are_one_group(formats):
    x, w = quantize(matrix(1, (3, 40)), formats[0]), quantize(matrix(2, (4, 40)), formats[1])
    y, _ = scaled_gemm(x, w, MacArray())
    np.testing.assert_allclose(y, x.dequantize() @ w.dequantize().T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p_format", ["branch", "fp16"])
@pytest.mark.parametrize("text", ["W4A4+W8A8r6", "W4A8+W8A8r6", "W4A4+W16A16r6", "W4A16+W6A8r6"])
def test_run_layer_adds_the_requantized_branch_to_the_main_branch(text, p_format):
    weight, x, bias = matrix(3, (24, 48)), matrix(4, (5, 48)), matrix(5, (24,))
    split = parse_split(text, group=16)
    solution = solve(
        weight, "svdquant", main=split.main_weight, branch=split.branch_weight, rank=split.rank
    )
    path = Datapath(p_format=p_format, out_format="fp32")
    out = run_layer(x, solution, split, path, bias=bias)

    def stored(values, fmt):
        return quantize(values, fmt).dequantize().astype(np.float64)

    p = stored(x, split.branch_activation) @ solution.right.dequantize().T
    p_stored = stored(
        p.astype(np.float32), split.branch_activation if p_format == "branch" else "fp16"
    )
    expected = stored(x, split.main_activation) @ solution.main.dequantize().T + bias
    expected = expected + p_stored @ solution.left.dequantize().T
    # A P element that lies on a rounding boundary may fall to the other side in float32: one step
    # of P times one element of L. All else is float32 summation noise.
    step = np.abs(p).max() / (127 if p_format == "branch" else 1024)
    slack = step * np.abs(solution.left.dequantize()).max() + 1e-5 * np.abs(expected).max()
    assert np.abs(out.y - expected).max() <= slack


def test_the_output_is_rounded_to_the_output_format():
    weight, x = matrix(3, (24, 48)), matrix(4, (5, 48))
    solution = solve(weight, "rtn", main="int4/g16")
    y32, y16 = (
        run_layer(x, solution, parse_split("W4A8", group=16), Datapath(out_format=fmt)).y
        for fmt in ("fp32", "bf16")
    )
    np.testing.assert_array_equal(y16, y32.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_smoothing_divides_the_activations():
    weight, x = matrix(3, (24, 48)), matrix(4, (5, 48))
    smooth = np.exp2(np.arange(48) % 5 - 2).astype(np.float32)
    solution = solve(weight, "rtn", main="int8/row", smooth=smooth)
    out = run_layer(x, solution, parse_split("W8A16"), Datapath(out_format="fp32"))
    stored = solution.reconstruct().astype(np.float64)
    # Powers of two divide exactly; fp16 activations round by 2**-11, float32 sums by far less.
    bound = (2**-11 + 48 * np.finfo(np.float32).eps) * (np.abs(x) @ np.abs(stored).T)
    assert (np.abs(out.y - x @ stored.T) <= bound).all()


def test_safe_width_is_the_narrowest_without_overflow():
    x = quantize(matrix(1, (6, 64)), "int8/g64")
    w = quantize(matrix(2, (7, 64)), "int8/g64")
    _, wide = scaled_gemm(x, w, MacArray())
    for bits, clean in ((wide.safe_acc_bits, True), (wide.safe_acc_bits - 1, False)):
        mac = MacArray(acc_bits=bits, overflow="saturate")
        _, statistics = scaled_gemm(x, w, mac)
        assert (statistics.overflow_count == 0) == clean


def test_sixteen_bit_operands_have_no_integer_statistics():
    x, w = quantize(matrix(1, (3, 40)), "fp16"), quantize(matrix(2, (4, 40)), "int4/g16")
    _, statistics = scaled_gemm(x, w, MacArray())
    assert statistics.safe_acc_bits is None
    assert statistics.overflow_count == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combine": "fp64"}, r"unknown combine rule 'fp64'"),
        ({"p_format": "int9"}, r"unknown format of P 'int9'; did you mean"),
        ({"out_format": "int8"}, r"must be element/granularity"),
    ],
)
def test_datapath_says_what_is_wrong(options, message):
    with pytest.raises(InputError, match=message):
        Datapath(**options)


def with_group_scales(values, group):
    """Stored codes as given, (rows, K) int8, one scale of 1 a group."""
    fmt = parse_format(f"int8/g{group}/fp32")
    codes = np.array(values, np.int8)
    scales = np.ones(fmt.scale_shape(codes.shape), np.float32)
    return QuantizedTensor(codes=codes, scales=scales, format=fmt)


@pytest.mark.parametrize("group", [2, 3, 4])
def test_the_first_overflow_is_counted_along_all_of_k(group):
    # Ones up to the ninth product; from there on every add leaves 8 bits.
    values = [1] * 8 + [127] * 4
    x, w = with_group_scales([values], group), with_group_scales([values], group)
    _, seen = scaled_gemm(x, w, MacArray(acc_bits=8, overflow="saturate"))
    assert seen.first_overflow_k == 8
    assert seen.overflow_count == 4
    two = with_group_scales([[1] * 8 + [11] * 4], group)
    _, merged = scaled_gemm(two, two, MacArray(acc_bits=8, overflow="wrap", products_per_add=2))
    # 11 * 11 = 121 fits 8 bits alone; with one more product, or 4 ones before it, it does not.
    expected = first_overflow([1] * 8 + [11] * 4, group, chunk=2)
    assert merged.first_overflow_k == expected


def first_overflow(values, group, chunk):
    for start in range(0, len(values), group):
        held, stop = 0, min(start + group, len(values))
        for k in range(start, stop, chunk):
            total = held + sum(v * v for v in values[k : min(k + chunk, stop)])
            held = wrap(total, 8)
            if held != total:
                return k
    return None


@pytest.mark.parametrize("rounding", ["floor", "ceil", "symmetric_inf", "conv_even"])
def test_p_becomes_codes_in_the_rounding_mode_of_the_data_path(rounding):
    split = parse_split("W4A8+W8A8r2", group=4)
    rng = np.random.default_rng(6)
    # Codes of X and R are exact (every group reaches 127), so that P is known to the last bit.
    x = rng.integers(-126, 127, (6, 8)).astype(np.float32)
    x[:, ::4] = 127
    weight = matrix(7, (5, 8))
    solution = solve(weight, "svdquant", main=split.main_weight, branch=split.branch_weight, rank=2)
    still = dataclasses.replace(solution.main, codes=np.zeros_like(solution.main.codes))
    solution = dataclasses.replace(solution, main=still)
    path = Datapath(rounding=rounding, out_format="fp32")
    y = run_layer(x, solution, split, path).y
    p = (x @ solution.right.dequantize().T.astype(np.float64)).astype(np.float32)
    scales = np.float16(np.abs(p).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
    how = {
        "floor": np.floor,
        "ceil": np.ceil,
        "symmetric_inf": lambda v: np.copysign(np.floor(np.abs(v) + 0.5), v),
        "conv_even": np.rint,
    }[rounding]
    codes = np.clip(how((p / scales).astype(np.float64)), -128, 127)
    expected = codes * scales @ solution.left.dequantize().T
    # Another mode moves codes by a whole step; float32 sums of two products by 1e-6 of the output.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("element", ["bfp16ebs8", "mxint8"])
def test_block_rounding_cuts_mantissas_of_block_formats_only(element):
    x = np.random.default_rng(8).standard_normal((5, 64)).astype(np.float32)
    cut = Datapath(block_rounding="floor")
    for fmt, mode in ((parse_format(element), "floor"), (parse_format("int8/g32"), "conv_even")):
        assert cut.rounding_to(fmt) == mode
        stored, _ = rounded_tensor("X", x, fmt, cut.rounding_to(fmt), cut.float_overflow)
        group = fmt.group_width(64)
        steps = x.reshape(5, -1, group) / stored.scales[..., None]
        want = np.floor(steps) if mode == "floor" else np.rint(steps)
        want = np.clip(want, fmt.element.lo, fmt.element.hi).reshape(5, 64)
        np.testing.assert_array_equal(stored.codes, want)
    with pytest.raises(InputError, match="'flor'"):
        Datapath(block_rounding="flor")
