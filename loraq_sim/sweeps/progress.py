"""How far a sweep is, for people: a bar, the time left, and the front that fills in.

A terminal gets a bar on stderr, Jupyter a bar of HTML that is replaced in place, without
widgets. Both have the front of the layers that are finished: splits are compared over the same
layers, and the front of the whole model is there when the last of them is.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from typing import Any, Literal

from loraq_sim.errors import counted
from loraq_sim.files import shown
from loraq_sim.results.choice import has_cost, has_error, objectives_of
from loraq_sim.results.columns import number_of
from loraq_sim.results.front import mark_front
from loraq_sim.results.rows import Row
from loraq_sim.results.totals import model_totals
from loraq_sim.results.wording import clock_text, context_of, labels_of, value_text

__all__ = [
    "OnEvent",
    "SweepEvent",
    "in_jupyter",
    "is_problem",
    "left_text",
    "live_progress",
    "problem_text",
    "terminal_bar",
]

EventKind = Literal["start", "case", "worker_lost", "note", "end"]


def _no_rows() -> list[Row]:
    return []


@dataclass(frozen=True, kw_only=True)
class SweepEvent:
    """One step of a sweep, with the state after it.

    `kind` is ``start``, ``case`` (one case finished), ``worker_lost``, ``note`` or ``end``. `total`
    counts the cases this run has to do, `done` those it has done, `failed` the failed among them;
    `skipped` were in the store already. `eta_s` is the expected time left, None until known.
    `layer`, `split` and `status` belong to the case; `message` says why it failed, what happened
    to the worker, or what else to know. `n_layers` layers of `of_layers` have all their rows, which
    `finished` reads.
    """

    kind: EventKind
    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
    eta_s: float | None = None
    layer: str = ""
    split: str = ""
    status: str = ""
    message: str = ""
    n_layers: int = 0
    of_layers: int = 0
    finished: Callable[[], Sequence[Row]] = field(default=_no_rows, repr=False, compare=False)


OnEvent = Callable[[SweepEvent], None]


class _FrontSoFar:
    """Splits over the layers that are finished, and which of them no other beats.

    Attributes
    ----------
    contexts : mapping
        By dump and accelerator (error column, cost column, points): label, error, cost and whether
        the point is on the front, cheapest first.
    """

    def __init__(self) -> None:
        self.contexts: dict[str, tuple[str, str, list[tuple[str, float, float, bool]]]] = {}
        self.n_layers = self.of_layers = 0
        self._not_before = -math.inf

    def take(self, event: SweepEvent) -> None:
        """Read the rows again where more layers are finished, and it is not too soon."""
        now = time.monotonic()
        if event.n_layers in (0, self.n_layers) or now < self._not_before:
            return
        self.n_layers, self.of_layers = event.n_layers, event.of_layers
        totals = model_totals(list(event.finished()))
        error, cost = objectives_of(totals)
        self.contexts = {}
        if cost:
            marked = mark_front(totals, [error, cost], by=("dump", "accelerator"))
            several = len({row.get("dump") for row in marked}) > 1
            for label, row in zip(labels_of(marked), marked, strict=True):
                if not has_error(row, error) or not has_cost(row, cost):
                    continue
                place = context_of(row, several_dumps=several)
                points = self.contexts.setdefault(place, (error, cost, []))[2]
                value = number_of(row, error)
                points.append(
                    (label, math.inf if value is None else value, row[cost], row["pareto"])
                )
            for _, _, points in self.contexts.values():
                points.sort(key=lambda point: (point[2], point[1]))
        # Many rows take long to add up; a twentieth of the time is enough for a look.
        self._not_before = now + max(_LOOK_S, 20 * (time.monotonic() - now))

    def lines(self) -> list[str]:
        """One line a context: the front, cheapest first."""
        told = []
        for place, (error, cost, points) in list(self.contexts.items())[:_MOST_FRONTS]:
            front = [point for point in points if point[3]]
            shown_points = [front[i] for i in _spread_out(len(front), _MOST_POINTS)]
            text = ", ".join(
                f"{label} {value_text(error, own)} {value_text(cost, price)}"
                for label, own, price, _ in shown_points
            )
            told.append(f"{place}, {self.n_layers} of {counted(self.of_layers, 'layer')}: {text}")
        return told

    def svg(self) -> str:
        """Error (log) against cost of every split, the front as a staircase, per context."""
        return "".join(
            _svg_front(place, *known) for place, known in list(self.contexts.items())[:_MOST_FRONTS]
        )


_LOOK_S = 0.5
_MOST_FRONTS, _MOST_POINTS = 3, 5
_SVG_WIDTH, _SVG_HEIGHT, _SVG_MARGIN = 300, 120, 14


def _spread_out(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def _svg_front(
    place: str, error: str, cost: str, points: Sequence[tuple[str, float, float, bool]]
) -> str:
    drawn = [p for p in points if 0 < p[1] < math.inf]
    if not drawn:
        return ""
    xs = _placed([p[2] for p in drawn], _SVG_MARGIN, _SVG_WIDTH - _SVG_MARGIN)
    heights = [math.log(p[1]) for p in drawn]
    ys = _placed(heights, _SVG_HEIGHT - _SVG_MARGIN, _SVG_MARGIN)
    corners: list[str] = []
    marks: list[str] = []
    for (label, own, price, on_front), x, y in zip(drawn, xs, ys, strict=True):
        if on_front:
            corners.append(f"H{x:.1f}V{y:.1f}" if corners else f"M{x:.1f} {y:.1f}")
        color = "#0072B2" if on_front else "#9a9a9a"
        told = escape(f"{label}: {value_text(error, own)}, {value_text(cost, price)}")
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"><title>{told}</title>'
            "</circle>"
        )
    words = {"output_error": "error", "weight_error": "weight error"}
    title = f"{place}: {words.get(error, error)} (log) over {cost.rpartition('_')[0] or cost}"
    return (
        f'<svg width="{_SVG_WIDTH}" height="{_SVG_HEIGHT + 18}" role="img" '
        f'aria-label="front so far on {escape(place)}">'
        f'<text x="{_SVG_MARGIN}" y="12" font-size="11" fill="currentColor">'
        f"{escape(shown(title))}</text>"
        f'<g transform="translate(0 14)"><path d="{"".join(corners)}" fill="none" '
        f'stroke="#0072B2"/>{"".join(marks)}</g></svg>'
    )


def _placed(values: Sequence[float], start: float, end: float) -> list[float]:
    """`values` from the least at `start` to the largest at `end`; equal ones in the middle."""
    low, high = min(values), max(values)
    if high <= low:
        return [(start + end) / 2] * len(values)
    return [start + (value - low) / (high - low) * (end - start) for value in values]


def in_jupyter() -> bool:
    """Whether a notebook shows what this process displays."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and hasattr(shell, "kernel")


@contextmanager
def live_progress(wanted: bool | None = None) -> Iterator[OnEvent]:
    """Listener that shows a sweep: a bar in a notebook or on a terminal, else nothing.

    Parameters
    ----------
    wanted : bool, optional
        False for silence; True for a bar on stderr even where that is no terminal.
    """
    if wanted is not False and in_jupyter():
        yield _html_bar()
    elif wanted or (wanted is None and sys.stderr is not None and sys.stderr.isatty()):
        with terminal_bar() as listener:
            yield listener
    else:
        yield lambda event: None


@contextmanager
def terminal_bar() -> Iterator[OnEvent]:
    """Listener that keeps a bar, the time left and the front so far on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    front = _FrontSoFar()
    last: list[tuple[float, SweepEvent]] = []

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            if last:
                self.update(bar, left=_left_text(*last[0]), refresh=False)
            yield self.make_tasks_table(self.tasks)
            for line in front.lines() if last and last[0][1].kind != "end" else ():
                yield Text(shown(line), style="dim", no_wrap=True, overflow="ellipsis")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("[red]{task.fields[failures]}"),
    )
    with Bar(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("sweep", total=None, left="", failures="")

        def show(event: SweepEvent) -> None:
            last[:] = [(time.monotonic(), event)]
            front.take(event)
            failures = f"{event.failed} failed" if event.failed else ""
            progress.update(bar, total=event.total, completed=event.done, failures=failures)
            if is_problem(event):
                progress.console.print(shown(problem_text(event)), markup=False, highlight=False)

        yield show


def _html_bar() -> OnEvent:
    # Loaded by the notebook; loraq-sim does without it.
    display = import_module("IPython.display").display
    front = _FrontSoFar()
    problems: list[str] = []
    handle: list[Any] = []
    shown_at = [-math.inf]

    def show(event: SweepEvent) -> None:
        if is_problem(event):
            problems.append(problem_text(event))
        front.take(event)
        now = time.monotonic()
        if event.kind == "case" and event.done < event.total and now - shown_at[0] < _REDRAW_S:
            return
        shown_at[0] = now
        content = {
            "text/html": _html_of(event, front, problems),
            "text/plain": _counts_text(event),
        }
        if handle:
            handle[0].update(content, raw=True)
        else:
            handle.append(display(content, raw=True, display_id=True))

    return show


_REDRAW_S = 0.2
# A sweep below has a time left that may be off by half.
_SECONDS_OF_SHORT = 60.0
_MOST_PROBLEMS = 5


def _html_of(event: SweepEvent, front: _FrontSoFar, problems: Sequence[str]) -> str:
    """The bar of a notebook; when all is done one line, since the study says the rest."""
    words = _counts_text(event)
    left = "" if event.kind == "end" else _left_text(time.monotonic(), event)
    share = event.done / event.total if event.total else 1.0
    parts = [f"<div>{escape(words)}{' &middot; ' if left else ''}{escape(left)}</div>"]
    if event.kind != "end":
        parts.append(
            '<div style="height:6px;border-radius:3px;background:rgba(128,128,128,.25)">'
            f'<div style="width:{share:.1%};height:6px;border-radius:3px;background:#0072B2">'
            "</div></div>"
        )
        parts.append(f"<div>{front.svg()}</div>")
        look = "font-size:11px;white-space:nowrap;overflow:hidden;text-overflow:ellipsis"
        parts += [f'<div style="{look}">{escape(shown(line))}</div>' for line in front.lines()]
    parts += [
        f'<div style="color:#D55E00">{escape(shown(text))}</div>'
        for text in problems[:_MOST_PROBLEMS]
    ]
    if len(problems) > _MOST_PROBLEMS:
        parts.append(f"<div>and {counted(len(problems) - _MOST_PROBLEMS, 'message')} more</div>")
    return f'<div style="max-width:640px;font-size:13px">{"".join(parts)}</div>'


def _counts_text(event: SweepEvent) -> str:
    """How many cases are done, were there already and failed."""
    done = f"{event.done:,} of {counted(event.total, 'case')}"
    words = [done if event.total else "nothing left to evaluate"]
    if event.n_layers and event.kind != "end":
        words.append(f"{event.n_layers:,} of {counted(event.of_layers, 'layer')} finished")
    if event.skipped:
        words.append(f"{event.skipped:,} in the store already")
    if event.failed:
        words.append(f"{event.failed:,} failed")
    return ", ".join(words)


def _left_text(at: float, event: SweepEvent) -> str:
    """The time left as it is now, from what it was at the event."""
    return left_text(event, time.monotonic() - at)


def left_text(event: SweepEvent, since_s: float = 0.0) -> str:
    """The time left, so many seconds after an event; of sweeps of seconds about."""
    if event.kind == "end" or not event.total:
        return ""
    if event.eta_s is None:
        return "starting"
    # Half of a short sweep is loading kernels, and nobody knows which are still to come.
    about = "about " if event.elapsed_s + event.eta_s < _SECONDS_OF_SHORT else ""
    return f"ETA {about}{clock_text(max(event.eta_s - since_s, 0.0))}"


def is_problem(event: SweepEvent) -> bool:
    """Whether an event says what people want to know at once; remarks on good rows are in them."""
    return bool(event.message) and (event.kind != "case" or event.status != "ok")


def problem_text(event: SweepEvent) -> str:
    """What went wrong, or what else to know, with the case that it belongs to."""
    what = " ".join(filter(None, (event.layer, event.split, event.status)))
    return f"{what}: {event.message}" if what else event.message
