"""The result store: one SQLite file with the rows of all sweeps written to it and their provenance.

Tables: ``rows`` (one per case id, the columns of `results.rows` plus unknown keys as JSON in
``extra``), ``runs`` (per sweep its provenance and what its cases are, `results.planned`) and
``planned`` (which sweep last asked for which case, and in what order). Every row is one transaction
in a write-ahead log, so a killed sweep loses nothing that was added, and has a checksum: a damaged
row is named, counts as not done, and is never read. One process writes at a time (`WriterLock`);
readers are free.

A result that is not a number (NaN) is stored as NULL, like a missing one; infinities are kept.
"""

import json
import sqlite3
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loraq_sim.errors import StoreError, counted
from loraq_sim.files import make_folder
from loraq_sim.results.columns import frame_of
from loraq_sim.results.planned import missing_cases, newest
from loraq_sim.results.rows import (
    COLUMN_NAMES,
    EVALUATED,
    IDENTITY,
    Row,
    StoredRow,
    every_name,
)
from loraq_sim.results.store_file import (
    ROW_CHECKSUM,
    SCHEMA_VERSION,
    checksum_of,
    connect,
    explained,
    has_checksums,
    has_plans,
    row_checksum,
    stored_columns,
)
from loraq_sim.results.store_records import (
    check_possible,
    record_of,
    row_of,
    run_facts,
    write_csv,
    write_parquet,
)
from loraq_sim.results.store_snapshot import MAX_CELL_BYTES, WriterLock, is_outdated

if TYPE_CHECKING:
    import pandas

__all__ = [
    "ResultStore",
    "SCHEMA_VERSION",
]


_QUOTED = ", ".join(f'"{name}"' for name in COLUMN_NAMES)

_INSERT = (
    f"INSERT OR REPLACE INTO rows (case_id, {_QUOTED}, extra, checksum) "
    f"VALUES ({', '.join('?' * (len(COLUMN_NAMES) + 3))})"
)
# A changed row has no checksum until the end of its transaction, and a damaged row is not changed.
_SEAL = f"UPDATE rows SET checksum = {ROW_CHECKSUM} WHERE checksum = ''"
_UNSEALED_OR_WHOLE = f"(checksum = '' OR checksum IS {ROW_CHECKSUM})"
_MOST_NAMED = 3
_MOST_REOPENED = 5

# Rows in the order their sweeps planned them, with what tells which of them came last.
_SELECT = """
SELECT case_id, extra, {columns}, {checksum}, {is_whole}, COALESCE(planned.run, 0), rows.rowid
FROM rows LEFT JOIN planned USING (case_id)
ORDER BY COALESCE(planned.run, 0), planned.position, rows.rowid
"""
_CHECKSUM, _IS_WHOLE = -4, -3
_identity_of = itemgetter(*(2 + COLUMN_NAMES.index(name) for name in IDENTITY))
_age_of = itemgetter(-2, -1)


class ResultStore:
    """An open result store; use `ResultStore.open` and close it, or use it in a ``with`` block."""

    def __init__(self, path: Path, lock: WriterLock | None) -> None:
        self.path = path
        self._lock = lock
        self._connect()

    def __repr__(self) -> str:
        return f"ResultStore({str(self.path)!r}, {'writing' if self._lock else 'reading'})"

    def _connect(self) -> None:
        self._connection, self._state = connect(self.path, create=self._lock is not None)
        try:
            with explained(self.path, "open"):
                is_checked = has_checksums(self._connection)
                stored = stored_columns(self._connection)
        except BaseException:
            self._connection.close()
            raise
        self._is_whole = f"checksum IS {row_checksum(stored)}" if is_checked else "1"
        # What a store of an older release does not have is missing in all of its rows.
        column = {name: f'"{name}"' if name in stored else "NULL" for name in COLUMN_NAMES}
        self._parts = {
            "columns": ", ".join(f'{column[name]} AS "{name}"' for name in COLUMN_NAMES),
            "is_whole": self._is_whole,
            "plan": "plan" if has_plans(self._connection) else "''",
            # One over fewer columns is none of this release.
            "checksum": "checksum" if is_checked and stored == COLUMN_NAMES else "''",
        }

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        create: bool = False,
        wait_s: float = 0.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> Self:
        """Open the store at `path`, for writing with ``create=True``, else for reading.

        Parameters
        ----------
        path : str or Path
        create : bool
            Open for writing, and make the file and its folders where they are missing. Without
            it the store is opened read-only and must exist; other processes may write meanwhile.
        wait_s : float
            Seconds to wait for another writer before giving up.
        on_wait : callable, optional
            Told once, before waiting, who is writing.

        Raises
        ------
        StoreError
            If the file is missing, is not a store, is damaged, was written by a newer release, is
            being written by another process, or cannot be written.
        """
        path = Path(path)
        lock = None
        if create:
            make_folder(path.parent, error=StoreError)
            lock = WriterLock(path, wait_s=wait_s, on_wait=on_wait)
        try:
            return cls(path, lock)
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
        plan: str = "",
    ) -> int:
        """Record a sweep and the cases it asks for; return the number of the run.

        `positions` order the rows of the run; by default they are in the order of `case_ids`.
        `plan` says what is at each position: `results.planned.planned_text`.
        """
        places = range(len(case_ids)) if positions is None else positions
        with self._transaction("record the sweep") as connection:
            text = json.dumps(dict(provenance), default=str)
            # What is too much for a cell is missing without a name.
            plan = plan if len(plan) < MAX_CELL_BYTES // 4 else ""
            connection.execute("INSERT INTO runs (provenance, plan) VALUES (?, ?)", [text, plan])
            (run,) = connection.execute("SELECT last_insert_rowid()").fetchone()
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
            self._insert(connection, {case_id: row}, {})

    def add_all(
        self, rows: Mapping[str, Mapping[str, Any]], checksums: Mapping[str, str] | None = None
    ) -> None:
        """Store rows by case id in one transaction: all of them or none.

        `checksums` are those of `sealed_rows`, of rows that come from another store.
        """
        with self._transaction(f"store {counted(len(rows), 'row')}") as connection:
            self._insert(connection, rows, checksums or {})

    def _insert(
        self,
        connection: sqlite3.Connection,
        rows: Mapping[str, Mapping[str, Any]],
        checksums: Mapping[str, str],
    ) -> None:
        unsealed = []

        def sealed() -> Iterator[tuple]:
            for case_id, row in rows.items():
                record = record_of(case_id, row)
                if not (checksum := checksums.get(case_id) or checksum_of(record)):
                    unsealed.append((case_id,))
                yield (*record, checksum)

        connection.executemany(_INSERT, sealed())
        # What SQLite stores otherwise than it was given.
        connection.executemany(f"{_SEAL} AND case_id=?", unsealed)

    def done(self, case_ids: Iterable[str]) -> set[str]:
        """Those of `case_ids` that are stored, whole, and did not fail; others are to be run."""
        evaluated = ", ".join(f"'{status}'" for status in EVALUATED)
        with explained(self.path, "read"):
            found = self._read(
                f"SELECT case_id FROM rows WHERE status IN ({evaluated}) AND {{is_whole}}"
            )
            return set(case_ids).intersection(case_id for (case_id,) in found)

    def drop_damaged(self) -> list[str]:
        """Remove rows whose checksum does not match; return what can be told about each."""
        with self._transaction("remove damaged rows") as connection:
            found = connection.execute(
                f"SELECT rowid, layer, split FROM rows WHERE NOT ({self._is_whole})"
            ).fetchall()
            connection.executemany("DELETE FROM rows WHERE rowid=?", [row[:1] for row in found])
        return [_name(layer, split) for _, layer, split in found]

    def rows(self, case_ids: Sequence[str] | None = None) -> list[Row]:
        """Rows as dicts: columns of `loraq_sim.results.rows`, then other keys, then ``case_id``.

        Parameters
        ----------
        case_ids : sequence of str, optional
            Only these cases, in this order, as far as they are stored. Default: all cases in the
            order they were planned; of rows that agree in all of `rows.IDENTITY`, the
            one the latest sweep asked for.

        Raises
        ------
        StoreError
            If the store cannot be read or one of these rows is damaged.
        """
        return [row.as_dict() for row in self.stored_rows(case_ids)]

    def stored_rows(self, case_ids: Sequence[str] | None = None) -> list[StoredRow]:
        """`rows` to be read only, in a third of the memory."""
        with explained(self.path, "read"):
            found: list[Any] = self._records(case_ids)
            # In its own place: a large store is not in memory twice.
            for place, record in enumerate(found):
                found[place] = row_of(record)
            return found

    def sealed_rows(self, case_ids: Sequence[str]) -> tuple[list[StoredRow], dict[str, str]]:
        """`stored_rows`, and by case id the checksums that `add_all` need not make again."""
        with explained(self.path, "read"):
            found: list[Any] = self._records(case_ids)
            checksums = {}
            for place, record in enumerate(found):
                found[place] = row = row_of(record)
                # Further keys, and what an older release wrote, may be stored otherwise.
                if self._has_plain_texts and row.cells == (*record[2:_CHECKSUM], record[0]):
                    checksums[record[0]] = record[_CHECKSUM]
            return found, checksums

    def _records(self, case_ids: Sequence[str] | None) -> list[tuple]:
        found = self._read(_SELECT, _with_shared_texts)
        if case_ids is not None:
            by_id = {record[0]: record for record in found}
            found = [by_id[case_id] for case_id in case_ids if case_id in by_id]
        self._check_whole(found)
        if case_ids is None:
            found = newest(found, map(_identity_of, found), map(_age_of, found))
        return found

    def possible_rows(self) -> list[StoredRow]:
        """`stored_rows`, all of which can be added up and drawn; see `check_possible`.

        Raises
        ------
        StoreError
            If the store cannot be read, or a row has a number that nothing can have.
        """
        rows = self.stored_rows()
        check_possible(rows, self.path)
        return rows

    def frame(self, case_ids: Sequence[str] | None = None) -> "pandas.DataFrame":
        """`rows` as a DataFrame: missing numbers NaN, missing text None, ``pareto`` bool."""
        rows = self.rows(case_ids)
        with explained(self.path, "read"):
            return frame_of(rows)

    def set_pareto(self, case_ids: Iterable[str], *, among: Iterable[str] | None = None) -> None:
        """Mark `case_ids` as being on their layer's Pareto front, and the others `among` as not."""
        front = set(case_ids)
        with self._transaction("mark the Pareto front") as connection:
            if among is None:
                among = [case_id for (case_id,) in connection.execute("SELECT case_id FROM rows")]
            connection.executemany(
                f"UPDATE rows SET pareto=?, checksum='' WHERE case_id=? AND {_UNSEALED_OR_WHOLE}",
                [(int(case_id in front), case_id) for case_id in among],
            )
            connection.execute(_SEAL)

    def planned(self) -> dict[str, tuple[int, int]]:
        """(run, position) by case id: which sweep asked last for it, and where in its order."""
        with explained(self.path, "read"):
            found = self._read("SELECT case_id, run, position FROM planned")
            if not all(type(number) is int for _, *numbers in found for number in numbers):
                raise TypeError("planned holds what is no number")
            return {case_id: (run, position) for case_id, run, position in found}

    def plans(self) -> dict[int, str]:
        """What the cases of each run are (`results.planned.planned_text`), of runs that say it."""
        with explained(self.path, "read"):
            return {run: text for run, text in self._read("SELECT run, {plan} FROM runs") if text}

    def missing(self) -> list[Row]:
        """Cases that were planned and have no row, in the order planned, as `IDENTITY` columns.

        An empty dict stands for one of a release whose stores do not say what their cases are.
        """
        with explained(self.path, "read"):
            left = self._read(
                "SELECT run, position FROM planned WHERE case_id NOT IN "
                "(SELECT case_id FROM rows) ORDER BY run, position"
            )
        every = list(self.planned().values()) if left else []
        plans = self.plans() if left else {}
        with explained(self.path, "read"):
            return missing_cases(left, every, plans)

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
                    f"UPDATE rows SET \"{name}\"=?, checksum='' WHERE case_id=? "
                    f'AND "{name}" IS NOT ? AND {_UNSEALED_OR_WHOLE}',
                    values,
                )
            connection.execute(_SEAL)

    def provenance(self) -> list[dict[str, Any]]:
        """Provenance of every sweep into this store, oldest first, with its ``run`` number."""
        with explained(self.path, "read"):
            found = self._read("SELECT run, provenance FROM runs ORDER BY run")
            return [run_facts(run, text) for run, text in found]

    def export_csv(self, path: str | Path, case_ids: Sequence[str] | None = None) -> int:
        """Write `rows` to a CSV file: missing values empty, booleans ``True`` and ``False``.

        Returns their number.

        Raises
        ------
        StoreError
            If the file cannot be written. A file that was there stays as it was.
        """
        rows = self.stored_rows(case_ids)
        write_csv(path, rows, every_name(rows))
        return len(rows)

    def export_parquet(self, path: str | Path, case_ids: Sequence[str] | None = None) -> int:
        """Write `rows` to a Parquet file: missing values null.

        Returns their number.

        Raises
        ------
        StoreError
            If pyarrow is missing or the file cannot be written. A file that was there stays.
        """
        rows = self.stored_rows(case_ids)
        write_parquet(path, rows, every_name(rows))
        return len(rows)

    def _read(self, query: str, of: Callable[[tuple], tuple] = tuple) -> list[tuple]:
        """All records of a query; a store that another process has changed is opened again.

        `of` makes of each record at once what is kept of it.
        """
        for attempt in range(_MOST_REOPENED + 1):
            if is_outdated(self.path, self._state):
                self._connection.close()
                self._connect()
            try:
                found = self._fetched(query.format(**self._parts), of)
            except sqlite3.DatabaseError:
                # Half of an old and half of a new file may be no database at all.
                if attempt == _MOST_REOPENED or not is_outdated(self.path, self._state):
                    raise
            else:
                if not is_outdated(self.path, self._state):
                    return found
        raise sqlite3.OperationalError("database is locked: it changes during every read")

    def _fetched(self, query: str, of: Callable[[tuple], tuple]) -> list[tuple]:
        """Records whose texts SQLite decodes itself, five times as fast; if it cannot, as usual."""
        usual = self._connection.text_factory
        self._connection.text_factory = str
        self._has_plain_texts = True
        try:
            return list(map(of, self._connection.execute(query)))
        except sqlite3.OperationalError as error:
            if "decode" not in str(error):
                raise
        finally:
            self._connection.text_factory = usual
        self._has_plain_texts = False
        return list(map(of, self._connection.execute(query)))

    def _check_whole(self, records: Sequence[tuple]) -> None:
        damaged = [record for record in records if not record[_IS_WHOLE]]
        if damaged:
            layer, split = (COLUMN_NAMES.index(name) + 2 for name in ("layer", "split"))
            names = ", ".join(_name(r[layer], r[split]) for r in damaged[:_MOST_NAMED])
            raise StoreError(
                f"{self.path}: {counted(len(damaged), 'row', 'is')} damaged (wrong checksum): "
                f"{names}; run the sweep again, which replaces them"
            )

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        if self._lock is None:
            raise StoreError(f"{self.path}: was opened for reading; cannot {doing}")
        with explained(self.path, doing), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection


def _with_shared_texts(record: tuple) -> tuple:
    """`record` with each text kept once: they repeat in thousands of rows, a KiB in each."""
    case_id, *values, checksum, is_whole, run, number = record
    shared = [sys.intern(value) if type(value) is str else value for value in values]
    return (case_id, *shared, checksum, is_whole, run, number)


def _name(layer: Any, split: Any) -> str:
    return f"layer {str(layer)[:200]!r}, split {str(split)[:50]!r}"
