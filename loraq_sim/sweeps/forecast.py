"""What a sweep will take: time on this machine, and memory of a worker.

**Time** is units of work (`loraq_sim.sweeps.cases`) times what a unit takes. Seconds per unit are
learned by effort: from rows that the store has, and for other efforts from a probe, which runs one
real case of each on a small layer. The probe is a process on one thread that imports what a worker
imports, so that it also says how long a worker takes to start.

**Memory** at the largest layer, in bytes of peak resident memory:

    c_0 + max( c_s N K, c_w N K + c_x T (N + K) ) + c_k S N K + 4 T_all K

    c_0: interpreter and libraries    c_s: solving    c_w, c_x: emulation and reference output
    S: different solutions of the layer, which are kept until its last case    c_k: one of them
    T: activation rows used    T_all: rows in the dump, which are loaded before rows are chosen

The constants of single cases are fitted to nine runs with N and K from 64 to 4608 and T from 16 to
2048, and are within 10 % of all nine. Of whole sweeps (the example dumps, ten PixArt layers in 12
splits, three of SANA) the sum is 0.9 to 1.3 times the peak.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

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
    "SweepForecast",
    "estimate",
    "layer_bytes",
    "probe_machine",
    "run_probe",
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
