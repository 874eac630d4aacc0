"""Time the emulated GEMM, with SRS to int8, as a ratio to the exact `torch._int_mm`.

    python benchmarks/emulator_speed.py            # minutes; prints the table
    python benchmarks/emulator_speed.py --shape 4096x1152x4608 --no-peers --format json
    python benchmarks/emulator_speed.py --out benchmarks/emulator_speed.md

`torch._int_mm` multiplies int8 exactly at nearly the processor's peak, so the ratio says what the
overflow rule costs, whatever the processor. One process, thread time, calls that take turns,
medians. A ratio counts everything a call does but packing W: checks, packing A, the kernel, and the
shift-round-saturate step to int8.

Two threads against one are timed by the clock, which also counts what other programs take: a busy
machine has no second core to give. So each counts by the best of a few rounds, and `torch._int_mm`
says in the same minute what two threads can gain here. Shift-round-saturate on its own is timed for
every rounding mode, and `emulator_peers.py` brings what one would run instead.
"""

import os

# Before NumPy loads: peers use one thread, as the emulator does.
if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from emulator_peers import peers as installed_peers
from llvmlite import binding

from loraq_sim.cli.options import NoProgress, OutFormat, OutputFormat, Quiet, listed_shapes
from loraq_sim.cli.output import note, one_line_failures, print_table, tracked
from loraq_sim.emulator.gemm import emulate_gemm_report, emulate_gemm_srs
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import PackedWeight, pack_weight
from loraq_sim.emulator.requantize import srs
from loraq_sim.errors import InputError
from loraq_sim.files import write_file
from loraq_sim.formats import Rounding
from loraq_sim.kernels.processor import PATH_VARIABLE, PATHS, choose_path
from loraq_sim.reporting.tables import result_table

SHAPES = ("256x1152x1152", "1024x4608x1152")
THREAD_SHAPES = (*SHAPES, "4096x1152x4608")
COLUMNS = (
    *("shape", "codes", "mac", "path", "what", "gmacs", "ratio"),
    *("must", "stretch", "verdict", "ms", "compile_ms"),
)
CODES = {"int8": (-128, 127), "int6": (-32, 31), "int4": (-8, 7)}
SHIFT = 10

# Two threads: the arrays they are timed on, the rounds of which the best counts, and the goal.
THREAD_ARRAYS = (
    MacArray(acc_bits=20),
    MacArray(acc_bits=16, overflow="saturate"),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=2),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=4),
    MacArray(acc_bits=18, overflow="saturate", products_per_add=32),
)
THREAD_ROUNDS = 3
THREAD_MUST = 1.8

# SRS on its own: accumulators of a tile that is still in the second cache, and the goal in 10^9
# elements per second.
SRS_ELEMENTS = 2**17
SRS_CALLS = 8
SRS_MUST = 2.5


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
        (m, n, k), (low, high) = shape, CODES[codes]
        rng = np.random.default_rng(0)
        a = rng.integers(low, high + 1, (m, k)).astype(np.int8)
        w = rng.integers(low, high + 1, (n, k)).astype(np.int8)
        return cls(a=a, w=w, weight=pack_weight(w))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(M, N, K)."""
        return (self.a.shape[0], *self.w.shape)


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
        return emulate_gemm_srs(operands.a, operands.weight, goal.mac, SHIFT, threads=threads)

    with forced_path(goal.path) as path:
        started = time.perf_counter()
        run()
        first = time.perf_counter() - started
        route = emulate_gemm_report(
            operands.a[:12], operands.weight, goal.mac, statistics=False
        ).route
        calls = [run] if reference is None else [run, reference]
        mine, *theirs = timed_medians(calls, repeats, wall=threads > 1)
    row = gemm_row(operands, goal.codes, str(goal.mac), path, f"emulate_gemm_srs ({route})", mine)
    row["compile_ms"] = max(0.0, 1e3 * (first - mine))
    if theirs:
        row["ratio"] = theirs[0] / mine
        row["must"], row["stretch"] = goal.must, goal.stretch
        row["verdict"] = goal_verdict(row["ratio"], goal)
    return row


def peer_row(
    operands: Operands, mac: MacArray, what: str, run: Callable, repeats: int, part: float
) -> dict[str, Any]:
    """Return the row of a peer that computes `part` of the GEMM in one call."""
    reference = exact_product(operands)
    run()
    mine, *theirs = timed_medians([run] if reference is None else [run, reference], repeats)
    row = gemm_row(operands, "int8", str(mac), "", what, mine / part)
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


def gemm_row(
    operands: Operands, codes: str, mac: str | None, path: str | None, what: str, seconds: float
) -> dict[str, Any]:
    m, n, k = operands.shape
    return dict.fromkeys(COLUMNS) | {
        "shape": f"{m}x{k}x{n}",
        "codes": codes,
        "mac": mac,
        "path": path,
        "what": what,
        "gmacs": 1e-9 * m * k * n / seconds,
        "ms": 1e3 * seconds,
    }


def goal_verdict(ratio: float, goal: Goal) -> str:
    if ratio < goal.must:
        return "missed"
    return "stretch" if goal.stretch is not None and ratio >= goal.stretch else "must"


@contextmanager
def forced_path(path: str | None) -> Iterator[str]:
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


def thread_rows(operands: Operands, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each array: `ratio` is one thread's time over two threads'."""
    if (os.cpu_count() or 1) < 2:
        return
    a, weight = operands.a, operands.weight
    for mac in THREAD_ARRAYS:

        def run(threads: int, mac: MacArray = mac) -> Callable:
            return lambda: emulate_gemm_srs(a, weight, mac, SHIFT, threads=threads)

        ratio, seconds = best_ratio(run(1), run(2), repeats)
        verdict = "missed" if ratio < THREAD_MUST else "must"
        what = "emulate_gemm_srs, 2 threads / 1"
        timed = gemm_row(operands, "int8", str(mac), choose_path(), what, seconds)
        yield timed | {"ratio": ratio, "must": THREAD_MUST, "verdict": verdict}
    if (products := exact_products(operands)) is not None:
        ratio, seconds = best_ratio(*products, repeats)
        timed = gemm_row(operands, "int8", None, None, "torch._int_mm, 2 threads / 1", seconds)
        yield timed | {"ratio": ratio}


def best_ratio(one: Callable, two: Callable, repeats: int) -> tuple[float, float]:
    """(one thread's time over two threads', two threads' seconds), medians of their best rounds."""
    each = max(1, repeats // THREAD_ROUNDS)
    rounds = [timed_medians([one, two], each, wall=True) for _ in range(THREAD_ROUNDS)]
    # Each by its own best round: one round's disturbed single thread would flatter the ratio.
    single, double = (min(medians) for medians in zip(*rounds, strict=True))
    return single / double, double


def exact_products(operands: Operands) -> tuple[Callable, Callable] | None:
    try:
        import torch
    except ImportError:
        return None
    a, w = torch.from_numpy(operands.a), torch.from_numpy(operands.w).T.contiguous()

    def run(threads: int) -> None:
        torch.set_num_threads(threads)
        torch._int_mm(a, w)
        torch.set_num_threads(1)

    return lambda: run(1), lambda: run(2)


def srs_rows(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each rounding mode; `ratio` is 10**9 elements per second."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**18), 2**18, (256, SRS_ELEMENTS // 256)).astype(np.int32)

    def call(mode: str):
        def run() -> None:
            for _ in range(SRS_CALLS):
                srs(acc, SHIFT, rounding=mode)

        return run

    modes = [mode.value for mode in Rounding]
    seconds = timed_medians([call(mode) for mode in modes], repeats)
    rows = []
    for mode, taken in zip(modes, seconds, strict=True):
        rate = 1e-9 * SRS_CALLS * acc.size / taken
        verdict = "missed" if rate < SRS_MUST else "must"
        rows.append(
            dict.fromkeys(COLUMNS)
            | {
                "shape": "x".join(map(str, acc.shape)),
                "what": f"srs int32 to int8, {mode}: 10^9 elements/s",
                "ratio": rate,
                "must": SRS_MUST,
                "verdict": verdict,
                "ms": 1e3 * taken / SRS_CALLS,
            }
        )
    return rows


@one_line_failures
def emulator_speed(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="m=M,n=N,k=K|MxKxN",
            help="GEMM size: M rows, N output features, K input features; repeatable.",
            show_default=" ".join(SHAPES),
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed calls of each kernel; the median counts.")
    ] = 15,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=1, help="Threads of the emulator; more than one is timed by the clock."
        ),
    ] = 1,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time what one would run instead, too.")
    ] = True,
    sections: Annotated[
        bool,
        typer.Option(
            "--sections/--no-sections",
            help="Also time two threads against one, and shift-round-saturate on its own.",
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the table to this Markdown file."),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Time the emulated GEMM, with SRS to int8, as a ratio to the exact torch._int_mm."""
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    rows = []
    asked = goals()
    sizes = listed_shapes("--shape", shape or SHAPES).values()
    cases = [(size, goal) for size in sizes for goal in asked]
    drawn: dict = {}
    for size, goal in tracked(cases, "timing", quiet=quiet or no_progress):
        if (size, goal.codes) not in drawn:
            drawn[size, goal.codes] = Operands.draw(size, goal.codes)
        rows.append(measure_goal(goal, drawn[size, goal.codes], repeats, threads=threads))
    if sections:
        note("timing two threads, and shift-round-saturate", quiet=quiet)
        for size in listed_shapes("--shape", shape or THREAD_SHAPES).values():
            rows += thread_rows(Operands.draw(size, "int8"), repeats)
        rows += srs_rows(repeats)
    if peers:
        operands = drawn[cases[0][0], "int8"]
        mac = asked[2].mac
        for name, run, part in installed_peers(
            operands.a, operands.w, mac, lambda text: note(text, quiet=quiet)
        ):
            rows.append(peer_row(operands, mac, name, run, min(repeats, 5), part))
    title = f"Emulated GEMM against torch._int_mm, {threads} thread(s), {processor_name()}"
    table = result_table(rows, list(COLUMNS), title=title)
    print_table(table, output)
    if out is not None:
        write_file(out, f"**{title}**\n\n{table.to_markdown()}")
    missed = sum(row["verdict"] == "missed" for row in rows)
    n_goals = sum(row["verdict"] is not None for row in rows)
    note(f"{missed} of {n_goals} goals missed", quiet=quiet)


def processor_name() -> str:
    """Name of the processor as the system or LLVM gives it."""
    return f"{platform.machine()} {binding.get_host_cpu_name()}"


if __name__ == "__main__":
    typer.run(emulator_speed)
