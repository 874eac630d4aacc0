"""Standing threads that help a caller with work which all of them take from one queue."""

import os
import threading
from collections.abc import Callable
from functools import lru_cache
from queue import SimpleQueue

__all__ = ["WORTH_THREADS", "run_together"]

# Multiply-adds below which waking a thread costs more than it gains.
WORTH_THREADS = 2**24


def run_together(
    threads: int,
    run: Callable[[], None],
    run_here: Callable[[], None] | None = None,
    done: Callable[[], bool] = lambda: False,
) -> None:
    """Call `run` here and on up to ``threads - 1`` standing threads; return when all are done.

    `run_here` takes the place of `run` here. When `done` says afterwards that no work is left, not
    even begun, nobody is waited for: to be woken would take longer than what is left to do.

    Each call of `run` must take work from a queue of its own until nothing is left, so that it does
    not matter how many calls there are: a thread that has not started when the caller is through is
    not waited for.

    Raises
    ------
    Exception
        The first that a call of `run` raised.
    """
    helps = [_Help(run) for _ in range(threads - 1)]
    if helps:
        crew = _crew(os.getpid())
        crew.grow(len(helps))
        for one in helps:
            crew.waiting.put(one)
    (run_here or run)()
    finished = done()
    for one in helps:
        if not one.recall() and not finished:
            one.wait()


class _Help:
    """One call of `run`, made by a standing thread or by nobody."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._claim, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def give(self) -> None:
        if not self.recall():
            return
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 (raised again where the caller waits)
            self._error = error
        finally:
            self._done.release()

    def recall(self) -> bool:
        """Whether no thread has begun, and now none will."""
        return self._claim.acquire(blocking=False)

    def wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error


class _Crew:
    """Threads of one process that wait for help to give, as many as were ever asked for."""

    def __init__(self) -> None:
        self.waiting: SimpleQueue[_Help] = SimpleQueue()
        self._size, self._growing = 0, threading.Lock()

    def grow(self, size: int) -> None:
        while self._size < size:
            with self._growing:
                if self._size < size:
                    name = f"loraq-sim-tiles-{self._size}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
                    self._size += 1

    def _serve(self) -> None:
        while True:
            self.waiting.get().give()


@lru_cache(maxsize=1)
def _crew(process: int) -> _Crew:
    """The crew of this process: a forked one has none of its parent's threads."""
    del process
    return _Crew()
