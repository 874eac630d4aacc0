"""Parquet files of result rows, replaced as a whole or not at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError
from loraq_sim.files import replaced_file
from loraq_sim.rows import COLUMNS

__all__ = ["write_parquet"]


def write_parquet(
    path: str | Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Write columns `names` of `rows` to `path`; columns have the types of the store.

    An integer column with a fractional value is written as floats. A column that is not in
    `loraq_sim.rows.COLUMNS` is text.

    Raises
    ------
    StoreError
        If pyarrow is missing or the file cannot be written. A file that was there stays as it was.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise StoreError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    types = {"TEXT": pyarrow.string(), "INTEGER": pyarrow.int64(), "REAL": pyarrow.float64()}
    known = {column.name: types[column.sql_type] for column in COLUMNS}
    known["pareto"] = pyarrow.bool_()
    columns = {name: _column(rows, name, known.get(name), pyarrow) for name in names}
    table = pyarrow.table(columns)
    with replaced_file(path, error=StoreError) as file:
        parquet.write_table(table, file)


def _column(rows: Sequence[Mapping[str, Any]], name: str, kind: Any, pyarrow: Any) -> Any:
    values = [row.get(name) for row in rows]
    # SQLite keeps a fraction in an integer column; Parquet would cut it off.
    if kind == pyarrow.int64() and any(isinstance(value, float) for value in values):
        kind = pyarrow.float64()
    if kind is None:
        kind = pyarrow.string()
        values = [None if value is None else str(value) for value in values]
    return pyarrow.array(values, kind)
