"""One thread per worker: more would fight for the cores, and sum in another order."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["ONE_THREAD", "computing_on_one_thread", "environment"]

ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "MKL_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMBA_NUM_THREADS",
    ),
    "1",
)
"""Environment of a process that computes on one thread; libraries read it when they load."""


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for libraries loaded and processes started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def computing_on_one_thread() -> Iterator[None]:
    """Hold BLAS and OpenMP to one thread, whether they are loaded already or not.

    For processes that others started; needs threadpoolctl, which comes with ``[cluster]``.
    """
    from threadpoolctl import threadpool_limits

    # PyTorch keeps a count of its own.
    torch = sys.modules.get("torch")
    n_torch = torch.get_num_threads() if torch is not None else 0
    with environment(ONE_THREAD), threadpool_limits(limits=1):
        if torch is not None:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(n_torch)
