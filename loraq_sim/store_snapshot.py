"""Open the file of a result store: for writing, or for reading and leaving nothing beside it.

SQLite makes a log and an index beside a write-ahead-log file for whoever opens it, and a reader
without the right to write cannot remove them again. So a file that nobody writes is opened as
immutable; what tells that a writer has come is compared before and after each read. What a killed
writer left in its log is read from a copy.

A write-ahead log needs memory that processes share through the file system. Where that cannot be
had (some network and cluster file systems), a writer uses SQLite's rollback journal.
"""

import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["file_state", "is_outdated", "open_for_writing", "open_snapshot"]

_LOGS = ("-wal", "-journal")
_INDEX = "-shm"
_COPY_ATTEMPTS = 5
_NO_SHARED_MEMORY = (
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_SHMOPEN,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMLOCK,
)

FileState = tuple[tuple[int, int, int] | None, ...]


def file_state(path: Path) -> FileState:
    """Identity, size and time of the file and of what its writers have not moved into it yet."""
    return (_identity(path), *(_identity(_beside(path, end)) for end in _LOGS))


def is_outdated(path: Path, seen: FileState | None) -> bool:
    """Whether a snapshot of state `seen` may be older than the file; None means it never is."""
    # A file that was removed stays readable for who has it open.
    return seen is not None and (now := file_state(path))[0] is not None and now != seen


def open_for_writing(path: Path, **options: Any) -> sqlite3.Connection:
    """A connection that may write the file at `path`, which is made if it is missing.

    Raises
    ------
    sqlite3.Error
        If the file cannot be opened for writing as a database.
    """
    uri = f"{path.resolve().as_uri()}?mode=rwc"
    connection = sqlite3.connect(uri, uri=True, **options)
    try:
        # Reading the schema opens the log of a file that has one.
        (entries,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        if not entries:
            connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
        return connection
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode not in _NO_SHARED_MEMORY:
            raise
    except BaseException:
        connection.close()
        raise
    connection = sqlite3.connect(uri, uri=True, **options)
    try:
        # Alone, SQLite needs no shared memory to read a log, and can leave that mode.
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = DELETE",
            "locking_mode = NORMAL",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchone()
        connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def open_snapshot(path: Path, **options: Any) -> tuple[sqlite3.Connection, FileState | None]:
    """A connection for reading the file at `path`, and the state it shows.

    The state is None if SQLite itself sees what others write. `options` go to `sqlite3.connect`.

    Raises
    ------
    sqlite3.Error
        If the file cannot be read as a database.
    """
    state = file_state(path)
    if not any(state[1:]):
        return _opened(path, "immutable=1", options), state
    if state[1] is None or _beside(path, _INDEX).exists():
        try:
            return _opened(path, "mode=ro", options), None
        except sqlite3.OperationalError:
            # A log in a folder we may not write: SQLite wants to make an index, or to roll back.
            pass
    return _open_copy(path, options)


def _open_copy(path: Path, options: dict[str, Any]) -> tuple[sqlite3.Connection, FileState]:
    """The file with its log worked in, from a copy that is gone when the connection is."""
    for _ in range(_COPY_ATTEMPTS):
        state = file_state(path)
        with tempfile.TemporaryDirectory(prefix="loraq-sim-") as folder:
            copy = Path(folder) / "store.sqlite"
            try:
                shutil.copyfile(path, copy)
                for end in _LOGS:
                    if _beside(path, end).exists():
                        shutil.copyfile(_beside(path, end), _beside(copy, end))
            except OSError as error:
                raise sqlite3.OperationalError(
                    f"cannot copy it with its log to {tempfile.gettempdir()}: {error.strerror}"
                ) from error
            if file_state(path) != state:
                continue
            connection = sqlite3.connect(copy, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = DELETE").fetchone()
            finally:
                connection.close()
            # The open file outlives its name.
            return _opened(copy, "immutable=1", options), state
    raise sqlite3.OperationalError("database is locked: it changes while it is being copied")


def _opened(path: Path, how: str, options: dict[str, Any]) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?{how}", uri=True, **options)
    try:
        # The first statement that opens the file.
        connection.execute("PRAGMA schema_version").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # An empty log holds nothing.
    return (status.st_ino, status.st_size, status.st_mtime_ns) if status.st_size else None


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)
