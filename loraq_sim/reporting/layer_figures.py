"""Pictures of layers: error by layer and case, parts of the cost, accumulator widths, time steps.

They are the static counterparts of the plots in the report page, on explicit `Figure` objects, no
pyplot. A heat map with its margins shows which layers and time steps make up the error; a sample
grid shows the same images under several arithmetics, one row each, the reference on top.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from loraq_sim.errors import InputError, counted, unknown_name
from loraq_sim.reporting.figures import draw_footer, draw_heading, without_math
from loraq_sim.reporting.labels import part_colors
from loraq_sim.reporting.panels import (
    GRID,
    INK,
    MOST_DRAWN,
    MUTED,
    SHADE,
    nice_log_ticks,
    tick_texts,
    widest_text,
)
from loraq_sim.reporting.report_data import BOUND_NAMES, PART_NAMES, Answer, ReportData
from loraq_sim.results.columns import choose_unit
from loraq_sim.results.rows import AnyRow
from loraq_sim.results.wording import labels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "accumulators_figure",
    "heat_map_figure",
    "latency_figure",
    "sample_grid",
    "shown_image",
    "step_heat_map",
    "step_title",
]


_MOST_TICKS = 40
# Cases in one picture; more are neither read nor drawn in reasonable time.
_MOST_LINES = 24
_WIDTH = 11.0
# Inches: a line of labels, what stands above and below the axes.
_LINE, _TOP, _BOTTOM, _RIGHT = 0.21, 1.0, 0.75, 0.4


@without_math
def heat_map_figure(drawn: Mapping[str, Any], context: str, quantity: str) -> "Figure":
    """One quantity of every layer (across) in every case (down) of a context.

    Parameters
    ----------
    drawn : mapping
        What `loraq_sim.reporting.plot_data.plot_data` returns.
    context, quantity : str
        Which of its contexts, and the key of one of that context's quantities, a fraction.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    layers = drawn["layers"][context]
    known = [item["key"] for item in layers["quantities"]]
    if quantity not in known:
        raise InputError(unknown_name("quantity", quantity, known))
    (chosen,) = [item for item in layers["quantities"] if item["key"] == quantity]
    width = len(layers["names"])
    best = drawn["answers"].get(context, "")
    shown = _some(layers["labels"], _first(drawn, context))
    labels = [layers["labels"][i] for i in shown]
    matrix = [chosen["z"][i] for i in shown]
    lines = [line if isinstance(line, list) else [line] * width for line in matrix]
    z = np.array(lines, dtype=np.float64)
    drawable = (z >= 1 / MOST_DRAWN) & (z <= MOST_DRAWN)
    z = np.ma.masked_where(~drawable, np.where(drawable, z, 0.0) * 100.0)
    figure, axes = _figure(labels, below=1.6, right=0.6)
    low, high = (z.min(), z.max()) if z.count() else (1.0, 10.0)
    norm = LogNorm(vmin=low, vmax=high if high > low else low * 1.1)
    look = ScalarMappable(norm=norm, cmap="cividis_r")
    # Not an image, which is scaled to the pixels of the picture in 100 MB of floats.
    edges = np.arange(width + 1) - 0.5, np.arange(len(labels) + 1) - 0.5
    axes.pcolormesh(*edges, z, cmap=look.cmap, norm=norm, rasterized=True)
    axes.set_xlim(-0.5, width - 0.5)
    step = max(1, -(-len(layers["names"]) // _MOST_TICKS))
    places = range(0, len(layers["names"]), step)
    axes.set_xticks(places, [_short(layers["names"][i], 26) for i in places], rotation=60)
    for label in axes.get_xticklabels():
        label.set(ha="right", rotation_mode="anchor", fontsize=7)
    for label in axes.get_yticklabels():
        is_best = label.get_text() == _short(best, _NAME_LENGTH)
        label.set_fontweight("bold" if is_best else "normal")
    axes.tick_params(length=0)
    ticks = nice_log_ticks(*_ends(norm))
    place = axes.get_position()
    beside = figure.add_axes((place.x1 + 0.12 / _WIDTH, place.y0, 0.14 / _WIDTH, place.height))
    bar = figure.colorbar(look, cax=beside, ticks=ticks)
    bar.ax.set_yticklabels([f"{text} %" for text in tick_texts(ticks)], fontsize=8, color=MUTED)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    heading = f"{chosen['heading'][:1].upper()}{chosen['heading'][1:]} of each layer on {context}"
    told = f"{counted(width, 'layer')} in {_of(len(labels), len(layers['labels']), 'case')}"
    left_out = (
        ", the answer and the fronts first, from most to least error; layers.csv has all"
        if len(labels) < len(chosen["z"])
        else ""
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
        bound = str(BOUND_NAMES.get(row["bound"], row["bound"]))
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
    rows = [rows[i] for i in _some([r["label"] for r in rows], _first(drawn, context))]
    figure, axes = _figure([row["label"] for row in rows], above=0.3)
    at = range(len(rows))
    axis = drawn["accumulatorAxes"][context]
    place = dict(axis["at"])
    axes.barh(
        at,
        [place[row["high"]] - place[row["low"]] + 0.36 for row in rows],
        left=[place[row["low"]] - 0.18 for row in rows],
        color="#0072B2", height=0.5, label="needed on this input",
    )  # fmt: skip
    mark: dict[str, Any] = {"mfc": "none", "mec": "#D55E00", "label": "enough for any input"}
    looks: dict[str, dict[str, Any]] = {
        "guaranteed": {"marker": "D", **mark},
        "array": {"marker": "|", "mec": INK, "ms": 11, "mew": 2, "label": "of the array"},
    }
    for key, look in looks.items():
        points = [(place[r[key]], i) for i, r in zip(at, rows, strict=True) if r[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="none", **look)
    for spot in axis["breaks"]:
        axes.axvspan(spot - 0.4, spot + 0.4, color=SHADE, linewidth=0)
    ticks = axis["at"][:: -(-len(place) // 24)]
    axes.set_xticks(
        [*(spot for _, spot in ticks), *axis["breaks"]],
        [*(str(bits) for bits, _ in ticks), *("…" for _ in axis["breaks"])],
    )
    axes.set_xlim(min(place.values()) - 0.8, max(place.values()) + 0.8)
    axes.set_xlabel("Accumulator width (bits)", fontsize=9, color=INK)
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)
    overflow = "overflows" if n_over == 1 else "overflow"
    told = f"{n_over} of {counted(n_all, 'case')} {overflow}" if n_over else "no case overflows"
    if len(rows) < n_all:
        told += f"; {_of(len(rows), n_all, 'case')} drawn, from most to least demanding"
    most = max(row["high"] for row in rows)
    draw_heading(
        figure,
        f"Accumulator widths on {context}: {most} bits hold every sum of this input",
        f"bar: least to most demanding layer; {told}",
    )
    return figure


def _first(drawn: Mapping[str, Any], context: str) -> list[str]:
    """Labels a picture of some cases shows first: the answer's, the least error's, the fronts'."""
    points = [point for point in drawn["points"] if point["context"] == context]
    known = [point for point in points if point[drawn["error"]] is not None]
    least = sorted(known, key=lambda point: point[drawn["error"]])[:1]
    cost = drawn["answerCosts"].get(context, "")
    # The front of the cost that decided goes before those of other costs.
    front = [point for point in points if cost in point["fronts"]]
    fronts = [point for point in points if point["fronts"]]
    answer = drawn["answers"].get(context, "")
    return list(dict.fromkeys([answer, *(p["label"] for p in (*least, *front, *fronts))]))


def _some(labels: Sequence[str], first: Sequence[str]) -> list[int]:
    """Places of at most `_MOST_LINES` labels: of `first`, then evenly of the others."""
    place = {label: i for i, label in enumerate(labels)}
    found = {place[label] for label in first[:_MOST_LINES] if label in place}
    others = [i for i in range(len(labels)) if i not in found]
    room = min(len(others), _MOST_LINES - len(found))
    # Both ends are among them.
    found |= {others[round(i * (len(others) - 1) / max(1, room - 1))] for i in range(room)}
    return sorted(found)


def _of(some: int, whole: int, noun: str) -> str:
    return f"{some} of {counted(whole, noun)}" if some < whole else counted(whole, noun)


def _ends(norm: Any) -> tuple[float, float]:
    return float(norm.vmin), float(norm.vmax)


def _latency(row: AnyRow) -> float:
    return sum(row["parts"]["latency_s"].values()) * row["calls"]


def _figure(
    labels: Sequence[str], *, above: float = 0.0, below: float = 0.0, right: float = 0.0
) -> "tuple[Figure, Axes]":
    """Figure and axes with one line a label; further room in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [_short(label, _NAME_LENGTH) for label in labels]
    tall = max(1.2, _LINE * len(labels))
    height = _TOP + above + tall + max(_BOTTOM, below)
    figure = Figure(figsize=(_WIDTH, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.4 + widest_text(figure, shown, fontsize=8, fontweight="bold")
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


_COLOR = "#08519C"
_NAME_LENGTH = 44
# Inches.
_MAP_WIDTH, _MAP_LINE, _TALLEST = 11.0, 0.22, 16.0
_HEAD, _STEPS, _GAP, _BELOW = 1.0, 0.75, 0.1, 1.0
_LAYERS, _BAR, _RIGHT_OF_MAP = 1.1, 0.14, 0.75


def step_title(case: AnyRow) -> str:
    """The finding: how few layers and steps make half of the squared error."""
    if not case["half_layers"]:
        return "No error at any time step"
    layers = f"{case['half_layers']} of {case['n_layers']} layers"
    steps = f"{case['half_steps']} of {case['n_steps']} time steps"
    return f"Half of the squared error comes from {layers}, or from {steps}"


@without_math
def step_heat_map(
    case: AnyRow,
    cells: Sequence[AnyRow],
    *,
    provenance: Mapping[str, Any] | None = None,
) -> "Figure":
    """Share of each layer (down) and time step (across) in the model's squared output error.

    Bars above and beside the map are the sums of its columns and rows. A cell without rows is
    hatched.

    Parameters
    ----------
    case : mapping
        Of a step report: ``accelerator split method calibration output_error half_layers
        half_steps n_layers n_steps tokens``.
    cells : sequence of mapping
        ``layer step run_share``, layer by layer, each with the same steps in the order of the run.
    provenance : mapping, optional
        Printed below the picture.

    Raises
    ------
    InputError
        If there are no cells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not cells:
        raise InputError("no cells to draw; give those of a step report")
    names = list(dict.fromkeys(cell["layer"] for cell in cells))
    steps = [cell["step"] for cell in cells[: len(cells) // len(names)]]
    shares = [cell["run_share"] for cell in cells]
    z = np.array(shares, dtype=np.float64).reshape(len(names), len(steps)) * 100.0
    shown = [_short(name, _NAME_LENGTH) for name in names]
    tall = min(_TALLEST, max(1.2, _MAP_LINE * len(names)))
    height = _HEAD + _STEPS + _GAP + tall + _BELOW
    figure = Figure(figsize=(_MAP_WIDTH, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left = 0.4 + widest_text(figure, shown, fontsize=8)
    wide = _MAP_WIDTH - left - _GAP - _LAYERS - 0.25 - _BAR - _RIGHT_OF_MAP

    def place(x: float, y: float, width: float, tall: float) -> "Axes":
        return figure.add_axes((x / _MAP_WIDTH, y / height, width / _MAP_WIDTH, tall / height))

    axes = place(left, _BELOW, wide, tall)
    above = place(left, _BELOW + tall + _GAP, wide, _STEPS)
    beside = place(left + wide + _GAP, _BELOW, _LAYERS, tall)
    scale = place(left + wide + _GAP + _LAYERS + 0.25, _BELOW, _BAR, tall)
    axes.set_facecolor("#F0F0F0")
    axes.patch.set(hatch="////", edgecolor="#B0B0B0")
    top = float(z[np.isfinite(z)].max()) if np.isfinite(z).any() else 0.0
    image = axes.imshow(
        np.ma.masked_invalid(z),
        vmin=0.0,
        vmax=top or 1.0,
        aspect="auto",
        cmap="Blues",
        interpolation="nearest",
    )
    filled = np.nan_to_num(z)
    above.bar(range(len(steps)), filled.sum(axis=0), width=0.84, color=_COLOR)
    beside.barh(range(len(names)), filled.sum(axis=1), height=0.74, color=_COLOR)
    _mark_map(axes, shown, steps, room=wide)
    _mark_margins(above, beside, axes)
    bar = figure.colorbar(image, cax=scale)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    draw_heading(figure, step_title(case), _facts(case))
    draw_footer(figure, {"rows": case["tokens"], **(provenance or {})}, n_left_out=0)
    return figure


def _facts(case: AnyRow) -> str:
    parts = (
        f"{labels_of([case])[0]} on {case['accelerator']}",
        f"method {case['method']}",
        f"calibrated on {case['calibration']}",
        f"output error {100 * case['output_error']:.3g} %",
        "shares of its square, each step with equal weight",
    )
    return "  ·  ".join(parts)


def _mark_map(axes: "Axes", names: Sequence[str], steps: Sequence[Any], *, room: float) -> None:
    every = max(1, -(-len(names) // _MOST_TICKS))
    rows = range(0, len(names), every)
    axes.set_yticks(rows, [names[i] for i in rows])
    # Labels of time steps, upright, need a fifth of an inch each.
    every = max(1, -(-len(steps) * 20 // int(100 * room)))
    columns = range(0, len(steps), every)
    axes.set_xticks(columns, [f"{steps[i]:g}" for i in columns], rotation=90)
    axes.set_xlabel("Time step, in the order of the run", fontsize=9, color=INK)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _mark_margins(above: "Axes", beside: "Axes", axes: "Axes") -> None:
    above.set_xlim(axes.get_xlim())
    beside.set_ylim(axes.get_ylim())
    above.set_xticks([])
    beside.set_yticks([])
    above.locator_params(axis="y", nbins=3)
    beside.locator_params(axis="x", nbins=3)
    above.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    beside.xaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    above.set_title("sum over layers", loc="left", fontsize=8, color=MUTED, pad=3)
    beside.set_title("sum over steps", loc="left", fontsize=8, color=MUTED, pad=3)
    along: Literal["x", "y"]
    for margin, along in ((above, "y"), (beside, "x")):
        margin.grid(True, axis=along, color=GRID, linewidth=0.7)
        margin.set_axisbelow(True)
        margin.tick_params(colors=MUTED, labelsize=8, length=0)
        for side in margin.spines.values():
            side.set_visible(False)


# Inches.
_SIZE, _GRID_GAP, _LABEL, _MARGIN, _TITLE = 0.85, 0.06, 2.5, 0.15, 0.55
_MOST_IMAGES = 12


def sample_grid(
    rows: Mapping[str, tuple[np.ndarray, str]], *, title: str = "", subtitle: str = ""
) -> "Figure":
    """Draw rows of images, label and note to their left.

    Parameters
    ----------
    rows : mapping of label to (images, note)
        Images (images, channels, height, width), the same number in each row; the first row is
        the reference. A row's note stands below its label, such as ``27.6 dB``.
    title, subtitle : str

    Raises
    ------
    InputError
        If there are no images, or rows differ in shape.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shapes = {images.shape for images, _ in rows.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or 0 in next(iter(shapes)):
        raise InputError(f"rows must hold images of one shape, got {sorted(shapes)}")
    low, high = _shown_range(next(iter(rows.values()))[0])
    n_images = min(next(iter(shapes))[0], _MOST_IMAGES)
    top = _TITLE if title or subtitle else 0.0
    pictures = _LABEL + n_images * (_SIZE + _GRID_GAP) + _MARGIN
    # Few pictures are narrower than what is said above them: letters of 8 points, 11 points high.
    told = max(0.062 * len(subtitle), 0.086 * len(title)) + 2 * _MARGIN
    width = max(pictures, told)
    height = top + len(rows) * (_SIZE + _GRID_GAP) + 2 * _MARGIN
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - 0.2 / height, title, fontsize=11, color=INK, va="center")
    figure.text(_MARGIN / width, 1 - 0.42 / height, subtitle, fontsize=8, color=MUTED, va="center")
    for r, (label, (images, note)) in enumerate(rows.items()):
        bottom = height - top - _MARGIN - (r + 1) * _SIZE - r * _GRID_GAP
        middle = (bottom + _SIZE / 2) / height
        left = (_LABEL - 0.12) / width
        look: dict[str, Any] = {"ha": "right", "color": INK if r else MUTED}
        figure.text(left, middle, label, fontsize=9, va="bottom" if note else "center", **look)
        figure.text(left, middle - 0.04 / height, note, fontsize=8.5, va="top", **look)
        for i, image in enumerate(images[:n_images]):
            place = ((_LABEL + i * (_SIZE + _GRID_GAP)) / width, bottom / height)
            axes = figure.add_axes((*place, _SIZE / width, _SIZE / height))
            axes.imshow(shown_image(image, low, high), interpolation="nearest")
            axes.set_axis_off()
    return figure


def shown_image(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGB (height, width, 3) within 0..1 of (channels, height, width); 1 channel is gray.

    Of latents, which have more channels, the first three are shown.
    """
    channels = image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, axis=0)
    return np.clip((channels.transpose(1, 2, 0) - low) / (high - low), 0.0, 1.0)


def _shown_range(reference: np.ndarray) -> tuple[float, float]:
    """-1..1 for pixels; for latents the range that holds all but the outermost 1 %."""
    if np.abs(reference).max() <= 1.0:
        return -1.0, 1.0
    low, high = np.quantile(reference, [0.005, 0.995])
    return float(low), float(max(high, low + 1e-6))
