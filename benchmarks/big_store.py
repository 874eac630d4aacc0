"""Large stores: time, memory and size of what the commands make of 100,000 rows.

    python benchmarks/big_store.py             # writes benchmarks/big_store.md
    python benchmarks/big_store.py --rows 5000 --keep runs/big

The rows are those of a sweep of a transformer: layers of 28 blocks in 60 splits on 5 accelerators,
with two accumulator widths; errors follow bits and rank with a spread of their own, costs come from
closed formulas. Every command runs in a process of its own; CPU time and peak memory are the
system's account of it (`os.wait4`), so a busy machine changes the CPU time little.
"""

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

# Before NumPy loads: a command may use one thread only, so that CPU time is its own.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import numpy as np

import loraq_sim as lq
from loraq_sim.results.store import ResultStore

ROOT = Path(__file__).parent.parent
BLOCKS = 28
SHAPES = {
    "attn1.to_q": (1152, 1152), "attn1.to_k": (1152, 1152), "attn1.to_v": (1152, 1152),
    "attn1.to_out.0": (1152, 1152), "attn2.to_q": (1152, 1152), "attn2.to_k": (1152, 1152),
    "attn2.to_v": (1152, 1152), "attn2.to_out.0": (1152, 1152),
    "ff.net.0.proj": (4608, 1152), "ff.net.2": (1152, 4608),
}  # fmt: skip
MAINS = {"W4A4": (4, 4), "W4A8": (4, 8), "W4A16": (4, 16)}
BRANCHES = ("W8A8", "W16A16")
RANKS = (8, 16, 24, 32, 48, 64, 80, 96, 128)
PLAIN = ("W4A4", "W4A8", "W4A16", "W8A8", "W8A16", "W16A16")
# Operations and bytes a second.
MACHINES = {"aie2": (5e12, 5e10), "aie2p": (2e13, 1.2e11), "a100": (6e14, 1.5e12),
            "h100": (1.9e15, 3.3e12), "rtx4090": (6e14, 1e12)}  # fmt: skip
M = 4096


def splits():
    """(split, bits of weights, of activations, rank, bits of the branch), 60 of them."""
    for name in PLAIN:
        weight, activation = (int(part) for part in name[1:].split("A"))
        yield name, weight, activation, 0, 0
    for main, (weight, activation) in MAINS.items():
        for branch in BRANCHES:
            for rank in RANKS:
                yield (
                    f"{main}+{branch}r{rank}",
                    weight,
                    activation,
                    rank,
                    int(branch[1:].split("A")[0]),
                )


def rows(count: int):
    """Rows of one sweep, in the order of its plan."""
    rng = np.random.default_rng(0)
    made = 0
    for acc_bits in (24, 32):
        for block in range(BLOCKS):
            for kind, (n, k) in SHAPES.items():
                hard = float(rng.lognormal(0.0, 0.4))
                for split, weight, activation, rank, branch in splits():
                    noise = float(rng.lognormal(0.0, 0.05))
                    kept = (1 - 0.4 * (rank / 160) ** 0.5) * noise
                    weight_error = hard * 2.0 ** (1 - weight) * kept
                    error = float(np.hypot(weight_error, hard * 0.8 * 2.0 ** (1 - activation)))
                    nbytes = n * k * weight // 8 + n * k // 32 + (n + k) * rank * branch // 8
                    for machine, (speed, bandwidth) in MACHINES.items():
                        if made == count:
                            return
                        made += 1
                        macs = M * n * k + M * rank * (n + k)
                        latency = max(macs * weight * activation / 16 / speed, nbytes / bandwidth)
                        yield {
                            "layer": f"transformer_blocks.{block}.{kind}",
                            "kind": kind.replace(".", "_"),
                            "group": f"transformer_blocks.{block}.{kind.partition('.to_')[0]}",
                            **{"m": M, "n": n, "k": k, "tokens": 256, "calls_per_step": 1},
                            **{"split": split, "method": "loraq" if rank else "rtn"},
                            **{"preset": "balanced", "accelerator": machine, "rank": rank},
                            **{"weight_bytes": nbytes, "bits_per_weight": 8 * nbytes / (n * k)},
                            **{"weight_error": weight_error, "output_error": error},
                            "sqnr_db": -20 * float(np.log10(error)),
                            **{"cosine": 1 - error**2 / 2, "max_abs_error": 8 * error},
                            **{"output_rms": 1.25, "overflow_count": 0, "safe_acc_bits": 21},
                            **{"guaranteed_acc_bits": 23, "arithmetic": "bit exact"},
                            **{"latency_s": latency, "cycles": int(latency * 1e9)},
                            **{"energy_j": macs * 2e-13, "dram_bytes": nbytes + M * (n + k)},
                            **{"utilization": 0.7, "bound": "compute", "status": "ok"},
                            **{"message": "", "seconds": 0.1, "seed": 0, "dump": "pixart.pt"},
                            **{"family": "int", "group_size": 64, "acc_bits": acc_bits},
                            **{"overflow": "saturate", "products_per_add": 8, "accumulators": 1},
                        }


def write_store(path: Path, count: int) -> int:
    """Make a store of `count` rows at `path`; return how many it has."""
    found = {f"{number:016x}": row for number, row in enumerate(rows(count))}
    with ResultStore.open(path, create=True) as store:
        facts = {"started": "2026-01-01T00:00:00+00:00", "plan": {"dump": "pixart.pt"}}
        store.begin_run(facts, list(found))
        store.add_all(found)
    return len(found)


def measured(*words: str) -> dict[str, float]:
    """CPU seconds and peak MiB of one command."""
    command = [sys.executable, "-c", "from loraq_sim.__main__ import main; main()", *words]
    process = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"loraq-sim {' '.join(words)} failed")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / unit}


def main() -> None:
    """Make the store, run the commands, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--keep", type=Path, help="folder for the store and what is made of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.keep or Path(made)
        store = folder / "results.sqlite"
        if not store.exists():
            write_store(store, options.rows)
        text = table(folder, store, options.rows)
    print(text)
    if options.rows == 100_000:
        (ROOT / "benchmarks" / "big_store.md").write_text(text)


def table(folder: Path, store: Path, count: int) -> str:
    """The measured table as Markdown."""
    page = folder / "report.html"
    commands = {
        "report": ("report", str(store), "--out", str(page), "--force"),
        "export": ("export", str(store), "--csv", str(folder / "rows.csv"), "--force"),
        "merge": ("merge", str(folder / "merged"), str(store), "--force"),
        "pareto": ("pareto", str(store)),
    }
    results = {name: (*words,) for name, words in commands.items()}
    sizes = {"report": page, "export": folder / "rows.csv"}
    sizes["merge"] = folder / "merged" / "results.sqlite"
    lines = [
        "# Commands on a large store",
        "",
        f"`python benchmarks/big_store.py`: {count:,} rows, a store of "
        f"{store.stat().st_size / 2**20:.0f} MiB. CPU seconds and peak memory of each command, one "
        f"thread. {platform.machine()}, Python {platform.python_version()}, "
        f"loraq-sim {lq.__version__}.",
        "",
        "| command | CPU (s) | peak memory (MiB) | makes (MiB) |",
        "|---|---:|---:|---:|",
    ]
    for name, words in results.items():
        found = measured(*words)
        size = f"{sizes[name].stat().st_size / 2**20:.1f}" if name in sizes else "-"
        lines.append(f"| {name} | {found['cpu_s']:.1f} | {found['peak_mib']:.0f} | {size} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
