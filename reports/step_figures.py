"""Picture of which layers and time steps make up the error: a heat map with its margins."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError
from reports.captions import draw_footer, draw_heading, without_math
from reports.panels import GRID, INK, MUTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["step_heat_map", "step_title"]

Row = Mapping[str, Any]

_COLOR = "#08519C"
_MOST_TICKS = 60
_NAME_LENGTH = 44
# Inches.
_WIDTH, _LINE, _TALLEST = 11.0, 0.22, 16.0
_HEAD, _STEPS, _GAP, _BELOW = 1.0, 0.75, 0.1, 1.0
_LAYERS, _BAR, _RIGHT = 1.1, 0.14, 0.75


def step_title(case: Row) -> str:
    """The finding: how few layers and steps make half of the squared error."""
    if not case["half_layers"]:
        return "No error at any time step"
    layers = f"{case['half_layers']} of {case['n_layers']} layers"
    steps = f"{case['half_steps']} of {case['n_steps']} time steps"
    return f"Half of the squared error comes from {layers}, or from {steps}"


@without_math
def step_heat_map(
    case: Row,
    cells: Sequence[Row],
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
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not cells:
        raise InputError("no cells to draw; give those of a step report")
    names = list(dict.fromkeys(cell["layer"] for cell in cells))
    steps = [cell["step"] for cell in cells[: len(cells) // len(names)]]
    shares = [cell["run_share"] for cell in cells]
    z = np.array(shares, dtype=np.float64).reshape(len(names), len(steps)) * 100.0
    shown = [_short(name) for name in names]
    left = 0.4 + 0.072 * max(map(len, shown))
    tall = min(_TALLEST, max(1.2, _LINE * len(names)))
    wide = _WIDTH - left - _GAP - _LAYERS - 0.25 - _BAR - _RIGHT
    height = _HEAD + _STEPS + _GAP + tall + _BELOW
    figure = Figure(figsize=(_WIDTH, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)

    def place(x: float, y: float, width: float, tall: float) -> "Axes":
        return figure.add_axes((x / _WIDTH, y / height, width / _WIDTH, tall / height))

    axes = place(left, _BELOW, wide, tall)
    above = place(left, _BELOW + tall + _GAP, wide, _STEPS)
    beside = place(left + wide + _GAP, _BELOW, _LAYERS, tall)
    scale = place(left + wide + _GAP + _LAYERS + 0.25, _BELOW, _BAR, tall)
    axes.set_facecolor("#F0F0F0")
    axes.patch.set(hatch="////", edgecolor="#B0B0B0")
    top = float(z[np.isfinite(z)].max()) if np.isfinite(z).any() else 0.0
    look = {"aspect": "auto", "cmap": "Blues", "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_invalid(z), vmin=0.0, vmax=top or 1.0, **look)
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


def _facts(case: Row) -> str:
    parts = (
        f"{case['split']} on {case['accelerator']}",
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
    for margin, along in ((above, "y"), (beside, "x")):
        margin.grid(True, axis=along, color=GRID, linewidth=0.7)
        margin.set_axisbelow(True)
        margin.tick_params(colors=MUTED, labelsize=8, length=0)
        for side in margin.spines.values():
            side.set_visible(False)


def _short(text: str) -> str:
    half = _NAME_LENGTH // 2
    return text if len(text) <= _NAME_LENGTH else f"{text[: half - 1]}…{text[-half:]}"
