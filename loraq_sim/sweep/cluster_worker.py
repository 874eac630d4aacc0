"""What a sweep runs on a worker of a Dask cluster: look whether it can help, and do a task.

A worker reports through a topic of the scheduler, one round trip per message: what has been said
is at the scheduler before the next case begins, so a worker that dies takes no finished case along
and the case that was running when it died is known.
"""

import pickle
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraq_sim.sweep.code_digest import code_digest
from loraq_sim.sweep.one_thread import computing_on_one_thread
from loraq_sim.sweep.tasks import SweepTask

__all__ = ["Report", "Requirements", "describe_code", "inspect_worker", "run_cluster_task"]

# Tells this process from one that a nanny starts at the same address after its death.
_PROCESS = uuid.uuid4().hex
# Their rounding is part of a result.
_COMPUTING = ("loraq-sim", "numpy", "scipy", "numba")


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a worker must have to be of use: this code, the dumps, and the accelerator files."""

    code: str
    versions: Mapping[str, str]
    dumps: Mapping[str, int]
    accelerators: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Report:
    """One message of a worker.

    `assignment` says of what, `process` from where. `kind` is ``inspected`` (`content`: why the
    worker is of no use, or empty), ``begun``, ``loaded``, ``result`` (`content`: the CaseResult),
    ``ended``, or ``displaced``: the process that was asked is gone, and this one did nothing.
    """

    kind: str
    assignment: int
    process: str
    content: Any = None


def describe_code() -> tuple[str, dict[str, str]]:
    """Digest of the code and versions of the libraries that results depend on, here."""
    return code_digest(), {name: _version(name) for name in _COMPUTING}


def inspect_worker(topic: str, assignment: int, needed: Requirements) -> None:
    """Report whether this process can work for a sweep."""
    _tell(topic, assignment, "inspected", _problem(needed))


def run_cluster_task(
    topic: str, assignment: int, process: str, task: SweepTask, evaluate: str
) -> None:
    """Run `task` if this is the process that was inspected, and report every result.

    Stops between two cases when its future is cancelled or the driver is gone.
    """
    from loraq_sim.sweep.worker import load_evaluate, run_task

    if process != _PROCESS:
        _tell(topic, assignment, "displaced")
        return
    _tell(topic, assignment, "begun")
    with computing_on_one_thread():
        results = run_task(
            task, load_evaluate(evaluate), on_loaded=lambda: _tell(topic, assignment, "loaded")
        )
        for result in results:
            _tell(topic, assignment, "result", result)
            if _is_unwanted():
                return
    _tell(topic, assignment, "ended")


def _tell(topic: str, assignment: int, kind: str, content: Any = None) -> None:
    from distributed import get_client

    report = Report(kind=kind, assignment=assignment, process=_PROCESS, content=content)
    get_client().log_event(topic, pickle.dumps(report))


def _is_unwanted() -> bool:
    """Whether the scheduler has taken back the task that runs here."""
    from distributed import get_worker

    with suppress(AttributeError):  # no documented name: without it a task runs to its end
        worker = get_worker()
        state = worker.state.tasks.get(worker.get_current_task())
        return state is None or state.state in ("cancelled", "released", "forgotten")
    return False


def _problem(needed: Requirements) -> str:
    code, versions = describe_code()
    if code != needed.code:
        return "has other code of loraq-sim; install the same release there and here"
    for name, expected in needed.versions.items():
        if versions[name] != expected:
            return f"has {name} {versions[name] or 'not installed'}, here it is {expected}"
    for path, size in needed.dumps.items():
        file = Path(path)
        if not file.is_file():
            return f"cannot see the dump {path}; put it on a file system that all machines share"
        if file.stat().st_size != size:
            return f"has another file at {path}: {file.stat().st_size} bytes, not {size}"
    return _accelerator_problem(needed.accelerators)


def _accelerator_problem(digests: Mapping[str, str]) -> str:
    import hwmodels

    for reference, expected in digests.items():
        try:
            found = hwmodels.load_accelerator(reference).digest()
        except (OSError, hwmodels.AcceleratorError) as error:
            return f"cannot use the accelerator {reference}: {error}"
        if found != expected:
            return f"has another description of the accelerator {reference}"
    return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
