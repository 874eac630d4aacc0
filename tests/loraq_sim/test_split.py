"""Precision splits as text."""

import dataclasses

import pytest

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
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
