"""Which file is meant where a command takes a result store, and rows to compute with."""

from pathlib import Path
from typing import TYPE_CHECKING

from loraq_sim.errors import StoreError

if TYPE_CHECKING:
    from loraq_sim.rows import Row
    from loraq_sim.store import ResultStore

__all__ = ["possible_rows", "store_file"]


def store_file(path: Path) -> Path:
    """The store in a folder that a sweep wrote, or the file itself."""
    return path / "results.sqlite" if path.is_dir() else path


def possible_rows(store: "ResultStore") -> "list[Row]":
    """All rows of a store; raise StoreError if one has a number that nothing can have."""
    from loraq_sim.store_records import impossible

    rows = store.rows()
    for row in rows:
        if why := impossible(row):
            where = f"layer {row['layer']!r:.200}, split {row['split']!r:.50}"
            raise StoreError(
                f"{store.path}: cannot be used: in the row of {where}, {why}; sweep it again with "
                "--force, or into a new --out"
            )
    return rows
