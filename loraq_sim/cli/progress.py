"""Progress on stderr: a bar with ETA on a terminal, now and then a plain line elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

from loraq_sim.cli.output import is_terminal, say
from loraq_sim.plain_text import shown
from loraq_sim.sweep.progress import OnEvent, SweepEvent

__all__ = ["sweep_progress", "tracked"]

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 5.0


def tracked(items: Sequence[Item], label: str, *, quiet: bool) -> Iterator[Item]:
    """Yield `items`, with progress unless `quiet`: a bar on a terminal, plain lines elsewhere."""
    if quiet:
        yield from items
        return
    if not is_terminal(sys.stderr):
        yield from _with_lines(items, label)
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description=label, console=console, transient=True)


def _with_lines(items: Sequence[Item], label: str) -> Iterator[Item]:
    started = last = time.monotonic()
    has_spoken = False
    for n_done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        n_left = len(items) - n_done
        # A short run says nothing; one that has said something also says that it is through.
        if now - last >= _SECONDS_BETWEEN_LINES or (has_spoken and not n_left):
            last, has_spoken = now, True
            left = f", ETA {_clock((now - started) / n_done * n_left)}" if n_left else ""
            say(f"{label}: {n_done} of {len(items)}{left}", err=True)


def sweep_progress(*, counts: bool, quiet: bool) -> AbstractContextManager[OnEvent]:
    """Context that gives the listener of a sweep's events; without `counts`, of its problems."""
    if quiet:
        return _silent()
    return _bar() if counts and is_terminal(sys.stderr) else _lines(counts)


@contextmanager
def _silent() -> Iterator[OnEvent]:
    yield lambda event: None


@contextmanager
def _bar() -> Iterator[OnEvent]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("[red]{task.fields[failures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("sweep", total=None, left="", failures="")

        def show(event: SweepEvent) -> None:
            left = "" if event.eta_s is None else f"ETA {_clock(event.eta_s)}"
            failures = f"{event.failed} failed" if event.failed else ""
            progress.update(
                bar, total=event.total, completed=event.done, left=left, failures=failures
            )
            if event.message and event.kind in ("case", "worker_lost", "note"):
                progress.console.print(shown(_problem(event)), markup=False, highlight=False)

        yield show


@contextmanager
def _lines(counts: bool) -> Iterator[OnEvent]:
    last = time.monotonic()

    def show(event: SweepEvent) -> None:
        nonlocal last
        if event.message and (event.kind != "case" or event.status == "failed"):
            say(_problem(event), err=True)
        now = time.monotonic()
        if not counts:
            return
        if event.kind == "end" or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            is_known = event.eta_s is not None and event.kind != "end"
            left = f", ETA {_clock(event.eta_s)}" if is_known else ""
            failed = f", {event.failed} failed" if event.failed else ""
            say(f"{event.done} of {event.total} cases{failed}{left}", err=True)

    yield show


def _problem(event: SweepEvent) -> str:
    what = " ".join(filter(None, (event.layer, event.split, event.status)))
    return f"{what}: {event.message}" if what else event.message


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
