"""Open the file of a result store: for one writer, or for readers who leave nothing beside it.

**Reading.** SQLite makes a log and an index beside a write-ahead-log file for whoever opens it, and
a reader without the right to write cannot remove them again. So a file that nobody writes is opened
as immutable; what tells that a writer has come is compared before and after each read. What a
killed writer left in its log is read from a copy.

**Strangers' files.** SQLite runs what a file's schema says: a view or a generated column can
compute for ever or fill the memory, a trigger can delete rows. So nothing of a file is read before
its schema is known to be one that a release wrote; cells and rows are limited; and Ctrl-C ends
every statement at once. Source: sqlite.org/security.html, "Untrusted SQLite Database Files".

**Writing.** A write-ahead log needs memory that processes share through the file system. Where that
cannot be had (some network and cluster file systems), a writer uses SQLite's rollback journal. One
process writes at a time, by a lock on a small file beside the store: closing any handle of an
SQLite file drops SQLite's own POSIX locks on it (sqlite.org/howtocorrupt.html, section 2.2). Where
the system has advisory locks it frees them when their holder dies, however it dies, so a killed
sweep never blocks the next one.

Some file systems have no such locks (Lustre without the option ``flock``, some FUSE mounts). There
a second file that only one process can make is the lock. It says which process of which machine
holds it; a holder of this machine that is gone is found out, one of another machine has to be
looked after.
"""

import errno
import json
import os
import platform
import re
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError

__all__ = [
    "MAX_CELL_BYTES",
    "WriterLock",
    "check_schema",
    "check_size",
    "is_outdated",
    "open_for_writing",
    "open_snapshot",
    "restrict",
]


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


def _file_state(path: Path) -> FileState:
    """Identity, size and time of the file and of what its writers have not moved into it yet."""
    return (_identity(path), *(_identity(_beside(path, end)) for end in _LOGS))


def is_outdated(path: Path, seen: FileState | None) -> bool:
    """Whether a snapshot of state `seen` may be older than the file; None means it never is."""
    # A file that was removed stays readable for who has it open.
    return seen is not None and (now := _file_state(path))[0] is not None and now != seen


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
    state = _file_state(path)
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
        state = _file_state(path)
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
            if _file_state(path) != state:
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


MAX_CELL_BYTES = 32 * 2**20
"""Of one text; the provenance of a sweep of 1,000 layers is below 1 MiB."""
_MAX_ROWS = 2_000_000
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
            # A damaged schema may say anything for a kind, control characters too.
            return f"it holds the {repr(str(kind)[:20])[1:-1]} {str(name)[:60]!r}"
        if not set(_columns(text)) <= schema[name]:
            return f"its table {name} is not defined as a release defines it"
    missing = schema.keys() - {name for kind, name, _ in entries if kind == "table"}
    return f"it has no table {min(missing)}" if missing else ""


def check_size(connection: sqlite3.Connection) -> str:
    """What is too large, in a few words, or nothing."""
    for table in ("rows", "runs", "planned"):
        (count,) = connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()
        if count > _MAX_ROWS:
            return f"its table {table} has {count:,} records, at most {_MAX_ROWS:,} are read"
    return ""


def _columns(text: object) -> list[str]:
    """Definitions of the columns in a CREATE TABLE statement, one text each."""
    match = re.fullmatch(r"CREATE TABLE \"?\w+\"? ?\((.*)\)", " ".join(str(text).split()))
    return [part.strip() for part in match[1].split(",")] if match else [str(text)]


_POLL_S = 0.1
# Somebody else has it; any other error of a lock call says that there are no such locks here.
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_MAX_HOLDER_BYTES = 1000
# What JSON of anyone raises on its way to a number of a process.
_UNREADABLE = (ValueError, KeyError, TypeError, RecursionError, OverflowError)


class WriterLock:
    """Exclusive right to write `target`, held until `release` or the end of the process.

    Parameters
    ----------
    target : Path
        The file to be written; the lock file is ``<target>.lock`` beside it.
    wait_s : float
        Seconds to wait for another holder before giving up.
    on_wait : callable, optional
        Told once, before waiting, who holds the lock.

    Raises
    ------
    StoreError
        If another process holds the lock for longer than `wait_s`, or the folder is not writable.
    """

    def __init__(
        self,
        target: Path,
        *,
        wait_s: float = 0.0,
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self._path = target.with_name(target.name + ".lock")
        # Made by one process alone, where the system has no locks.
        self._own = target.with_name(target.name + ".lock-owner")
        self._handle: int | None = None
        deadline = time.monotonic() + wait_s
        while not self._try():
            holder = self._holder()
            if on_wait is not None and wait_s > 0:
                on_wait(f"{target} is being written by {holder}")
                on_wait = None
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{target}: is being written by {holder}; "
                    "wait until it has finished or choose another --out"
                )
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Give the lock back and remove its files; a second call does nothing."""
        if self._handle is not None:
            # Removed while still held: an opener that waits finds a new file (see `_try`).
            self._path.unlink(missing_ok=True)
            self._own.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None

    def _try(self) -> bool:
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise StoreError(f"{self._path.parent}: cannot write here ({error.strerror})") from None
        try:
            _lock_exclusively(handle)
            # The holder may have removed the file between our open and our lock.
            is_ours = os.path.samestat(os.fstat(handle), self._path.stat())
        except FileNotFoundError:
            is_ours = False
        except OSError as error:
            is_ours = error.errno not in _HELD and self._make_own()
        if not is_ours:
            os.close(handle)
            return False
        os.ftruncate(handle, 0)
        os.write(handle, _this_process().encode())
        self._handle = handle
        return True

    def _make_own(self) -> bool:
        """Make the file that is the lock where the system has none; take over a dead holder's."""
        try:
            handle = os.open(self._own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            dead = self._dead_holder()
            return bool(dead) and self._bury(dead) and self._make_own()
        except OSError as error:
            raise StoreError(f"{self._own}: cannot be made ({error.strerror})") from None
        os.write(handle, _this_process().encode())
        os.close(handle)
        return True

    def _dead_holder(self) -> str:
        """What the file says, if its holder was a process of this machine that is gone."""
        found = _read(self._own)
        try:
            holder = json.loads(found)
            host, process, started = holder["host"], int(holder["process"]), holder["started"]
        except _UNREADABLE:
            return ""
        if host != platform.node() or process < 1:
            return ""
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return found
        except (OSError, OverflowError):
            pass
        # A number is used again after a while; the time it began tells them apart.
        return found if started and _started(process) not in ("", started) else ""

    def _bury(self, dead: str) -> bool:
        """Take a dead holder's file away; False if it was a living one's by then."""
        aside = self._own.with_name(f"{self._own.name}-{os.getpid()}")
        try:
            self._own.rename(aside)
        except FileNotFoundError:
            return True
        is_dead = _read(aside) == dead
        if not is_dead:
            with suppress(OSError):
                self._own.hardlink_to(aside)
        aside.unlink(missing_ok=True)
        return is_dead

    def _holder(self) -> str:
        text = _read(self._own) or _read(self._path)
        with suppress(*_UNREADABLE):
            holder = json.loads(text)
            process, host = int(holder["process"]), str(holder["host"])
            if host == platform.node():
                return f"process {process}"
            where = f"process {process} on {host!r:.80}"
            if self._own.exists():
                return f"{where} (if that is gone, remove {self._own})"
            return where
        if self._own.exists():
            return f"another process (if none is there any more, remove {self._own})"
        return "another process"


def _lock_exclusively(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _this_process() -> str:
    facts = {"process": os.getpid(), "host": platform.node(), "started": _started(os.getpid())}
    return json.dumps(facts)


def _started(process: int) -> str:
    """When a process of this machine began, as its system counts; empty where that is not told."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return fields.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: Path) -> str:
    # Not a pipe that somebody put there.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return os.read(handle, _MAX_HOLDER_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(handle)
