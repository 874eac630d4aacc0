"""What may be in the file of a result store, and how much: it may come from anyone.

SQLite runs what a file's schema says: a view or a generated column can compute for ever or fill the
memory, a trigger can delete rows. So nothing of a file is read before its schema is known to be one
that a release wrote; cells and rows are limited; and Ctrl-C ends every statement at once.

Source: sqlite.org/security.html, "Untrusted SQLite Database Files".
"""

import re
import sqlite3
from collections.abc import Mapping

__all__ = ["MAX_CELL_BYTES", "MAX_ROWS", "check_schema", "check_size", "restrict"]

MAX_CELL_BYTES = 32 * 2**20
"""Of one text; the provenance of a sweep of 1,000 layers is below 1 MiB."""
MAX_ROWS = 2_000_000
"""Of one table; 100,000 are a large sweep, and reading takes about 2 KiB of memory each."""
_STEPS_BETWEEN_SIGNALS = 100_000
_AUTOMATIC = re.compile(r"sqlite_autoindex_(?:rows|planned)_\d")


def restrict(connection: sqlite3.Connection) -> None:
    """Limits of a connection that is about to read a file of unknown origin."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    # Python handles Ctrl-C when it runs: here. SQLite then reports "interrupted".
    connection.set_progress_handler(lambda: 0, _STEPS_BETWEEN_SIGNALS)


def check_schema(connection: sqlite3.Connection, schema: Mapping[str, frozenset[str]]) -> str:
    """What is wrong with the schema in a few words; empty if a release could have written it.

    `schema` gives the columns of each table as they are written; a table of an older release may
    lack some.
    """
    entries = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchmany(100)
    for kind, name, text in entries:
        if kind == "table" and name == "sqlite_sequence":
            continue
        if kind == "index" and text is None and _AUTOMATIC.fullmatch(str(name)):
            continue
        if kind != "table" or name not in schema:
            return f"it holds the {str(kind)[:20]} {str(name)[:60]!r}"
        if not set(_columns(text)) <= schema[name]:
            return f"its table {name} is not defined as a release defines it"
    missing = schema.keys() - {name for kind, name, _ in entries if kind == "table"}
    return f"it has no table {min(missing)}" if missing else ""


def check_size(connection: sqlite3.Connection) -> str:
    """What is too large, in a few words, or nothing."""
    for table in ("rows", "runs", "planned"):
        (count,) = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
        if count > MAX_ROWS:
            return f"its table {table} has {count:,} records, at most {MAX_ROWS:,} are read"
    return ""


def _columns(text: object) -> list[str]:
    """Definitions of the columns in a CREATE TABLE statement, one text each."""
    match = re.fullmatch(r"CREATE TABLE \"?\w+\"? ?\((.*)\)", " ".join(str(text).split()))
    return [part.strip() for part in match[1].split(",")] if match else [str(text)]
