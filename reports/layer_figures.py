"""Pictures of layers: error of each layer and case, parts of the cost, accumulator widths.

The static counterparts of the plots in the report page; explicit `Figure` objects, no pyplot.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraq_sim.results.units import choose_unit
from reports.answers import Answer
from reports.captions import draw_heading, without_math
from reports.palette import part_colors
from reports.panels import GRID, INK, MUTED
from reports.part_names import BOUND_NAMES, PART_NAMES
from reports.report_data import ReportData
from reports.ticks import nice_log_ticks, tick_texts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["accumulators_figure", "heat_map_figure", "latency_figure"]

Row = Mapping[str, Any]

_MOST_TICKS = 60
# Cases in one picture; more are neither read nor drawn in reasonable time.
_MOST_LINES = 48
_WIDTH = 11.0
# Inches: a line of labels, what stands above and below the axes.
_LINE, _TOP, _BOTTOM, _RIGHT = 0.21, 1.0, 0.75, 0.4


@without_math
def heat_map_figure(drawn: Mapping[str, Any], context: str, quantity: str) -> "Figure":
    """One quantity of every layer (across) in every case (down) of a context.

    Parameters
    ----------
    drawn : mapping
        What `reports.plot_data.plot_data` returns.
    context, quantity : str
        Which of its contexts, and the key of one of that context's quantities, a fraction.
    """
    import numpy as np
    from matplotlib.colors import LogNorm

    layers = drawn["layers"][context]
    (chosen,) = [item for item in layers["quantities"] if item["key"] == quantity]
    width = len(layers["names"])
    best = drawn["answers"].get(context, "")
    shown = _some(layers["labels"], best)
    labels = [layers["labels"][i] for i in shown]
    matrix = [chosen["z"][i] for i in shown]
    lines = [line if isinstance(line, list) else [line] * width for line in matrix]
    z = np.array(lines, dtype=np.float64)
    z = np.ma.masked_where(~(z > 0), z) * 100.0
    figure, axes = _figure(labels, below=1.6, right=0.6)
    low, high = (z.min(), z.max()) if z.count() else (1.0, 10.0)
    norm = LogNorm(vmin=low, vmax=high if high > low else low * 1.1)
    image = axes.imshow(z, aspect="auto", cmap="cividis_r", norm=norm, interpolation="nearest")
    step = max(1, -(-len(layers["names"]) // _MOST_TICKS))
    places = range(0, len(layers["names"]), step)
    axes.set_xticks(places, [_short(layers["names"][i], 26) for i in places], rotation=60)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor", fontsize=7)
    for label in axes.get_yticklabels():
        is_best = label.get_text() == _short(best, 44)
        label.set_fontweight("bold" if is_best else "normal")
    axes.tick_params(length=0)
    ticks = nice_log_ticks(*_ends(norm))
    place = axes.get_position()
    beside = figure.add_axes((place.x1 + 0.12 / _WIDTH, place.y0, 0.14 / _WIDTH, place.height))
    bar = figure.colorbar(image, cax=beside, ticks=ticks)
    bar.ax.set_yticklabels([f"{text} %" for text in tick_texts(ticks)], fontsize=8, color=MUTED)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    heading = f"{chosen['heading'][:1].upper()}{chosen['heading'][1:]} of each layer on {context}"
    told = f"{width} layers in {_of(len(labels), len(layers['labels']))} cases"
    left_out = (
        ", from most to least error; layers.csv has all" if len(labels) < len(chosen["z"]) else ""
    )
    draw_heading(figure, heading, told + left_out)
    return figure


@without_math
def latency_figure(data: ReportData, answer: Answer) -> "Figure | None":
    """Parts of the latency of the answer, one bar a shape; None without a breakdown."""
    label = answer.best["label"] if answer.best else None
    rows = [r for r in data.parts if r["context"] == answer.context and r["label"] == label]
    if not rows:
        return None
    rows.sort(key=lambda row: -_latency(row))
    unit = choose_unit([_latency(row) for row in rows], "time")
    names = [f"{row['kind']} {row['k']}→{row['n']} ×{row['n_layers']}" for row in rows]
    figure, axes = _figure(names, above=0.35)
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]["latency_s"]))
    start = [0.0] * len(rows)
    for part, color in part_colors(parts).items():
        widths = [
            row["parts"]["latency_s"].get(part, 0.0) * row["calls"] / unit.size for row in rows
        ]
        name = PART_NAMES.get(part, part)
        axes.barh(range(len(rows)), widths, left=start, color=color, height=0.66, label=name)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for i, (row, end) in enumerate(zip(rows, start, strict=True)):
        bound = BOUND_NAMES.get(row["bound"], row["bound"])
        axes.annotate(
            bound,
            (end, i),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=MUTED,
        )
    axes.set_xlim(0, max(start) * 1.14)
    axes.set_xlabel(f"Latency per denoising step ({unit.symbol})", fontsize=9, color=INK)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(len(parts), 8), frameon=False,
        fontsize=7.5, handlelength=1, columnspacing=1.2,
    )  # fmt: skip
    draw_heading(
        figure,
        f"Where the latency of {label} goes on {answer.context}",
        "one bar a layer shape, all its layers; at its end what limits the speed",
    )
    return figure


@without_math
def accumulators_figure(drawn: Mapping[str, Any], context: str) -> "Figure | None":
    """Bits needed on this input, for any input, and of the array; None without activations."""
    rows = [row for row in drawn["accumulators"] if row["context"] == context]
    if not rows:
        return None
    rows.sort(key=lambda row: (-row["high"], -row["low"]))
    n_all, n_over = len(rows), sum(row["overflows"] > 0 for row in rows)
    rows = [rows[i] for i in _some([r["label"] for r in rows], drawn["answers"].get(context, ""))]
    figure, axes = _figure([row["label"] for row in rows], above=0.3)
    at = range(len(rows))
    axes.barh(
        at,
        [row["high"] - row["low"] + 0.36 for row in rows],
        left=[row["low"] - 0.18 for row in rows],
        color="#0072B2", height=0.5, label="needed on this input",
    )  # fmt: skip
    looks = {
        "guaranteed": {
            "marker": "D",
            "mfc": "none",
            "mec": "#D55E00",
            "label": "enough for any input",
        },
        "array": {"marker": "|", "mec": INK, "ms": 11, "mew": 2, "label": "of the array"},
    }
    for key, look in looks.items():
        points = [(row[key], i) for i, row in zip(at, rows, strict=True) if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", **look)
    axes.set_xlim(left=min(row["low"] for row in rows) - 1)
    axes.set_xlabel("Accumulator width (bits)", fontsize=9, color=INK)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)
    told = f"{n_over} of {n_all} cases overflow" if n_over else "no case overflows"
    if len(rows) < n_all:
        told += f"; {_of(len(rows), n_all)} cases drawn, from most to least demanding"
    most = max(row["high"] for row in rows)
    draw_heading(
        figure,
        f"Accumulator widths on {context}: {most} bits hold every sum of this input",
        f"bar: least to most demanding layer; {told}",
    )
    return figure


def _some(labels: Sequence[str], best: str) -> list[int]:
    """Places of at most `_MOST_LINES` labels, evenly, with both ends and the best one."""
    last, lines = len(labels) - 1, min(len(labels), _MOST_LINES)
    found = {round(i * last / max(1, lines - 1)) for i in range(lines)}
    if best in labels and labels.index(best) not in found:
        # In place of its neighbor.
        place = labels.index(best)
        found.discard(min(found - {0, last}, key=lambda other: abs(other - place)))
        found.add(place)
    return sorted(found)


def _of(some: int, whole: int) -> str:
    return f"{some} of {whole}" if some < whole else str(whole)


def _ends(norm: Any) -> tuple[float, float]:
    return float(norm.vmin), float(norm.vmax)


def _latency(row: Row) -> float:
    return sum(row["parts"]["latency_s"].values()) * row["calls"]


def _figure(
    labels: Sequence[str], *, above: float = 0.0, below: float = 0.0, right: float = 0.0
) -> "tuple[Figure, Axes]":
    """Figure and axes with one line a label; further room in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [_short(label, 44) for label in labels]
    left = 0.35 + 0.068 * max((len(text) for text in shown), default=0)
    tall = max(1.2, _LINE * len(labels))
    height = _TOP + above + tall + max(_BOTTOM, below)
    figure = Figure(figsize=(_WIDTH, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    bottom = max(_BOTTOM, below) / height
    wide = (_WIDTH - left - _RIGHT - right) / _WIDTH
    axes = figure.add_axes((left / _WIDTH, bottom, wide, tall / height))
    axes.set_yticks(range(len(labels)), shown)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#AAAAAA")
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    return figure, axes


def _short(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[: half - 1]}…{text[-half:]}"
