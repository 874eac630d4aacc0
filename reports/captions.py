"""Words around the panels: heading, subtitle, panel titles, legend and provenance footer."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reports.panels import INK, MUTED, PanelStyle
from reports.split_names import NO_BRANCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = [
    "draw_footer",
    "draw_heading",
    "draw_legend",
    "panel_title",
    "subtitle",
    "without_math",
]

_DIGEST = re.compile(r"[0-9a-f]{16,}")
_DIGEST_DIGITS = 12


def without_math(draw: Callable[..., Any]) -> Callable[..., Any]:
    """`draw` with dollar signs as they stand: a name such as ``$\\frac{$`` is no formula."""

    @functools.wraps(draw)
    def plain(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return plain


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


def subtitle(
    rows: Sequence[Mapping[str, Any]],
    model: str | None,
    layers: int | None,
    groups: Mapping[str, Any],
) -> str:
    """What was evaluated: model, accelerators, layers, splits, methods."""
    names = [name for name in groups if name]
    # Splits without a branch are plain rounding, whatever the method of the others.
    branched = [row for row in rows if "+" in str(row.get("split"))] or rows
    methods = sorted({str(row["method"]) for row in branched if row.get("method")})
    n_splits = len({row.get("split") for row in rows})
    parts = [
        model,
        f"on {', '.join(names)}" if names else None,
        f"{layers} layer{'s' * (layers != 1)}" if layers else None,
        f"{n_splits} split{'s' * (n_splits != 1)}",
        f"method {', '.join(methods)}" if methods else None,
        "down and left is better",
    ]
    return "  ·  ".join(part for part in parts if part)


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


def _fit(text: "Text", room: float) -> None:
    """Shrink a text that is wider than `room` pixels."""
    drawn = text.get_window_extent(text.figure.canvas.get_renderer()).width
    if drawn > room:
        text.set_fontsize(text.get_fontsize() * room / drawn)


def draw_footer(figure: "Figure", provenance: Mapping[str, Any], *, n_left_out: int) -> None:
    """Where the numbers come from, in small print."""
    width, height = figure.get_size_inches()
    parts = [_fact(key, value) for key, value in provenance.items()]
    if n_left_out:
        parts.insert(
            0, f"{n_left_out} row{'s' * (n_left_out != 1)} not drawn: failed or without a value"
        )
    text = "  ·  ".join(parts)
    figure_text = figure.text(0.3 / width, 0.14 / height, text, fontsize=7, color="#888888")
    _fit(figure_text, figure.dpi * (width - 0.6))


def _fact(key: str, value: Any) -> str:
    shown = str(value)
    if _DIGEST.fullmatch(shown):
        shown = shown[:_DIGEST_DIGITS]
    return f"{key.removesuffix('_digest').replace('_', ' ')} {shown}"
