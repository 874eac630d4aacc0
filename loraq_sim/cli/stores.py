"""The commands that work on result stores.

``compare`` says what changed between two and whether it got worse, ``merge`` makes one of several,
``export`` writes the rows as a file for other programs, and ``report`` makes a page to decide by,
with pictures and tables.
"""

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import Force, OutFormat, OutputFormat, Quiet
from loraq_sim.cli.output import (
    note,
    note_unfinished,
    one_line_failures,
    print_json,
    print_tables,
    say,
    store_file,
)
from loraq_sim.errors import InputError, LoraqError, counted
from loraq_sim.files import make_folder, markdown_text, refuse_existing
from loraq_sim.reporting.tables import result_table
from loraq_sim.results.planned import unfinished
from loraq_sim.results.rows import IDENTITY, Row
from loraq_sim.results.wording import labels_of

if TYPE_CHECKING:
    from loraq_sim.results.merge import Change, Comparison
    from loraq_sim.results.store import ResultStore

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
# A comment on a pull request is read, not searched.
_MOST_IN_MARKDOWN = 20


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
    sides, left, verdicts = [], {}, {}
    for name, path in (("before", before), ("after", after)):
        with ResultStore.open(store_file(path)) as store:
            rows, missing = store.rows(), store.missing()
        sides.append(rows)
        left[name], verdicts[name] = unfinished(len(rows), missing), _headline(rows, missing)
        if output is OutputFormat.CSV:
            note_unfinished(len(rows), missing, where=name)
    found = compare_rows(sides[0], sides[1], limits)
    if output is OutputFormat.MD:
        say(f"### loraq-sim compare: {_outcome(found, has_limits=bool(limits))}\n")
    _print(found, verdicts, left, output)
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


def _headline(rows: "list[Row]", missing: "list[Row]") -> str:
    """What a verdict on the rows says first; empty where there is nothing to judge."""
    from loraq_sim.results.store_records import check_possible
    from loraq_sim.results.totals import model_totals
    from loraq_sim.results.verdict import verdict_of

    try:
        check_possible(rows, "the store")
        totals = model_totals(rows, missing=missing)
        return " ".join(verdict_of(totals).headline.split()) if rows else ""
    except LoraqError:
        return ""


def _outcome(found: "Comparison", *, has_limits: bool) -> str:
    if has_limits and not found.n_matched:
        return "no row in common, so no limit was checked"
    if found.regressions:
        count = len(found.regressions)
        return f"{counted(count, 'value')} beyond {'its' if count == 1 else 'their'} limit"
    if has_limits:
        return "all within their limits"
    return f"{counted(len(found.changes), 'value')} of {counted(found.n_matched, 'row')} changed"


def _verdict_text(verdicts: dict[str, str]) -> str:
    before, after = verdicts["before"], verdicts["after"]
    if not after:
        return ""
    was = "as before" if before == after else f"before: {before or 'none'}"
    return f"Verdict: {after} ({was})"


def _print(
    found: "Comparison",
    verdicts: dict[str, str],
    left: dict[str, dict[str, Any] | None],
    output: OutputFormat,
) -> None:
    rows = [_changed(change) for change in found.changes]
    only = [
        {"only": side, **{name: row.get(name) for name in IDENTITY}}
        for side, side_rows in (("before", found.only_before), ("after", found.only_after))
        for row in side_rows
    ]
    beyond = [{"limit": limit.text, **_changed(change)} for limit, change in found.regressions]
    if output is OutputFormat.JSON:
        more = {"matched": found.n_matched, "changes": rows, "only": only, "regressions": beyond}
        print_json(rows, more | {"verdicts": verdicts, "unfinished": left})
        return
    for_people = output in (OutputFormat.TABLE, OutputFormat.MD)
    told = [f"{name}: {side['text']}" for name, side in left.items() if side and for_people]
    for text in told:
        say(f"{markdown_text(text) if output is OutputFormat.MD else text}\n")
    if for_people and not rows and not only:
        say("no differences")
        return
    if for_people and (text := _verdict_text(verdicts)):
        say(f"{markdown_text(text) if output is OutputFormat.MD else text}\n")
    # What is one for all rows tells nothing apart.
    names = [
        name
        for name in IDENTITY
        if name in _SHOWN or len({str(row[name]) for row in (*rows, *only)}) > 1
    ]
    columns = [*names, "column", "before", "after", "change_percent"]
    most = _MOST_IN_MARKDOWN if output is OutputFormat.MD else len(rows) + len(only)
    tables = [result_table(rows[:most], columns, title=_cut_title("Changed values", rows, most))]
    if only and not rows:
        tables = []
    if only:
        title = _cut_title("Rows of one store only", only, most)
        tables.append(result_table(only[:most], ["only", *names], title=title))
    if beyond and output is OutputFormat.MD:
        title = _cut_title("Beyond their limit", beyond, most)
        tables.insert(0, result_table(beyond[:most], [*columns, "limit"], title=title))
    print_tables(tables, output)


def _cut_title(title: str, rows: list[dict[str, Any]], most: int) -> str:
    return title if len(rows) <= most else f"{title}, the first {most} of {len(rows)}"


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
    from loraq_sim.results.store import ResultStore
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
    with ResultStore.open(target) as store:
        note_unfinished(count, store.missing())


def _remove(path: Path) -> None:
    """Remove an SQLite file and the files that may lie beside it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)


EXPORT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim export runs/demo --to rows.parquet\n\n"
    "loraq-sim export runs/demo --to trials\n\n"
    "loraq-sim export runs/demo --to trials --by model --out trials.parquet"
)


class TrialsOf(enum.StrEnum):
    """What is one trial."""

    LAYER = "layer"
    MODEL = "model"


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
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="csv|parquet|trials|FILE",
            help="What to write: rows, into a FILE that ends in .csv or .parquet, or rows.csv or "
            "rows.parquet beside the store; or trials, the columns of Optuna's trials_dataframe "
            "(params_*, values_*, user_attrs_*).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="File of --to; .csv or .parquet. Default: rows or trials beside the store.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        TrialsOf, typer.Option("--by", help="Trials: of each layer's cases, or of the whole model.")
    ] = TrialsOf.LAYER,
    force: Force = False,
) -> None:
    """Write all rows of a store, one line or record a case, missing values empty or null."""
    from loraq_sim.results.store import ResultStore

    if out is not None and to is None:
        raise InputError("--out is the file of --to: give --to csv, parquet or trials")
    source = store_file(store)
    files = {name: path for name, path in (("csv", csv), ("parquet", parquet)) if path is not None}
    target = None if to is None else _export_file(source, to, out)
    if target is None and not files:
        raise InputError("nothing to write: give --to csv, parquet, trials or a FILE")
    if by is TrialsOf.MODEL and to != "trials":
        raise InputError("--by says what a trial is: give --to trials")
    refuse_existing(*files.values(), *([target] if target else []), overwrite=force)
    with ResultStore.open(source) as opened:
        for name, path in files.items():
            count = getattr(opened, f"export_{name}")(path)
            say(f"{counted(count, 'row')} in {path}")
        if target is not None and to == "trials":
            _write_trials(opened, target, by)
        elif target is not None:
            count = getattr(opened, f"export_{target.suffix[1:].lower()}")(target)
            say(f"{counted(count, 'row')} in {target}")
        if missing := opened.missing():
            note_unfinished(len(opened.stored_rows()), missing)


def _export_file(store: Path, to: str, out: Path | None) -> Path:
    """The file that ``--to`` and ``--out`` mean, which says by its end what it is."""
    ends = (".csv", ".parquet")
    if to not in ("csv", "parquet", "trials"):
        if out is not None:
            raise InputError(f"--to {to} and --out {out} both name a file; give one")
        path = Path(to)
        if path.suffix.lower() not in ends:
            raise InputError(
                f"--to must be csv, parquet, trials or a file that ends in .csv or .parquet, "
                f"got {to!r}"
            )
        return path
    path = out or store.with_name("trials.csv" if to == "trials" else f"rows.{to}")
    if path.suffix.lower() not in (ends if to == "trials" else (f".{to}",)):
        raise InputError(
            f"--to {to} writes .{'csv or .parquet' if to == 'trials' else to}, got --out {path}"
        )
    return path


def _write_trials(store: "ResultStore", path: Path, by: TrialsOf) -> None:
    from loraq_sim.results.store_records import trial_rows, write_trials
    from loraq_sim.results.totals import model_totals

    rows = store.rows()
    if by is TrialsOf.MODEL:
        rows = model_totals(store.possible_rows(), missing=store.missing())
    trials, names = trial_rows(rows)
    if not trials:
        raise InputError(f"{store.path}: holds no row yet; run loraq-sim sweep into it first")
    write_trials(path, trials, names)
    say(f"{counted(len(trials), 'trial')} in {path}")


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
        from loraq_sim.reporting.machine_figures import validation_figure

        figure = validation_figure(list(data.validation))
    written = write_report(data, page, with_files=not page_only, validation=figure)
    found = answers(data)
    say(data.verdict.headline)
    if data.verdict.joint:
        say(data.verdict.joint)
    if len(found) > 1 and data.verdict.partial:
        say(data.verdict.partial)
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
    before_missing: Sequence[Row] = ()
    if against is not None:
        with ResultStore.open(store_file(against)) as opened:
            before, before_missing = opened.possible_rows(), opened.missing()
        if not before:
            raise InputError(f"{against}: holds no row to compare with")
    with ResultStore.open(path) as opened:
        return gather(
            opened.possible_rows(),
            opened.provenance(),
            title=title,
            missing=opened.missing(),
            before=before,
            before_missing=before_missing,
        )


def _check_place(page: Path, folder: Path, *, page_only: bool, force: bool) -> None:
    from loraq_sim.reporting.page import check_report_name

    check_report_name(page)
    if page.is_dir():
        raise InputError(f"{page} is a folder; name a file such as {page / 'report.html'}")
    refuse_existing(page, *(() if page_only else (folder,)), overwrite=force)
