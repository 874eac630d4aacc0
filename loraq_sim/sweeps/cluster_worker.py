"""What a sweep runs on a worker of a Dask cluster: look whether it can help, and do a task.

A worker reports through a topic of the scheduler, one round trip per message: what has been said
is at the scheduler before the next case begins, so a worker that dies takes no finished case along
and the case that was running when it died is known. Messages are JSON texts: the driver takes data
from a scheduler, never pickles.
"""

import json
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loraq_sim.results.rows import plain_value
from loraq_sim.sweeps.cases import SweepTask
from loraq_sim.sweeps.digests import code_digest
from loraq_sim.sweeps.worker import (
    CaseResult,
    computing_on_one_thread,
    load_evaluate,
    run_task,
)

__all__ = [
    "Report",
    "Requirements",
    "anywhere",
    "inspect_worker",
    "read_report",
    "report_text",
    "requirements",
    "run_cluster_task",
]


MAX_REPORT_CHARACTERS = 16 * 2**20

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


@dataclass(frozen=True)
class Report:
    """One message of a worker.

    `assignment` says of what, `process` from where. `kind` is ``inspected`` (`content`: why the
    worker is of no use, or empty), ``begun``, ``loaded``, ``result`` (`content`: a mapping of
    ``case_id``, ``row`` and ``is_unreadable``), ``ended``, ``raised`` (`content`: why), or
    ``displaced``: the process that was asked is gone, and this one did nothing.
    """

    kind: str
    assignment: int
    process: str = ""
    content: Any = ""


_KINDS = ("inspected", "begun", "loaded", "result", "ended", "raised", "displaced", "mark")
_PLAIN = (str, int, float, bool, type(None))


def report_text(report: Report) -> str:
    """`report` as the JSON text that `read_report` reads."""
    return json.dumps(asdict(report), default=str)


def read_report(text: Any) -> Report:
    """The report behind a JSON text, checked to be one, whoever may have sent it.

    Raises
    ------
    ValueError
        If it is not one; the message says in a few words what is wrong.
    """
    if not isinstance(text, str) or len(text) > MAX_REPORT_CHARACTERS:
        raise ValueError("no text of a report")
    try:
        found = json.loads(text)
        report = Report(**found)
    except (ValueError, TypeError, RecursionError):
        raise ValueError("no JSON of a report") from None
    if report.kind not in _KINDS or type(report.assignment) is not int:
        raise ValueError("an unknown kind of report")
    if not isinstance(report.process, str):
        raise ValueError("a report of no process")
    if report.kind == "result":
        _check_result(report.content)
    elif not isinstance(report.content, str):
        raise ValueError("a report without a text")
    return report


def _check_result(content: Any) -> None:
    is_right = (
        isinstance(content, dict)
        and content.keys() == {"case_id", "row", "is_unreadable"}
        and isinstance(content["case_id"], str)
        and isinstance(content["is_unreadable"], bool)
        and isinstance(content["row"], dict)
    )
    if not is_right:
        raise ValueError("a result of another form")
    for name, value in content["row"].items():
        is_huge = isinstance(value, int) and not -(2**63) <= value < 2**63
        if not isinstance(value, (*_PLAIN, dict, list)) or is_huge:
            raise ValueError(f"a result whose {name[:60]!r} no row can hold")
    for name in ("layer", "split", "status"):
        if not isinstance(content["row"].get(name), str):
            raise ValueError(f"a result without a {name}")


def _describe_code() -> tuple[str, dict[str, str]]:
    """Digest of the code and versions of the libraries that results depend on, here."""
    return code_digest(), {name: _version(name) for name in _COMPUTING}


def anywhere(task: SweepTask) -> SweepTask:
    """`task` with absolute paths: a worker runs in a folder of its own."""
    cases = tuple(replace(case, accelerator=_absolute(case.accelerator)) for case in task.cases)
    return replace(task, dump=str(Path(task.dump).absolute()), cases=cases)


def _absolute(reference: str) -> str:
    is_path = "/" in reference or reference.endswith((".yaml", ".yml"))
    return str(Path(reference).absolute()) if is_path else reference


def requirements(tasks: Iterable[SweepTask]) -> Requirements:
    """What a worker needs for `tasks`."""
    import hwmodels

    code, versions = _describe_code()
    references = {case.accelerator for task in tasks for case in task.cases}
    return Requirements(
        code=code,
        versions=versions,
        dumps={dump: Path(dump).stat().st_size for dump in {task.dump for task in tasks}},
        accelerators={name: hwmodels.load_accelerator(name).digest() for name in references},
    )


def inspect_worker(topic: str, assignment: int, needed: Requirements) -> None:
    """Report whether this process can work for a sweep."""
    with _telling(topic, assignment):
        _tell(topic, assignment, "inspected", _problem(needed))


def run_cluster_task(
    topic: str, assignment: int, process: str, task: SweepTask, evaluate: str
) -> None:
    """Run `task` if this is the process that was inspected, and report every result.

    Stops between two cases when its future is cancelled or the driver is gone.
    """
    if process != _PROCESS:
        _tell(topic, assignment, "displaced")
        return
    _tell(topic, assignment, "begun")
    with _telling(topic, assignment), computing_on_one_thread():
        results = run_task(
            task, load_evaluate(evaluate), on_loaded=lambda: _tell(topic, assignment, "loaded")
        )
        for result in results:
            _tell(topic, assignment, "result", _result(result))
            if _is_unwanted():
                return
    _tell(topic, assignment, "ended")


@contextmanager
def _telling(topic: str, assignment: int) -> Iterator[None]:
    """Report an exception as a text: the driver does not look into Dask's pickle of it."""
    try:
        yield
    except Exception as error:
        _tell(topic, assignment, "raised", f"{type(error).__name__}: {error}"[:300])
        raise


def _result(result: CaseResult) -> dict[str, Any]:
    row = {name: plain_value(value) for name, value in result.row.items()}
    case_id = result.case.case_id
    return {"case_id": case_id, "row": row, "is_unreadable": bool(result.is_unreadable)}


def _tell(topic: str, assignment: int, kind: str, content: Any = "") -> None:
    from distributed import get_client

    report = Report(kind=kind, assignment=assignment, process=_PROCESS, content=content)
    get_client().log_event(topic, report_text(report))


def _is_unwanted() -> bool:
    """Whether the scheduler has taken back the task that runs here."""
    from distributed import get_worker

    with suppress(AttributeError):  # no documented name: without it a task runs to its end
        worker = get_worker()
        state = worker.state.tasks.get(worker.get_current_task())
        return state is None or state.state in ("cancelled", "released", "forgotten")
    return False


def _problem(needed: Requirements) -> str:
    code, versions = _describe_code()
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
