"""Numba's njit, with compiled code kept on disk where that is possible and done without elsewhere.

Numba itself refuses to define a function whose code it cannot keep (an installation and a home
folder that cannot be written), and lets a full disk end the first call.

Processes that start together do not compile the same: one does, the others wait and read its code.

Compiling is most of what the first layer takes, so it is asked for little: no wrappers for C,
division as IEEE 754 has it, and `smaller` and `larger`, which are one instruction where `min` and
`max` are a function to compile for every type.
"""

import hashlib
import logging
import multiprocessing
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache as remembered
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not there on Windows: every process compiles by itself
    fcntl = None  # type: ignore[assignment]

import numba.extending
from numba import types
from numba.core.caching import FunctionCache
from numba.core.registry import CPUDispatcher

__all__ = [
    *("intrinsic", "keep_compiled", "kept_in", "larger", "njit", "smaller", "taking_turns"),
    "why_not_kept",
]

logger = logging.getLogger(__name__)


# One folder, or the first reason, for all functions of the process.
_state: dict[str, str] = {}
# Of this thread: whether it compiles, and the lock it holds meanwhile.
_turn = threading.local()
_LOCK, _LOOK_SECONDS, _MOST_LOOKS = "loraq_sim.lock", 0.02, 3000


def njit(function: Callable | None = None, *, cache: bool = False, **options: Any) -> Callable:
    """As `numba.njit`; with `cache`, compiled code is kept on disk if the disk lets us.

    Under ``NUMBA_DISABLE_JIT`` the function comes back as it is.
    """
    if function is None:
        return lambda function: njit(function, cache=cache, **options)
    spared: dict[str, Any] = {"error_model": "numpy", "no_cfunc_wrapper": True}
    compiled = numba.njit(**spared, **options)(function)
    if cache and isinstance(compiled, CPUDispatcher):
        keep_compiled(compiled, function)
        alone = compiled.compile

        def compile_in_turn(signature: Any) -> Any:
            with taking_turns():
                return alone(signature)

        vars(compiled)["compile"] = compile_in_turn
    return compiled


@contextmanager
def taking_turns() -> Iterator[None]:
    """Compile here what no other process compiles; its lock is let go of at the outermost end."""
    is_outermost, _turn.compiles = not getattr(_turn, "compiles", False), True
    try:
        yield
    finally:
        if is_outermost:
            _turn.compiles = False
            if (lock := _turn.__dict__.pop("lock", None)) is not None:
                # A process forked meanwhile has it open, too: closing alone would not do.
                fcntl.flock(lock, fcntl.LOCK_UN)
                lock.close()


def _locked(folder: str) -> IO[bytes] | None:
    """The lock of a folder once no other process has it; None if it takes a minute or cannot be."""
    if fcntl is None or "impatient" in _state:
        return None
    try:
        lock = Path(folder, _LOCK).open("ab")  # noqa: SIM115 (held until its turn ends)
    except OSError:
        return None
    for _ in range(_MOST_LOOKS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)
        except OSError:  # no locks on this file system
            break
    _state["impatient"] = folder
    lock.close()
    return None


def intrinsic(emit: Callable[..., Any]) -> Callable[..., Any]:
    """As `numba.extending.intrinsic`, typed as compiled code calls it: without a typing context."""
    return numba.extending.intrinsic(emit)


def smaller(x: Any, y: Any) -> Any:
    """The smaller of two numbers of one type; `x` unless `y` is smaller."""
    return min(x, y)


def larger(x: Any, y: Any) -> Any:
    """The larger of two numbers of one type; `x` unless `y` is larger."""
    return max(x, y)


def _compile_pick(function: Callable, order: str) -> None:
    """Let compiled code pick by one comparison."""

    @numba.extending.type_callable(function)
    def typed(context):
        return lambda x, y: x if x == y else None

    @numba.extending.lower_builtin(function, types.Any, types.Any)
    def emit(context, builder, signature, args):
        kind, (x, y) = signature.return_type, args
        if isinstance(kind, types.Float):
            better = builder.fcmp_ordered(order, y, x)
        else:
            compare = builder.icmp_signed if kind.signed else builder.icmp_unsigned
            better = compare(order, y, x)
        return builder.select(better, y, x)


_compile_pick(smaller, "<")
_compile_pick(larger, ">")


def keep_compiled(compiled: Any, function: Callable) -> FunctionCache | None:
    """Let a dispatcher or callback of Numba keep the code of `function` on disk, if possible."""
    try:
        kept = _ForgivingCache(function)
        # Numba compares the function's file alone: what others put in would go unseen.
        files, source = kept._cache_file, Path(function.__code__.co_filename)
        files._source_stamp = (files._source_stamp, _fingerprint(source))
    # No folder of Numba's choice can be written, or the source cannot be read.
    except (RuntimeError, OSError) as error:
        _tell(error)
        return None
    compiled._cache = kept
    _state.setdefault("folder", kept.cache_path)
    return kept


@remembered
def _sources(file: Path) -> frozenset[Path]:
    """A file and those of this room that it imports, which may put constants and code into it."""
    found = {file}
    for name in re.findall(
        r"^from loraq_sim\.kernels\.(\w+) import", file.read_text("utf-8"), re.M
    ):
        found |= _sources(Path(__file__).with_name(f"{name}.py"))
    return frozenset(found)


@remembered
def _fingerprint(file: Path) -> str:
    digest = hashlib.sha256()
    for source in sorted(_sources(file)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def kept_in() -> Path | None:
    """Folder of the code that was compiled so far; None if none is kept."""
    return Path(_state["folder"]) if "folder" in _state and "problem" not in _state else None


def why_not_kept() -> str | None:
    """Why compiled code could not be kept, or None."""
    return _state.get("problem")


class _ForgivingCache(FunctionCache):
    """A cache whose files may be unreadable, and whose disk may be full: then it is not used."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
            if found is not None or "lock" in _turn.__dict__ or not _turn.__dict__.get("compiles"):
                return found
            _turn.lock = _locked(self.cache_path)
            # Whoever had the lock may have compiled just this.
            return None if _turn.lock is None else super().load_overload(sig, target_context)
        # Whatever is wrong with a kept file, compiling gives the right code.
        except Exception as error:
            _tell(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _tell(error)


def _tell(error: Exception) -> None:
    """Say once that code is not kept; workers are silent, their parent has said it."""
    if "problem" in _state:
        return
    # Numba names the function; what holds for one holds for all.
    reason = getattr(error, "strerror", None) or "no folder for it can be written"
    _state["problem"] = reason
    level = logging.WARNING if multiprocessing.parent_process() is None else logging.DEBUG
    logger.log(
        level,
        "compiled code cannot be kept (%s): every start compiles again, which takes some seconds; "
        "set NUMBA_CACHE_DIR to a folder with room that can be written",
        reason,
    )
