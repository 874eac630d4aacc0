"""Results to stdout in the format asked for; notes to stderr."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

import typer

from loraq_sim.cli.options import OutputFormat
from loraq_sim.plain_text import markdown_text, shown
from reports.tables import ResultTable, json_text

if TYPE_CHECKING:
    from loraq_sim.results.verdict import Verdict

__all__ = [
    *("is_terminal", "note", "print_json", "print_table", "print_tables", "print_verdict"),
    "say",
]


def print_table(table: ResultTable, output: OutputFormat) -> None:
    """Print one table."""
    print_tables([table], output)


def print_tables(tables: list[ResultTable], output: OutputFormat) -> None:
    """Print tables for people one after the other; for programs, only the first."""
    if output is OutputFormat.TABLE:
        for table in tables:
            _print_for_people(table)
    elif output is OutputFormat.MD:
        parts = [
            f"**{markdown_text(t.title)}**\n\n{t.to_markdown()}" if t.title else t.to_markdown()
            for t in tables
        ]
        say("\n".join(parts), nl=False)
    else:
        say(str(tables[0].render(output.value)).rstrip("\n"))


def say(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text, which may quote files from anywhere: a terminal obeys nothing in it.

    Every line of the program goes through here or is a table.
    """
    typer.echo(shown(text), err=err, nl=nl)


def print_verdict(verdict: "Verdict", output: OutputFormat, *, within: str = "") -> None:
    """Print a verdict for people, a line a sentence, behind the tables it is read from.

    `within` are the limits that rows had to meet to be looked at.
    """
    lines = [*([f"Within {within}:"] if within else []), *verdict.text.split("\n")]
    if output is OutputFormat.MD:
        lines = [f"{markdown_text(line)}\n" for line in lines]
    say("\n" + "\n".join(lines).rstrip())


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object."""
    say(json_text(value), nl=False)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether `stream` is a terminal; one that was closed before the start is None."""
    return stream is not None and stream.isatty()


def note(text: str, *, quiet: bool = False) -> None:
    """Say something on stderr that is not a result."""
    if not quiet:
        say(text, err=True)


def _print_for_people(table: ResultTable) -> None:
    if not is_terminal(sys.stdout):
        say(table.to_text(), nl=False)
        return
    from rich.console import Console

    Console().print(table.to_rich())
