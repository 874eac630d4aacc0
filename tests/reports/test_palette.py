"""Colors and markers are stable, distinct and told by the split's name."""

import pytest

from reports.palette import branch_markers, main_and_branch, main_colors

SPLITS = ["W4A4", "W4A8+W8A8r64", "W4A4+W16A16r32", "W4A4+W8A8@fp16r32", "W5A5+W3A3r8", "W8A8"]


@pytest.mark.parametrize(
    ("split", "parts"),
    [
        ("W4A4", ("W4A4", "none")),
        ("W4A4+W8A8r64", ("W4A4", "W8A8")),
        ("W4A8+W6A6@fp16r32", ("W4A8", "W6A6")),
    ],
)
def test_split_names_its_main_and_branch_precision(split, parts):
    assert main_and_branch(split) == parts


def test_looks_within_a_figure_are_distinct():
    colors, markers = main_colors(SPLITS), branch_markers(SPLITS)
    assert len(set(colors.values())) == len(colors) == 4
    assert len(set(markers.values())) == len(markers) == 4


def test_color_of_a_known_precision_does_not_depend_on_the_others():
    assert main_colors(["W4A8"])["W4A8"] == main_colors(SPLITS)["W4A8"]


def test_more_unknown_precisions_than_colors_still_get_one():
    names = [f"W{i}A{i}" for i in range(20, 40)]
    assert set(main_colors(names)) == set(names)
