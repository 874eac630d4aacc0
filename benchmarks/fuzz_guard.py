"""What no input file may make a reader do, checked after every case.

A reader gives a valid object or one of its own errors with a one-line message. It never raises
anything else, warns, runs code, touches a file that is not its own, takes more than `MAX_CPU_S`, or
raises the memory peak of the process by more than `MAX_GROWTH_BYTES`.
"""

import os
import resource
import sys
import time
import traceback
import warnings
from pathlib import Path

__all__ = ["Defect", "Guard", "MAX_CPU_S", "MAX_GROWTH_BYTES"]

MAX_CPU_S = 5.0
MAX_GROWTH_BYTES = 256 * 2**20
MAX_MESSAGE = 2000

# Events of code that a data file has no business to start (docs.python.org: audit events table).
_FORBIDDEN = (
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile", "os.kill",
    "os.putenv", "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
    "os.chmod", "os.chown", "subprocess.Popen", "pty.spawn", "ctypes.dlopen",
    "pickle.find_class", "shutil.", "socket.", "urllib.Request", "webbrowser.open", "ftplib.",
    "smtplib.", "code.__new__", "sqlite3.enable_load_extension", "tempfile.",
)  # fmt: skip


class Defect(Exception):
    """A reader broke one of the rules; the message says which."""


class Guard:
    """Watches the readers of this process; files under `scratch` are theirs to open.

    One guard a process: an audit hook cannot be taken away again.
    """

    scratch: Path

    def __init__(self) -> None:
        code = (sys.prefix, sys.base_prefix, Path(__file__).parent.parent, "/proc", "/sys", "/usr")
        self._readable = tuple(os.path.realpath(folder) for folder in code)
        self._is_on = False
        self._seen: list[str] = []
        sys.addaudithook(self._watch)

    def check(self, read, errors: tuple[type[Exception], ...], path: Path) -> str:
        """Run ``read(path)``: "read" or "refused".

        Raises
        ------
        Defect
            If a rule is broken.
        """
        peak = _peak_bytes()
        started = time.process_time()
        outcome, broken = "read", None
        self._seen.clear()
        with warnings.catch_warnings(record=True) as noise:
            warnings.simplefilter("always")
            self._is_on = True
            try:
                read(path)
            except errors as error:
                outcome, broken = "refused", _message_fault(error)
            except Exception as error:
                broken = f"{type(error).__name__} at {_place(error)}: {str(error)[:200]!r}"
            finally:
                self._is_on = False
        seconds = time.process_time() - started
        growth = _peak_bytes() - peak
        if self._seen:
            broken = f"did {self._seen[0]}"
        elif broken is None and noise:
            broken = f"warned: {noise[0].category.__name__} {str(noise[0].message)[:100]!r}"
        elif broken is None and seconds > MAX_CPU_S:
            broken = f"took {seconds:.0f} s"
        elif broken is None and growth > MAX_GROWTH_BYTES:
            broken = f"took {growth / 2**20:.0f} MiB"
        if broken is not None:
            raise Defect(broken)
        return outcome

    def _watch(self, event: str, arguments: tuple) -> None:
        if not self._is_on:
            return
        if event == "open":
            self._watch_open(*arguments)
        elif event == "os.truncate" and isinstance(arguments[0], int):
            pass  # Of a file that was opened before, and watched then.
        elif event.startswith((*_FORBIDDEN, "os.truncate")) and not self._is_own(arguments):
            self._seen.append(f"{event} {arguments!r:.80}")

    def _is_own(self, arguments: tuple) -> bool:
        """Whether all paths among the arguments lie in the scratch folder."""
        paths = [a for a in arguments if isinstance(a, str | bytes) and a]
        return bool(paths) and all(
            os.path.realpath(os.fsdecode(path)).startswith(os.path.realpath(self.scratch))
            for path in paths
        )

    def _watch_open(self, path, mode, flags) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return
        try:
            real = os.path.realpath(os.fsdecode(path))
        except ValueError:
            return  # A NUL byte: the system opens no such file.
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if real.startswith(os.path.realpath(self.scratch)):
            return
        if not writes and real.startswith(self._readable):
            return
        self._seen.append(f"open {real!r:.120} ({mode!r}, flags {flags})")


def _message_fault(error: Exception) -> str | None:
    text = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return f"asked for more memory than there is: {text[:200]!r}"
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if not text or not text.isprintable():
        return f"message of {type(error).__name__} is no printable line: {text[:200]!r}"
    if len(text) > MAX_MESSAGE:
        return f"message of {type(error).__name__} has {len(text)} characters: {text[:100]!r}"
    return None


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "loraq_sim" in f.filename or "hwmodels" in f.filename]
    frame = (ours or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
