"""How long a sweep will take: a formula per case, fitted once, scaled to this machine and store.

seconds(case) = c_0 + passes (c_p + c_w N K + c_r N K r) + c_m T N K

    N K: weights    r: rank of the branch    T: activation rows emulated
    passes: 0 for rtn, 1 for one-shot methods, alternations of the preset + 1 for loraq

The constants are seconds per unit on one core, least squares in the logarithm over 258 kinds of
case of the two example dumps (half of them within -16 and +18 %). A probe of some milliseconds
scales them to this machine; rows already in the store do so better.
"""

import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraq_sim.dumps import LayerInfo
from loraq_sim.split import PrecisionSplit
from loraq_sim.sweep.memory import worker_bytes
from loraq_sim.sweep.tasks import SweepCase

if TYPE_CHECKING:
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.plan import ComposedSweep

__all__ = [
    "SweepForecast",
    "case_seconds",
    "emulate_seconds",
    "estimate",
    "rank_of",
    "solve_seconds",
]

_CASE_S = 1.7e-3
_PASS_S = 1.6e-3
_WEIGHT_S = 6.9e-8
_WEIGHT_RANK_S = 1.0e-9
_MAC_S = 2.5e-10
_ONE_PASS = {"rtn": 0, "lqer": 1, "svdquant": 1}
# Time of `_probe` where the constants were fitted.
_REFERENCE_PROBE_S = 2.7e-3
# A worker imports torch and loads compiled kernels before its first case.
_START_S = 2.5


@dataclass(frozen=True, kw_only=True)
class SweepForecast:
    """What a sweep would do; `seconds` is a rough estimate, and `basis` says what it rests on.

    `worker_bytes` is the expected peak memory of a worker; see `loraq_sim.sweep.memory`.
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
    factor, basis = _machine_factor(sweep.cases, store)
    work = factor * sum(case.work for case in waiting)
    longest = max((factor * task.work for task in sweep.tasks), default=0.0)
    # No schedule beats the mean load, and none beats the longest task.
    seconds = max(work / max(jobs, 1), min(longest, work)) + (_START_S if waiting else 0.0)
    return SweepForecast(
        n_layers=len(sweep.tasks),
        n_cases=len(sweep.cases),
        n_done=len(done),
        seconds=seconds,
        jobs=jobs,
        basis=basis,
        worker_bytes=worker_bytes(sweep.tasks),
    )


def case_seconds(
    info: LayerInfo | None, split: PrecisionSplit, method: str, preset: str, tokens: int | None
) -> float:
    """Expected time of one case on the reference machine, in seconds; see the module."""
    return solve_seconds(info, split, method, preset) + emulate_seconds(info, tokens)


def solve_seconds(info: LayerInfo | None, split: PrecisionSplit, method: str, preset: str) -> float:
    """The part of `case_seconds` that cases with the same solution share."""
    from loraq_sim.solvers import PRESETS

    if info is None:
        return 0.0
    weights = info.n * info.k
    rank = min(rank_of(split), info.n, info.k) if method != "rtn" else 0
    passes = _ONE_PASS.get(method, PRESETS[preset] + 1)
    return passes * (_PASS_S + weights * (_WEIGHT_S + _WEIGHT_RANK_S * rank))


def emulate_seconds(info: LayerInfo | None, tokens: int | None) -> float:
    """The part of `case_seconds` that every case has of its own."""
    if info is None:
        return _CASE_S
    rows = min(tokens or math.inf, info.tokens or 0)
    return _CASE_S + _MAC_S * rows * info.n * info.k


def rank_of(split: PrecisionSplit) -> int:
    """Rank of the branch, for a budget about the rank its codes alone would allow."""
    if not split.has_branch:
        return 0
    if split.rank is not None:
        return split.rank
    bits = int(re.match(r"W(\d+)", split.branch)[1])
    return int(split.budget.rpartition("@")[2]) * 16 // bits


def _machine_factor(cases: Sequence[SweepCase], store: "ResultStore | None") -> tuple[float, str]:
    """How much longer cases take here than the formula says, and how that is known."""
    if store is not None:
        expected = {case.case_id: case.work for case in cases}
        rows = store.rows([case.case_id for case in cases])
        ratios = [
            row["seconds"] / expected[row["case_id"]]
            for row in rows
            if row["status"] == "ok" and row["seconds"]
        ]
        if ratios:
            return statistics.median(ratios), f"{len(ratios)} cases of this sweep already stored"
    return _probe() / _REFERENCE_PROBE_S, "a short probe of this machine"


def _probe() -> float:
    """Least time of five runs of a fixed piece of array work, in seconds."""
    import numpy as np

    # Element-wise, so that it takes one core here as the work does in a worker.
    values = np.linspace(-1.0, 1.0, 2**18, dtype=np.float32)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for scale in range(64):
            np.rint(values * np.float32(scale))
        times.append(time.perf_counter() - started)
    return min(times)
