"""Digests of the layers of a dump, remembered per version of its file.

A layer's digest covers its values (`Layer.digest`), so it takes reading them: 2 GB of weights are
some seconds. They are written down for the file's path, size, inode and time of change, and the
next plan over the same file reads none. A worker computes the digest again from the values it
works on and refuses a layer that differs, so a stale record can cost a message, never a wrong row.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from loraq_sim.dumps import LayerDump
from loraq_sim.dumps.roles import config_path
from loraq_sim.errors import InputError, LoraqError
from loraq_sim.files import make_folder, write_file
from loraq_sim.layers import Layer
from loraq_sim.sweep.cache_folder import cache_folder

__all__ = ["dump_content_digest", "forget_digests", "layer_digests"]

logger = logging.getLogger(__name__)

# Counts changes of what a digest is made of, such as kinds that are read off names.
_LAYOUT = 2


def layer_digests(dump: LayerDump, *, remember: bool = True) -> dict[str, str]:
    """Digest of each layer of `dump` by name; empty for a layer that cannot be loaded.

    `remember` writes them down for the next call.
    """
    record = _record_path(dump.path)
    version = _version(dump.path)
    known = _read(record, version)
    missing = [name for name in dump if name not in known]
    last: Layer | None = None  # layers of one group share activations while one is in memory
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


def forget_digests(path: Path) -> None:
    """Drop what is written down for the file at `path`."""
    with suppress(OSError):
        _record_path(path).unlink(missing_ok=True)


def _record_path(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_folder() / "digests" / f"{name}.json"


def _version(path: Path) -> list[int]:
    """Of the file and of what a reader takes from beside it; empty if the file is not there."""
    version = [_LAYOUT]
    for source in (path, config_path(path)):
        try:
            status = source.stat()
        except OSError:
            if source == path:
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
