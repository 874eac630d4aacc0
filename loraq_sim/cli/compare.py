"""``loraq-sim compare``: what changed between two result stores, and whether it got worse."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import OutFormat, OutputFormat, Quiet
from loraq_sim.cli.output import note, print_json, print_tables, say
from loraq_sim.cli.store_path import store_file

if TYPE_CHECKING:
    from loraq_sim.sweep.compare import Change, Comparison

__all__ = ["EXAMPLES", "compare_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim compare runs/before runs/after\n\n"
    "loraq-sim compare runs/before runs/after --fail-if 'output_error>+2%' "
    "--fail-if 'sqnr_db<-0.1' --format json"
)

_MISSED = 3
_MOST_SHOWN = 3


@one_line_failures
def compare_command(
    before: Annotated[Path, typer.Argument(help="Result store, or its folder.")],
    after: Annotated[Path, typer.Argument(help="Result store to compare with it.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-if",
            metavar="LIMIT",
            help="Exit with 3 if a row goes beyond, such as 'output_error>+2%' or 'sqnr_db<-0.5'; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Match the rows of two stores and print every value that changed, and rows only one has."""
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.compare import compare_rows, parse_limit

    limits = [parse_limit(text) for text in fail_if or ()]
    sides = []
    for path in (before, after):
        with ResultStore.open(store_file(path)) as store:
            sides.append(store.rows())
    found = compare_rows(*sides, limits)
    _print(found, output)
    only = f"{len(found.only_before)} only before, {len(found.only_after)} only after"
    text = f"{found.n_matched} rows in both, {len(found.changes)} values changed; {only}"
    note(text, quiet=quiet)
    if limits and not found.n_matched:
        note("error: the stores have no row in common, so no limit was checked")
        raise typer.Exit(_MISSED)
    if found.regressions:
        shown = "; ".join(_worse(limit.text, c) for limit, c in found.regressions[:_MOST_SHOWN])
        note(f"error: {len(found.regressions)} values beyond their limit: {shown}")
        raise typer.Exit(_MISSED)


def _worse(limit: str, change: "Change") -> str:
    where = f"{change.row['layer']} {change.row['split']}"
    return f"{where}: {change.column} {change.before} to {change.after} ({limit})"


def _print(found: "Comparison", output: OutputFormat) -> None:
    from reports.tables import result_table

    rows = [_changed(change) for change in found.changes]
    names = ("layer", "split", "method", "accelerator")
    only = [
        {"only": side, **{name: row.get(name) for name in names}}
        for side, side_rows in (("before", found.only_before), ("after", found.only_after))
        for row in side_rows
    ]
    if output is OutputFormat.JSON:
        regressions = [
            {"limit": limit.text, **_changed(change)} for limit, change in found.regressions
        ]
        print_json(
            {"matched": found.n_matched, "changes": rows, "only": only, "regressions": regressions}
        )
        return
    if output is OutputFormat.TABLE and not rows and not only:
        say("no differences")
        return
    columns = [*names, "column", "before", "after", "change_percent"]
    tables = [result_table(rows, columns, title="Changed values")] if rows or not only else []
    if only:
        tables.append(result_table(only, title="Rows of one store only"))
    print_tables(tables, output)


def _changed(change: "Change") -> dict[str, Any]:
    row = {name: change.row.get(name) for name in ("layer", "split", "method", "accelerator")}
    relative = change.relative
    return row | {
        "column": change.column,
        "before": change.before,
        "after": change.after,
        "change_percent": None if relative is None else 100.0 * relative,
    }
