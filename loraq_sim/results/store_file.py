"""What a result store file is: its schema and version, how it is opened, and what errors mean.

Anything that is not such a file, is damaged or cannot be written ends in one `StoreError` line.
Every row has a checksum over what is stored of it, since SQLite would not notice a flipped bit in
a value. A store of an older release is read as it is, and brought up to date when it is written.
"""

import hashlib
import sqlite3
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError
from loraq_sim.results.rows import COLUMN_NAMES, COLUMNS
from loraq_sim.results.store_snapshot import (
    MAX_CELL_BYTES,
    FileState,
    check_schema,
    check_size,
    open_for_writing,
    open_snapshot,
    restrict,
)

__all__ = [
    "ROW_CHECKSUM",
    "SCHEMA_VERSION",
    "checksum_of",
    "connect",
    "explained",
    "has_checksums",
    "has_plans",
    "row_checksum",
    "stored_columns",
]


SCHEMA_VERSION = 12
_APPLICATION_ID = 0x4C6F5261  # "LoRa": tells our files from other SQLite files.
_BUSY_TIMEOUT_S = 30.0

_CHECKSUM = "checksum TEXT NOT NULL DEFAULT ''"
_PLAN = "plan TEXT NOT NULL DEFAULT ''"
_TABLES = {
    "rows": (
        "case_id TEXT PRIMARY KEY",
        *(f'"{column.name}" {column.sql_type}' for column in COLUMNS),
        "extra TEXT NOT NULL DEFAULT '{}'",
        _CHECKSUM,
    ),
    "runs": ("run INTEGER PRIMARY KEY AUTOINCREMENT", "provenance TEXT NOT NULL", _PLAN),
    "planned": (
        "case_id TEXT PRIMARY KEY",
        "run INTEGER NOT NULL",
        "position INTEGER NOT NULL",
    ),
}
_KNOWN = {name: frozenset(columns) for name, columns in _TABLES.items()}
_SCHEMA = "".join(
    f"CREATE TABLE {name} ({', '.join(columns)});" for name, columns in _TABLES.items()
) + (f"PRAGMA application_id = {_APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};")


def row_checksum(names: Sequence[str]) -> str:
    """SQL expression of the checksum of a row with the columns `names` of `loraq_sim.results.rows`.

    Connections of `connect` know the function in it.
    """
    # Text as the bytes that are stored, which a flipped bit may have made invalid UTF-8.
    sealed = [
        f'CAST("{name}" AS BLOB)' if sql_type == "TEXT" else f'"{name}"'
        for name, sql_type in (
            *(("case_id", "TEXT"), ("extra", "TEXT")),
            *((column.name, column.sql_type) for column in COLUMNS if column.name in names),
        )
    ]
    return f"row_checksum({', '.join(sealed)})"


ROW_CHECKSUM = row_checksum(COLUMN_NAMES)
"""The checksum of a row of this release."""

# What brings a store of that version to the next one, besides columns that are new.
_MIGRATIONS = {
    2: (f"ALTER TABLE rows ADD COLUMN {_CHECKSUM}",),
    3: (),
    4: (),
    5: (),
    6: (),
    7: (),
    8: (),
    9: (),
    10: (),
    11: (f"ALTER TABLE runs ADD COLUMN {_PLAN}",),
}
_OLDEST = min(_MIGRATIONS)
_FIRST_WITH_CHECKSUMS = 3


def connect(path: Path, *, create: bool) -> tuple[sqlite3.Connection, FileState | None]:
    """Open and check the store at `path`; read-only unless `create`, which also makes it.

    With `create`, a store of an older schema is brought up to date, in one transaction. Also
    returns which state of the file the connection shows; None if it sees every later change.

    Raises
    ------
    StoreError
        If the file is missing, is not a store, is damaged, has a schema version that is not known
        here, or cannot be read or written.
    """
    connection, state = _open_file(path, create)
    try:
        restrict(connection)
        connection.create_function("row_checksum", -1, _row_checksum, deterministic=True)
        _check(connection, path, create)
        with explained(path, "open"):
            is_checked = has_checksums(connection)
        if is_checked:
            # Reading a damaged row must not fail before its checksum is looked at.
            connection.text_factory = lambda text: text.decode("utf-8", "replace")
    except BaseException:
        connection.close()
        raise
    return connection, state


def _open_file(path: Path, create: bool) -> tuple[sqlite3.Connection, FileState | None]:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise StoreError(f"{path}: is a folder; give the file of a result store")
        is_regular = stat.S_ISREG(mode)
    except FileNotFoundError:
        is_regular = create
        if not create:
            raise StoreError(f"{path}: no such result store") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{str(path)!r:.300}: cannot open ({reason})") from None
    if not is_regular:
        # SQLite would wait for ever on a pipe.
        raise StoreError(f"{path}: is not a regular file; give the file of a result store")
    # Autocommit: transactions are opened by hand, so that nothing is ever left half-open.
    options = {"timeout": _BUSY_TIMEOUT_S, "isolation_level": None}
    with explained(path, "open"):
        if not create:
            return open_snapshot(path, **options)
        return open_for_writing(path, **options), None


def _check(connection: sqlite3.Connection, path: Path, create: bool) -> None:
    with explained(path, "open"):
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if create and application == 0 and tables == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} COMMIT;")
            application, version = _APPLICATION_ID, SCHEMA_VERSION
        if application != _APPLICATION_ID:
            raise StoreError(f"{path}: is not a loraq-sim result store")
        if not _OLDEST <= version <= SCHEMA_VERSION:
            age = "newer" if version > SCHEMA_VERSION else "older"
            raise StoreError(
                f"{path}: was written by a {age} release (schema version {version}, this one reads "
                f"{_OLDEST} to {SCHEMA_VERSION}); use that release, or sweep into a new --out"
            )
        # Before anything that would run what the file's schema says.
        if problem := check_schema(connection, _KNOWN) or check_size(connection):
            raise StoreError(f"{path}: is not a store that loraq-sim wrote: {problem}")
        (page,) = connection.execute("PRAGMA page_size").fetchone()
        # SQLite fills up a last page that is cut short with zeros. While there is a log, its copy
        # of that page counts.
        if path.stat().st_size % page and not _has_log(path):
            raise sqlite3.DatabaseError("malformed: the last page is cut short")
        # In a write-ahead log NORMAL survives any kill of the process, and is far faster than FULL.
        (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
        connection.execute(f"PRAGMA synchronous = {'NORMAL' if journal == 'wal' else 'FULL'}")
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(f"malformed: {verdict}")
        if create and version < SCHEMA_VERSION:
            _migrate(connection, version)


def _migrate(connection: sqlite3.Connection, version: int) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        for step in range(version, SCHEMA_VERSION):
            for statement in _MIGRATIONS[step]:
                connection.execute(statement)
        old = stored_columns(connection)
        for column in COLUMNS:
            if column.name not in old:
                connection.execute(f'ALTER TABLE rows ADD COLUMN "{column.name}" {column.sql_type}')
        # A row that was damaged before stays so.
        whole = "1" if version < _FIRST_WITH_CHECKSUMS else f"checksum IS {row_checksum(old)}"
        connection.execute(f"UPDATE rows SET checksum = {ROW_CHECKSUM} WHERE {whole}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def has_checksums(connection: sqlite3.Connection) -> bool:
    """Whether the rows of this store have checksums; older ones opened for reading do not."""
    return any(name == "checksum" for _, name, *_ in connection.execute("PRAGMA table_info(rows)"))


def has_plans(connection: sqlite3.Connection) -> bool:
    """Whether the runs of this store say what the cases of their sweeps are; older ones do not."""
    return any(name == "plan" for _, name, *_ in connection.execute("PRAGMA table_info(runs)"))


def stored_columns(connection: sqlite3.Connection) -> tuple[str, ...]:
    """Columns of `results.rows` that this store has, in their order; older ones lack some."""
    found = {name for _, name, *_ in connection.execute("PRAGMA table_info(rows)")}
    return tuple(name for name in COLUMN_NAMES if name in found)


def _row_checksum(*values: bytes | float | int | None) -> str:
    # The representation of a float is exact, and types do not meet.
    return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()


_SQL_TYPES = ("TEXT", *(column.sql_type for column in COLUMNS), "TEXT")


def checksum_of(record: Sequence[Any]) -> str:
    """Checksum of the row that SQLite makes of case id, columns and ``extra``.

    Empty where SQLite may store another value than it is given, such as a text for a number in a
    column of texts; `ROW_CHECKSUM` then says.
    """
    stored: list[Any] = []
    for value, sql_type in zip(record, _SQL_TYPES, strict=True):
        kind = type(value)
        if kind is str and sql_type == "TEXT":
            try:
                stored.append(value.encode())
            except UnicodeEncodeError:
                return ""
        elif (
            value is None
            or (kind is int and sql_type == "INTEGER" and -(2**63) <= value < 2**63)
            # SQLite has no negative zero.
            or (kind is float and sql_type == "REAL" and (value or str(value) == "0.0"))
        ):
            stored.append(value)
        else:
            return ""
    case_id, *columns, extra = stored
    return _row_checksum(case_id, extra, *columns)


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn SQLite's errors into one `StoreError` line that names `path` and what was being done."""
    try:
        yield
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        if "interrupted" in str(error):
            # Nothing but Ctrl-C interrupts a statement (`store_snapshot.restrict`).
            raise KeyboardInterrupt from None
        # SQLite's words may hold a piece of the file and several lines.
        text = " ".join(str(error).split())
        text = text if text.isprintable() else repr(text)[1:-1]
        raise StoreError(f"{path}: {_explanation(text[:300], doing)}") from error
    except (TypeError, ValueError, RecursionError) as error:
        if doing != "read":
            raise
        # A row that no release wrote: another type in a column, or no JSON object.
        reason = " ".join(str(error).split())[:200]
        shown = reason if reason.isprintable() else repr(reason)[1:-1]
        raise StoreError(
            f"{path}: is damaged (a record cannot be read: {shown}); restore a copy or sweep into "
            "a new --out"
        ) from error


def _explanation(error: str, doing: str) -> str:
    if "disk is full" in error:
        return (
            f"disk is full, cannot {doing}; rows stored so far are safe: "
            "free some space and run the same command again"
        )
    if "disk I/O error" in error:
        return (
            f"the disk refuses, cannot {doing} (full, over a quota or size limit, or failing); "
            "rows stored so far are safe: make room and run the same command again"
        )
    if "locked" in error:
        return f"another process keeps it locked, cannot {doing}; try again when it has finished"
    if "too big" in error:
        return (
            f"cannot {doing}: a value is larger than the {MAX_CELL_BYTES // 2**20} MiB a store "
            "may hold"
        )
    if "not a database" in error:
        return "is not a loraq-sim result store"
    if "malformed" in error:
        return f"is damaged ({error}); restore a copy or sweep into a new --out"
    if "readonly" in error or "unable to open" in error:
        return f"cannot {doing}: no permission, or not a plain file ({error})"
    return f"cannot {doing} ({error})"
