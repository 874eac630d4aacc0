"""A file that appears complete or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError

__all__ = ["replaced_file"]


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place when the block ends well.

    Raises
    ------
    DumpError
        If the folder or the disk refuses; nothing is left behind then, nor after any other error.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    # torch reports a full disk as RuntimeError.
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DumpError(
            f"{path}: cannot be written: {reason}; check the folder and its free space"
        ) from error
    finally:
        _discard(temporary)


def _discard(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        # The folder is gone or is a file: then there is nothing to remove either.
        return
