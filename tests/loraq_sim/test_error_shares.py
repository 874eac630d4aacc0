"""Shares of the roundings in a row, against `explain`, which switches each of them off."""

import numpy as np
import pytest

import loraq_sim as lq
from loraq_sim.evaluate import RoundingWatch


@pytest.fixture(scope="module")
def layer(request):
    path = request.config.rootpath / "examples" / "tiny_pixart.pt"
    return lq.read_layer_dump(path)["transformer_blocks.0.attn1.to_q"]


@pytest.mark.parametrize("split", ["W4A4+W4A4r16", "W4A4+W6A6r8", "W4A4+W8A8r8"])
@pytest.mark.parametrize("rotate", [None, "hadamard"])
def test_a_rows_shares_are_those_that_switching_off_gives(layer, split, rotate):
    settings = {"preset": "fast", "tokens": 64, "seed": 3}
    parsed = lq.parse_split(split)
    solution = lq.solve(
        *(layer.weight,),
        main=parsed.main_weight,
        branch=parsed.branch_weight,
        rank=parsed.rank,
        preset="fast",
        rotate=rotate,
        activations=layer.activations,
    )
    row = lq.evaluate_layer(layer, split, "aie2", solution=solution, **settings)
    told = lq.explain_case(layer, split, "aie2", solution=solution, **settings)
    terms = {term["source"]: term for term in told.errors}
    # Switching off before or after the rounding of the output differs by less than that rounding.
    assert row["p_error_share"] == pytest.approx(terms["p_rounding"]["share"], abs=0.01)
    share = terms["main_activation"]["share"]
    assert row["activation_error_share"] == pytest.approx(share, abs=0.02)
    # fp16 is 2**-11 from no rounding at all.
    assert row["wide_p_error"] == pytest.approx(terms["p_rounding"]["error_without"], rel=0.01)
    assert row["p_format"] == str(parsed.branch_activation)


def test_without_a_branch_or_activations_there_is_nothing_to_tell(layer):
    row = lq.evaluate_layer(layer, "W4A4", "aie2", preset="fast", tokens=16)
    assert row["p_error_share"] is row["wide_p_error"] is row["p_format"] is None
    assert row["activation_error_share"] > 0.5
    bare = lq.Layer(name="bare", weight=layer.weight)
    row = lq.evaluate_layer(bare, "W4A4+W4A4r8", "aie2", preset="fast")
    assert row.get("p_error_share") is row.get("activation_error_share") is None


def test_a_wide_p_is_asked_of_narrow_ones_only(layer):
    datapath = {"p_format": "fp16"}
    row = lq.evaluate_layer(
        layer, "W4A4+W8A8r8", "aie2", preset="fast", tokens=16, datapath=datapath
    )
    assert row["p_format"] == "fp16"
    assert row["wide_p_error"] is None
    assert row["p_error_share"] == pytest.approx(0, abs=0.01)


def test_a_sample_of_rows_speaks_for_all(layer):
    few = lq.evaluate_layer(layer, "W4A4+W4A4r16", "aie2", preset="fast", tokens=64)
    many = lq.evaluate_layer(layer, "W4A4+W4A4r16", "aie2", preset="fast")
    assert many["tokens"] == 512
    assert many["p_error_share"] == pytest.approx(few["p_error_share"], abs=0.1)


def test_an_output_that_is_not_finite_has_no_shares():
    watch = RoundingWatch(4)
    found = watch.shares(np.full((4, 2), np.inf, np.float32), np.ones((4, 2)), np.inf)
    assert set(found.values()) == {None}
