"""Solutions on disk by content, so that a changed accelerator or accumulator solves nothing again.

One file per solution, in the layout of `loraq_sim.quantized_model`, named by its key (a digest of
the layer's values, the split, the solver's settings and the solver's code) and by a digest of its
bytes. A file appears whole or not at all; one whose bytes do not match its name is removed and
counts as missing. Whatever goes wrong with the cache, a case is solved instead.

The least recently used files go when the folder grows past its size. Each process looks at the
folder when it first writes and after every 1/16 of the size, so several processes may exceed it by
that much each for a while.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraq_sim.errors import LoraqError
from loraq_sim.sweep.cache_folder import cache_folder

if TYPE_CHECKING:
    from loraq_sim.solvers import Solution

__all__ = ["DEFAULT_MAX_BYTES", "SolutionCache", "default_solution_folder"]

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 2 * 2**30
_LAYER = "solution"
_KEPT_AFTER_CLEANING = 0.9
_CHECKS_PER_SIZE = 16
_FORGOTTEN_S = 3600.0

# Bytes this process wrote to each folder since it last looked at the size of all.
_unchecked: dict[str, int] = {}


def default_solution_folder() -> Path:
    """Folder that all sweeps of a user share."""
    return cache_folder() / "solutions"


@dataclass(frozen=True, kw_only=True)
class SolutionCache:
    """A folder of solutions; travels to workers as these values.

    Parameters
    ----------
    folder : str
    max_bytes : int
        Size of the folder.
    least_seconds : float
        What took less to solve is not kept: reading it back would take about as long.
    """

    folder: str
    max_bytes: int = DEFAULT_MAX_BYTES
    least_seconds: float = 0.05

    def load(self, key: str) -> "Solution | None":
        """The solution stored under `key`, or None."""
        from loraq_sim.quantized_model import read_quantized_model

        for path in self._shelf(key).glob(f"{key}-*.safetensors"):
            try:
                if path.stem != f"{key}-{_digest(path)}":
                    raise LoraqError("its bytes changed")
                solution = read_quantized_model(path)[_LAYER]
                os.utime(path)
            except (OSError, LoraqError) as error:
                logger.info("solution cache: %s is not usable: %s", path, error)
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            else:
                return solution
        return None

    def keep(self, key: str, solution: "Solution") -> None:
        """Store `solution` under `key`, unless solving it was quick or the disk refuses."""
        if solution.seconds < self.least_seconds:
            return
        from loraq_sim.quantized_model import write_quantized_model

        part = self._shelf(key) / f".{key}.{os.getpid()}.part"
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            write_quantized_model(part, {_LAYER: solution}, overwrite=True)
            path = part.with_name(f"{key}-{_digest(part)}.safetensors")
            size = part.stat().st_size
            part.replace(path)
            self._limit_size(size)
        except (OSError, LoraqError) as error:
            logger.info("solution cache: cannot keep a solution: %s", error)
            with suppress(OSError):
                part.unlink(missing_ok=True)

    def _shelf(self, key: str) -> Path:
        # 256 folders: a file system slows down with all files in one.
        return Path(self.folder) / key[:2]

    def _limit_size(self, written: int) -> None:
        unchecked = _unchecked.get(self.folder, self.max_bytes) + written
        _unchecked[self.folder] = unchecked
        if unchecked < self.max_bytes / _CHECKS_PER_SIZE:
            return
        _unchecked[self.folder] = 0
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in files:
            if total <= _KEPT_AFTER_CLEANING * self.max_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
            total -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of every solution; removes what killed writers left."""
        for path in Path(self.folder).glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                if path.suffix == ".safetensors":
                    yield status.st_mtime, status.st_size, path
                elif time.time() - status.st_mtime > _FORGOTTEN_S:
                    path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
