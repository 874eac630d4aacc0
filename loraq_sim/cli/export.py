"""``loraq-sim export``: the rows of a store as a file for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force
from loraq_sim.cli.output import say
from loraq_sim.cli.store_path import store_file
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing

__all__ = ["EXAMPLES", "export_command"]

EXAMPLES = (
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
    from loraq_sim.store import ResultStore

    files = {name: path for name, path in (("csv", csv), ("parquet", parquet)) if path is not None}
    if not files:
        raise InputError("nothing to write: give --csv FILE, --parquet FILE or both")
    refuse_existing(*files.values(), overwrite=force)
    with ResultStore.open(store_file(store)) as opened:
        for name, path in files.items():
            count = getattr(opened, f"export_{name}")(path)
            say(f"{count} rows in {path}")
