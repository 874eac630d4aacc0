"""Errors a caller may want to catch, and how an unknown name is reported.

The tree, from the most general down:

- `LoraqError`: base of every error this package raises on purpose

  - `InputError` (also ValueError): bad argument, name, format, split or file content

    - `DumpError`: a layer dump cannot be read or holds unusable layers

  - `StoreError`: a result store cannot be opened, read or written
  - `CaseFailed`: one (layer, split) case could not be evaluated
  - `SchedulerLost`: a cluster's scheduler went away or fell silent before all cases were done
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CaseFailed",
    "DumpError",
    "InputError",
    "LoraqError",
    "SchedulerLost",
    "StoreError",
    "unknown_name",
]


class LoraqError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(LoraqError, ValueError):
    """An argument, name or file content breaks a stated rule."""


class DumpError(InputError):
    """A layer dump is missing, unreadable, unsafe or holds an unusable layer."""


class StoreError(LoraqError):
    """A result store cannot be opened, read or written."""


class CaseFailed(LoraqError):
    """One (layer, split) case could not be evaluated; the message says why."""


class SchedulerLost(LoraqError):
    """A cluster's scheduler went away, fell silent or made no sense; finished cases are stored."""


def unknown_name(what: str, value: str, valid: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest valid names first.

    >>> unknown_name("method", "lorq", ["loraq", "rtn"])
    "unknown method 'lorq'; did you mean 'loraq'? Known: loraq, rtn"
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value)[:100].lower(), names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ";"
    return f"unknown {what} {value!r:.100}{hint} Known: {', '.join(names)}"
