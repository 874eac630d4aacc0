"""Bands of rows on threads that are kept between calls."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

__all__ = ["run_bands"]

T = TypeVar("T")
# Multiply-adds below which starting threads costs more than it gains.
_WORTH_THREADS = 2**24


def run_bands(threads: int, work: int, row_panels: int, run: Callable[[int, int], T]) -> list[T]:
    """Return ``run(first, stop)`` of each thread's share of the row panels.

    `work` is the multiply-adds of the whole: few of them are not worth a thread.
    """
    threads = min(threads, row_panels) if work >= _WORTH_THREADS else 1
    if threads == 1:
        return [run(0, row_panels)]
    cuts = [i * row_panels // threads for i in range(threads + 1)]
    bands = list(zip(cuts[:-1], cuts[1:], strict=True))
    others = [_pool(os.getpid(), threads - 1).submit(run, *cut) for cut in bands[1:]]
    return [run(*bands[0]), *(other.result() for other in others)]


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads kept between calls; a forked process has none of its parent's and starts its own."""
    del process
    return ThreadPoolExecutor(threads)
