"""The result store: one SQLite file with the rows of all sweeps written to it and their provenance.

Tables: ``rows`` (one per case id, the columns of `loraq_sim.rows` plus unknown keys as JSON in
``extra``), ``runs`` (one provenance record per sweep) and ``planned`` (which sweep last asked for
which case, and in what order). Every row is one transaction in a write-ahead log, so a killed
sweep loses nothing that was added. One process writes at a time (`WriterLock`); readers are free.

A result that is not a number (NaN) is stored as NULL, like a missing one; infinities are kept.
"""

import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loraq_sim.csv_file import write_csv
from loraq_sim.errors import StoreError
from loraq_sim.parquet_file import write_parquet
from loraq_sim.rows import COLUMN_NAMES, COLUMNS, IDENTITY, Row
from loraq_sim.store_file import SCHEMA_VERSION, connect, explained, make_folder
from loraq_sim.writer_lock import WriterLock

if TYPE_CHECKING:
    import pandas

__all__ = ["SCHEMA_VERSION", "ResultStore"]

_QUOTED = ", ".join(f'"{name}"' for name in COLUMN_NAMES)

_INSERT = (
    f"INSERT OR REPLACE INTO rows (case_id, {_QUOTED}, extra) "
    f"VALUES ({', '.join('?' * (len(COLUMN_NAMES) + 2))})"
)

# Rows in the order their sweeps planned them; `newest` is 1 for the row of the sweep that asked
# last among rows a reader could not tell apart (a changed dump, accelerator file or release).
_SELECT = f"""
SELECT case_id, extra, {_QUOTED},
    ROW_NUMBER() OVER (
        PARTITION BY {", ".join(f'"{name}"' for name in IDENTITY)}
        ORDER BY COALESCE(planned.run, 0) DESC, rows.rowid DESC
    ) AS newest
FROM rows LEFT JOIN planned USING (case_id)
ORDER BY COALESCE(planned.run, 0), planned.position, rows.rowid
"""


class ResultStore:
    """An open result store; use `ResultStore.open` and close it, or use it in a ``with`` block."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: WriterLock | None) -> None:
        self.path = path
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: str | Path, *, create: bool = False, wait_s: float = 0.0) -> Self:
        """Open the store at `path`, for writing with ``create=True``, else for reading.

        Parameters
        ----------
        path : str or Path
        create : bool
            Open for writing, and make the file and its folders where they are missing. Without
            it the store is opened read-only and must exist; other processes may write meanwhile.
        wait_s : float
            Seconds to wait for another writer before giving up.

        Raises
        ------
        StoreError
            If the file is missing, is not a store, is damaged, was written by a newer release, is
            being written by another process, or cannot be written.
        """
        path = Path(path)
        lock = None
        if create:
            make_folder(path)
            lock = WriterLock(path, wait_s=wait_s)
        try:
            return cls(path, connect(path, create=create), lock)
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def close(self) -> None:
        """Close the file and let the next writer in; a second call does nothing."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def begin_run(
        self,
        provenance: Mapping[str, Any],
        case_ids: Sequence[str] = (),
        *,
        positions: Sequence[int] | None = None,
    ) -> int:
        """Record a sweep and the cases it asks for; return the number of the run.

        `positions` order the rows of the run; by default they are in the order of `case_ids`.
        """
        places = range(len(case_ids)) if positions is None else positions
        with self._transaction("record the sweep") as connection:
            text = json.dumps(dict(provenance), default=str)
            run = connection.execute("INSERT INTO runs (provenance) VALUES (?)", [text]).lastrowid
            connection.executemany(
                "INSERT OR REPLACE INTO planned VALUES (?, ?, ?)",
                [
                    (case_id, run, position)
                    for case_id, position in zip(case_ids, places, strict=True)
                ],
            )
        return run

    def end_run(self, run: int, facts: Mapping[str, Any]) -> None:
        """Add `facts` (end time, counts) to the provenance of `run`."""
        with self._transaction("record the end of the sweep") as connection:
            (text,) = connection.execute(
                "SELECT provenance FROM runs WHERE run=?", [run]
            ).fetchone()
            text = json.dumps(json.loads(text) | dict(facts), default=str)
            connection.execute("UPDATE runs SET provenance=? WHERE run=?", [text, run])

    def add(self, case_id: str, row: Mapping[str, Any]) -> None:
        """Store the row of one case, in place of an earlier one; durable when this returns.

        Raises
        ------
        StoreError
            If the row cannot be written: a full disk, a value SQLite cannot hold.
        """
        with self._transaction(f"store the row of layer {row.get('layer')!r}") as connection:
            connection.execute(_INSERT, _record(case_id, row))

    def add_all(self, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Store rows by case id in one transaction: all of them or none."""
        with self._transaction(f"store {len(rows)} rows") as connection:
            connection.executemany(_INSERT, [_record(case, row) for case, row in rows.items()])

    def done(self, case_ids: Iterable[str]) -> set[str]:
        """Those of `case_ids` that are stored with status ``ok``; failed ones are to be retried."""
        with explained(self.path, "read"):
            found = self._connection.execute("SELECT case_id FROM rows WHERE status='ok'")
            return set(case_ids).intersection(case_id for (case_id,) in found)

    def rows(self, case_ids: Sequence[str] | None = None) -> list[Row]:
        """Rows as dicts: columns of `loraq_sim.rows`, then other keys, then ``case_id``.

        Parameters
        ----------
        case_ids : sequence of str, optional
            Only these cases, in this order, as far as they are stored. Default: all cases in the
            order they were planned; of rows that agree in all of `loraq_sim.rows.IDENTITY`, the
            one the latest sweep asked for.
        """
        with explained(self.path, "read"):
            found = self._connection.execute(_SELECT).fetchall()
            if case_ids is None:
                return [_row(record) for record in found if record[-1] == 1]
            by_id = {record[0]: record for record in found}
            return [_row(by_id[case_id]) for case_id in case_ids if case_id in by_id]

    def frame(self, case_ids: Sequence[str] | None = None) -> "pandas.DataFrame":
        """`rows` as a DataFrame: missing numbers NaN, missing text None, ``pareto`` bool."""
        import pandas

        rows = self.rows(case_ids)
        frame = pandas.DataFrame(rows, columns=_names(rows), dtype=object)
        for column in COLUMNS:
            if column.name == "pareto":
                frame["pareto"] = frame["pareto"].eq(True).astype(bool)
            elif column.sql_type != "TEXT":
                with explained(self.path, "read"):
                    frame[column.name] = pandas.to_numeric(frame[column.name])
        return frame

    def set_pareto(self, case_ids: Iterable[str], *, among: Iterable[str] | None = None) -> None:
        """Mark `case_ids` as being on their layer's Pareto front, and the others `among` as not."""
        front = set(case_ids)
        with self._transaction("mark the Pareto front") as connection:
            if among is None:
                among = [case_id for (case_id,) in connection.execute("SELECT case_id FROM rows")]
            connection.executemany(
                "UPDATE rows SET pareto=? WHERE case_id=?",
                [(int(case_id in front), case_id) for case_id in among],
            )

    def planned(self) -> dict[str, tuple[int, int]]:
        """(run, position) by case id: which sweep asked last for it, and where in its order."""
        with explained(self.path, "read"):
            found = self._connection.execute("SELECT case_id, run, position FROM planned")
            return {case_id: (run, position) for case_id, run, position in found}

    def relabel(self, labels: Mapping[str, Mapping[str, Any]]) -> None:
        """Set columns of stored rows, by case id; None leaves a column as it is."""
        changes: dict[str, list[tuple[Any, str, Any]]] = {}
        for case_id, columns in labels.items():
            for name in COLUMN_NAMES:
                if columns.get(name) is not None:
                    value = columns[name]
                    changes.setdefault(name, []).append((value, case_id, value))
        with self._transaction("name the rows") as connection:
            for name, values in changes.items():
                connection.executemany(
                    f'UPDATE rows SET "{name}"=? WHERE case_id=? AND "{name}" IS NOT ?', values
                )

    def provenance(self) -> list[dict[str, Any]]:
        """Provenance of every sweep into this store, oldest first, with its ``run`` number."""
        with explained(self.path, "read"):
            found = self._connection.execute("SELECT run, provenance FROM runs ORDER BY run")
            return [{"run": run} | json.loads(text) for run, text in found]

    def export_csv(self, path: str | Path, case_ids: Sequence[str] | None = None) -> None:
        """Write `rows` to a CSV file: missing values empty, booleans ``True`` and ``False``.

        Raises
        ------
        StoreError
            If the file cannot be written. A file that was there stays as it was.
        """
        rows = self.rows(case_ids)
        write_csv(path, rows, _names(rows))

    def export_parquet(self, path: str | Path, case_ids: Sequence[str] | None = None) -> None:
        """Write `rows` to a Parquet file: missing values null.

        Raises
        ------
        StoreError
            If pyarrow is missing or the file cannot be written. A file that was there stays.
        """
        rows = self.rows(case_ids)
        write_parquet(path, rows, _names(rows))

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        if self._lock is None:
            raise StoreError(f"{self.path}: was opened for reading; cannot {doing}")
        with explained(self.path, doing), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


def _record(case_id: str, row: Mapping[str, Any]) -> list[Any]:
    extra = {name: _plain(value) for name, value in row.items() if name not in COLUMN_NAMES}
    known = [_plain(row.get(name)) for name in COLUMN_NAMES]
    return [case_id, *known, json.dumps(extra, default=str)]


def _plain(value: Any) -> Any:
    """A value SQLite and JSON can hold: NumPy scalars become Python ones, NaN becomes None."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def _row(record: tuple) -> Row:
    case_id, extra, *values, _newest = record
    row: Row = dict(zip(COLUMN_NAMES, values, strict=True))
    row["pareto"] = None if row["pareto"] is None else bool(row["pareto"])
    return row | json.loads(extra) | {"case_id": case_id}


def _names(rows: Sequence[Row]) -> list[str]:
    """Columns, then the other keys in order of appearance, then ``case_id``."""
    others = dict.fromkeys(name for row in rows for name in row if name not in COLUMN_NAMES)
    others.pop("case_id", None)
    return [*COLUMN_NAMES, *others, "case_id"]
