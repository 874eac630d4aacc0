"""Where caches are kept: ``LORAQ_SIM_CACHE``, or the user's cache folder."""

import os
from pathlib import Path

__all__ = ["CACHE_VARIABLE", "cache_folder"]

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
