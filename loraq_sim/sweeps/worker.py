"""What is done for one task, in the process it runs in: load the layer once, evaluate its cases.

Whatever goes wrong with one layer or case becomes the row of that case and touches no other. A
worker process (`serve`) does this for one task after the other, on one thread: more would fight for
the cores, and sum in another order.
"""

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps import LayerDump, read_layer_dump
from loraq_sim.errors import DumpError, InputError, LoraqError
from loraq_sim.layers import Layer
from loraq_sim.results.rows import Row, failed_row
from loraq_sim.sweeps.cases import SweepCase, SweepTask
from loraq_sim.sweeps.digests import forget_digests

if TYPE_CHECKING:
    import hwmodels
    from loraq_sim.solvers import Solution
    from loraq_sim.solvers.problem import SharedStages

__all__ = [
    "EVALUATE",
    "CaseResult",
    "Evaluate",
    "ONE_THREAD",
    "computing_on_one_thread",
    "environment",
    "evaluate_case",
    "failed_result",
    "forget_files",
    "load_evaluate",
    "run_task",
    "serve",
]

logger = logging.getLogger(__name__)


EVALUATE = "loraq_sim.sweeps.worker:evaluate_case"
"""Reference of the evaluation a sweep uses, as ``module:function``; workers import it by name."""

_KEPT_SOLUTIONS = 2
_last_solutions: "dict[str, Solution]" = {}

Evaluate = Callable[[Layer, SweepCase], Row]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """A finished case. `is_unreadable`: it failed because its layer could not be loaded."""

    case: SweepCase
    row: Row
    is_unreadable: bool = False


def evaluate_case(layer: Layer, case: SweepCase) -> Row:
    """`loraq_sim.evaluate.evaluate_case` with the settings of `case`."""
    from loraq_sim.evaluate import evaluate_case

    started = time.perf_counter()
    solution = _solution(layer, case)
    row = evaluate_case(layer, case.settings, _accelerator(case.accelerator), solution=solution)
    return {**row, "seconds": time.perf_counter() - started}


def _solution(layer: Layer, case: SweepCase) -> "Solution":
    """From the cases before, the cache, or the solver; its key stands for all it depends on."""
    from loraq_sim.evaluate import solve_case
    from loraq_sim.machine import check_machine

    # Cases of one layer that differ only in the machine run in a row, and have the same solution
    # where each machine can do all that a condition may choose.
    if case.solution_key in _last_solutions:
        return _last_solutions[case.solution_key]
    found = case.cache.load(case.solution_key) if case.cache is not None else None
    if found is None:
        machine, shared = _accelerator(case.accelerator), _shared_stages(layer)
        check_machine(case.settings, machine)
        found = solve_case(layer, case.settings, accelerator=machine, shared=shared)
        if case.cache is not None:
            case.cache.keep(case.solution_key, found)
    while len(_last_solutions) >= _KEPT_SOLUTIONS:
        del _last_solutions[next(iter(_last_solutions))]
    _last_solutions[case.solution_key] = found
    return found


@lru_cache(maxsize=1)
def _shared_stages(layer: Layer) -> "SharedStages":
    """Solver stages of one layer: splits that differ only in activations share all of them."""
    from loraq_sim.solvers.problem import SharedStages

    return SharedStages()


def load_evaluate(reference: str) -> Evaluate:
    """The function behind a ``module:function`` reference.

    Raises
    ------
    InputError
        If there is no such module or function.
    """
    module, _, name = reference.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"cannot load the evaluation {reference!r}: {error}") from None


def run_task(
    task: SweepTask, evaluate: Evaluate, *, on_loaded: Callable[[], None] = lambda: None
) -> Iterator[CaseResult]:
    """Results of the cases of `task`, each as soon as it is there; `on_loaded` marks the start.

    Raises nothing but what is no `Exception`, such as KeyboardInterrupt.
    """
    try:
        layer = _dump(task.dump, task.drawn_rows, task.lora)[task.layer]
        _check_content(task, layer)
    except Exception as error:
        message = _message(error)
        yield from (failed_result(case, message, is_unreadable=True) for case in task.cases)
        return
    on_loaded()
    _last_solutions.clear()
    _shared_stages.cache_clear()
    for case in task.cases:
        yield _run_case(layer, case, evaluate)


def _completed(case: SweepCase, row: Mapping[str, Any]) -> Row:
    """The row to store: what the evaluation returned, completed by the labels of the case."""
    completed = {name: v for name, v in case.labels.items() if row.get(name) is None}
    # To the evaluation all rows of the plan are given; the plan knows by whom.
    return dict(row) | completed | {"m_source": case.labels.get("m_source", row.get("m_source"))}


def failed_result(case: SweepCase, message: str, *, is_unreadable: bool = False) -> CaseResult:
    """Result of a case that gave no row; `message` is kept on one line."""
    row = failed_row(" ".join(message.split()), case.labels)
    return CaseResult(case=case, row=row, is_unreadable=is_unreadable)


def _check_content(task: SweepTask, layer: Layer) -> None:
    """Refuse a layer that is not the one the cases were named for."""
    if task.digest and layer.digest() != task.digest:
        forget_digests(_dump(task.dump, task.drawn_rows, task.lora))
        raise DumpError(
            f"{task.dump}: layer {task.layer!r} changed since the sweep was planned; "
            "run the same command again"
        )


def _run_case(layer: Layer, case: SweepCase, evaluate: Evaluate) -> CaseResult:
    try:
        row: dict[str, Any] = evaluate(layer, case)
    except Exception as error:
        return failed_result(case, _message(error))
    return CaseResult(case=case, row=_completed(case, row))


def _message(error: Exception) -> str:
    if isinstance(error, LoraqError):
        return str(error)
    # Not one of ours: a defect or a full memory. The place helps whoever reads the row. Not logged
    # as a warning, which a process without handlers would print across the progress bar.
    logger.info("unexpected error in a case", exc_info=error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def forget_files() -> None:
    """Read dumps and accelerator files anew next time; they may have changed since."""
    _dump.cache_clear()
    _accelerator.cache_clear()


@lru_cache(maxsize=1)
def _dump(path: str, drawn_rows: bool | int, lora: tuple[str, ...]) -> LayerDump:
    return read_layer_dump(path, synthesize_inputs=drawn_rows, lora=lora)


@lru_cache(maxsize=16)
def _accelerator(reference: str) -> "hwmodels.Accelerator":
    import hwmodels

    return hwmodels.load_accelerator(reference)


def serve(pipe: Connection, evaluate: str) -> None:
    """Ask for tasks, run them and send results until the pipe closes.

    Sends ``("idle",)`` for a task, ``("loaded",)`` when its layer is there, ``("result", r)`` per
    case, or ``("broken", why)`` if the evaluation cannot be imported.
    """
    # Ctrl-C goes to the whole process group; the driver decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        _serve(pipe, evaluate)


def _serve(pipe: Connection, evaluate: str) -> None:
    try:
        function = load_evaluate(evaluate)
    except InputError as error:
        pipe.send(("broken", str(error)))
        return
    while True:
        pipe.send(("idle",))
        task = pipe.recv()
        for result in run_task(task, function, on_loaded=lambda: pipe.send(("loaded",))):
            pipe.send(("result", result))


def _end_with_parent() -> None:
    """End this process when its parent dies without having closed it (SIGKILL of a sweep)."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


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
