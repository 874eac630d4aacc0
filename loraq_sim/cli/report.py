"""``loraq-sim report``: a result store as one page to decide by, with pictures and tables."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force, Quiet
from loraq_sim.cli.output import note, say
from loraq_sim.cli.store_path import possible_rows, store_file
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing

__all__ = ["EXAMPLES", "report_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim report runs/demo\n\n"
    "loraq-sim report runs/demo --out slides/report.html --title 'PixArt on AIE2'"
)


@one_line_failures
def report_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help="The page. NAME_files/ beside it gets pictures (.png, .svg), tables (.csv, .md) "
            "and summary.md. Default: report.html beside the store.",
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

    The page needs no connection. It prints the answer on stdout.
    """
    from reports.answers import answers
    from reports.bundle import files_folder, write_report
    from reports.html import check_report_extra

    check_report_extra()
    path = store_file(store)
    page = out or path.with_name("report.html")
    _check_place(page, files_folder(page), page_only=page_only, force=force)
    data = _data(path, title)
    if not data.rows:
        raise InputError(f"{path}: holds no row yet; run loraq-sim sweep into it first")
    figure = None
    if data.validation and not page_only:
        from loraq_sim.cli.hw_figure import validation_figure

        figure = validation_figure(list(data.validation))
    written = write_report(data, page, with_files=not page_only, validation=figure)
    found = answers(data)
    say(data.verdict.headline)
    if data.verdict.joint:
        say(data.verdict.joint)
    for answer in found:
        for sentence in answer.sentences:
            say(f"{answer.context}: {sentence}" if len(found) > 1 else sentence)
    size = page.stat().st_size / 2**20
    beside = f", {len(written) - 1} files in {files_folder(page)}" if not page_only else ""
    note(f"wrote {page} ({size:.1f} MiB){beside}", quiet=quiet)


def _data(path: Path, title: str | None):
    from loraq_sim.reporting.gather import gather
    from loraq_sim.store import ResultStore

    with ResultStore.open(path) as opened:
        return gather(possible_rows(opened), opened.provenance(), title=title, in_place=True)


def _check_place(page: Path, folder: Path, *, page_only: bool, force: bool) -> None:
    if page.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out must name an HTML file such as report.html, got {str(page)!r}")
    if page.is_dir():
        raise InputError(f"{page} is a folder; name a file such as {page / 'report.html'}")
    refuse_existing(page, *(() if page_only else (folder,)), overwrite=force)
