"""Figures an architect puts on a slide: error against cost, with the finding as the title.

A figure is panels (`loraq_sim.reporting.panels`) and the words around them: heading, subtitle,
panel titles, legend and a footer of provenance. Everything is drawn on explicit `Figure` objects
with an Agg canvas: no pyplot, no global state, no display. Rows carry a ``pareto`` flag made
elsewhere; nothing is computed here but the layout.
"""

import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, counted
from loraq_sim.files import replaced_file
from loraq_sim.reporting.labels import NO_BRANCH, branch_markers, main_colors
from loraq_sim.reporting.panels import (
    INK,
    MOST_DRAWN,
    MUTED,
    PanelStyle,
    can_draw,
    draw_panel,
    mark_partial,
)
from loraq_sim.results.columns import is_missing, plain_rows
from loraq_sim.results.rows import IDENTITY
from loraq_sim.results.verdict import Verdict, verdict_of
from loraq_sim.results.wording import labelled, main_and_branch_of, name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text


__all__ = [
    "draw_footer",
    "draw_heading",
    "pareto_figure",
    "save_figure",
    "shown_in_notebooks",
    "subtitle",
    "without_math",
]

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
_DIGEST = re.compile(r"[0-9a-f]{16,}")
_DIGEST_DIGITS = 12
_DPI = 200
_MAX_PER_ROW = 3
# Inches.
_PANEL_WIDTH, _PANEL_HEIGHT = 4.9, 3.75
_SINGLE_WIDTH = 7.4
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.8, 1.75, 1.0, 0.95
_GAP_X, _GAP_Y = 0.85, 1.0


def without_math(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` with dollar signs as they stand: a name such as ``$\\frac{$`` is no formula."""

    @functools.wraps(draw)
    def plain(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return plain


@without_math
def pareto_figure(
    totals: Any,
    *,
    x: str | Sequence[str] = "latency_s",
    y: str = "output_error",
    title: str | None = None,
    accelerator: str | None = None,
    model: str | None = None,
    layers: int | None = None,
    provenance: Mapping[str, Any] | None = None,
    verdict: Verdict | None = None,
) -> "Figure":
    """Error-versus-cost picture of model totals (or of one layer's rows).

    One panel for each accelerator (and dump, if several) and each cost named in `x`. The first
    cost is the one the ``pareto`` flags were made for: its panels emphasize the flagged rows.
    Panels of further costs emphasize their own lower left edge. Smaller is better on both axes.

    Parameters
    ----------
    totals : DataFrame or iterable of mappings
        Rows with ``split``, ``pareto``, the columns named by `x` and `y`, and optionally
        ``accelerator``, ``method``, ``preset``. Rows without finite values (or with an error of
        zero, which a log axis cannot show) are left out and counted below the picture.
    x : str or sequence of str
        Cost columns, in base units.
    y : str
        Error column, drawn on a log axis.
    title : str, optional
        By default the headline of the verdict.
    accelerator : str, optional
        Draw only the rows of this accelerator; also names it where rows do not.
    model, layers : str, int, optional
        Named in the subtitle.
    provenance : mapping, optional
        Printed as ``key value`` pairs below the picture; hex digests are cut to 12 digits.
    verdict : Verdict, optional
        What to build, which is emphasized wherever it lies; by default that on these rows, read
        from `y` and the first of `x`.

    Returns
    -------
    figure : matplotlib.figure.Figure
        With an Agg canvas attached.

    Raises
    ------
    InputError
        If `x` names no column, or a named column is in none of the rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    xs = (x,) if isinstance(x, str) else tuple(x)
    rows = _rows_of(plain_rows(totals), accelerator)
    _check_columns(rows, (*xs, y))
    verdict = verdict or verdict_of(rows, error=y, cost=xs[0])
    drawn = _labelled([row for row in rows if _can_draw(row, xs, y)])
    groups = _by_accelerator(drawn, accelerator)
    n_panels = max(1, len(groups) * len(xs))
    n_columns = len(xs) if len(xs) > 1 else _columns_for(n_panels)
    size, places = _layout(n_panels, n_columns, has_panel_titles=len(groups) > 1)
    figure = Figure(figsize=size, dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    style = _style(drawn)
    panels, n_bars = [(name, key) for name in groups for key in xs], 0
    for (name, key), place in zip(panels, places, strict=False):
        axes = figure.add_axes(place)
        members = groups[name]
        own = verdict.on.get(name, verdict)
        best = _best_of(members, own) if len(members) > 1 else None
        n_bars += draw_panel(
            axes, members, x=key, y=y, style=style, use_marks=key == xs[0], best=best
        )
        if len(groups) > 1:
            panel_title(axes, name, own.headline if key == xs[0] else "")
    if drawn:
        draw_legend(figure, style, left=size[0] - _RIGHT + 0.2)
    facts = subtitle(drawn or rows, model, layers, groups)
    if n_bars:
        facts += "  ·  bars: how far the latency model may be off"
    elif "latency_s" in xs and any(row.get("accelerator") for row in drawn):
        facts += "  ·  the latency model may be off by more than is shown"
    draw_heading(figure, title or verdict.headline, facts)
    draw_footer(figure, provenance or {}, n_left_out=len(rows) - len(drawn))
    mark_partial(figure, verdict.partial)
    return figure


def shown_in_notebooks(figure: "Figure", partial: str = "") -> "Figure":
    """`figure`, which a notebook shows as a picture even where pyplot was never loaded."""
    mark_partial(figure, partial)

    def picture() -> bytes:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", metadata={"Software": None})
        return drawn.getvalue()

    setattr(figure, "_repr_png_", picture)  # noqa: B010
    return figure


@without_math
def save_figure(figure: "Figure", path: str | Path, *, most_pixels: float = math.inf) -> Path:
    """Write a figure as PNG (200 dpi), SVG or PDF, by the suffix of `path`; returns the path.

    What would have more than `most_pixels` is written with fewer dots per inch. Equal figures give
    equal files: no date is written and SVG ids do not vary.

    Raises
    ------
    InputError
        If the suffix is none of `FIGURE_SUFFIXES` or the file cannot be written.
    """
    import matplotlib

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FIGURE_SUFFIXES:
        raise InputError(
            f"{path}: cannot save a figure as {suffix or 'a file without suffix'}; "
            f"use one of {', '.join(FIGURE_SUFFIXES)}"
        )
    metadata = {
        ".png": {"Software": "loraq-sim"},
        ".svg": {"Creator": "loraq-sim", "Date": None},
        ".pdf": {"Creator": "loraq-sim", "CreationDate": None},
    }[suffix]
    width, height = figure.get_size_inches()
    # Of what is drawn as pixels in SVG and PDF too.
    dpi = min(_DPI, math.sqrt(most_pixels / (width * height)))
    settings: dict[str, Any] = {"format": suffix[1:], "dpi": dpi, "metadata": metadata}
    if suffix == ".png":
        # Half the time of the usual level; lines and flat areas grow little.
        settings["pil_kwargs"] = {"compress_level": 3}
    with (
        matplotlib.rc_context({"svg.hashsalt": "loraq-sim"}),
        replaced_file(path) as file,
        warnings.catch_warnings(),
    ):
        # A name may have letters that no font here has: a box stands for each.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, **settings)
    return path


def _rows_of(rows: list[dict[str, Any]], accelerator: str | None) -> list[dict[str, Any]]:
    if accelerator is None:
        return rows
    return [row for row in rows if row.get("accelerator") in (None, accelerator)]


def _check_columns(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    if len(keys) < 2:
        raise InputError("x names no cost column; use for example x='latency_s'")
    known = {key for row in rows for key in row}
    missing = [key for key in keys if rows and key not in known]
    if missing:
        raise InputError(
            f"column {missing[0]!r} is in none of the rows; known: {', '.join(sorted(known))}"
        )


def _can_draw(row: Mapping[str, Any], xs: Sequence[str], y: str) -> bool:
    known = all(not is_missing(row.get(key)) and math.isfinite(row[key]) for key in (*xs, y))
    return known and row[y] > 0 and all(row[key] <= MOST_DRAWN for key in xs) and can_draw(row[y])


def _labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with a ``label``: their own, or split and settings in which rows of a split differ."""
    return [
        {**row, "label": row.get("label") or named["label"]}
        for row, named in zip(rows, labelled(rows), strict=True)
    ]


def _best_of(rows: Sequence[Mapping[str, Any]], verdict: Verdict) -> str | None:
    """What the row of the verdict is called among `rows`."""
    chosen = verdict.row
    if chosen is None:
        return None
    keys = [name for name in (*IDENTITY, verdict.error, verdict.cost) if name in chosen]
    found = (row for row in rows if all(row.get(key) == chosen[key] for key in keys))
    return next(map(name_of, found), None)


def _by_accelerator(
    rows: Sequence[Mapping[str, Any]], accelerator: str | None
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of each panel; dumps are kept apart too, since errors of two models do not compare."""
    several_dumps = len({row.get("dump") for row in rows}) > 1
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = str(row.get("accelerator") or accelerator or "")
        groups.setdefault(f"{row.get('dump')} on {name}" if several_dumps else name, []).append(row)
    return groups


def _columns_for(n_panels: int) -> int:
    return 2 if n_panels == 4 else min(n_panels, _MAX_PER_ROW)


def _layout(
    n_panels: int, n_columns: int, *, has_panel_titles: bool
) -> tuple[tuple[float, float], list[tuple[float, float, float, float]]]:
    """Figure size in inches and panel rectangles as fractions, row by row from the top."""
    panel_width = _SINGLE_WIDTH if n_panels == 1 else _PANEL_WIDTH
    n_rows = math.ceil(n_panels / n_columns)
    width = _LEFT + n_columns * panel_width + (n_columns - 1) * _GAP_X + _RIGHT
    top = _TOP + 0.3 * has_panel_titles
    height = top + n_rows * _PANEL_HEIGHT + (n_rows - 1) * _GAP_Y + _BOTTOM
    places = []
    for i in range(n_panels):
        row, column = divmod(i, n_columns)
        left = _LEFT + column * (panel_width + _GAP_X)
        bottom = height - top - (row + 1) * _PANEL_HEIGHT - row * _GAP_Y
        places.append((left / width, bottom / height, panel_width / width, _PANEL_HEIGHT / height))
    return (width, height), places


def _style(rows: Sequence[Mapping[str, Any]]) -> PanelStyle:
    splits = [str(row["split"]) for row in rows]
    return PanelStyle(colors=main_colors(splits), markers=branch_markers(splits))


def draw_heading(figure: "Figure", heading: str, facts: str) -> None:
    """Bold heading and gray `facts` below it, shrunk where the figure is too narrow."""
    width, height = figure.get_size_inches()
    left = 0.3 / width
    room = figure.dpi * (width - 0.6)
    text = figure.text(
        left, 1 - 0.28 / height, heading, fontsize=15, fontweight="bold", color=INK, va="top"
    )
    _fit(text, room)
    y = 1 - 0.60 / height
    _fit(figure.text(left, y, facts, fontsize=9.5, color=MUTED, va="top"), room)


def subtitle(
    rows: Sequence[Mapping[str, Any]],
    model: str | None,
    layers: int | None,
    groups: Mapping[str, Any],
) -> str:
    """What was evaluated: model, accelerators, layers, splits, methods."""
    names = [name for name in groups if name]
    # Splits without a branch are plain rounding, whatever the method of the others.
    branched = [row for row in rows if main_and_branch_of(str(row.get("split")))[1]] or rows
    methods = sorted({str(row["method"]) for row in branched if row.get("method")})
    n_splits = len({row.get("split") for row in rows})
    parts = [
        model,
        f"on {', '.join(names)}" if names else None,
        counted(layers, "layer") if layers else None,
        counted(n_splits, "split"),
        f"method {', '.join(methods)}" if methods else None,
        "down and left is better",
    ]
    return "  ·  ".join(part for part in parts if part)


def _fit(text: "Text", room: float) -> None:
    """Shrink a text that is wider than `room` pixels."""
    drawn = text.get_window_extent().width
    if drawn > room:
        text.set_fontsize(float(text.get_fontsize()) * room / drawn)


def panel_title(axes: "Axes", name: str, finding: str) -> None:
    """Accelerator name above a panel of several, with what its front says if anything."""
    text = f"{name}: {finding}" if finding else name
    _fit(axes.set_title(text, loc="left", fontsize=9, color=INK), axes.get_window_extent().width)


def draw_legend(figure: "Figure", style: PanelStyle, *, left: float) -> None:
    """Two small legends, color above marker, `left` inches from the left, at the panels' top."""
    from matplotlib.lines import Line2D

    def handle(label: str, color: str, marker: str) -> Line2D:
        return Line2D([], [], linestyle="none", marker=marker, color=color, label=label)

    width, height = figure.get_size_inches()
    top = max(axes.get_position().y1 for axes in figure.axes)
    look = {"frameon": False, "fontsize": 8.5, "title_fontsize": 8.5, "alignment": "left"}
    look |= {"borderaxespad": 0, "borderpad": 0, "handletextpad": 0.4, "labelcolor": INK}
    colors = [handle(name, color, "o") for name, color in style.colors.items()]
    markers = [
        handle("no branch" if name == NO_BRANCH else name, "#777777", marker)
        for name, marker in style.markers.items()
    ]
    for title, handles, drop in (
        ("Main precision", colors, 0.0),
        ("Low-rank branch", markers, 0.30 + 0.205 * len(colors)),
    ):
        place = (left / width, top - drop / height)
        figure.legend(handles=handles, title=title, loc="upper left", bbox_to_anchor=place, **look)


def draw_footer(figure: "Figure", provenance: Mapping[str, Any], *, n_left_out: int) -> None:
    """Where the numbers come from, in small print."""
    width, height = figure.get_size_inches()
    parts = [_fact(key, value) for key, value in provenance.items()]
    if n_left_out:
        left_out = f"{counted(n_left_out, 'row')} not drawn"
        parts.insert(0, f"{left_out}: failed, or without a value to draw")
    text = "  ·  ".join(parts)
    figure_text = figure.text(0.3 / width, 0.14 / height, text, fontsize=7, color="#888888")
    _fit(figure_text, figure.dpi * (width - 0.6))


def _fact(key: str, value: Any) -> str:
    shown = str(value)
    if _DIGEST.fullmatch(shown):
        shown = shown[:_DIGEST_DIGITS]
    return f"{key.removesuffix('_digest').replace('_', ' ')} {shown}"
