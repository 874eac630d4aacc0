"""The name of a case: a digest of everything its result depends on.

The same command run again finds its cases in the store by these names and skips them. A changed
dump, accelerator, setting or release gives new names, so nothing stale is ever taken for fresh.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["case_identity", "code_digest"]

# Parts that cannot change a number of a row.
_WITHOUT_EFFECT = ("cli", "sweep", "store.py", "store_file.py", "csv_file.py", "writer_lock.py")
_WITHOUT_EFFECT += ("pareto.py", "totals.py", "rows.py", "__init__.py")
_PACKAGES = ("loraq_sim", "hwmodels")


def case_identity(**facts: Any) -> str:
    """SHA-256 (hex) of `facts`: strings, numbers, None, and mappings and sequences of them."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 (hex) of the source files that decide results, in both packages.

    A release has one digest; while the code is being changed every edit of these files makes a
    new one, and earlier rows are not reused.
    """
    state = hashlib.sha256()
    for package in _PACKAGES:
        root = Path(find_spec(package).origin).parent
        for path in _sources(root):
            state.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            state.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return state.hexdigest()


def _sources(root: Path) -> Iterable[Path]:
    return sorted(
        path
        for path in root.rglob("*.py")
        if path.relative_to(root).parts[0] not in _WITHOUT_EFFECT
    )
