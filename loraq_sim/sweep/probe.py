"""How fast this machine is: real cases of each effort on a small layer, in a process like a worker.

The process computes on one thread, like a worker, whatever this one does, and imports what a
worker imports, so that it also says how long a worker takes to start.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from loraq_sim.sweep.one_thread import ONE_THREAD
from loraq_sim.sweep.work import SOLVED, case_work

__all__ = ["ProbeResult", "probe_machine", "run_probe"]

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
    command = "import sys, json; from loraq_sim.sweep.probe import run_probe"
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
    import numpy as np

    import hwmodels
    from loraq_sim.case_settings import CaseSettings
    from loraq_sim.dumps import LayerInfo
    from loraq_sim.evaluate import evaluate_case, solve_case
    from loraq_sim.layers import Layer
    from loraq_sim.split import parse_split

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
