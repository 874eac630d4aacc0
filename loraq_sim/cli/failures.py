"""How a command fails: one line on stderr and an exit code, never a traceback."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from loraq_sim.cli.output import say
from loraq_sim.errors import LoraqError

__all__ = [
    "BAD_INPUT",
    "INTERRUPTED",
    "SOME_FAILED",
    "case_failure",
    "end_with",
    "one_line_failures",
    "set_debug",
]

SOME_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

# Names from a file may be of any length.
_LONGEST = 1000
_DEBUG_VARIABLE = "LORAQ_SIM_DEBUG"


def set_debug(wanted: bool) -> None:
    """Let errors show their traceback (also in worker processes), for bug reports."""
    if wanted:
        os.environ[_DEBUG_VARIABLE] = "1"


def case_failure(error: Exception) -> str:
    """Why one case failed, in one line; the others go on. Re-raises under ``--debug``."""
    if os.environ.get(_DEBUG_VARIABLE):
        raise error
    return _one_line(error) if _is_users(error) else f"{type(error).__name__}: {_one_line(error)}"


def end_with(rows: list[dict], show: Callable[[bool], None]) -> None:
    """Show the rows of a command and exit as its failed cases demand.

    `show` prints the rows; its argument says whether any of them has a message to show. Nothing is
    printed on stdout if no case at all succeeded.
    """
    failures = [row["message"] for row in rows if row["status"] == "failed"]
    if len(failures) == len(rows):
        say(f"error: {failures[0]}", err=True)
        raise typer.Exit(BAD_INPUT)
    show(any(row.get("message") for row in rows))
    if failures:
        text = f"error: {len(failures)} of {len(rows)} cases failed; the first: {failures[0]}"
        say(text, err=True)
        raise typer.Exit(SOME_FAILED)


def one_line_failures(command: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line on stderr and an exit code."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            say("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if os.environ.get(_DEBUG_VARIABLE) or not _is_users(error):
                raise
            say(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(BAD_INPUT) from None

    return guarded


def _is_users(error: Exception) -> bool:
    """Whether the error says something about the input or the machine, not about our code."""
    if isinstance(error, (LoraqError, OSError)):
        return True
    # Loaded only if a command used it; an error of a module that was never loaded cannot occur.
    errors = sys.modules.get("hwmodels.errors")
    return errors is not None and isinstance(error, errors.AcceleratorError)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror or error}"
    text = " ".join(str(error).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
