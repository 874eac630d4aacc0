"""What is not computed twice: digests of code and layers, and the solutions kept under them.

**Code**, one digest per subsystem. A subsystem is an entry module and everything of this project it
imports, directly or not, found in the text of the sources: a new kernel is covered the moment
something imports it, and code of reports, commands, stores and sweeps is never reached. While the
code is being changed, every edit of a covered file makes a new digest, and earlier results of that
subsystem are not reused.

**Layers.** A layer's digest covers its values (`Layer.digest`), so it takes reading them: 2 GB of
weights are some seconds. They are written down for the file's path, size, inode and time of change,
and the next plan over the same file reads none. A worker computes the digest again from the values
it works on and refuses a layer that differs, so a stale record can cost a message, never a wrong
row.

**Solutions**, so that a changed accelerator or accumulator solves nothing again. One file each, in
the layout of `loraq_sim.quantized_model`, named by its key (a digest of the layer's values, the
split, the solver's settings and the solver's code) and by a digest of its bytes. A file appears
whole or not at all; one whose bytes do not match its name is removed and counts as missing.
Whatever goes wrong with the cache, a case is solved instead. The least recently used files go when
the folder grows past its size. Each process looks at the folder when it first writes and after
every 1/16 of the size, so several processes may exceed it by that much each for a while.

All of it is kept in the folder of ``LORAQ_SIM_CACHE``, or the user's cache folder.
"""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from loraq_sim.dumps import LayerDump
from loraq_sim.errors import InputError, LoraqError
from loraq_sim.files import make_folder, write_file
from loraq_sim.layers import Layer
from loraq_sim.version import __version__

if TYPE_CHECKING:
    from loraq_sim.solvers import Solution

__all__ = [
    "CACHE_VARIABLE",
    "SolutionCache",
    "cache_folder",
    "code_digest",
    "code_digests",
    "default_solution_folder",
    "dump_content_digest",
    "forget_digests",
    "layer_digests",
]

logger = logging.getLogger(__name__)


_PACKAGES = ("loraq_sim", "hwmodels")
# The cost model exports lazily, so no import statement leads into it: all of it counts.
_ENTRIES = {
    "solver": ("loraq_sim.solvers", "loraq_sim.split"),
    "emulator": ("loraq_sim.evaluate",),
    "cost": ("hwmodels",),
}
# Messages, and the names of columns: neither changes a number.
_WITHOUT_EFFECT = ("loraq_sim", "loraq_sim.errors", "loraq_sim.results.rows")

_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+((?:loraq_sim|hwmodels)[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|^[ \t]*import[ \t]+((?:loraq_sim|hwmodels)[\w.]*)",
    re.MULTILINE,
)


@lru_cache(maxsize=1)
def code_digests() -> dict[str, str]:
    """SHA-256 (hex) of each subsystem: ``solver``, ``emulator`` and ``cost``.

    ``solver`` covers solvers, quantizers, formats and their kernels, and decides whether a stored
    solution is used again. ``emulator`` covers the whole data flow of a case but ``cost``, which
    is the package `hwmodels` (its accelerator files have digests of their own).
    """
    sources = {name: path for package in _PACKAGES for name, path in _modules(package)}
    texts: dict[str, bytes] = {}
    digests = {}
    for subsystem, entries in _ENTRIES.items():
        state = hashlib.sha256()
        for name in sorted(_reached(entries, sources, texts)):
            state.update(f"{name}\0".encode())
            state.update(texts[name])
        digests[subsystem] = state.hexdigest()
    return digests


def code_digest() -> str:
    """SHA-256 (hex) over all subsystems."""
    return hashlib.sha256("".join(code_digests().values()).encode()).hexdigest()


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise LoraqError(f"the sources of {package} cannot be found; install it as files")
    root = Path(spec.origin).parent
    for path in root.rglob("*.py"):
        parts = (package, *path.relative_to(root).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def _reached(
    entries: tuple[str, ...], sources: dict[str, Path], texts: dict[str, bytes]
) -> set[str]:
    """Modules that `entries` lead to; their texts are read into `texts` on the way."""
    waiting = list(entries)
    if "hwmodels" in entries:
        waiting += [name for name in sources if name.startswith("hwmodels.")]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in sources:
            continue
        seen.add(name)
        if name not in texts:
            texts[name] = sources[name].read_bytes().replace(b"\r\n", b"\n")
        waiting += _imports(texts[name].decode("utf-8"))
    return seen


def _imports(text: str) -> Iterator[str]:
    for base, names, plain in _IMPORT.findall(text):
        module = base or plain
        found = [module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))]
        # Importing a.b.c runs a and a.b first.
        parts = module.split(".")
        found += [".".join(parts[:length]) for length in range(1, len(parts))]
        for name in found:
            # What `hwmodels` is to the data flow, the digest of ``cost`` says.
            if name not in _WITHOUT_EFFECT and not name.startswith("hwmodels"):
                yield name


CACHE_VARIABLE = "LORAQ_SIM_CACHE"


def cache_folder() -> Path:
    """Folder of all caches of this program; not made here.

    The environment's ``LORAQ_SIM_CACHE``, else ``loraq-sim`` in ``XDG_CACHE_HOME`` or ``~/.cache``.
    """
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    # The XDG specification tells programs to ignore a relative path.
    if base and Path(base).is_absolute():
        return Path(base) / "loraq-sim"
    try:
        return Path.home() / ".cache" / "loraq-sim"
    except RuntimeError:  # no home folder, as in some containers
        return Path(".cache") / "loraq-sim"


# Counts changes of what a digest is made of, such as kinds that are read off names.
_LAYOUT = 4


def layer_digests(
    dump: LayerDump, *, remember: bool = True, contents: bool = True
) -> dict[str, str]:
    """Digest of each layer of `dump` by name; empty for a layer that cannot be loaded.

    `remember` writes them down for the next call. Without `contents` no values are read: a layer
    whose digest is not written down has one of its name and of the files, good for counting.
    """
    record = _record_path(dump)
    version = _version(dump)
    known = _read(record, version)
    missing = [name for name in dump if name not in known]
    last: Layer | None = None  # layers of one group share activations while one is in memory
    if not contents:
        for name in missing:
            known[name] = hashlib.sha256(repr((version, name)).encode()).hexdigest()
        missing = []
    for name in missing:
        try:
            last = dump[name]
            known[name] = last.digest()
        except LoraqError:
            known[name] = ""
    if missing and remember:
        _write(record, version, known)
    return {name: known[name] for name in dump}


def dump_content_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 (hex) of what the layers hold, whatever their order and the file's name."""
    text = json.dumps(sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def forget_digests(dump: LayerDump) -> None:
    """Drop what is written down for a dump."""
    with suppress(OSError):
        _record_path(dump).unlink(missing_ok=True)


def _record_path(dump: LayerDump) -> Path:
    state = hashlib.sha256(os.fsencode(dump.path.resolve()))
    if dump.drawn_rows:
        state.update(f"\0{dump.drawn_rows} rows, drawn by {__version__}".encode())
    if dump.lora:
        state.update(f"\0{dump.lora} merged by {__version__}".encode())
    name = state.hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _version(dump: LayerDump) -> list[int]:
    """Of the files and of what a reader takes from beside them; empty if one is not there."""
    version = [_LAYOUT]
    for source in (*dump.files, dump.config):
        try:
            status = source.stat()
        except OSError:
            if source in dump.files:
                return []
            continue
        version += [status.st_dev, status.st_ino, status.st_size]
        version += [status.st_mtime_ns, status.st_ctime_ns]
    return version


def _read(record: Path, version: list[int]) -> dict[str, str]:
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["version"] == version and version:
            return {str(name): str(digest) for name, digest in stored["layers"].items() if digest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {}


def _write(record: Path, version: list[int], digests: Mapping[str, str]) -> None:
    try:
        make_folder(record.parent)
        write_file(record, json.dumps({"version": version, "layers": digests}))
    except InputError as error:
        # Planning is slower next time, that is all.
        logger.info("%s", error)


_DEFAULT_MAX_BYTES = 2 * 2**30
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
    max_bytes: int = _DEFAULT_MAX_BYTES
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
