"""The commands that work on result stores.

``compare`` says what changed between two and whether it got worse, ``merge`` makes one of several,
``export`` writes the rows as a file for other programs, and ``report`` makes a page to decide by,
with pictures and tables.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import Force, OutFormat, OutputFormat, Quiet
from loraq_sim.cli.output import (
    note,
    one_line_failures,
    print_json,
    print_tables,
    say,
    store_file,
)
from loraq_sim.errors import InputError, counted
from loraq_sim.files import make_folder, refuse_existing, write_file
from loraq_sim.reporting.tables import result_table
from loraq_sim.results.rows import IDENTITY
from loraq_sim.results.wording import labels_of

if TYPE_CHECKING:
    from loraq_sim.results.merge import Change, Comparison

__all__ = [
    "COMPARE_EXAMPLES",
    "EXPORT_EXAMPLES",
    "MERGE_EXAMPLES",
    "REPORT_EXAMPLES",
    "compare_command",
    "export_command",
    "merge_command",
    "report_command",
]


COMPARE_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim compare runs/before runs/after\n\n"
    "loraq-sim compare runs/before runs/after --fail-if 'output_error>+2%' "
    "--fail-if 'sqnr_db<-0.1' --format json"
)

_MISSED = 3
_SHOWN = ("layer", "split", "method", "accelerator")
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
    from loraq_sim.results.merge import compare_rows, parse_limit
    from loraq_sim.results.store import ResultStore

    limits = [parse_limit(text) for text in fail_if or ()]
    sides = []
    for path in (before, after):
        with ResultStore.open(store_file(path)) as store:
            sides.append(store.rows())
    found = compare_rows(sides[0], sides[1], limits)
    _print(found, output)
    only = f"{len(found.only_before)} only before, {len(found.only_after)} only after"
    both, changed = counted(found.n_matched, "row"), counted(len(found.changes), "value")
    text = f"{both} in both, {changed} changed; {only}"
    note(text, quiet=quiet)
    if limits and not found.n_matched:
        note("error: the stores have no row in common, so no limit was checked")
        raise typer.Exit(_MISSED)
    if found.regressions:
        shown = "; ".join(_worse(limit.text, c) for limit, c in found.regressions[:_MOST_SHOWN])
        note(f"error: {counted(len(found.regressions), 'value')} beyond their limit: {shown}")
        raise typer.Exit(_MISSED)


def _worse(limit: str, change: "Change") -> str:
    where = f"{change.row['layer']} {labels_of([change.row])[0]}"
    return f"{where}: {change.column} {change.before} to {change.after} ({limit})"


def _print(found: "Comparison", output: OutputFormat) -> None:

    rows = [_changed(change) for change in found.changes]
    only = [
        {"only": side, **{name: row.get(name) for name in IDENTITY}}
        for side, side_rows in (("before", found.only_before), ("after", found.only_after))
        for row in side_rows
    ]
    if output is OutputFormat.JSON:
        regressions = [
            {"limit": limit.text, **_changed(change)} for limit, change in found.regressions
        ]
        print_json(
            rows,
            {"matched": found.n_matched, "changes": rows, "only": only, "regressions": regressions},
        )
        return
    if output is OutputFormat.TABLE and not rows and not only:
        say("no differences")
        return
    # What is one for all rows tells nothing apart.
    names = [
        name
        for name in IDENTITY
        if name in _SHOWN or len({str(row[name]) for row in (*rows, *only)}) > 1
    ]
    columns = [*names, "column", "before", "after", "change_percent"]
    tables = [result_table(rows, columns, title="Changed values")] if rows or not only else []
    if only:
        tables.append(result_table(only, ["only", *names], title="Rows of one store only"))
    print_tables(tables, output)


def _changed(change: "Change") -> dict[str, Any]:
    row = {name: change.row.get(name) for name in IDENTITY}
    relative = change.relative
    return row | {
        "column": change.column,
        "before": change.before,
        "after": change.after,
        "change_percent": None if relative is None else 100.0 * relative,
    }


MERGE_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim merge runs/whole runs/part1 runs/part2\n\n"
    "loraq-sim merge runs/whole runs/part* --force"
)


@one_line_failures
def merge_command(
    out: Annotated[Path, typer.Argument(help="Folder of the new store.")],
    stores: Annotated[list[Path], typer.Argument(help="Result stores, or their folders.")],
    force: Force = False,
) -> None:
    """Write the rows of several stores into a new one; n shards become the whole sweep.

    Rows of the same case must agree in everything but the time they took.
    """
    from loraq_sim.results.merge import merge_stores
    from loraq_sim.results.store_snapshot import WriterLock

    target = out / "results.sqlite"
    sources = [store_file(store) for store in stores]
    if target.exists():
        refuse_existing(target, overwrite=force)
        if target.resolve() in [source.resolve() for source in sources]:
            raise InputError(f"{target} is one of the stores to merge; choose another folder")
    # Made beside the old one, which stays until the new one is whole.
    part = out / "results.sqlite.merging"
    make_folder(out)
    # A sweep that is writing the old store would go on writing a file that has no name any more.
    lock = WriterLock(target)
    try:
        # A sweep may have made it meanwhile.
        refuse_existing(target, overwrite=force)
        _remove(part)
        count = merge_stores(part, sources, csv=out / "results.csv")
        _remove(target)
        part.replace(target)
    finally:
        _remove(part)
        lock.release()
    say(f"{counted(count, 'row')} of {counted(len(sources), 'store')} in {target}")


def _remove(path: Path) -> None:
    """Remove an SQLite file and the files that may lie beside it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


EXPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim export runs/demo --csv rows.csv\n\n"
    "loraq-sim export runs/demo --parquet rows.parquet"
)


@one_line_failures
def export_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    csv: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Write CSV.", show_default=False),
    ] = None,
    parquet: Annotated[
        Path | None,
        typer.Option(
            "--parquet",
            metavar="FILE",
            help="Write Parquet (needs pyarrow).",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Write all rows of a store, one line or record a case, missing values empty or null."""
    from loraq_sim.results.store import ResultStore

    files = {name: path for name, path in (("csv", csv), ("parquet", parquet)) if path is not None}
    if not files:
        raise InputError("nothing to write: give --csv FILE, --parquet FILE or both")
    refuse_existing(*files.values(), overwrite=force)
    with ResultStore.open(store_file(store)) as opened:
        for name, path in files.items():
            count = getattr(opened, f"export_{name}")(path)
            say(f"{counted(count, 'row')} in {path}")


REPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim report runs/demo\n\n"
    "loraq-sim report runs/demo --out slides/report.html --title 'PixArt on AIE2'\n\n"
    "loraq-sim report runs/demo --out report.md\n\n"
    "loraq-sim report runs/after --against runs/before"
)


@one_line_failures
def report_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="The page, .html; or the same verdict and numbers as Markdown, .md. "
            "NAME_files/ beside a page gets pictures (.png, below 20,000 rows .svg "
            "too) of four accelerators at most, tables (.csv, .md) and summary.md. "
            "Default: report.html beside the store.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            metavar="STORE",
            help="Another store, or its folder: the report tells what changed since.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(
            "--title",
            metavar="TEXT",
            help="What was swept, for the head of the page. Default: the dump's name.",
            show_default=False,
        ),
    ] = None,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="No pictures and tables beside the page.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write one self-contained page: what to build, what it costs and loses, and why.

    The page needs no connection; its controls show the costs on other machines. It prints the
    answer on stdout.
    """
    from loraq_sim.reporting.page import (
        check_report_extra,
        files_folder,
        markdown_report,
        write_report,
    )
    from loraq_sim.reporting.report_data import answers

    path = store_file(store)
    page = out or path.with_name("report.html")
    is_markdown = page.suffix.lower() == ".md"
    if not is_markdown:
        check_report_extra()
    page_only = page_only or is_markdown
    _check_place(page, files_folder(page), page_only=page_only, force=force)
    data = _data(path, title, against)
    if not data.rows:
        raise InputError(f"{path}: holds no row yet; run loraq-sim sweep into it first")
    figure = None
    if data.validation and not page_only:
        from loraq_sim.cli.hw_measured import validation_figure

        figure = validation_figure(list(data.validation))
    if is_markdown:
        written = [write_file(page, markdown_report(data))]
    else:
        written = write_report(data, page, with_files=not page_only, validation=figure)
    found = answers(data)
    say(data.verdict.headline)
    if data.verdict.joint:
        say(data.verdict.joint)
    for answer in found:
        for sentence in answer.sentences:
            say(f"{answer.context}: {sentence}" if len(found) > 1 else sentence)
    nbytes = page.stat().st_size
    size = f"{nbytes / 2**20:.1f} MiB" if nbytes > 2**19 else f"{nbytes / 1024:.0f} KiB"
    beside = (
        f", {counted(len(written) - 1, 'file')} in {files_folder(page)}" if not page_only else ""
    )
    note(f"wrote {page} ({size}){beside}", quiet=quiet)


def _data(path: Path, title: str | None, against: Path | None):
    from loraq_sim.reporting.gather import gather
    from loraq_sim.results.store import ResultStore

    before: Sequence[Any] = ()
    if against is not None:
        with ResultStore.open(store_file(against)) as opened:
            before = opened.possible_rows()
        if not before:
            raise InputError(f"{against}: holds no row to compare with")
    with ResultStore.open(path) as opened:
        return gather(opened.possible_rows(), opened.provenance(), title=title, before=before)


def _check_place(page: Path, folder: Path, *, page_only: bool, force: bool) -> None:
    if page.suffix.lower() not in (".html", ".htm", ".md"):
        raise InputError(
            f"--out must name an HTML file such as report.html, or a .md, got {str(page)!r}"
        )
    if page.is_dir():
        raise InputError(f"{page} is a folder; name a file such as {page / 'report.html'}")
    refuse_existing(page, *(() if page_only else (folder,)), overwrite=force)
