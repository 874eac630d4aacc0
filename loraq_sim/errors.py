"""Errors a caller may want to catch, and how unknown names and unnamed options are reported.

The tree, from the most general down:

- `LoraqError`: base of every error this package raises on purpose

  - `InputError` (also ValueError): bad argument, name, format, split or file content

    - `DumpError`: a layer dump cannot be read or holds unusable layers

  - `StoreError`: a result store cannot be opened, read or written
  - `CaseFailed`: one (layer, split) case could not be evaluated
  - `SchedulerLost`: a cluster's scheduler went away or fell silent before all cases were done
"""

import difflib
import functools
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

__all__ = [
    "CaseFailed",
    "DumpError",
    "InputError",
    "LoraqError",
    "SchedulerLost",
    "StoreError",
    "counted",
    "named_options",
    "unknown_name",
]

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")


def _in_one_line(error: Exception) -> list[str]:
    """What a notebook prints of an error: its message, and the line of the cell that asked.

    IPython calls it in place of a traceback, whose frames are ours and say nothing to a user.
    """
    if os.environ.get("LORAQ_SIM_DEBUG"):
        return traceback.format_exception(error)
    lines = [f"{type(error).__name__}: {error}"]
    frames = traceback.extract_tb(error.__traceback__)
    cells = [frame for frame in frames if _CELL.search(frame.filename)]
    if cells and cells[-1].line:
        lines.append(f"  in line {cells[-1].lineno} of the cell: {cells[-1].line}")
    return lines


# IPython's names of cells: <ipython-input-3-...>, and a file of ipykernel.
_CELL = re.compile(r"<ipython-input-|[/\\]ipykernel_\d+[/\\]\d+\.py$")


class LoraqError(Exception):
    """Base of every error this package raises on purpose."""

    def _render_traceback_(self) -> list[str]:
        return _in_one_line(self)


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


def counted(number: int, noun: str, verb: str = "") -> str:
    """How many of a thing, and what they do; `noun` and `verb` as of one.

    >>> counted(1, "layer"), counted(1200, "row", "is"), counted(2, "case", "overflows")
    ('1 layer', '1,200 rows are', '2 cases overflow')
    """
    one = number == 1
    plural = {"is": "are", "has": "have", "was": "were"}.get(verb, verb.removesuffix("s"))
    nouns = noun if one else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,} {nouns} {verb if one else plural}".rstrip()


def unknown_name(what: str, value: str, valid: Iterable[str]) -> str:
    """Message for an unknown name, with the nearest valid names first.

    >>> unknown_name("method", "lorq", ["loraq", "rtn"])
    "unknown method 'lorq'; did you mean 'loraq'? Known: loraq, rtn"
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value)[:100].lower(), names, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ";"
    return f"unknown {what} {value!r:.100}{hint} Known: {', '.join(names)}"


def named_options(
    function: Callable[_Parameters, _Returned],
) -> Callable[_Parameters, _Returned]:
    """Let a public function take its keyword-only options by place still, with a warning.

    Version 0.1 allowed that. A type checker sees the function as it is.
    """
    code = function.__code__
    n_placed = code.co_argcount
    names = code.co_varnames[: n_placed + code.co_kwonlyargcount]

    @functools.wraps(function)
    def called(*values: _Parameters.args, **options: _Parameters.kwargs) -> _Returned:
        if not n_placed < len(values) <= len(names):
            return function(*values, **options)
        unnamed = dict(zip(names[n_placed:], values[n_placed:], strict=False))
        given = ", ".join(f"{name}=" for name in unnamed)
        warnings.warn(
            f"{function.__name__}() takes its options by name: write {given}",
            DeprecationWarning,
            stacklevel=2,
        )
        by_name: Callable[..., _Returned] = function
        return by_name(*values[:n_placed], **unnamed, **options)

    return called
