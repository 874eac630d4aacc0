"""Errors switched off in turn: the ends are the emulated and the exact layer, the shares add up."""

import dataclasses
import math

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.walk import run_layer
from loraq_sim.evaluate import reference_output, solve_split
from loraq_sim.explain.switchable import (
    BRANCH_SOURCES,
    FEEDBACK_SOURCES,
    SOURCES,
    SwitchableLayer,
    float_branch,
)
from loraq_sim.explain.terms import INTERACTION, output_terms, weight_terms

NARROW = lq.MacArray(acc_bits=12, overflow="saturate", products_per_add=4)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(11)
    activations = rng.standard_normal((24, 128)).astype(np.float32)
    activations[:, 5] *= 8
    return lq.Layer(
        name="a",
        weight=rng.standard_normal((96, 128)).astype(np.float32)
        * rng.uniform(0.2, 2, (96, 1)).astype(np.float32),
        bias=rng.standard_normal(96).astype(np.float32),
        activations=activations,
    )


def switchable(layer, text, path, *, family="int", method="lqer", scale=1, **options):
    layer = louder(layer, scale)
    split = lq.parse_split(text, family=family, group=32)
    solution = solve_split(layer, split, method=method, preset="fast", seed=0, **options)
    return SwitchableLayer(layer, solution, split, path, layer.activations), solution, split


LOUD = {"fp16": "saturate"}
CASES = {
    "no branch": ("W4A4", Datapath(), {}),
    "branch": ("W4A4+W8A8r8", Datapath(), {}),
    "shared activations": ("W4A8+W8A8r8", Datapath(combine="bf16", out_format="bf16"), {}),
    "float branch": ("W4A8+W16A16r8", Datapath(), {}),
    "narrow accumulator": ("W4A8+W8A8r8", Datapath(mac=NARROW), {}),
    "fp16 P, toward zero": (
        "W4A4+W6A6r8",
        Datapath(p_format="fp16", rounding="symmetric_floor"),
        {},
    ),
    "aligned shifts": ("W4A4+W8A8r8", Datapath(combine="shift"), {"family": "mxint"}),
    "small floats": ("W4A4+W8A8r8", Datapath(combine="fp22"), {"family": "mxfp"}),
    "rotated": ("W4A4+W8A8r8", Datapath(), {"smooth": 0.5, "rotate": "hadamard:32"}),
    "smoothed": ("W4A4+W8A8r8", Datapath(), {"smooth": 0.5}),
    "clamped output": (
        "W4A4+W8A8r8",
        Datapath(out_format="fp16", float_overflow=LOUD),
        {"scale": 2e3},
    ),
    "infinite output": ("W4A4+W8A8r8", Datapath(out_format="fp16"), {"scale": 2e3}),
    "infinite P": (
        "W4A4+W8A8r8",
        Datapath(p_format="fp16", out_format="fp32"),
        {"scale": 3e4},
    ),
    "infinite scales": ("W4A4+W8A8r8", Datapath(out_format="fp32"), {"scale": 5e4}),
    "residual input": ("W4A4~W8A8r8f3", Datapath(), {"rotate": "hadamard:32"}),
    "all for the input": ("W4A4~W6A6r4f4", Datapath(feedback_p_format="int4"), {}),
    "narrow residual input": ("W4A4~W8A8r8f3", Datapath(mac=NARROW), {}),
    "infinite P_f": (
        "W4A4~W8A8r8f3",
        Datapath(p_format="fp16", out_format="fp32"),
        {"scale": 3e4},
    ),
    "int8 output": ("W4A4+W8A8r8", Datapath(out_format="int8/row"), {}),
}


def _sources_of(split):
    rank, spent = split.ranks(96, 128)
    missing = BRANCH_SOURCES if rank == spent else ()
    return set(SOURCES) - {*missing, *(() if spent else FEEDBACK_SOURCES)}


def louder(layer, scale):
    return dataclasses.replace(layer, activations=layer.activations * np.float32(scale))


@pytest.mark.parametrize("name", CASES)
def test_with_all_switches_on_the_output_is_that_of_the_emulated_data_path(layer, name):
    text, path, options = CASES[name]
    parts, solution, split = switchable(layer, text, path, **options)
    loud = louder(layer, options.get("scale", 1))
    emulated = run_layer(loud.activations, solution, split, path, bias=layer.bias)
    np.testing.assert_array_equal(parts.output(parts.sources), emulated.y)
    assert parts.overflows == emulated.statistics.overflow_count
    if name == "narrow accumulator":
        assert parts.overflows > 0


@pytest.mark.parametrize("name", CASES)
def test_with_all_switches_off_it_is_that_of_the_full_precision_layer(layer, name):
    text, path, options = CASES[name]
    parts, _, _ = switchable(layer, text, path, **options)
    loud = louder(layer, options.get("scale", 1))
    reference = reference_output(layer, loud.activations)
    # Float64 sums of 128 + 8 products of normal numbers.
    np.testing.assert_allclose(
        parts.output(()), reference, rtol=0, atol=1e-11 * abs(reference).max()
    )


@pytest.mark.parametrize("name", CASES)
def test_shares_add_up_and_errors_are_those_of_the_outputs(layer, name):
    text, path, options = CASES[name]
    parts, _, split = switchable(layer, text, path, **options)
    reference = reference_output(layer, louder(layer, options.get("scale", 1)).activations)
    rows, summary = output_terms(parts, reference)
    assert [row["source"] for row in rows] == [
        *(s for s in SOURCES if s in _sources_of(split)),
        INTERACTION,
    ]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=1e-12)
    if name.startswith("infinite"):
        assert summary["total_error"] == math.inf
        return
    whole = np.linalg.norm(parts.output(parts.sources) - reference) / np.linalg.norm(reference)
    assert summary["total_error"] == pytest.approx(whole, rel=1e-12)
    assert summary["unexplained_error"] < 1e-12
    alone = [row["error_alone"] for row in rows[:-1]]
    assert summary["root_sum_of_squares"] == pytest.approx(np.linalg.norm(alone), rel=1e-12)


def shares(layer, text, path, **options):
    parts, _, _ = switchable(layer, text, path, **options)
    x = louder(layer, options.get("scale", 1)).activations
    rows, _ = output_terms(parts, reference_output(layer, x))
    return {row["source"]: row for row in rows}


def test_the_source_that_was_made_worse_has_the_larger_share(layer):
    base = shares(layer, "W4A8+W8A8r8", Datapath())
    assert base["accumulator"]["share"] == base["accumulator"]["error_alone"] * 0
    narrow = shares(layer, "W4A8+W8A8r8", Datapath(mac=NARROW))
    assert narrow["accumulator"]["share"] > 0.3
    coarse = shares(layer, "W4A4+W8A8r8", Datapath())
    assert coarse["main_activation"]["share"] > 5 * base["main_activation"]["share"]
    branch = shares(layer, "W4A8+W3A8r8", Datapath())
    assert branch["branch_weight"]["error_alone"] > 5 * base["branch_weight"]["error_alone"]
    inputs = shares(layer, "W4A8+W8A3r8", Datapath())
    assert inputs["branch_activation"]["error_alone"] > 5 * base["branch_activation"]["error_alone"]
    p = shares(layer, "W4A8+W8A8r8", Datapath(p_format="int3"))
    assert p["p_rounding"]["error_alone"] > 5 * base["p_rounding"]["error_alone"]
    output = shares(layer, "W4A8+W8A8r8", Datapath(out_format="int5/row"))
    assert output["output_rounding"]["share"] > 10 * base["output_rounding"]["share"]
    sums = shares(layer, "W4A8+W8A8r8", Datapath(combine="bf16"))
    assert sums["combine"]["error_alone"] > 100 * base["combine"]["error_alone"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("infinite output", "y"), ("infinite P", "P"), ("infinite scales", "scales of X_a")],
)
def test_an_infinite_error_is_due_to_what_left_its_format(layer, name, tensor):
    text, path, options = CASES[name]
    parts, _, _ = switchable(layer, text, path, **options)
    assert tensor in [found.tensor for found in parts.clipped]
    rows, _ = output_terms(
        parts, reference_output(layer, louder(layer, options["scale"]).activations)
    )
    told = {row["source"]: row for row in rows}
    assert told["float_overflow"]["share"] == 1.0
    assert told["p_rounding"]["share"] == 0.0
    # Without it the error is that of a layer of usual size: floats know no scale but the limits.
    usual, _, _ = switchable(layer, text, path)
    _, summary = output_terms(usual, reference_output(layer, layer.activations))
    assert told["float_overflow"]["error_without"] == pytest.approx(summary["total_error"], rel=0.2)
    assert told["float_overflow"]["error_alone"] == math.inf
    assert told["main_activation"]["error_alone"] < 1


def test_clamped_values_are_a_source_of_their_own_and_not_rounding(layer):
    text, path, options = CASES["clamped output"]
    clamped = shares(layer, text, path, **options)
    usual = shares(layer, text, Datapath(out_format="fp16"))
    assert usual["float_overflow"]["share"] == 0.0
    assert usual["float_overflow"]["error_alone"] < 1e-12
    assert clamped["float_overflow"]["share"] > 0.5
    assert clamped["output_rounding"]["error_alone"] < 1e-3


def test_weight_terms_are_orthogonal_parts_of_the_weight_error(layer):
    for text, smooth in (("W4A4", None), ("W4A4+W3A8r8", None), ("W4A4+W8A8r8", 0.5)):
        split = lq.parse_split(text, group=32)
        solution = solve_split(
            layer, split, method="svdquant", preset="fast", seed=0, smooth=smooth
        )
        rows, summary = weight_terms(dataclasses.replace(layer, activations=None), solution)
        # The solution measures in float32.
        assert summary["total_error"] == pytest.approx(solution.weight_error, rel=1e-4)
        assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=1e-12)
        assert rows[-1]["share"] == pytest.approx(0.0, abs=1e-9)
        if not split.has_branch:
            assert [row["source"] for row in rows] == ["main_weight", INTERACTION]
            assert rows[0]["error_without"] == 0.0


def test_the_float_branch_fits_better_than_the_stored_one_and_lies_near_it(layer):
    for bits, near in ((8, 0.05), (4, 0.25)):
        split = lq.parse_split(f"W4A4+W{bits}A8r8", group=32)
        solution = solve_split(layer, split, method="lqer", preset="fast", seed=0)
        branch = float_branch(layer, solution)
        residual = layer.weight.astype(np.float64) - solution.main.dequantize()
        stored = solution.left.dequantize().astype(np.float64) @ solution.right.dequantize()
        best = np.linalg.norm(np.linalg.svd(residual, compute_uv=False)[8:])
        fit = np.linalg.norm(residual - branch.product())
        assert best <= fit < np.linalg.norm(residual - stored)
        # Roundings of some 1 % and 10 % of each factor, and a small step toward a better fit.
        assert np.linalg.norm(branch.product() - stored) < near * np.linalg.norm(stored)
        rows = solution.right.dequantize()
        assert np.linalg.norm(branch.right - rows) < near * np.linalg.norm(rows)


def test_a_zero_weight_has_no_error(layer):
    zero = dataclasses.replace(layer, weight=np.zeros((96, 128), np.float32))
    rows = shares(zero, "W4A4+W8A8r4", Datapath(out_format="fp32"))
    assert rows["main_weight"]["error_alone"] == 0.0
