"""What a sweep will take: time on this machine, and memory of a worker.

**Time** is units of work (`loraq_sim.sweeps.cases`) times what a unit takes. Seconds per unit are
learned by effort: from rows that the store has, and for other efforts from a probe, which runs one
real case of each on a small layer. The probe is a process on one thread that imports what a worker
imports, so that it also says how long a worker takes to start.

**Time left** of a sweep that runs. Its grid is layers times points (split, method, preset), and its
tasks are layers. A point takes about as long per unit of work in every layer, so rates are learned
by point, then by effort for points that are new, then from rates known beforehand times how fast
this machine turned out to be. Every case also takes a fixed time. First cases load compiled
kernels, so that of few cases the time only bounds the rate, and of many the slowest are left out.
Where the latest cases took longer or shorter than that, half of it is taken to go on.
What is left is dealt out to the workers as the sweep will do it: tasks that run are finished where
they run, the others follow in order, each to the worker that is free first.

**Memory** at the largest layer, in bytes of peak resident memory:

    c_0 + max( c_s N K, c_w N K + c_x T (N + K) ) + c_k S N K + 4 T_all K

    c_0: interpreter and libraries    c_s: solving    c_w, c_x: emulation and reference output
    S: different solutions of the layer, which are kept until its last case    c_k: one of them
    T: activation rows used    T_all: rows in the dump, which are loaded before rows are chosen

The constants of single cases are fitted to nine runs with N and K from 64 to 4608 and T from 16 to
2048, and are within 10 % of all nine. Of whole sweeps (the example dumps, ten PixArt layers in 12
splits, three of SANA) the sum is 0.9 to 1.3 times the peak.
"""

import heapq
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

import hwmodels
from loraq_sim.dumps import LayerInfo
from loraq_sim.errors import counted
from loraq_sim.layers import Layer
from loraq_sim.settings import CaseSettings
from loraq_sim.split import WITHOUT_BRANCH, parse_split
from loraq_sim.sweeps.cases import (
    SOLVED,
    SweepCase,
    SweepTask,
    case_work,
    seconds_of,
    units_by_effort,
)
from loraq_sim.sweeps.worker import ONE_THREAD

if TYPE_CHECKING:
    from loraq_sim.results.store import ResultStore
    from loraq_sim.sweeps.plan import ComposedSweep

__all__ = [
    "ProbeResult",
    "ProgressClock",
    "SweepForecast",
    "estimate",
    "layer_bytes",
    "point_of",
    "probe_machine",
    "run_probe",
    "usual_rate",
    "worker_bytes",
]


_PROCESS_BYTES = 187e6
# Torch, which reads .pt files.
_TORCH_BYTES = 190e6
_SOLVE_BYTES = 32
_KEPT_BYTES = 6
_WEIGHT_BYTES = 11
_ROW_BYTES = 32
_FLOAT32_BYTES = 4


def worker_bytes(tasks: Iterable[SweepTask]) -> int:
    """Expected peak memory of a worker that may get any of `tasks`, in bytes."""
    needs = []
    for task in tasks:
        if task.info is not None and task.cases:
            tokens = max(case.settings.tokens or task.info.tokens or 0 for case in task.cases)
            needs.append(
                layer_bytes(task.info, tokens, n_solutions=_n_solutions(task))
                + (_TORCH_BYTES if task.dump.endswith((".pt", ".pth")) else 0)
            )
    return round(_PROCESS_BYTES + max(needs, default=0))


def _n_solutions(task: SweepTask) -> int:
    """Solutions that differ; activation formats do not enter them."""
    return len(
        {
            case.solution_key
            for case in task.cases
            if case.settings.split.has_branch and case.settings.method not in WITHOUT_BRANCH
        }
    )


def layer_bytes(info: LayerInfo, tokens: int, *, n_solutions: int = 0) -> int:
    """What one layer adds to a process with `tokens` activation rows used, in bytes."""
    weights = info.n * info.k
    rows = min(tokens, info.tokens or 0)
    emulate = _WEIGHT_BYTES * weights + _ROW_BYTES * rows * (info.n + info.k)
    loaded = _FLOAT32_BYTES * (info.tokens or 0) * info.k
    kept = _KEPT_BYTES * n_solutions * weights
    return max(_SOLVE_BYTES * weights, emulate) + kept + loaded


_SHAPE = (512, 512)
_TOKENS = 64
_SPLIT, _PLAIN = "W4A4+W8A8r16", "W4A4"
_TIMEOUT_S = 120.0
# What efforts took where this was written, for a machine that cannot start the probe.
_FALLBACK_RATE = 1.5e-7
_FALLBACK_START_S = 2.5


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """`rates`: seconds per unit of work by effort; `start_s`: to start a worker."""

    rates: Mapping[str, float]
    start_s: float
    basis: str


@lru_cache(maxsize=8)
def probe_machine(efforts: tuple[str, ...]) -> ProbeResult:
    """Measure each of `efforts` once per process; some seconds."""
    command = "import sys, json; from loraq_sim.sweeps.forecast import run_probe"
    command += "; sys.stdout.write(json.dumps(run_probe(json.loads(sys.argv[1]))))"
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", command, json.dumps(efforts)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        rates, probing_s = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ProbeResult(
            rates=dict.fromkeys(efforts, _FALLBACK_RATE),
            start_s=_FALLBACK_START_S,
            basis="a machine like that of the authors",
        )
    start_s = max(time.perf_counter() - started - probing_s, 0.0)
    return ProbeResult(rates=rates, start_s=start_s, basis="a short probe of this machine")


def run_probe(efforts: list[str]) -> tuple[dict[str, float], float]:
    """Seconds per unit of each effort, measured here, and the seconds that took."""

    from loraq_sim.evaluate import evaluate_case, solve_case

    rng = np.random.default_rng(0)
    n, k = _SHAPE
    layer = Layer(
        name="probe",
        weight=rng.normal(size=_SHAPE).astype(np.float32),
        activations=rng.normal(size=(_TOKENS, k)).astype(np.float32),
    )
    info = LayerInfo(
        name=layer.name, n=n, k=k, tokens=_TOKENS, kind="linear", group="", has_bias=False,
        rows_per_call=None, calls_per_step=1, dtype="float32", bias_dtype=None,
        activation_dtype="float32", nbytes=4 * n * k, activation_key=None,
    )  # fmt: skip
    accelerator = hwmodels.load_accelerator("aie2")
    warm = CaseSettings(split=parse_split(_SPLIT), preset="fast")
    # The first ones compile or load kernels.
    solution = solve_case(layer, warm)
    evaluate_case(layer, warm, accelerator, solution=solution)
    rates = {}
    began = time.perf_counter()
    for effort in efforts:
        method, _, preset = effort.partition(" ")
        split = parse_split(_SPLIT if preset or effort == SOLVED else _PLAIN)
        settings = warm
        if effort != SOLVED:
            settings = CaseSettings(split=split, method=method, preset=preset or "balanced")
        started = time.perf_counter()
        known = solution if effort == SOLVED else None
        evaluate_case(layer, settings, accelerator, solution=known)
        units = case_work(settings, info, is_solved=effort == SOLVED)
        rates[effort] = (time.perf_counter() - started) / units
    return rates, time.perf_counter() - began


@dataclass(frozen=True, kw_only=True)
class SweepForecast:
    """What a sweep would do; `seconds` is a rough estimate, and `basis` says what it rests on.

    `worker_bytes` is the expected peak memory of a worker; see `loraq_sim.sweeps.forecast`.
    """

    n_layers: int
    n_cases: int
    n_done: int
    seconds: float
    jobs: int
    basis: str
    worker_bytes: int = 0

    @property
    def n_to_run(self) -> int:
        """Cases that are not in the store yet."""
        return self.n_cases - self.n_done


def estimate(
    sweep: "ComposedSweep",
    store: "ResultStore | None" = None,
    *,
    jobs: int = 1,
    force: bool = False,
) -> SweepForecast:
    """Cases, those already in `store`, and the time the others would take with `jobs` workers."""
    done = set() if store is None or force else store.done(sweep.case_ids)
    waiting = [case for case in sweep.cases if case.case_id not in done]
    rates, basis, start_s = _rates(sweep.cases, waiting, store)
    work = _seconds(waiting, rates)
    longest = max((_seconds(task.cases, rates) for task in sweep.tasks), default=0.0)
    # No schedule beats the mean load, and none beats the longest task.
    seconds = max(work / max(jobs, 1), min(longest, work)) + start_s
    return SweepForecast(
        n_layers=len(sweep.tasks),
        n_cases=len(sweep.cases),
        n_done=len(done),
        seconds=seconds,
        jobs=jobs,
        basis=basis,
        worker_bytes=worker_bytes(sweep.tasks),
    )


def _seconds(cases: Iterable[SweepCase], rates: Mapping[str, float]) -> float:
    units = units_by_effort((case.effort, case.work) for case in cases)
    known = {effort: amount for effort, amount in units.items() if effort in rates}
    return seconds_of(known, rates) or 0.0


def _rates(
    cases: Sequence[SweepCase], waiting: Sequence[SweepCase], store: "ResultStore | None"
) -> tuple[dict[str, float], str, float]:
    """Seconds per unit of every effort there is, how that is known, and seconds to start."""
    rates: dict[str, float] = {}
    n_rows = 0
    if store is not None:
        by_id = {case.case_id: case for case in cases}
        rows = [row for row in store.rows(list(store.done(by_id))) if row["seconds"]]
        n_rows = len(rows)
        done = [(by_id[row["case_id"]], row["seconds"]) for row in rows]
        units = units_by_effort((case.effort, case.work) for case, _ in done)
        seconds = units_by_effort((case.effort, spent) for case, spent in done)
        # Long cases weigh as much as they take.
        rates = {effort: seconds[effort] / amount for effort, amount in units.items()}
    if not waiting:
        return rates, "nothing left to run", 0.0
    missing = tuple(sorted({case.effort for case in waiting} - rates.keys()))
    probe = probe_machine(missing)
    known = f"{counted(n_rows, 'case')} of this sweep already stored"
    if not missing:
        return rates, known, probe.start_s
    return (
        {**probe.rates, **rates},
        f"{known}, and {probe.basis}" if n_rows else probe.basis,
        probe.start_s,
    )


# Seconds per unit of work of cases after the first, on the authors' machine: they say how efforts
# compare before cases of each have finished, and nothing afterwards.
_USUAL_RATE = {
    "rtn": 2.6e-8,
    "solved": 3.0e-8,
    "lqer": 5.0e-8,
    "svdquant": 8.0e-8,
    "loraq fast": 2.6e-7,
    "loraq": 8.0e-7,
    "loraq thorough": 2.5e-6,
}
_OTHER_RATE = 3.0e-7
_RESIDUAL, _RESIDUAL_RATE = " ~", 5.0
# Every case takes a time that its size says nothing of, in units of work.
_FIXED_UNITS = 2e5
# What loading and compiling kernels can add to the first case of an effort in a process.
_WARM_UP_S = 3.0
# Finished cases that say what the next of their kind will take.
_REMEMBERED, _SLOWEST = 24, 8
# Cases over which the machine's speed is watched, of a change of which half is taken to last.
_WATCHED = 32


class _Seen:
    """Finished cases of one point or effort: seconds per unit, from what and to what."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._cases: deque[tuple[float, float]] = deque(maxlen=max(_REMEMBERED, 2 * jobs))

    def take(self, seconds: float, units: float) -> None:
        """Remember a case."""
        self._cases.append((seconds, units))

    def rate(self, expected: float) -> float:
        """Seconds per unit, without the slowest cases; of few, what they leave of `expected`."""
        if self.is_enough:
            usual = sorted(self._cases, key=lambda case: case[0] / case[1])
            usual = usual[: len(usual) - max(self._jobs, len(usual) // _SLOWEST)]
            return sum(seconds for seconds, _ in usual) / sum(units for _, units in usual)
        # Warm-up makes a case longer, never shorter.
        least = max(((s - _WARM_UP_S) / units for s, units in self._cases), default=0.0)
        most = min((s / units for s, units in self._cases), default=math.inf)
        return min(max(expected, least), most)

    @property
    def is_enough(self) -> bool:
        """Whether some worker has had a second one, which did not warm up."""
        return len(self._cases) > self._jobs


@dataclass
class _TaskLeft:
    """Units that are left of one task by point and effort, and since when a case of it runs."""

    units: dict[tuple[str, str], float] = field(default_factory=dict)
    n_cases: int = 0
    since: float | None = None


class ProgressClock:
    """Elapsed time, and time left by what finished cases of each point and effort took.

    Parameters
    ----------
    work : iterable of (effort, units) or (effort, units, point, task)
        Every case there is to do, in the order of the tasks: its effort, its units of work, and the
        point of the grid and the task it belongs to, where known.
    jobs : int
        Cases that run at a time.
    """

    def __init__(self, work: Iterable[tuple[Any, ...]], *, jobs: int = 1) -> None:
        self._started = time.monotonic()
        self._jobs = max(jobs, 1)
        self._tasks: dict[str, _TaskLeft] = {}
        self._points: dict[str, _Seen] = {}
        self._efforts: dict[str, _Seen] = {}
        self._places: dict[str, str] = {}
        self._told: tuple[float, float, float] = (-math.inf, 0.0, 0.0)
        self._took: deque[tuple[float, float]] = deque(maxlen=_WATCHED)
        for number, (effort, units, *names) in enumerate(work):
            point, task = names or (effort, str(number))
            left = self._tasks.setdefault(task, _TaskLeft())
            known = left.units.get((point, effort), 0.0)
            left.units[point, effort] = known + units + _FIXED_UNITS
            left.n_cases += 1

    @classmethod
    def of_tasks(cls, tasks: "Sequence[SweepTask]", *, jobs: int) -> "ProgressClock":
        """The clock of tasks in the order in which they will be handed out."""
        placed = [(case, str(number)) for number, task in enumerate(tasks) for case in task.cases]
        work = ((_effort(case), case.work, point_of(case), task) for case, task in placed)
        clock = cls(work, jobs=jobs)
        clock._places = {case.case_id: task for case, task in placed}
        return clock

    def finish(self, case: "SweepCase", seconds: float | None) -> None:
        """Count a finished case of `of_tasks`; one that failed has no seconds."""
        task = self._places.get(case.case_id, "")
        self.advance(_effort(case), case.work, seconds, point=point_of(case), task=task)

    def advance(
        self, effort: str, units: float, seconds: float | None, *, point: str = "", task: str = ""
    ) -> None:
        """Count a finished case; one that failed says nothing of the others."""
        key = (point or effort, effort)
        name = task or next((n for n, left in self._tasks.items() if key in left.units), "")
        units += _FIXED_UNITS
        if name in self._tasks:
            self._count(name, key, units)
        if seconds is not None and seconds > 0:
            if key[0] in self._points and self._points[key[0]].is_enough:
                self._took.append((seconds, units * self._rates()(*key)))
            for seen, which in ((self._points, key[0]), (self._efforts, effort)):
                seen.setdefault(which, _Seen(self._jobs)).take(seconds, units)

    def _count(self, name: str, key: tuple[str, str], units: float) -> None:
        left, now = self._tasks[name], time.monotonic()
        left.units[key] = max(left.units.get(key, 0.0) - units, 0.0)
        left.n_cases -= 1
        left.since = now
        if left.n_cases <= 0:
            del self._tasks[name]
            # The worker that is free takes the first task that waits.
            following = next((other for other in self._tasks.values() if other.since is None), None)
            if following is not None:
                following.since = now

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def eta_s(self) -> float | None:
        """Seconds left, None until a case has finished."""
        if not self._efforts:
            return None
        now = time.monotonic()
        at, left_s, took_s = self._told
        # Thousands of layers take a while to go through, and little changes from case to case.
        if not self._tasks or now - at >= 20 * took_s:
            left_s = self._expected(now)
            self._told = (now, left_s, time.monotonic() - now)
            return left_s
        return max(left_s - (now - at), 0.0)

    def _expected(self, now: float) -> float:
        rate = self._rates()
        loads: list[float] = []
        waiting: list[float] = []
        for left in self._tasks.values():
            seconds = sum(units * rate(*key) for key, units in left.units.items())
            if left.since is None:
                waiting.append(seconds)
                continue
            # What the case that runs has taken already, which may be longer than it should.
            loads.append(seconds - min(now - left.since, seconds / left.n_cases))
        loads += [0.0] * (self._jobs - len(loads))
        heapq.heapify(loads)
        for seconds in waiting:
            heapq.heapreplace(loads, loads[0] + seconds)
        took, expected = map(sum, zip((0.0, 1e-9), *self._took, strict=True))
        drift = took / expected if 2 * len(self._took) >= _WATCHED else 1.0
        return max(loads) * math.sqrt(min(max(drift, 0.4), 2.0))

    def _rates(self) -> Callable[[str, str], float]:
        """Seconds per unit by point and effort."""
        speed = self._speed()

        @cache
        def of_effort(effort: str) -> float:
            seen, usual = self._efforts.get(effort), speed * usual_rate(effort)
            return seen.rate(usual) if seen else usual

        @cache
        def of_point(point: str, effort: str) -> float:
            seen = self._points.get(point)
            return seen.rate(of_effort(effort)) if seen else of_effort(effort)

        return of_point

    def _speed(self) -> float:
        """How many times as long as usual this machine takes."""
        ratios = sorted(
            seen.rate(usual_rate(effort)) / usual_rate(effort)
            for effort, seen in self._efforts.items()
            if seen.is_enough or len(self._efforts) == 1
        )
        return ratios[(len(ratios) - 1) // 2] if ratios else 1.0


def usual_rate(effort: str) -> float:
    """Seconds per unit of work of an effort such as ``loraq fast``, beforehand."""
    plain = effort.removesuffix(_RESIDUAL)
    rate = _USUAL_RATE.get(plain) or _USUAL_RATE.get(plain.partition(" ")[0], _OTHER_RATE)
    return rate if plain == effort else rate * _RESIDUAL_RATE


def _effort(case: SweepCase) -> str:
    """The effort of a case, those with a residual input apart."""
    has_residual = case.settings.split.feedback is not None and case.effort != SOLVED
    return f"{case.effort}{_RESIDUAL}" if has_residual else case.effort


def point_of(case: "SweepCase") -> str:
    """The point of the grid that a case belongs to: what it is called in every layer."""
    settings = case.settings
    parts = (case.effort, settings.split.text, case.accelerator, settings.condition)
    return " ".join(map(str, (*parts, sorted(settings.datapath.items()))))
