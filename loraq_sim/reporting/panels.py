"""One Pareto panel: error (log) against a cost, the front as a step, labels on its points.

Axes have few ticks at round values, written the way people write numbers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraq_sim.reporting.labels import Box, main_and_branch, place_labels
from loraq_sim.results.choice import latency_accuracy
from loraq_sim.results.columns import Column, choose_unit, column_for
from loraq_sim.results.planned import partial_in_short
from loraq_sim.results.rows import AnyRow
from loraq_sim.results.wording import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


__all__ = [
    "mark_partial",
    "MOST_DRAWN",
    "PanelStyle",
    "can_draw",
    "draw_panel",
    "nice_log_ticks",
    "staircase",
    "tick_texts",
    "widest_text",
]

INK = "#222222"
MUTED = "#666666"
WARNING = "#A33B00"
GRID = "#E4E4E4"
SHADE = "#F5F5F2"
BAR = "#0072B2"
_MAX_LABELS = 12
# Mantissas of the tick sets to try, coarse to fine, until enough ticks fall into the range.
_MANTISSAS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    tuple(1.0 + 0.1 * i for i in range(90)),
    tuple(1.0 + 0.02 * i for i in range(450)),
)


@dataclass(frozen=True, kw_only=True)
class PanelStyle:
    """Looks shared by the panels of a figure: color by main precision, marker by branch."""

    colors: Mapping[str, str]
    markers: Mapping[str, str]
    font_size: float = 9.0


def draw_panel(
    axes: "Axes",
    rows: Sequence[AnyRow],
    *,
    x: str,
    y: str,
    style: PanelStyle,
    use_marks: bool = True,
    best: str | None = None,
) -> int:
    """Draw points, front, ticks and labels of one panel; how many bars of latencies it has.

    Parameters
    ----------
    axes : matplotlib Axes
        Empty, already placed in a figure with an Agg canvas.
    rows : sequence of rows
        Finite `x` and positive `y`; ``split``; ``pareto`` where `use_marks`.
    use_marks : bool
        Emphasize the rows marked ``pareto``. False emphasizes the lower left edge of this panel,
        for a panel whose cost is not the one the marks were made for.
    best : str, optional
        Name (`name_of`) of the row the title speaks of: emphasized wherever it lies, bold label.
    """
    x_unit = choose_unit([row[x] for row in rows], column_for(x).quantity)
    y_unit = choose_unit([row[y] for row in rows], column_for(y).quantity)
    points = [(row[x] / x_unit.size, row[y] / y_unit.size) for row in rows]
    edge = staircase(points)
    emphasized = [
        (row.get("pareto") == 1 if use_marks else i in edge) or name_of(row) == best
        for i, row in enumerate(rows)
    ]
    _set_ranges(axes, points)
    _style_axes(axes, style)
    axes.set_xlabel(_axis_title(column_for(x), x_unit.symbol), fontsize=style.font_size, color=INK)
    axes.set_ylabel(_axis_title(column_for(y), y_unit.symbol), fontsize=style.font_size, color=INK)
    _draw_front(axes, [points[i] for i in edge])
    bars = _draw_bars(axes, rows, points, emphasized, best) if x == "latency_s" else []
    _draw_points(axes, rows, points, emphasized, style)
    _draw_labels(axes, rows, points, emphasized, edge, bars, style, best)
    return len(bars)


def _draw_bars(
    axes: "Axes",
    rows: Sequence[AnyRow],
    points: Sequence[tuple[float, float]],
    emphasized: Sequence[bool],
    best: str | None,
) -> list[list[tuple[float, float]]]:
    """Where the true latency of what is emphasized may lie; the two ends of each bar drawn."""
    left, right = axes.get_xlim()
    bars: list[tuple[bool, list[tuple[float, float]]]] = []
    for row, (x, y), strong in zip(rows, points, emphasized, strict=True):
        if strong and row.get("accelerator"):
            worst, _ = latency_accuracy(str(row["accelerator"]))
            ends = [(x / (1 + worst), y), (x / max(1 - worst, 1e-9), y)]
            bars.append((name_of(row) == best, ends))
    # Bars of a quarter of the panel say the same at every point: one of them is enough.
    if any(ends[1][0] - ends[0][0] > 0.25 * (right - left) for _, ends in bars):
        bars = [(is_best, ends) for is_best, ends in bars if is_best]
    # One from edge to edge reads like a line of the plot.
    bars = [(b, ends) for b, ends in bars if ends[0][0] > left or ends[1][0] < right]
    for _, ends in bars:
        (low, y), (high, _) = ends
        axes.hlines(y, low, high, color=BAR, linewidth=1.1, zorder=2.6)
        axes.scatter([low, high], [y, y], color=BAR, s=36, linewidth=1.1, marker="|", zorder=2.6)
    return [ends for _, ends in bars]


def staircase(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the lower left edge of the points, left to right; one index of equal points."""
    order = sorted(range(len(points)), key=lambda i: points[i])
    edge, lowest = [], math.inf
    for i in order:
        if points[i][1] < lowest:
            edge.append(i)
            lowest = points[i][1]
    return edge


def _axis_title(column: Column, symbol: str) -> str:
    heading = column.heading
    heading = heading[:1].upper() + heading[1:]
    return f"{heading} ({symbol})" if symbol else heading


def _set_ranges(axes: "Axes", points: Sequence[tuple[float, float]]) -> None:
    # More room below and left than above: labels go to the empty side of the front.
    set_log_axis(axes.yaxis, [y for _, y in points], below=0.16, above=0.10)
    xs = [x for x, _ in points]
    if min(xs) > 0 and max(xs) > 20 * min(xs):
        set_log_axis(axes.xaxis, xs, below=0.2, above=0.1)
    else:
        set_linear_axis(axes.xaxis, xs, below=0.2, above=0.1)


def _style_axes(axes: "Axes", style: PanelStyle) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#AAAAAA")
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=style.font_size - 0.5, length=3, color="#AAAAAA")


def _draw_front(axes: "Axes", edge: Sequence[tuple[float, float]]) -> None:
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    xs = [edge[0][0], *(x for x, _ in edge), right]
    ys = [top, *(y for _, y in edge), edge[-1][1]]
    axes.fill_between(xs, ys, top, step="post", color=SHADE, linewidth=0, zorder=0.5)
    axes.step(xs[1:], ys[1:], where="post", color="#555555", linewidth=1.2, zorder=2)


def _draw_points(
    axes: "Axes",
    rows: Sequence[AnyRow],
    points: Sequence[tuple[float, float]],
    emphasized: Sequence[bool],
    style: PanelStyle,
) -> None:
    for row, (x, y), strong in zip(rows, points, emphasized, strict=True):
        main, branch = main_and_branch(str(row["split"]))
        axes.plot(
            [x],
            [y],
            linestyle="none",
            marker=style.markers[branch],
            color=style.colors[main],
            markersize=8.5 if strong else 6.5,
            alpha=1.0 if strong else 0.45,
            markeredgecolor="white",
            markeredgewidth=0.9,
            zorder=4 if strong else 3,
            clip_on=False,
        )


def _draw_labels(
    axes: "Axes",
    rows: Sequence[AnyRow],
    points: Sequence[tuple[float, float]],
    emphasized: Sequence[bool],
    edge: Sequence[int],
    bars: Sequence[Sequence[tuple[float, float]]],
    style: PanelStyle,
    best: str | None,
) -> None:
    from matplotlib.patheffects import withStroke

    labels = _labelled(rows, points, emphasized, best)
    chosen, texts = list(labels), list(labels.values())
    scale = axes.figure.dpi / 100
    pixels = [tuple(axes.transData.transform(point)) for point in points]
    weights = ["bold" if name_of(rows[i]) == best else "normal" for i in chosen]
    sizes = [
        _text_size(axes, text, fontsize=style.font_size - 1, fontweight=weight)
        for text, weight in zip(texts, weights, strict=True)
    ]
    window = axes.get_window_extent()
    boxes = place_labels(
        [pixels[i] for i in chosen],
        sizes,
        bounds=Box(x0=window.x0 + 3, y0=window.y0 + 3, x1=window.x1 + 20 * scale, y1=window.y1),
        obstacles=[_marker_box(pixel, 6.5 * scale) for pixel in pixels],
        line=[
            *_step_samples([pixels[i] for i in edge], window.x1, 6 * scale),
            *(p for ends in bars for p in _bar_samples(axes.transData.transform(ends), 6 * scale)),
        ],
        distances=[d * scale for d in (10, 17, 27, 41, 60, 84, 112, 150)],
    )
    to_data = axes.transData.inverted()
    for text, weight, box, i in zip(texts, weights, boxes, chosen, strict=True):
        x, y = pixels[i]
        near = box.nearest((x, y))
        if math.hypot(near[0] - x, near[1] - y) > 14 * scale:
            ends = to_data.transform([(x, y), near])
            axes.plot(
                ends[:, 0], ends[:, 1], color="#999999", linewidth=0.7, zorder=2.5, clip_on=False
            )
        middle = to_data.transform(((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2))
        axes.text(
            middle[0],
            middle[1],
            text,
            fontsize=style.font_size - 1,
            fontweight=weight,
            color=INK,
            ha="center",
            va="center",
            zorder=5,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )


def _labelled(
    rows: Sequence[AnyRow],
    points: Sequence[tuple[float, float]],
    emphasized: Sequence[bool],
    best: str | None,
) -> dict[int, str]:
    """Label by index, left to right: emphasized points, thinned evenly when there are too many.

    Equal points share one label, which then counts the others.
    """
    stacks: dict[tuple[float, float], list[int]] = {}
    for i in sorted((i for i, strong in enumerate(emphasized) if strong), key=lambda i: points[i]):
        stacks.setdefault(points[i], []).append(i)
    for stack in stacks.values():
        stack.sort(key=lambda i: name_of(rows[i]) != best)
    firsts = [stack[0] for stack in stacks.values()]
    if len(firsts) > _MAX_LABELS:
        step = (len(firsts) - 1) / (_MAX_LABELS - 1)
        kept = {firsts[round(k * step)] for k in range(_MAX_LABELS)}
        firsts = [i for i in firsts if i in kept or name_of(rows[i]) == best]
    labels = {}
    for i in firsts:
        n_equal = len(stacks[points[i]]) - 1
        name = name_of(rows[i])
        labels[i] = f"{name} (+{n_equal} equal)" if n_equal else name
    return labels


def _text_size(axes: "Axes", text: str, **look: Any) -> tuple[float, float]:
    probe = axes.text(0, 0, text, transform=None, **look)
    extent = probe.get_window_extent()
    probe.remove()
    return extent.width, extent.height


def widest_text(figure: "Figure", texts: Sequence[str], **look: Any) -> float:
    """Width of the widest of `texts` in inches; 0 of none."""
    widest = 0.0
    # What is widest has nearly as many letters as the longest.
    for text in sorted(texts, key=len)[-8:]:
        probe = figure.text(0, 0, text, **look)
        widest = max(widest, probe.get_window_extent().width / figure.dpi)
        probe.remove()
    return widest


def _marker_box(pixel: tuple[float, float], radius: float) -> Box:
    return Box(x0=pixel[0], y0=pixel[1], x1=pixel[0], y1=pixel[1]).grown(radius)


def _step_samples(
    edge: Sequence[tuple[float, float]], right: float, spacing: float
) -> list[tuple[float, float]]:
    samples = []
    for (x0, y0), (x1, y1) in zip(edge, [*edge[1:], (right, edge[-1][1])], strict=True):
        samples += [(x0 + t * spacing, y0) for t in range(int((x1 - x0) / spacing) + 1)]
        samples += [(x1, y0 - t * spacing) for t in range(int((y0 - y1) / spacing) + 1)]
    return samples


def _bar_samples(ends: Any, spacing: float) -> list[tuple[float, float]]:
    (x0, y), (x1, _) = ends
    return [(x0 + t * spacing, y) for t in range(int((x1 - x0) / spacing) + 1)] + [(x1, y)]


def set_log_axis(axis: "Axis", values: Sequence[float], *, below: float, above: float) -> None:
    """Log axis over positive `values`, with margins as fractions of their logarithmic spread."""
    axis.axes.set(**{f"{_letter(axis)}scale": "log"})
    # Equal values still need a range: about a factor of 1.5.
    spread = math.log(max(values) / min(values)) or 0.4
    low, high = min(values) * math.exp(-below * spread), max(values) * math.exp(above * spread)
    _fix(axis, low, high, nice_log_ticks(low, high), even=False)


def set_linear_axis(axis: "Axis", values: Sequence[float], *, below: float, above: float) -> None:
    """Linear axis over `values`, with margins as fractions of their spread; not forced to zero."""
    from matplotlib.ticker import MaxNLocator

    spread = (max(values) - min(values)) or 0.2 * abs(values[0]) or 1.0
    low, high = min(values) - below * spread, max(values) + above * spread
    if min(values) >= 0:
        low = max(low, 0.0)
    ticks = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(low, high)
    _fix(axis, low, high, [float(tick) for tick in ticks if low <= tick <= high], even=True)


def _letter(axis: "Axis") -> str:
    from matplotlib.axis import XAxis

    return "x" if isinstance(axis, XAxis) else "y"


def _fix(axis: "Axis", low: float, high: float, ticks: Sequence[float], *, even: bool) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.axes.set(**{f"{_letter(axis)}lim": (low, high)})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter(tick_texts(ticks, even=even)))


MOST_DRAWN = 1e100
"""Of what an axis shows: its margins are floats too."""


def can_draw(value: float) -> bool:
    """Whether a log axis can show it."""
    return 1 / MOST_DRAWN <= value <= MOST_DRAWN


def nice_log_ticks(low: float, high: float, *, fewest: int = 5, most: int = 9) -> list[float]:
    """Round ticks between `low` and `high` (positive): the coarsest set with enough of them."""
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**d for d in decades for m in mantissas]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= fewest:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else [low]


# Ticks that are printed with zeros.
_LEAST_PLAIN, _MOST_PLAIN = 1e-6, 1e12


def tick_texts(ticks: Sequence[float], *, even: bool = False) -> list[str]:
    """Labels with thousands separators and no needless zeros; `even` gives all equal decimals.

    >>> tick_texts([0.5, 1.0, 1500.0]), tick_texts([1.5, 2.0], even=True)
    (['0.5', '1', '1,500'], ['1.5', '2.0'])
    """
    if not all(tick == 0 or _LEAST_PLAIN <= abs(tick) < _MOST_PLAIN for tick in ticks):
        return [f"{tick:.6g}" for tick in ticks]
    short = [f"{float(f'{tick:.6g}'):.12f}".rstrip("0").rstrip(".") for tick in ticks]
    decimals = [len(text.partition(".")[2]) for text in short]
    most = max(decimals, default=0)
    return [f"{tick:,.{most if even else own}f}" for tick, own in zip(ticks, decimals, strict=True)]


def mark_partial(figure: "Figure", partial: str) -> None:
    """Say above the heading of a figure what of the sweep it does not show, if anything."""
    if partial:
        width, height = figure.get_size_inches()
        place = (0.3 / width, 1 - 0.09 / height)
        figure.text(*place, partial_in_short(partial), fontsize=8.5, color=WARNING, va="top")
