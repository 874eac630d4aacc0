"""``loraq-sim merge``: one store from several, such as the shards of a sweep."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force
from loraq_sim.cli.output import say
from loraq_sim.cli.store_path import store_file
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing

__all__ = ["EXAMPLES", "merge_command"]

EXAMPLES = (
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
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.merge import merge_stores
    from loraq_sim.writer_lock import WriterLock

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
        count = merge_stores(part, sources)
        _remove(target)
        part.replace(target)
        with ResultStore.open(target) as store:
            store.export_csv(out / "results.csv")
    finally:
        _remove(part)
        lock.release()
    say(f"{count} rows of {len(sources)} stores in {target}")


def _remove(path: Path) -> None:
    """Remove an SQLite file and the files that may lie beside it."""
    for end in ("", "-wal", "-shm"):
        path.with_name(path.name + end).unlink(missing_ok=True)
