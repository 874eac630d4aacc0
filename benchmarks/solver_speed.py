"""Time of the solver on a 4608 x 1152 weight, in full SVDs of the same weight on the same core.

    python benchmarks/solver_speed.py            # prints a table, writes benchmarks/solver_speed.md

CPU time of one thread (`time.thread_time`), the least of a few runs; the torch SVD and the torch
scale search that it is compared with run on one thread, in the same process, the SVD in turn with
what is given in SVDs: what else runs on a machine slows either.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import platform
import time
import tracemalloc
from pathlib import Path

import numpy as np
import torch

import loraq_sim as lq
from loraq_sim.solvers import solve_many
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.main_grid import MainGrid

SHAPE = (4608, 1152)
BUDGET = "fp16@32"
FORMATS = ("int8/g64", "int6/g64", "fp16", "int8/g32")


def seconds(function, repeats=3):
    """Least CPU time of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        function()
        times.append(time.thread_time() - started)
    return min(times)


def in_turn(functions, repeats=4):
    """Least CPU time of each of `functions`, which run one after the other, again and again."""
    rounds = [[seconds(function, 1) for function in functions] for _ in range(repeats)]
    return [min(times) for times in zip(*rounds, strict=True)]


def heavy_tailed(shape, seed=0):
    """A weight with tails, column scales and a decaying spectrum, float32."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal((shape[0], 115)) * np.arange(1, 116) ** -0.4
    low_rank = u @ rng.standard_normal((115, shape[1]))
    weight = rng.standard_t(8, shape) * np.exp(0.15 * rng.standard_normal(shape[1]))
    return (0.02 * (weight + 0.15 * low_rank)).astype(np.float32)


def torch_mse_search(weight, group=64, ratios=17):
    """The same search of clipping ratios, vectorized over the whole tensor."""
    grouped = weight.reshape(weight.shape[0], -1, group)
    step = grouped.abs().amax(dim=2, keepdim=True) / 7
    best = torch.full_like(step, torch.inf)
    scales = step.clone()
    for ratio in torch.linspace(1.0, 0.6, ratios):
        scale = (step * ratio).half().float()
        q = torch.clamp(torch.round(grouped / scale), -8, 7)
        error = (q * scale - grouped).square().sum(dim=2, keepdim=True)
        scales = torch.where(error < best, scale, scales)
        best = torch.minimum(error, best)
    return torch.clamp(torch.round(grouped / scales), -8, 7).to(torch.int8), scales


def main():
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    weight = heavy_tailed(SHAPE)
    as_tensor = torch.from_numpy(weight)
    rows = []

    def add(label, spent, target):
        rows.append((label, spent, f"{spent / full:.2f}", target))
        print(f"{label}: {spent:.3f} s = {spent / full:.2f} full SVDs   {target}", flush=True)

    def solve(preset, branch="int8/g64"):
        return lq.solve(
            weight, "loraq", main="int4/g64", branch=branch, budget=BUDGET, preset=preset
        )

    warm = weight[:128, :128].copy()
    for branch in FORMATS:
        lq.solve(warm, "loraq", main="int4/g64", branch=branch, rank=8, preset="fast")
    full, fast, one = in_turn(
        [
            lambda: torch.linalg.svd(as_tensor, full_matrices=False),
            lambda: solve("fast"),
            lambda: solve("balanced"),
        ]
    )
    add("full torch.linalg.svd", full, "")
    add("truncated SVD, rank 62", seconds(lambda: rank_62(weight)), "at most 0.125")
    add("loraq fast", fast, "at most 4, moonshot 1.5")
    add("loraq balanced", one, "at most 2.8")
    specs = [{"main": "int4/g64", "branch": fmt, "rank": 62} for fmt in FORMATS]
    add("4 branch formats of rank 62", seconds(lambda: solve_many(weight, specs), 1), "")
    shared = rows[-1][1] / one
    lq.quantize(weight, "int4/g64", rule="mse")
    grid, nothing = MainGrid(lq.parse_format("int4/g64"), SHAPE), np.zeros_like(weight)
    follow(grid, weight, nothing)
    ours = seconds(lambda: lq.quantize(weight, "int4/g64", rule="mse"))
    theirs = seconds(lambda: torch_mse_search(as_tensor))
    add("mse scale search, int4/g64", ours, "")
    add("the same in torch", theirs, "")
    warm_search = seconds(lambda: follow(grid, weight, nothing.fill(0) or nothing))
    add("warm-started pass of a descent", warm_search, "")
    tracemalloc.start()
    solve("fast")
    copies = tracemalloc.get_traced_memory()[1] / weight.nbytes
    tracemalloc.stop()
    lines = [
        "# Time of the solver",
        "",
        f"`python benchmarks/solver_speed.py` on {platform.processor() or platform.machine()}, one "
        f"core, weight {SHAPE[0]} x {SHAPE[1]}, int4/g64 main, int8/g64 branch at the bytes of "
        f"{BUDGET}.",
        "",
        "| what | seconds | full SVDs | target |",
        "|---|---|---|---|",
        *(
            f"| {label} | {spent:.3f} | {ratio} | {target} |"
            for label, spent, ratio, target in rows
        ),
        "",
        f"- Scale search: {theirs / ours:.1f} times as fast as torch; warm-started, as in a "
        f"descent, {theirs / warm_search:.1f} times (target 5).",
        f"- Four branch formats of one rank cost {shared:.2f} times one (target 2.5).",
        f"- Peak memory beyond the weight: {copies:.1f} copies of it (target 6).",
    ]
    (Path(__file__).parent / "solver_speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-3:]))


def follow(grid, weight, product):
    """One pass of the scale search as a descent runs it: last scale, a neighbor, the error."""
    grid.leave(weight, product, 1)


def rank_62(weight):
    """What a solve starts from."""
    return truncated_svd(weight, 62, rng=np.random.default_rng(0), power_iterations=1)


if __name__ == "__main__":
    main()
