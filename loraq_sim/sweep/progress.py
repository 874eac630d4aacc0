"""What a sweep tells its caller while it runs and when it has ended."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from loraq_sim.sweep.work import seconds_of, units_by_effort

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


_CRUMB = 1e-6

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
    """Elapsed time, and time left by what finished cases of each effort took.

    Parameters
    ----------
    work : iterable of (str, float)
        Effort and units of work of every case there is to do.
    jobs : int
        Cases that run at a time.
    """

    def __init__(self, work: Iterable[tuple[str, float]], *, jobs: int = 1) -> None:
        self._started = time.monotonic()
        self._left = units_by_effort(work)
        self._jobs = max(jobs, 1)
        self._done: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def advance(self, effort: str, units: float, seconds: float | None) -> None:
        """Count a finished case; one that failed says nothing of the others."""
        self._left[effort] = max(self._left.get(effort, 0.0) - units, 0.0)
        # Sums of floats leave crumbs.
        if self._left[effort] < units * _CRUMB:
            self._left[effort] = 0.0
        if seconds is not None and units > 0:
            self._done[effort] = self._done.get(effort, 0.0) + units
            self._seconds[effort] = self._seconds.get(effort, 0.0) + seconds

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def eta_s(self) -> float | None:
        """Seconds left, None until a case of every effort that is left has finished."""
        rates = {effort: self._seconds[effort] / units for effort, units in self._done.items()}
        left = seconds_of(self._left, rates)
        return None if left is None or not rates else left / self._jobs
