"""Digests of the code that results depend on, one per subsystem.

A subsystem is an entry module and everything of this project it imports, directly or not, found
in the text of the sources: a new kernel is covered the moment something imports it, and code of
reports, commands, stores and sweeps is never reached. While the code is being changed, every edit
of a covered file makes a new digest, and earlier results of that subsystem are not reused.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

__all__ = ["code_digest", "code_digests"]

_PACKAGES = ("loraq_sim", "hwmodels")
# The cost model exports lazily, so no import statement leads into it: all of it counts.
_ENTRIES = {
    "solver": ("loraq_sim.solvers", "loraq_sim.split"),
    "emulator": ("loraq_sim.evaluate",),
    "cost": ("hwmodels",),
}
# Messages, and the names of columns: neither changes a number.
_WITHOUT_EFFECT = ("loraq_sim", "loraq_sim.errors", "loraq_sim.rows")

_IMPORT = re.compile(
    r"^[ \t]*from[ \t]+((?:loraq_sim|hwmodels)[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)"
    r"|^[ \t]*import[ \t]+((?:loraq_sim|hwmodels)[\w.]*)",
    re.MULTILINE,
)
# ``import_module(f"loraq_sim.kernels.tiles_{path}")`` may load any module that begins like this.
_BY_NAME = re.compile(r"""import_module\(\s*f?["']((?:loraq_sim|hwmodels)[\w.]*)""")


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
    root = Path(find_spec(package).origin).parent
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
        waiting += _imports(texts[name].decode("utf-8"), sources)
    return seen


def _imports(text: str, sources: dict[str, Path]) -> Iterator[str]:
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
    for prefix in _BY_NAME.findall(text):
        yield from (name for name in sources if name.startswith(prefix))
