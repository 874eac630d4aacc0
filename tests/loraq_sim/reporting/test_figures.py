"""Pareto pictures: what is drawn, what is said, and what odd input does."""

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from PIL import Image

from loraq_sim.errors import InputError
from loraq_sim.reporting.figures import pareto_figure, save_figure
from loraq_sim.reporting.labels import Box
from loraq_sim.reporting.panels import staircase
from loraq_sim.results.choice import latency_accuracy

pytestmark = pytest.mark.pictures

SPLITS = (
    ("W4A4", 0.1921, 41.2e-3, 6.38e7),
    ("W4A8", 0.1312, 58.9e-3, 6.38e7),
    ("W8A8", 0.0212, 61.5e-3, 12.4e7),
    ("W4A4+W8A8r16", 0.1502, 43.1e-3, 6.60e7),
    ("W4A4+W8A8r32", 0.1331, 44.9e-3, 6.84e7),
    ("W4A4+W8A8r64", 0.1121, 48.6e-3, 7.31e7),
    ("W4A4+W4A4r64", 0.1290, 45.2e-3, 6.93e7),
    ("W4A4+W4A8r64", 0.1210, 47.5e-3, 6.95e7),
    ("W4A4+W6A6r64", 0.1180, 48.4e-3, 7.11e7),
    ("W4A4+W16A16r32", 0.1325, 52.0e-3, 7.31e7),
    ("W4A8+W8A8r32", 0.0872, 62.0e-3, 6.84e7),
    ("W4A8+W16A16r32", 0.0869, 71.0e-3, 7.31e7),
)


def mark_by_hand(rows):
    for row in rows:
        row["pareto"] = not any(
            other["latency_s"] <= row["latency_s"] and other["output_error"] < row["output_error"]
            for other in rows
        )
    return rows


@pytest.fixture
def rows():
    keys = ("split", "output_error", "latency_s", "weight_bytes")
    made = [dict(zip(keys, values, strict=True)) for values in SPLITS]
    return mark_by_hand([row | {"accelerator": "aie2", "method": "loraq"} for row in made])


def texts_of(figure):
    words = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        words += [text.get_text() for text in axes.texts] + [axes.get_title(loc="left")]
    return [word for word in words if word]


def test_every_row_is_drawn_and_every_front_row_is_labelled(rows):
    figure = pareto_figure(rows)
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() not in ("None", None, "")]
    assert len(points) == len(rows)
    labels = {text.get_text() for text in axes.texts}
    assert labels == {row["split"] for row in rows if row["pareto"]}


def test_labels_of_twelve_splits_do_not_overlap(rows):
    figure = pareto_figure(rows, x=("latency_s", "weight_bytes"))
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        extents = [text.get_window_extent(renderer) for text in axes.texts]
        boxes = [Box(x0=e.x0, y0=e.y0, x1=e.x1, y1=e.y1) for e in extents]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_title_is_the_verdict_and_subtitle_and_footer_say_where_from(rows):
    figure = pareto_figure(
        rows,
        model="tiny_pixart",
        layers=20,
        provenance={"version": "0.1.0", "seed": 7, "dump_digest": "9f86d081884c7d659a2f"},
    )
    heading, subtitle, footer = texts_of(figure)[:3]
    assert heading == "Build W8A8 on aie2"
    assert subtitle.startswith(
        "tiny_pixart  ·  on aie2  ·  20 layers  ·  12 splits  ·  method loraq"
    )
    assert footer == "version 0.1.0  ·  seed 7  ·  dump 9f86d081884c"


def test_bars_say_how_far_the_latency_model_may_be_off(rows):
    figure = pareto_figure(rows, x=("latency_s", "weight_bytes"))
    latency, memory = figure.axes
    worst, _ = latency_accuracy("aie2")
    (ends,) = (
        line.get_segments()[0]
        for line in latency.collections
        if isinstance(line, LineCollection) and line.get_segments()[0][0][1] == 2.12
    )
    # Milliseconds; W8A8 is on the front.
    assert ends[:, 0] == pytest.approx([61.5 / (1 + worst), 61.5 / (1 - worst)])
    assert not any(isinstance(drawn, LineCollection) for drawn in memory.collections)
    assert "bars: how far the latency model may be off" in texts_of(figure)[1]
    assert "bars" not in texts_of(pareto_figure(rows, x="weight_bytes"))[1]
    # Where all latencies are within what the model may be off, a bar would be a line from edge to
    # edge: none is drawn, and it is said.
    near = [row | {"latency_s": 0.05 + 1e-4 * i} for i, row in enumerate(rows)]
    narrow = pareto_figure(mark_by_hand(near))
    assert not any(isinstance(drawn, LineCollection) for drawn in narrow.axes[0].collections)
    assert texts_of(narrow)[1].endswith("the latency model may be off by more than is shown")


def test_given_title_wins(rows):
    assert texts_of(pareto_figure(rows, title="Mine"))[0] == "Mine"


def test_axes_carry_scaled_units(rows):
    left, right = pareto_figure(rows, x=("latency_s", "weight_bytes")).axes
    assert left.get_xlabel() == "Latency (ms)"
    assert right.get_xlabel() == "Weight memory (MiB)"
    assert left.get_ylabel() == "Output error (%)"
    assert left.get_yscale() == "log"


def test_large_values_get_thousands_separators(rows):
    for row in rows:
        row["cycles"] = int(row["latency_s"] * 1e9)
    (axes,) = pareto_figure(rows, x="cycles").axes
    assert "50,000,000" in [tick.get_text() for tick in axes.get_xticklabels()]


def test_accelerators_become_small_multiples(rows):
    other = [row | {"accelerator": "a100", "latency_s": row["latency_s"] / 30} for row in rows]
    figure = pareto_figure(rows + other)
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes] == ["aie2", "a100"]
    (only,) = pareto_figure(rows + other, accelerator="a100").axes
    assert only.get_xlim()[1] < 10


def test_two_methods_are_told_apart_in_labels(rows):
    better = [row | {"method": "svdquant", "output_error": row["output_error"] / 2} for row in rows]
    labels = [text.get_text() for text in pareto_figure(mark_by_hand(rows + better)).axes[0].texts]
    assert "W4A4 (svdquant)" in labels


def test_method_of_branchless_splits_is_not_repeated_in_labels(rows):
    for row in rows:
        row["method"] = "loraq" if "+" in row["split"] else "rtn"
    figure = pareto_figure(rows)
    assert "W4A4" in [text.get_text() for text in figure.axes[0].texts]
    assert texts_of(figure)[1].startswith("on aie2  ·  12 splits  ·  method loraq  ·  down")


def test_dumps_get_panels_of_their_own(rows):
    both = [row | {"dump": dump} for dump in ("a.pt", "b.pt") for row in rows]
    titles = [axes.get_title(loc="left") for axes in pareto_figure(both).axes]
    assert [title.split(":")[0] for title in titles] == ["a.pt on aie2", "b.pt on aie2"]


def test_equal_points_share_one_label(rows):
    equal = [rows[0] | {"split": split, "pareto": True} for split in ("W4A4", "W4A8", "W8A8")]
    (axes,) = pareto_figure(equal).axes
    assert [text.get_text() for text in axes.texts] == ["W4A4 (+2 equal)"]


def test_rows_without_a_value_are_counted_not_drawn(rows):
    rows[0].update(output_error=None, pareto=False)
    rows[1].update(latency_s=float("inf"))
    rows[2].update(output_error=0.0)
    figure = pareto_figure(rows)
    assert any("3 rows not drawn" in word for word in texts_of(figure))


@pytest.mark.parametrize("rows", [[], [{"split": "W4A4", "latency_s": None, "output_error": None}]])
def test_nothing_to_draw_says_so(rows):
    assert texts_of(pareto_figure(rows))[0] == "No split could be evaluated"


def test_one_point_and_sixty_points_draw(rows):
    assert pareto_figure(rows[:1]).axes
    rng = np.random.default_rng(0)
    many = [
        {
            "split": f"W4A4+W8A8r{i}",
            "latency_s": latency,
            "output_error": 0.02 / latency * float(np.exp(rng.normal(0, 0.2))),
        }
        for i, latency in enumerate(rng.uniform(0.05, 2.0, 60).tolist())
    ]
    (axes,) = pareto_figure(mark_by_hand(many)).axes
    assert len(axes.texts) <= 13


def test_data_frame_gives_the_same_picture(rows, tmp_path):
    a = save_figure(pareto_figure(rows), tmp_path / "a.svg")
    b = save_figure(pareto_figure(pd.DataFrame(rows)), tmp_path / "b.svg")
    assert a.read_bytes() == b.read_bytes()


def test_png_has_slide_resolution_and_ink(rows, tmp_path):
    with Image.open(save_figure(pareto_figure(rows), tmp_path / "p.png")) as image:
        assert image.width >= 1900
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 20


def test_rows_are_not_modified(rows):
    before = [dict(row) for row in rows]
    pareto_figure(rows)
    assert rows == before


def test_unknown_column_is_named_with_the_known_ones(rows):
    with pytest.raises(
        InputError, match=r"column 'power_w' is in none of the rows; known: .*split"
    ):
        pareto_figure(rows, x="power_w")


def test_unknown_suffix_lists_the_known_ones(rows, tmp_path):
    with pytest.raises(InputError, match=r"cannot save a figure as \.bmp; use one of \.png"):
        save_figure(pareto_figure(rows), tmp_path / "p.bmp")


def test_unwritable_path_is_reported(rows, tmp_path):
    with pytest.raises(InputError, match="cannot be written: No such file"):
        save_figure(pareto_figure(rows), tmp_path / "missing" / "p.png")


def test_staircase_is_the_set_of_points_without_a_better_one():
    rng = np.random.default_rng(1)
    points = [tuple(p) for p in rng.integers(0, 30, (80, 2)).tolist()]
    expected = {
        p for p in points if not any((q[0] <= p[0] and q[1] <= p[1]) and q != p for q in points)
    }
    edge = staircase(points)
    assert {points[i] for i in edge} == expected
    assert len(edge) == len(expected)
