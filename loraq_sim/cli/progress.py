"""Progress on stderr: a bar with ETA on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import typer

from loraq_sim.cli.output import is_terminal
from loraq_sim.sweep.progress import OnEvent, SweepEvent

__all__ = ["sweep_progress", "tracked"]

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 5.0


def tracked(items: Sequence[Item], label: str, *, quiet: bool) -> Iterator[Item]:
    """Yield `items` under a progress bar on a terminal, silently elsewhere."""
    if quiet or not is_terminal(sys.stderr):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, description=label, console=console, transient=True)


def sweep_progress(*, bar: bool, quiet: bool) -> AbstractContextManager[OnEvent]:
    """Context that gives the listener of a sweep's events."""
    if quiet:
        return _silent()
    return _bar() if bar and is_terminal(sys.stderr) else _lines()


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
                progress.console.print(_problem(event), markup=False, highlight=False)

        yield show


@contextmanager
def _lines() -> Iterator[OnEvent]:
    last = time.monotonic()

    def show(event: SweepEvent) -> None:
        nonlocal last
        if event.message and (event.kind != "case" or event.status == "failed"):
            typer.echo(_problem(event), err=True)
        now = time.monotonic()
        if event.kind == "end" or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = "" if not event.eta_s else f", ETA {_clock(event.eta_s)}"
            failed = f", {event.failed} failed" if event.failed else ""
            typer.echo(f"{event.done} of {event.total} cases{failed}{left}", err=True)

    yield show


def _problem(event: SweepEvent) -> str:
    what = " ".join(filter(None, (event.layer, event.split, event.status)))
    return f"{what}: {event.message}" if what else event.message


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
