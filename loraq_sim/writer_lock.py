"""One writer at a time: a lock on a small file beside the store.

The lock is on a file of its own because closing any handle of an SQLite file drops SQLite's own
POSIX locks on it (sqlite.org/howtocorrupt.html, section 2.2). Where the system has advisory locks
it frees them when their holder dies, however it dies, so a killed sweep never blocks the next one.

Some file systems have none (Lustre without the option ``flock``, some FUSE mounts). There a second
file that only one process can make is the lock. It says which process of which machine holds it;
a holder of this machine that is gone is found out, one of another machine has to be looked after.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loraq_sim.errors import StoreError

__all__ = ["WriterLock"]

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
        if host != socket.gethostname() or process < 1:
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
            if host == socket.gethostname():
                return f"process {process}"
            where = f"process {process} on {host!r:.80}"
            if self._own.exists():
                return f"{where} (if that is gone, remove {self._own})"
            return where
        if self._own.exists():
            return f"another process (if none is there any more, remove {self._own})"
        return "another process"


def _lock_exclusively(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _this_process() -> str:
    facts = {"process": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
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
