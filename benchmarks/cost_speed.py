"""Time of one cost estimate on every shipped accelerator, and of 100,000 in a row.

    python benchmarks/cost_speed.py            # about a minute
    python benchmarks/cost_speed.py --points 1000

Writes benchmarks/cost_speed.md. Targets: below 1 ms a point warm, 100,000 points below 2 minutes
on one core, memory flat.
"""

import argparse
import platform
import resource
import time
from pathlib import Path

import hwmodels

MAINS = ("W4A4", "W4A8", "W8A8")
BRANCHES = ((None, 0), ("W8A8", 32), ("W16A16", 32), ("W4A8", 64))


def workload(index: int) -> hwmodels.GemmWorkload:
    """A different workload for every index: sizes, precisions and schedules of real layers."""
    branch, rank = BRANCHES[index // 3 % len(BRANCHES)]
    return hwmodels.GemmWorkload(
        m=256 + 16 * (index % 509),
        n=1152 * (1 + index % 4),
        k=1152 * (1 + index // 4 % 4),
        main=MAINS[index % 3],
        branch=branch,
        rank=rank,
        fused=index % 2 == 0,
    )


def milliseconds(hw: hwmodels.Accelerator, points: int) -> float:
    """Mean processor time of one estimate, after a first one: the better of two passes."""
    works = [workload(index) for index in range(points)]
    hwmodels.estimate_cost(works[0], hw)
    passes = []
    for _ in range(2):
        started = time.process_time()
        for work in works:
            hwmodels.estimate_cost(work, hw)
        passes.append(time.process_time() - started)
    return min(passes) / points * 1e3


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=100_000, help="estimates of the long run")
    points = parser.parse_args().points
    lines = [
        "# Time of cost estimates",
        "",
        "| accelerator | ms of processor time per point |",
        "|---|---|",
    ]
    for name in hwmodels.list_accelerators():
        mean = milliseconds(hwmodels.load_accelerator(name), min(points, 500))
        lines.append(f"| {name} | {mean:.3f} |")
        print(lines[-1])
    hw, before, started = hwmodels.load_accelerator("aie2"), peak_mib(), time.process_time()
    for index in range(points):
        hwmodels.estimate_cost(workload(index), hw)
    seconds = time.process_time() - started
    lines += [
        "",
        f"{points:,} points on aie2, one core: {seconds:.1f} s of processor time; peak memory grew "
        f"by {peak_mib() - before:.1f} MiB. Python {platform.python_version()}, "
        f"{platform.machine()}. A third of the points have an unfused branch: 3 kernels.",
    ]
    print(lines[-1])
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
