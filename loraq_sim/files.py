"""Files this project writes: whole or not at all, and never over what is there unasked.

Every file the package, its command line and its reports write comes through here, so that a full
disk, a quota or Ctrl-C leaves either the old file or the new one, and the message names the file.
"""

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from loraq_sim.errors import InputError, LoraqError

__all__ = ["make_folder", "refuse_existing", "replaced_file", "write_file", "write_together"]


def refuse_existing(
    *paths: str | Path, overwrite: bool, error: type[LoraqError] = InputError
) -> None:
    """Raise `error` if one of `paths` is there, unless it may be replaced."""
    for path in () if overwrite else map(Path, paths):
        if os.path.lexists(path) and not _is_stream(path):
            raise error(
                f"{path} is there already; choose another name, or --force (in Python: "
                "overwrite=True) to replace it"
            )


def make_folder(folder: str | Path, *, error: type[LoraqError] = InputError) -> Path:
    """Make `folder` and those above it; raise `error` if that is not possible."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise error(f"{folder}: cannot make this folder ({cause.strerror or cause})") from cause
    return Path(folder)


@contextmanager
def replaced_file(path: str | Path, *, error: type[LoraqError] = InputError) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well.

    The folder must be there. A link is followed; a device or a pipe is written as it is.

    Raises
    ------
    LoraqError
        Of type `error`, if the folder or the disk refuses; then, and after any other error, `path`
        is as it was and nothing lies beside it.
    """
    target = Path(path)
    with _explained(target, error):
        if _is_stream(target):
            with target.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(target))
        # Short, so that it fits wherever the name of the file does.
        part = target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes, *, error: type[LoraqError] = InputError):
    """Write one file, text as UTF-8; return its path. Raises as `replaced_file` does."""
    with replaced_file(path, error=error) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


def write_together(
    contents: Mapping[Path, str | bytes], *, error: type[LoraqError] = InputError
) -> None:
    """Write files that belong together: none takes its place before all are on the disk.

    They take it in the order of `contents`. Raises as `replaced_file` does.
    """
    with ExitStack() as stack:
        files = {}
        # The stack closes what was opened last first.
        for path in reversed(list(contents)):
            files[path] = stack.enter_context(replaced_file(path, error=error))
        for path, content in contents.items():
            with _explained(path, error):
                files[path].write(content.encode("utf-8") if isinstance(content, str) else content)
                files[path].flush()


@contextmanager
def _explained(path: Path, error: type[LoraqError]) -> Iterator[None]:
    """Turn what the system says about writing `path` into one line that names it."""
    try:
        yield
    except (OSError, RuntimeError) as cause:
        # torch reports a full disk as a plain RuntimeError; its subclasses are something else, and
        # so is a refusal that names another file, which the block may be reading.
        named = getattr(cause, "filename", None)
        is_other = named is not None and not str(named).endswith((".tmp", str(path)))
        if is_other or (isinstance(cause, RuntimeError) and type(cause) is not RuntimeError):
            raise
        reason = getattr(cause, "strerror", None) or (str(cause).splitlines() or ["no reason"])[0]
        raise error(
            f"{path}: cannot be written: {reason}; check the folder and its free space"
        ) from cause


def _is_stream(path: Path) -> bool:
    """Whether `path` leads to a device or a pipe, such as /dev/stdout, which cannot be replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    # Even where the shell has sent it to a file: that file is open already.
    is_link = path.is_symlink() and path.parts[:2] in (("/", "dev"), ("/", "proc"))
    return not stat.S_ISDIR(mode) and (is_link or not stat.S_ISREG(mode))
