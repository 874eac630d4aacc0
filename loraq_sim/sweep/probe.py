"""How fast this machine is: a small real solve and emulation in a process like a worker.

The process computes on one thread, like a worker, whatever this one does, and imports what a
worker imports, so that it also says how long a worker takes to start.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import lru_cache

from loraq_sim.sweep.one_thread import ONE_THREAD

__all__ = ["ProbeResult", "probe_machine", "run_probe"]

_SHAPE = (512, 512)
_TOKENS = 64
_SPLIT = "W4A4+W8A8r16"
_REPEATS = 3
_TIMEOUT_S = 60.0
# What `run_probe` gave where the constants of `loraq_sim.sweep.work` were fitted.
_REFERENCE_S = 0.041
_REFERENCE_START_S = 2.5


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """`factor`: time here over time on the reference machine; `start_s`: to start a worker."""

    factor: float
    start_s: float
    basis: str


@lru_cache(maxsize=1)
def probe_machine() -> ProbeResult:
    """Measure once per process; about two seconds."""
    command = "import sys; from loraq_sim.sweep.probe import run_probe"
    command += "; sys.stdout.write(repr(run_probe()))"
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    started = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=True,
        )
        seconds = float(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return ProbeResult(
            factor=1.0, start_s=_REFERENCE_START_S, basis="a machine like that of the authors"
        )
    start_s = max(time.perf_counter() - started - _REPEATS * seconds, 0.0)
    return ProbeResult(
        factor=seconds / _REFERENCE_S, start_s=start_s, basis="a short probe of this machine"
    )


def run_probe() -> float:
    """Least time of some repeats of a small solve and emulation, in seconds."""
    import numpy as np

    import hwmodels
    from loraq_sim.evaluate import evaluate_layer
    from loraq_sim.layers import Layer

    rng = np.random.default_rng(0)
    layer = Layer(
        name="probe",
        weight=rng.normal(size=_SHAPE).astype(np.float32),
        activations=rng.normal(size=(_TOKENS, _SHAPE[1])).astype(np.float32),
        kind="linear",
    )
    accelerator = hwmodels.load_accelerator("aie2")
    times = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        evaluate_layer(layer, _SPLIT, accelerator, preset="fast")
        times.append(time.perf_counter() - started)
    # The first one compiles or loads kernels.
    return min(times[1:])
