"""Values beyond float formats, against NumPy's and ml_dtypes' own casts."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.datapath import Datapath, datapath_steps
from loraq_sim.emulator.float_overflow import FloatOverflow, rounded_float, rounded_tensor
from loraq_sim.emulator.walk import run_layer, walk_steps
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize

CASTS = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895313892515355e38}
# Halfway between the largest value and the next power of two: ties go to the even one, infinity.
HALFWAY = {"fp16": 65520.0, "bf16": float(np.uint32(0x7F7F8000).view(np.float32))}


@pytest.fixture
def exact():
    """A layer whose exact output is its bias: zero activations."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 32)).astype(np.float32)
    return lq.solve(weight, main="int8/g32", branch="int8/g32", rank=4, preset="fast")


def output(stored, bias, **path):
    split = lq.parse_split("W8A8+W8A8r4", group=32)
    x = np.zeros((3, 32), np.float32)
    return run_layer(x, stored, split, Datapath(**path), bias=np.array(bias, np.float32))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_outputs_overflow_where_the_cast_does_to_the_last_bit(exact, name):
    top, half = np.float32(LARGEST[name]), np.float32(HALFWAY[name])
    below = np.nextafter(half, np.float32(0))
    bias = [top, below, half, -below, -half, np.finfo(np.float32).max, 0.0, -top]
    out = output(exact, bias, out_format=name)
    with np.errstate(over="ignore"):
        expected = np.array(bias, np.float32).astype(CASTS[name]).astype(np.float32)
    np.testing.assert_array_equal(out.y, np.broadcast_to(expected, (3, 8)))
    assert np.isposinf(out.y[:, [2, 5]]).all()
    assert np.isneginf(out.y[:, 4]).all()
    (found,) = out.clipped
    assert (found.tensor, found.format, found.count, found.size) == ("y", name, 9, 24)
    assert (found.rule, found.first_row, out.clipped_count) == ("infinity", 0, 9)
    assert f"9 of 24 values of y overflow {name} to infinity (first: row 0)" == found.sentence()


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_kernel_that_clamps_gives_the_largest_value_and_counts_the_same(exact, name):
    half = np.float32(HALFWAY[name])
    bias = [half, -half, 1.0, 0, 0, 0, 0, 0]
    out = output(exact, bias, out_format=name, float_overflow={name: "saturate"})
    np.testing.assert_array_equal(out.y[0, :3], np.float32([LARGEST[name], -LARGEST[name], 1]))
    (found,) = out.clipped
    assert (found.count, found.rule) == (6, "saturate")
    assert "are clamped to the largest" in found.sentence()


def test_rounding_of_floats_is_that_of_the_casts():
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    for name, dtype in CASTS.items():
        with np.errstate(over="ignore", invalid="ignore"):
            expected = values.astype(dtype)
        rounded, clipped = rounded_float(values, name, "infinity")
        np.testing.assert_array_equal(*(a.astype(np.float32) for a in (rounded, expected)))
        wild = ~np.isfinite(expected) & np.isfinite(values)
        np.testing.assert_array_equal(wild if clipped is None else clipped, wild)
        clamped, _ = rounded_float(values, name, "saturate")
        assert np.isfinite(clamped[~np.isnan(values)]).all()
        np.testing.assert_array_equal(np.isnan(clamped), np.isnan(values))
    # e4m3 has no infinity: 464 is halfway between 448 and what 480 would be.
    values = np.array([448, 463, 464.5, -1e9], np.float32)
    nan, clipped = rounded_float(values, "e4m3", "infinity")
    np.testing.assert_array_equal(nan.astype(np.float32), np.float32([448, 448, np.nan, np.nan]))
    np.testing.assert_array_equal(clipped, [False, False, True, True])
    top, _ = rounded_float(values, "e4m3", "saturate")
    np.testing.assert_array_equal(top.astype(np.float32), np.float32([448, 448, 448, -448]))


def hand_made(left):
    """x = 1000 and 1 through R = 100 and 1: P = 1e5 and 100 in two rows."""
    one = parse_format("fp16")
    return {
        "main": quantize(np.zeros((2, 1), np.float32), "int8/g32"),
        "right": QuantizedTensor(codes=np.float16([[100]]), scales=None, format=one),
        "left": QuantizedTensor(codes=np.float16(left), scales=None, format=one),
        "smooth": None,
    }


class Stored:
    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_an_infinite_p_is_infinite_or_nan_behind_the_second_factor():
    split = lq.parse_split("W8A8+W16A16r1", group=32)
    x = np.array([[1000.0], [1.0]], np.float32)
    stored = Stored(**hand_made([[0.5], [0.0]]))
    path = Datapath(p_format="fp16", out_format="fp32")
    out = run_layer(x, stored, split, path)
    # 0.5 times infinity, 0 times infinity; the second row stays exact.
    np.testing.assert_array_equal(out.y, np.float32([[np.inf, np.nan], [50, 0]]))
    (found,) = out.clipped
    assert (found.tensor, found.format, found.count, found.first_row) == ("P", "fp16", 1, 0)
    clamped = dataclasses.replace(path, float_overflow={"fp16": "saturate"})
    np.testing.assert_array_equal(
        run_layer(x, stored, split, clamped).y, np.float32([[32752, 0], [50, 0]])
    )
    for wide in ("bf16", "branch"):
        assert np.isfinite(run_layer(x[1:], stored, split, Datapath(p_format=wide)).y).all()


def test_an_integer_p_of_infinite_sums_is_nan_in_its_group():
    split = lq.parse_split("W8A8+W8A8r4", group=32)
    x = np.array([[np.inf, 1.0, 2.0], [1.0, 1.0, 2.0]], np.float32)
    fmt = parse_format("int8/g2")
    stored, records = rounded_tensor("P", x, fmt, "conv_even", FloatOverflow())
    values = stored.dequantize()
    assert np.isnan(values[0, :2]).all()
    np.testing.assert_array_equal(values[:, 2], quantize(x[1:], fmt).dequantize()[0, 2])
    assert records == ()
    assert split.branch == "W8A8"


@pytest.mark.parametrize(("fmt", "hi"), [("int4/g4", 7), ("int8/row", 127), ("uint4/g4", 15)])
def test_scales_of_activations_beyond_fp16_make_their_group_nan(fmt, hi):
    x = np.ones((3, 8), np.float32)
    # The exact scale is 65519 in row 0, which rounds to 65504, and 65520 in row 2.
    x[0, 1], x[2, 1] = 65519.0 * hi, 65520.0 * hi
    stored, records = rounded_tensor("X_a", x, parse_format(fmt), "conv_even", FloatOverflow())
    scales = stored.scales
    assert scales[0, 0] == 65504.0
    assert np.isposinf(scales[2, 0])
    values = stored.dequantize()
    assert np.isfinite(values[:2]).all()
    group = 8 if fmt.endswith("row") else 4
    assert np.isnan(values[2, :group]).all()
    assert np.isfinite(values[2, group:]).all()
    (found,) = records
    assert (found.tensor, found.count, found.first_row) == ("scales of X_a", 1, 2)
    assert "1 of" in found.sentence()
    assert "scales of X_a overflow fp16 to infinity (first: row 2)" in found.sentence()
    top, records = rounded_tensor(
        "X_a", x, parse_format(fmt), "conv_even", FloatOverflow(fp16="saturate")
    )
    assert top.scales[2, 0] == 65504.0
    assert (records[0].count, records[0].rule) == (1, "saturate")
    np.testing.assert_array_equal(top.dequantize(), quantize(x, fmt).dequantize())


@pytest.mark.parametrize("fmt", ["mxint8", "mxfp4", "mxfp8_e4m3", "nvfp4", "bfp16ebs8"])
def test_blocks_with_a_value_that_is_not_finite_are_nan(fmt):
    x = np.ones((2, 64), np.float32)
    x[1, 3] = np.inf
    stored, records = rounded_tensor("P", x, parse_format(fmt), "conv_even", FloatOverflow())
    values = stored.dequantize()
    assert np.isnan(values[1, 3])
    if fmt == "nvfp4":
        # Its tensor scale sees every value.
        assert np.isnan(values).all()
    else:
        np.testing.assert_array_equal(values[0], np.ones(64))
        np.testing.assert_array_equal(values[1, 32:], np.ones(32))
    assert records == ()


def test_fp8_elements_are_rounded_to_the_largest_code_unless_fp8_overflows():
    # The OCP scale of amax 480 is 1: 480 lies beyond 448.
    x = np.zeros((1, 32), np.float32)
    x[0, :2] = 480, 448
    fmt = parse_format("mxfp8_e4m3")
    stored, records = rounded_tensor("y", x, fmt, "conv_even", FloatOverflow())
    assert (stored.dequantize()[0, 0], records) == (448.0, ())
    wild, (found,) = rounded_tensor("y", x, fmt, "conv_even", FloatOverflow(fp8_e4m3="infinity"))
    assert np.isnan(wild.dequantize()[0, 0])
    assert wild.dequantize()[0, 1] == 448.0
    assert (found.count, found.format) == (1, "mxfp8_e4m3")


@pytest.mark.parametrize(
    ("combine", "size"), [("fp16", 3e3), ("bf16", 1e24), ("fp32", 1e24), ("fp22", 1e24)]
)
def test_partial_sums_beyond_their_format_are_infinite_or_clamped(combine, size):
    rng = np.random.default_rng(5)
    x = (np.abs(rng.standard_normal((4, 64))) + 1).astype(np.float32)
    x[1:3] *= np.float32(size)
    w = np.where(np.arange(3)[:, None] == 1, -1, 1) * (1 + rng.random((3, 64)))
    w = (w * (1 if combine == "fp16" else 1e14)).astype(np.float32)
    split = lq.parse_split("W8A8", family="mxint")
    stored = lq.solve(w, method="rtn", main="mxint8")
    path = Datapath(combine=combine, out_format="fp32")
    y = run_layer(x, stored, split, path)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    top = {"fp16": 65504.0}.get(combine, 3.4e38)
    # The operands are rounded by less than 2 %, and every sum here is far from the limit.
    wild = np.abs(exact) > top
    assert 0 < wild.sum() < wild.size
    np.testing.assert_array_equal(np.isinf(y.y), wild)
    np.testing.assert_array_equal(np.sign(y.y), np.sign(exact))
    found = y.clipped[0]
    assert (found.tensor, found.format, found.count) == ("the sums Y", combine, wild.sum())
    assert found.first_row == 1
    name = "fp32" if combine == "fp22" else combine
    clamped = run_layer(
        x, stored, split, dataclasses.replace(path, float_overflow={name: "saturate"})
    )
    assert np.isfinite(clamped.y).all()
    assert (np.abs(clamped.y[wild]) > 0.99 * top).all()
    np.testing.assert_array_equal(clamped.y[~wild], y.y[~wild])
    assert clamped.clipped[0].count == wild.sum()


def test_steps_are_those_that_run_and_what_they_see_is_in_the_output():
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((16, 64)).astype(np.float32)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32)
    split = lq.parse_split("W4A4+W8A8r4", group=32)
    options = {"main": "int4/g32", "branch": "int8/g32", "rank": 4, "preset": "fast"}
    stored = lq.solve(weight, activations=x, smooth=0.5, rotate="hadamard:32", **options)
    path = Datapath()
    planned = datapath_steps(stored, split, path, bias=True)
    assert [step.name for step in planned] == [
        *("smooth", "rotate", "round_main", "main", "round_branch", "down", "round_p", "up"),
        *("combine", "bias", "output"),
    ]
    walked = list(walk_steps(x, stored, split, path, bias))
    assert [done.step for done in walked] == list(planned)
    np.testing.assert_array_equal(
        walked[-1].result.dequantize(), run_layer(x, stored, split, path, bias=bias).y
    )
    shared = lq.parse_split("W4A8+W8A8r4", group=32)
    plain = lq.solve(weight, **options)
    names = [step.name for step in datapath_steps(plain, shared, path)]
    assert names == ["round_main", "main", "down", "round_p", "up", "combine", "output"]
    alone = lq.solve(weight, method="rtn", main="int4/g32")
    names = [step.name for step in datapath_steps(alone, lq.parse_split("W4A8"), path)]
    assert names == ["round_main", "main", "output"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"fp61": "infinity"}, r"unknown format of float_overflow 'fp61'; did you mean 'fp16'"),
        (
            {"fp16": "infinite"},
            r"unknown overflow rule of fp16 'infinite'; did you mean 'infinity'",
        ),
        ("saturate", r"float_overflow must map formats to rules, such as .*got 'saturate'"),
    ],
)
def test_rules_say_what_is_wrong(rules, message):
    with pytest.raises(lq.InputError, match=message):
        Datapath(float_overflow=rules)


def test_no_number_of_the_oracle_is_infinite_by_accident():
    assert math.isfinite(LARGEST["bf16"])
    assert HALFWAY["bf16"] > LARGEST["bf16"]
