"""CSV files of result rows, replaced as a whole or not at all."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError

__all__ = ["write_csv"]


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write columns `names` of `rows` to `path`: UTF-8, a header line, missing values empty.

    Floats are written with as many digits as it takes to read the same number back.

    Raises
    ------
    StoreError
        If the file cannot be written. A file that was there stays as it was.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"{path}: cannot write this file ({error.strerror})") from None
