"""What a sweep tells its caller while it runs and when it has ended."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["OnEvent", "ProgressClock", "SweepEvent", "SweepOutcome"]


@dataclass(frozen=True, kw_only=True)
class SweepEvent:
    """One step of a sweep, with the state after it.

    `kind` is ``start``, ``case`` (one case finished), ``worker_lost``, ``note`` or ``end``. `total`
    counts the cases this run has to do, `done` those it has done, `failed` the failed among them;
    `skipped` were in the store already. `eta_s` is the expected time left, None until known.
    `layer`, `split` and `status` belong to the case; `message` says why it failed, what happened
    to the worker, or what else to know.
    """

    kind: Literal["start", "case", "worker_lost", "note", "end"]
    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    elapsed_s: float = 0.0
    eta_s: float | None = None
    layer: str = ""
    split: str = ""
    status: str = ""
    message: str = ""


OnEvent = Callable[[SweepEvent], None]


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """How a sweep ended.

    `n_failed` of the cases run gave no result, `n_skipped` were in the store, `n_left` were not
    reached. `is_unreadable`: no layer could be loaded at all. `first_failure` is a message;
    `stopped` says why a sweep ended before its cases did, if something but Ctrl-C ended it.
    """

    n_ok: int
    n_failed: int
    n_skipped: int
    n_left: int
    interrupted: bool
    is_unreadable: bool
    seconds: float
    first_failure: str = ""
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """130 if interrupted, 2 if no layer could be loaded, 1 if some case failed or is left."""
        if self.interrupted:
            return 130
        if self.is_unreadable:
            return 2
        return 1 if self.n_failed or self.stopped else 0


class ProgressClock:
    """Elapsed time, and time left in proportion to the expected work of the cases.

    The pace is measured from the first finished case on: starting the workers and compiling
    kernels takes seconds that say nothing about the rest.
    """

    def __init__(self, work: float) -> None:
        self._started = time.monotonic()
        self._left = work
        self._paced = 0.0
        self._pace_started: float | None = None

    def advance(self, work: float) -> None:
        """Count a finished case of this expected work."""
        self._left -= work
        if self._pace_started is None:
            self._pace_started = time.monotonic()
        else:
            self._paced += work

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def eta_s(self) -> float | None:
        """Seconds left, None before the second case is done."""
        if not self._paced:
            return None
        return max((time.monotonic() - self._pace_started) * self._left / self._paced, 0.0)
