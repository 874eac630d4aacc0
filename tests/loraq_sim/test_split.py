"""Precision splits as text."""

import dataclasses
import types

import numpy as np
import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.layers import Layer
from loraq_sim.split import parse_split


def test_split_without_branch_has_no_branch_formats():
    split = parse_split("w4a8")
    assert split.text == "W4A8"
    assert not split.has_branch
    assert str(split.main_weight) == "int4/g64/fp16"
    assert str(split.main_activation) == "int8/g64/fp16"
    assert split.branch_weight is None
    assert split.rank is None
    assert split.budget is None


def test_split_with_rank_names_both_branches():
    split = parse_split("W4A4+W8A6r48", group=32)
    assert split.text == "W4A4+W8A6r48"
    assert (split.main, split.branch, split.rank) == ("W4A4", "W8A6", 48)
    assert str(split.branch_weight) == "int8/g32/fp16"
    assert str(split.branch_activation) == "int6/g32/fp16"


def test_split_with_budget_keeps_it_for_the_solver():
    split = parse_split(" W4A4 + W8A8 @ fp16r32 ")
    assert split.text == "W4A4+W8A8@fp16r32"
    assert split.rank is None
    assert split.budget == "fp16@32"


def test_sixteen_bits_are_stored_as_fp16():
    split = parse_split("W4A16+W16A16r8")
    assert str(split.main_activation) == "fp16"
    assert str(split.branch_weight) == "fp16"


def test_canonical_text_parses_to_the_same_split():
    for text in ("W4A4", "W4A8+W16A16r32", "W4A4+W8A8@fp16r32"):
        assert parse_split(parse_split(text).text) == parse_split(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("W4", r"split 'W4' is not understood; write for example W4A4"),
        ("W4A4+W8A8", r"not understood"),
        ("W4A4+W8A8r", r"not understood"),
        ("W4A4r8", r"not understood"),
        ("", r"not understood"),
        ("W9A4", r"widths of family 'int' must be 2, .*, 8 or 16 bits, got 9"),
        ("W4A4+W8A1r4", r"got 1"),
        ("W4A4+W8A8r0", r"rank must be at least 1; write W4A4 instead"),
    ],
)
def test_split_says_what_is_wrong(text, message):
    with pytest.raises(InputError, match=message):
        parse_split(text)


@pytest.mark.parametrize(
    ("family", "formats"),
    [
        ("mxint", ("mxint4", "mxint8", "mxint6", "mxint6")),
        ("mxfp", ("mxfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e2m3")),
        ("nvfp", ("nvfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e2m3")),
    ],
)
def test_families_choose_the_element_of_each_width(family, formats):
    split = parse_split("W4A8+W6A6r8", family=family)
    found = (split.main_weight, split.main_activation, split.branch_weight, split.branch_activation)
    assert tuple(map(str, found)) == formats


def test_a_family_without_the_width_says_which_it_has():
    with pytest.raises(InputError, match=r"family 'mxfp' must be 4, 6, 8 or 16 bits, got 5"):
        parse_split("W5A8", family="mxfp")


def test_unknown_family_and_bad_group_are_refused():
    with pytest.raises(InputError, match=r"unknown element family 'inte'; did you mean 'int'"):
        parse_split("W4A4", family="inte")
    with pytest.raises(InputError, match=r"group must be an integer from 1 .* got 0"):
        parse_split("W4A4", group=0)


@pytest.mark.parametrize(
    ("changes", "text", "main"),
    [
        ({"main_activation": "uint4/g64"}, "W4A4u+W8A8r8", "W4A4"),
        ({"main_activation": "uint4/row"}, "W4A4[uint4/row/fp16]+W8A8r8", "W4A4"),
        ({"main_activation": "int8/g64"}, "W4A8+W8A8r8", "W4A8"),
        ({"main_activation": "bf16"}, "W4A16[bf16]+W8A8r8", "W4A16"),
        ({"main_weight": "uint4/g64", "rank": 16}, "W4uA4+W8A8r16", "W4A4"),
        ({"branch_weight": "fp16", "branch_activation": "mxint8"}, None, "W4A4"),
    ],
)
def test_a_format_replaced_in_python_is_in_the_label(changes, text, main):
    split = parse_split("W4A4+W8A8r8")
    formats = {name: parse_format(v) if isinstance(v, str) else v for name, v in changes.items()}
    changed = dataclasses.replace(split, **formats)
    assert changed.text == (text or "W4A4+W16A8[mxint8]r8")
    assert changed.main == main
    assert str(dataclasses.replace(changed, group=split.group)) == changed.text


@pytest.mark.parametrize("family", ["int", "mxint", "mxfp", "nvfp"])
@pytest.mark.parametrize("text", ["W4A4", "W8A16", "W16A4", "W4A8+W6A8r64", "W4A4+W8A8@fp16r32"])
def test_a_label_parses_to_the_split_it_labels(text, family):
    split = parse_split(text, family=family, group=32)
    assert split.text == text
    assert parse_split(split.text, family=family, group=32) == split


LETTERS = {
    "W4A4u": ("uint4/g64/fp16", "absmax"),
    "W4A4s": ("int4/g64/fp16", "signed_absmax"),
    "W4A4u8": ("uint4/g64/fp16/z8", "absmax"),
    "W8A8z-3": ("int8/g64/fp16/z-3", "absmax"),
    "W8A16i": ("int16/g64/fp32", "absmax"),
    "W4A4[uint4/row]": ("uint4/row/fp16", "absmax"),
    "W8A8s[int8/tensor]": ("int8/tensor/fp32", "signed_absmax"),
}


@pytest.mark.parametrize("text", LETTERS)
def test_a_letter_says_how_activations_round(text):
    split = parse_split(text)
    assert (str(split.main_activation), split.main_rule) == LETTERS[text]
    assert parse_split(split.text) == split
    in_branch = parse_split(f"W4A4+{text}@fp16r16")
    assert (str(in_branch.branch_activation), in_branch.branch_rule) == LETTERS[text]
    assert parse_split(in_branch.text) == in_branch


def test_the_shift_after_gelu_is_of_the_layers_that_follow_it():
    split = parse_split("W4A4sg+W8A8r4")
    assert split.text == "W4A4sg+W8A8r4"
    rng = np.random.default_rng(0)
    weight, x = np.ones((4, 8), np.float32), rng.standard_normal((5, 8)).astype(np.float32)
    below = np.maximum(x, -0.1699).astype(np.float32)
    layers = {
        "second of a feed-forward part": Layer(name="a", weight=weight, kind="ffn_down"),
        "the same, of a gated SiLU": Layer(name="b", weight=weight, kind="ffn_down", activations=x),
        "of unknown kind, inputs as of GELU": Layer(name="c", weight=weight, activations=below),
        "of unknown kind": Layer(name="d", weight=weight, activations=x),
        "attention": Layer(name="e", weight=weight, kind="self_q"),
    }
    found = {what: split.for_layer(layer).text for what, layer in layers.items()}
    shifted = "W4A4[uint4/g64/fp16/z0+0.171875]+W8A8r4"
    assert [text == shifted for text in found.values()] == [True, False, True, False, False]
    assert {text for text in found.values() if text != shifted} == {"W4A4s+W8A8r4"}
    assert parse_split(shifted).text == shifted
    rotated = types.SimpleNamespace(rotation=8)
    after = layers["second of a feed-forward part"]
    assert split.for_layer(after, rotated).text == "W4A4s+W8A8r4"


@pytest.mark.parametrize(
    ("text", "family", "message"),
    [
        ("W4A4u16", "int", r"A4u16: zero point 16 is outside the codes of uint4 \(0..15\)"),
        ("W4A8z128", "int", r"zero point 128 is outside the codes of int8 \(-128..127\)"),
        ("W4A4u", "mxfp", "zero points, .* are for the family int, got 'mxfp'; drop the 'u'"),
        ("W4A4s", "nvfp", "signed scales .* are for the family int, got 'nvfp'; drop the 's'"),
        ("W4A16u", "int", "A16 are floats without a scale; .* 16-bit integers are A16i"),
        ("W4A8i", "int", "i is for 16-bit integers; write A16i, or A8"),
        ("W4A16i", "mxint", "16-bit integers are for the family int"),
        ("W4A4+W8A8gr4", "int", "the shift after GELU is for the main branch"),
        ("W4A8[uint4/row]", "int", r"\[uint4/row\] has 4 bits, got 8 before it"),
        ("W4A4u[uint4/row]", "int", r"drop 'u' before \[uint4/row\]: the format says it"),
        ("W4A4s[uint4/row]", "int", "drop 's' .*: it is for symmetric integers"),
        ("W4A16[fp16+1]", "int", "fp16 needs no shift"),
        ("W16[int16/row]A8", "int", "weights have 2 to 8 bits"),
        ("W4A4x", "int", "activations may be A4s, A4u, A4a, A4u8, A4g, A4sg, A16i or"),
    ],
)
def test_a_letter_that_does_not_fit_is_said_in_one_line(text, family, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_split(text, family=family)
    assert "\n" not in str(caught.value)


def test_a_grid_that_is_left_open_is_that_of_the_solution():
    split = parse_split("W4A4a~W8A8@fp16r4", group=32)
    assert parse_split(split.text, group=32) == split
    assert (split.text, split.main_rule) == ("W4A4a~W8A8@fp16r4", "auto")
    # Before anything is solved, the cost is that of the dearest of the three.
    assert split.costed == ("W4A4u", "W8A8")
    layer = Layer(name="a", weight=np.ones((4, 32), np.float32))
    for grid in ("", "s", "u"):
        run_as = split.for_layer(layer, types.SimpleNamespace(grid=grid))
        assert run_as == parse_split(f"W4A4{grid}~W8A8@fp16r4", group=32)
    with pytest.raises(InputError, match="the solution does not say which grid it chose"):
        split.for_layer(layer, types.SimpleNamespace(grid=None))
    with pytest.raises(InputError, match="main branch, and so is an open grid"):
        parse_split("W4A4+W8A8ar4")
