"""How a sweep grows with layers and workers, and what of it is not arithmetic.

    python benchmarks/sweep_scaling.py                                    # about two hours
    python benchmarks/sweep_scaling.py --layers-counts 8,16 --splits 2    # a few minutes

PixArt-Sigma layers of true shapes (`dump synth`), 12 splits, preset fast, 256 tokens, aie2. Every
sweep starts from nothing: new store, new caches, new workers. A full run writes
benchmarks/sweep_scaling.md; with `--out` any run writes its table there.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORK = ROOT / "runs" / "sweep_scaling"
NOTE = ROOT / "benchmarks" / "sweep_scaling.md"
COUNTS = (35, 70, 140, 280)
WORKERS_COUNT = 70
TOKENS = 256
SPLITS = (
    *("W4A4", "W4A8", "W4A4+W16A16r32", "W4A4+W8A8@fp16r32", "W4A4+W6A6@fp16r32"),
    *("W4A4+W4A8@fp16r32", "W4A4+W4A4@fp16r32", "W4A4+W8A8@fp16r64", "W4A8+W16A16r32"),
    *("W4A8+W8A8@fp16r32", "W4A8+W6A6@fp16r32", "W4A8+W4A8@fp16r32"),
)
STAGES = ("solve", "emulate", "reference", "compare", "cost")


def main() -> None:
    """Run the sweeps one after the other; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers-counts", default=",".join(map(str, COUNTS)))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--workers-count", type=int, default=None, help="layers of the 1-job sweep")
    parser.add_argument("--splits", type=int, default=len(SPLITS), help="the first N splits only")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--profile", action="store_true", help="one sweep under cProfile, 0 jobs")
    options = parser.parse_args()
    counts = [int(count) for count in options.layers_counts.split(",")]
    dump = make_dump()
    if options.profile:
        return profile(dump, counts[0], SPLITS[: options.splits])
    lone = options.workers_count or (WORKERS_COUNT if WORKERS_COUNT in counts else counts[-1])
    # Kernels compile once, into Numba's own cache, before anything is timed.
    sweep(dump, 2, SPLITS[: options.splits], jobs=1)
    results = [sweep(dump, n, SPLITS[: options.splits], jobs=options.jobs) for n in counts]
    results.append(sweep(dump, lone, SPLITS[: options.splits], jobs=1))
    text = table(results, options)
    print(text)
    is_full = tuple(counts) == COUNTS and options.splits == len(SPLITS)
    target = options.out or (NOTE if is_full else None)
    if target:
        target.write_text(text)
    return None


def make_dump() -> Path:
    """The synthetic dump, made once."""
    dump = WORK / "pixart.safetensors"
    if not dump.exists():
        WORK.mkdir(parents=True, exist_ok=True)
        program = str(Path(sys.executable).with_name("loraq-sim"))
        command = [program, "dump", "synth", "--all"]
        command += ["--model", "pixart-sigma", "--layers", "transformer_blocks.*"]
        subprocess.run([*command, "--tokens", str(TOKENS), "--out", str(dump)], check=True)
    return dump


def plan_for(dump: Path, n_layers: int, splits: tuple[str, ...]):
    """The plan of a sweep over the first `n_layers`: whole blocks of ten, and a part of one."""
    import loraq_sim as lq
    from loraq_sim.sweeps import SweepPlan

    names = list(lq.read_layer_dump(dump))[:n_layers]
    return SweepPlan(
        dump=str(dump), accelerators=("aie2",), layers=tuple(names), splits=splits, preset="fast",
        tokens=TOKENS,
    )  # fmt: skip


def sweep(dump: Path, n_layers: int, splits: tuple[str, ...], *, jobs: int) -> dict:
    """Facts of one sweep from nothing."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        command = [sys.executable, __file__, "_one", folder, str(dump), str(n_layers)]
        environment = os.environ | {
            "LORAQ_SIM_CACHE": f"{folder}/cache", "SWEEP_SCALING_TIMES": folder,
            "PYTHONPATH": str(Path(__file__).parent),
        }  # fmt: skip
        started = time.perf_counter()
        subprocess.run([*command, str(jobs), *splits], check=True, env=environment)
        wall = time.perf_counter() - started
        return _facts(Path(folder), n_layers, jobs, wall)


def run_one(folder: str, dump: str, n_layers: str, jobs: str, *splits: str) -> None:
    """One sweep, in a process of its own."""
    from loraq_sim.results.store import ResultStore
    from loraq_sim.sweeps import compose, run_sweep

    composed = compose(plan_for(Path(dump), int(n_layers), splits))
    with ResultStore.open(Path(folder) / "results.sqlite", create=True) as store:
        outcome = run_sweep(composed, store, jobs=int(jobs), evaluate="sweep_scaling_case:evaluate")
    if outcome.n_failed:
        raise SystemExit(f"{outcome.n_failed} cases failed: {outcome.first_failure}")


def _facts(folder: Path, n_layers: int, jobs: int, wall: float) -> dict:
    times = [
        json.loads(line)
        for path in folder.glob("times-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    stages = {stage: sum(case[stage] for case in times) for stage in STAGES}
    layers = {case["layer"]: case["work"] for case in times}
    return {
        "layers": n_layers, "jobs": jobs, "wall": wall, "cases": len(times),
        "stages": stages, "case": sum(case["case"] for case in times),
        "work": sum(layers.values()), "peak_mib": max(case["peak_mib"] for case in times),
        "store_bytes": sum(path.stat().st_size for path in folder.glob("results.sqlite*")),
    }  # fmt: skip


def table(results: list[dict], options: argparse.Namespace) -> str:
    """The note: one row a sweep, then where the workers' time went."""
    *grown, lone = results
    first = grown[0]
    lines = [
        "# How a sweep grows",
        "",
        f"`python benchmarks/sweep_scaling.py --layers-counts {options.layers_counts} --splits "
        f"{options.splits}`: PixArt-Sigma (synthetic values, true shapes), {options.splits} "
        f"splits, preset fast, {TOKENS} tokens, aie2. {platform.machine()}, {os.cpu_count()} CPUs, "
        f"Python {platform.python_version()}.",
        "",
        "| layers | jobs | cases | wall s | cases/s | s per layer | relative | per weight, "
        "relative | peak MiB per worker | store MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        per_layer, per_weight = r["wall"] / r["layers"], r["wall"] / r["work"]
        relative = [per_layer / (first["wall"] / first["layers"])]
        relative += [per_weight / (first["wall"] / first["work"])]
        shown = [f"{value:.2f}" if r["jobs"] == first["jobs"] else "" for value in relative]
        cells = [
            str(r["layers"]), str(r["jobs"]), str(r["cases"]), f"{r['wall']:.1f}",
            f"{r['cases'] / r['wall']:.2f}", f"{per_layer:.2f}", *shown,
            f"{r['peak_mib']:.0f}", f"{r['store_bytes'] / 1e6:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for r in grown:
        if r["layers"] == lone["layers"]:
            speedup = lone["wall"] / r["wall"]
            lines += ["", f"{r['jobs']} workers against 1 on {r['layers']} layers: {speedup:.2f}x."]
    lines += [
        "",
        "Share of the workers' time (wall x jobs). `in case` is what evaluating a case takes "
        "beyond its stages; `outside` is start, loading, digests, the store and waiting.",
        "",
        f"| layers | jobs | {' | '.join(STAGES)} | in case | outside |",
        f"|---:|---:|{'---:|' * len(STAGES)}---:|---:|",
    ]
    for r in results:
        total = r["wall"] * r["jobs"]
        shares = [r["stages"][stage] / total for stage in STAGES]
        shares += [(r["case"] - sum(r["stages"].values())) / total, 1 - r["case"] / total]
        cells = [str(r["layers"]), str(r["jobs"]), *(f"{100 * share:.1f} %" for share in shares)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def profile(dump: Path, n_layers: int, splits: tuple[str, ...]) -> None:
    """Print the functions that a sweep in one process spends its time in."""
    import cProfile
    import pstats

    from loraq_sim.results.store import ResultStore
    from loraq_sim.sweeps import compose, run_sweep

    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        os.environ["LORAQ_SIM_CACHE"] = f"{folder}/cache"
        profiler = cProfile.Profile()
        with ResultStore.open(Path(folder) / "results.sqlite", create=True) as store:
            run_sweep(compose(plan_for(dump, 1, splits)), store, jobs=0)
            profiler.enable()
            run_sweep(compose(plan_for(dump, n_layers, splits)), store, jobs=0)
            profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
        pstats.Stats(profiler).sort_stats("cumtime").print_stats("loraq_sim|hwmodels", 60)


if __name__ == "__main__":
    if sys.argv[1:2] == ["_one"]:
        run_one(*sys.argv[2:])
    else:
        main()
