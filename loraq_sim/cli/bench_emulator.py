"""Time the emulated GEMM against `torch._int_mm`: one process, thread time, interleaved, medians.

`torch._int_mm` multiplies int8 exactly at nearly the processor's peak, so the ratio says what the
overflow rule costs, whatever the processor. A ratio counts everything a call does but packing W:
checks, packing A, the kernel, and the shift-round-saturate step to int8.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraq_sim.emulator.gemm import emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import PackedWeight, pack_weight
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path

__all__ = ["BENCH_COLUMNS", "Goal", "Operands", "goals", "measure_goal", "timed_medians"]

BENCH_COLUMNS = (
    *("shape", "codes", "mac", "path", "what", "gmacs", "ratio"),
    *("must", "stretch", "verdict", "ms", "compile_ms"),
)
_CODES = {"int8": (-128, 127), "int6": (-32, 31), "int4": (-8, 7)}
_SHIFT = 10


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One row of the table: a MAC array, the codes, and the ratio it must and should reach."""

    mac: MacArray
    must: float
    stretch: float | None = None
    codes: str = "int8"
    path: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """Seeded uniform codes of one shape."""

    a: np.ndarray
    w: np.ndarray
    weight: PackedWeight

    @classmethod
    def draw(cls, shape: tuple[int, int, int], codes: str) -> "Operands":
        """Draw (M, K) activations and (N, K) weights."""
        (m, k, n), (low, high) = shape, _CODES[codes]
        rng = np.random.default_rng(0)
        a = rng.integers(low, high + 1, (m, k)).astype(np.int8)
        w = rng.integers(low, high + 1, (n, k)).astype(np.int8)
        return cls(a=a, w=w, weight=pack_weight(w))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, K, N)."""
        return (*self.a.shape, self.w.shape[0])


def goals() -> list[Goal]:
    """Return the rows of the table."""

    def saturate(acc_bits: int, chunk: int, overflow: str = "saturate") -> MacArray:
        return MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=chunk)

    found = [
        Goal(mac=saturate(32, 1), must=0.90, stretch=0.97),
        Goal(mac=MacArray(acc_bits=20), must=0.85, stretch=0.95),
        Goal(mac=saturate(16, 1), must=0.22, stretch=0.26),
        Goal(mac=saturate(20, 1), must=0.22, stretch=0.26),
    ]
    for chunk, must, stretch in (
        *((2, 0.40, 0.50), (4, 0.45, 0.60), (8, 0.60, 0.75)),
        *((16, 0.72, 0.85), (32, 0.80, 0.92)),
    ):
        found.append(Goal(mac=saturate(18, chunk), must=must, stretch=stretch))
    found += [
        Goal(mac=saturate(12, 1), must=0.18, stretch=0.23),
        Goal(mac=saturate(16, 1, "saturate_symmetric"), must=0.12),
        Goal(mac=saturate(16, 2, "saturate_symmetric"), must=0.20),
        Goal(mac=saturate(12, 1), must=0.22, stretch=0.26, codes="int6"),
        Goal(mac=saturate(12, 2), must=0.40, stretch=0.50, codes="int6"),
        Goal(mac=saturate(10, 1), must=0.22, stretch=0.26, codes="int4"),
        Goal(mac=saturate(10, 2), must=0.40, stretch=0.50, codes="int4"),
        Goal(mac=saturate(16, 1), must=0.06, path="avx2"),
    ]
    here = PATHS.index(choose_path())
    return [goal for goal in found if goal.path is None or PATHS.index(goal.path) >= here]


def measure_goal(
    goal: Goal, operands: Operands, repeats: int, *, threads: int = 1
) -> dict[str, Any]:
    """Return one row: speed, ratio, verdict and the time of the first call."""
    reference = exact_product(operands)

    def run() -> np.ndarray:
        return emulate_gemm_srs(operands.a, operands.weight, goal.mac, _SHIFT, threads=threads)

    with _forced_path(goal.path) as path:
        started = time.perf_counter()
        run()
        first = time.perf_counter() - started
        route = emulate_gemm_report(
            operands.a[:12], operands.weight, goal.mac, statistics=False
        ).route
        calls = [run] if reference is None else [run, reference]
        mine, *theirs = timed_medians(calls, repeats, wall=threads > 1)
    row = _row(operands, goal.codes, str(goal.mac), path, f"emulate_gemm_srs ({route})", mine)
    row["compile_ms"] = max(0.0, 1e3 * (first - mine))
    if theirs:
        row["ratio"] = theirs[0] / mine
        row["must"], row["stretch"] = goal.must, goal.stretch
        row["verdict"] = _verdict(row["ratio"], goal)
    return row


def peer_row(
    operands: Operands, mac: MacArray, what: str, run: Callable, repeats: int, part: float
) -> dict[str, Any]:
    """Return the row of a peer that computes `part` of the GEMM in one call."""
    reference = exact_product(operands)
    run()
    mine, *theirs = timed_medians([run] if reference is None else [run, reference], repeats)
    row = _row(operands, "int8", str(mac), "", what, mine / part)
    if theirs:
        row["ratio"] = theirs[0] * part / mine
    return row


def exact_product(operands: Operands) -> Callable | None:
    """The exact int8 product of PyTorch, on one thread, or None where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)
    a, w = torch.from_numpy(operands.a), torch.from_numpy(np.ascontiguousarray(operands.w.T))
    return lambda: torch._int_mm(a, w)


def timed_medians(calls: list[Callable], repeats: int, *, wall: bool = False) -> list[float]:
    """Median seconds of each call; the calls take turns. `wall` counts all threads' time once."""
    clock = time.perf_counter if wall else time.thread_time
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, kept in zip(calls, seconds, strict=True):
            started = clock()
            call()
            kept.append(clock() - started)
    return [statistics.median(kept) for kept in seconds]


def _row(
    operands: Operands, codes: str, mac: str, path: str, what: str, seconds: float
) -> dict[str, Any]:
    m, k, n = operands.shape
    row = dict.fromkeys(BENCH_COLUMNS)
    return row | {
        "shape": f"{m}x{k}x{n}",
        "codes": codes,
        "mac": mac,
        "path": path,
        "what": what,
        "gmacs": 1e-9 * m * k * n / seconds,
        "ms": 1e3 * seconds,
    }


def _verdict(ratio: float, goal: Goal) -> str:
    if ratio < goal.must:
        return "missed"
    return "stretch" if goal.stretch is not None and ratio >= goal.stretch else "must"


@contextmanager
def _forced_path(path: str | None) -> Iterator[str]:
    before = os.environ.get(PATH_VARIABLE)
    if path is not None:
        os.environ[PATH_VARIABLE] = path
    try:
        yield choose_path()
    finally:
        if before is None:
            os.environ.pop(PATH_VARIABLE, None)
        else:
            os.environ[PATH_VARIABLE] = before
