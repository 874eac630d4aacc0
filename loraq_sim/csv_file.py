"""CSV files of result rows, replaced as a whole or not at all."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError
from loraq_sim.files import replaced_file
from loraq_sim.plain_text import csv_cell

__all__ = ["write_csv"]


def write_csv(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    line_end: str = "\r\n",
) -> None:
    """Write columns `names` of `rows` to `path`: UTF-8, a header line, missing values empty.

    Text that a spreadsheet would run as a formula gets a ``'`` in front (`csv_cell`). Floats are
    written with as many digits as it takes to read the same number back.

    Raises
    ------
    StoreError
        If the file cannot be written. A file that was there stays as it was.
    """
    with replaced_file(path, error=StoreError) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator=line_end)
        writer.writerow(map(csv_cell, names))
        # Texts repeat: a name of a layer stands in hundreds of rows.
        cell = lru_cache(csv_cell)
        writer.writerows(
            [cell(value) if type(value) is str else value for value in map(row.get, names)]
            for row in rows
        )
        # Leaves `file` open, which ends up on the disk before it takes its place.
        text.detach()
