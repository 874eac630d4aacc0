"""Colors and markers are stable and distinct."""

from loraq_sim.reporting.labels import branch_markers, main_colors

SPLITS = ["W4A4", "W4A8+W8A8r64", "W4A4+W16A16r32", "W4A4+W8A8@fp16r32", "W5A5+W3A3r8", "W8A8"]


def test_looks_within_a_figure_are_distinct():
    colors, markers = main_colors(SPLITS), branch_markers(SPLITS)
    assert len(set(colors.values())) == len(colors) == 4
    assert len(set(markers.values())) == len(markers) == 4


def test_color_of_a_known_precision_does_not_depend_on_the_others():
    assert main_colors(["W4A8"])["W4A8"] == main_colors(SPLITS)["W4A8"]


def test_more_unknown_precisions_than_colors_still_get_one():
    names = [f"W{i}A{i}" for i in range(20, 40)]
    assert set(main_colors(names)) == set(names)
