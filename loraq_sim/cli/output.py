"""What commands say, and how they end.

Results go to stdout in the format asked for, everything else to stderr; no text from a file can
steer a terminal. What a user can cause is one line on stderr and an exit code, never a traceback.
Progress is a bar with an ETA on a terminal, now and then a plain line elsewhere.
"""

import functools
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import typer

from loraq_sim.cli.options import OutputFormat
from loraq_sim.dumps import LayerDump, read_layer_dump
from loraq_sim.errors import LoraqError
from loraq_sim.files import markdown_text, shown
from loraq_sim.reporting.tables import ResultTable, json_text, result_table
from loraq_sim.results.planned import partial_text
from loraq_sim.results.wording import clock_text

if TYPE_CHECKING:
    from loraq_sim.results.verdict import Verdict
    from loraq_sim.sweeps.progress import OnEvent, SweepEvent

__all__ = [
    "BAD_INPUT",
    "INTERRUPTED",
    "SCHEMA_VERSION",
    "SOME_FAILED",
    "case_failure",
    "end_with",
    "layer_progress",
    "name_commands",
    "note",
    "note_unfinished",
    "open_dump",
    "one_line_failures",
    "print_json",
    "print_table",
    "print_tables",
    "print_verdict",
    "print_written",
    "say",
    "seconds_since",
    "set_debug",
    "set_wide",
    "store_file",
    "sweep_progress",
    "tracked",
]

SOME_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
# Of all JSON outputs: one more whenever a field goes or changes its meaning.
SCHEMA_VERSION = 1
# Names from a file may be of any length.
_LONGEST = 1000
_DEBUG_VARIABLE = "LORAQ_SIM_DEBUG"
_SECONDS_BETWEEN_LINES = 5.0
Item = TypeVar("Item")
_wide = False
_command_names: dict[Any, str] = {}
_running = ""
OnLayer = Callable[[str], None]


def print_table(table: ResultTable, output: OutputFormat) -> None:
    """Print one table."""
    print_tables([table], output)


def print_tables(tables: list[ResultTable], output: OutputFormat) -> None:
    """Print tables for people one after the other; for programs, only the first.

    As JSON it is an object, see `print_json`.
    """
    if output is OutputFormat.TABLE:
        for table in tables:
            _print_for_people(table)
    elif output is OutputFormat.MD:
        parts = [
            f"**{markdown_text(t.title)}**\n\n{t.to_markdown()}" if t.title else t.to_markdown()
            for t in tables
        ]
        say("\n".join(parts), nl=False)
    elif output is OutputFormat.JSON:
        print_json(tables[0].rows)
    else:
        say(str(tables[0].render(output.value)).rstrip("\n"))


def _print_for_people(table: ResultTable) -> None:
    if _wide or not is_terminal(sys.stdout):
        say(table.to_text(), nl=False)
        return
    from rich.console import Console

    console = Console()
    console.print(table.to_rich(console.width))


def print_verdict(verdict: "Verdict", output: OutputFormat, *, within: str = "") -> None:
    """Print a verdict for people, a line a sentence, behind the tables it is read from.

    `within` are the limits that rows had to meet to be looked at.
    """
    lines = [*([f"Within {within}:"] if within else []), *verdict.text.split("\n")]
    if output is OutputFormat.MD:
        lines = [f"{markdown_text(line)}\n" for line in lines]
    say("\n" + "\n".join(lines).rstrip())


def print_json(rows: Sequence[Mapping[str, Any]], more: Mapping[str, Any] | None = None) -> None:
    """Print the one JSON object of a command: ``schema``, ``rows`` as in CSV, and `more`.

    Every command that has ``--format json`` prints through here, so that programs read all of them
    alike. ``schema`` holds the name and version of what ``loraq-sim schema NAME`` prints.
    """
    schema = {"name": _running, "version": SCHEMA_VERSION}
    say(json_text({"schema": schema, "rows": rows} | dict(more or {})), nl=False)


def name_commands(app: typer.Typer, prefix: str = "") -> None:
    """Let outputs know the names under which `app` has its commands."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            name_commands(group.typer_instance, f"{prefix}{group.name} ")
    _command_names.update({c.callback: f"{prefix}{c.name}" for c in app.registered_commands})


def open_dump(
    path: Path,
    *,
    synthesize_inputs: bool,
    tokens: int | None,
    quiet: bool,
    lora: Sequence[str] | None = None,
) -> LayerDump:
    """The dump at `path`, with drawn inputs where they are asked for, which a note then says."""
    drawn = synthesize_inputs and (tokens or True)
    dump = read_layer_dump(path, synthesize_inputs=drawn, lora=lora or ())
    note(dump.inputs_note, quiet=quiet or not dump.inputs_note)
    return dump


def print_written(path: Path, *, seconds: float, output: OutputFormat) -> None:
    """Print one row about a dump that was just written; only its directory is read."""

    dump = read_layer_dump(path)
    infos = [dump.info(name) for name in dump]
    tokens = [info.tokens for info in infos if info.tokens is not None]
    row = {
        "file": str(path),
        "layers": len(infos),
        "inputs": len({info.activation_key for info in infos} - {None}),
        "tokens": max(tokens, default=None),
        "dtype": "/".join(dict.fromkeys(info.dtype for info in infos)),
        "bytes": path.stat().st_size,
        "seconds": seconds,
    }
    if output is OutputFormat.JSON:
        print_json([row], row)
    else:
        print_table(result_table([row], title=f"wrote {path}"), output)


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may quote files from anywhere: a terminal obeys nothing in it.

    Every line of the program goes through here or is a table. On a terminal, sentences break
    between words; commands to copy stay whole.
    """
    if is_terminal(sys.stderr if err else sys.stdout) and not _wide:
        text = _broken(text)
    typer.echo(shown(text), err=err, nl=nl)


def _broken(text: str) -> str:
    width = shutil.get_terminal_size().columns
    return "\n".join(
        line
        if len(line) <= width or "loraq-sim " in line or line != line.strip()
        else textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    )


def note(text: str, *, quiet: bool = False) -> None:
    """Say something on stderr that is not a result."""
    if not quiet:
        say(text, err=True)


def note_unfinished(n_rows: int, missing: Sequence[Mapping[str, Any]], *, where: str = "") -> None:
    """Say what a store's sweeps planned and it has no row of, if anything, under --quiet, too.

    Without it numbers of a part would look like those of the whole. `where` names the store.
    """
    if text := partial_text(n_rows, missing):
        note(f"{where}{': ' if where else ''}{text}")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal; one that was closed before the start is None."""
    return stream is not None and stream.isatty()


def set_wide(wanted: bool) -> None:
    """Let tables be as wide as they are on a terminal, too."""
    global _wide
    _wide = wanted


def set_debug(wanted: bool) -> None:
    """Let errors show their traceback (also in worker processes), for bug reports."""
    if wanted:
        os.environ[_DEBUG_VARIABLE] = "1"


def one_line_failures(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        global _running
        _running = _command_names.get(guarded, "")
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get(_DEBUG_VARIABLE) or not _is_users(error):
                raise
            say(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None

    return guarded


def case_failure(error: Exception) -> str:
    """Why one case failed, in one line; the others go on. Re-raises under ``--debug``."""
    if os.environ.get(_DEBUG_VARIABLE):
        raise error
    return _one_line(error) if _is_users(error) else f"{type(error).__name__}: {_one_line(error)}"


def _is_users(error: Exception) -> bool:
    """Whether the error says something about the input or the machine, not about our code."""
    if isinstance(error, (LoraqError, OSError)):
        return True
    # Loaded only if a command used it; an error of a module that was never loaded cannot occur.
    errors = sys.modules.get("hwmodels.errors")
    return errors is not None and isinstance(error, errors.AcceleratorError)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def end_with(rows: Sequence[Mapping[str, Any]], show: Callable[[bool], None]) -> None:
    """Show the rows of a command and exit as its failed cases demand.

    `show` prints the rows; its argument says whether any of them has a message to show. Nothing is
    printed on stdout if no case at all succeeded.
    """
    failures = [row["message"] for row in rows if row["status"] == "failed"]
    if len(failures) == len(rows):
        say(f"error: {failures[0]}", err=True)
        raise typer.Exit(BAD_INPUT)
    show(any(row.get("message") for row in rows))
    if failures:
        text = f"error: {len(failures)} of {len(rows)} cases failed; the first: {failures[0]}"
        say(text, err=True)
        raise typer.Exit(SOME_FAILED)


def tracked(items: Sequence[Item], label: str, *, quiet: bool) -> Generator[Item, None, None]:
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
            left = f", ETA {clock_text((now - started) / n_done * n_left)}" if n_left else ""
            say(f"{label}: {n_done} of {len(items)}{left}", err=True)


@contextmanager
def layer_progress(names: Sequence[str], label: str, *, quiet: bool) -> Iterator[OnLayer]:
    """Give the listener to call once for each of `names`, under `tracked` progress."""
    with closing(tracked(names, label, quiet=quiet)) as steps:
        next(steps, None)

        def step(name: str) -> None:
            next(steps, None)

        yield step
        # The bar ends when its last item has been asked for the next one.
        next(steps, None)


def sweep_progress(*, counts: bool, quiet: bool) -> "AbstractContextManager[OnEvent]":
    """Context that gives the listener of a sweep's events; without `counts`, of its problems."""
    from loraq_sim.sweeps.progress import live_progress, terminal_bar

    if quiet:
        return live_progress(False)
    return terminal_bar() if counts and is_terminal(sys.stderr) else _lines(counts)


@contextmanager
def _lines(counts: bool) -> "Iterator[OnEvent]":
    from loraq_sim.sweeps.progress import is_problem, left_text, problem_text

    last = time.monotonic()

    def show(event: "SweepEvent") -> None:
        nonlocal last
        if is_problem(event):
            say(problem_text(event), err=True)
        now = time.monotonic()
        if not counts:
            return
        if event.kind == "end" or now - last >= _SECONDS_BETWEEN_LINES:
            last = now
            left = f", {text}" if (text := left_text(event)) else ""
            failed = f", {event.failed} failed" if event.failed else ""
            say(f"{event.done} of {event.total} cases{failed}{left}", err=True)

    yield show


def seconds_since(started: float) -> float:
    """Seconds since a `time.monotonic` reading."""
    return time.monotonic() - started


def store_file(path: Path) -> Path:
    """The store in a folder that a sweep wrote, or the file itself."""
    return path / "results.sqlite" if path.is_dir() else path
