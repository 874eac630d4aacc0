"""The main loop of a worker process."""

import os
import signal
from contextlib import suppress
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from threading import Thread

__all__ = ["serve"]


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
    # Imported here so that `serve` itself loads in a moment and with SIGINT held.
    from loraq_sim.errors import InputError
    from loraq_sim.sweep.worker import load_evaluate, run_task

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
