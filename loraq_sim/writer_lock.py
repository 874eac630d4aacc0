"""One writer at a time: an advisory lock on a small file beside the store.

The lock is on a file of its own because closing any handle of an SQLite file drops SQLite's own
POSIX locks on it (sqlite.org/howtocorrupt.html, section 2.2). The system frees the lock when its
holder dies, however it dies, so a killed sweep never blocks the next one.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from loraq_sim.errors import StoreError

__all__ = ["WriterLock"]

_POLL_S = 0.1


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
        deadline = time.monotonic() + wait_s
        while (handle := _try_lock(self._path)) is None:
            if on_wait is not None and wait_s > 0:
                on_wait(f"{target} is being written by {_holder(self._path)}")
                on_wait = None
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{target}: is being written by {_holder(self._path)}; "
                    "wait until it has finished or choose another --out"
                )
            time.sleep(_POLL_S)
        self._handle: int | None = handle
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()}".encode())

    def release(self) -> None:
        """Give the lock back and remove its file; a second call does nothing."""
        if self._handle is not None:
            # Removed while still held: an opener that waits finds a new file (see `_try_lock`).
            self._path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


def _try_lock(path: Path) -> int | None:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"{path.parent}: cannot write here ({error.strerror})") from None
    try:
        _lock_exclusively(handle)
        # The holder may have removed the file between our open and our lock.
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None


def _lock_exclusively(handle: int) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip() or "another process"
    except OSError:
        return "another process"
