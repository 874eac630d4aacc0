"""Time of one sweep case, and where it goes: solve, emulate, reference, cost, the rest.

    python benchmarks/sweep_time.py            # prints a table, writes benchmarks/sweep_time.md

CPU time of one thread-pinned process (`time.process_time`), so a busy machine changes it little;
the first case of each stage runs once beforehand to compile kernels.
"""

import os

# Before NumPy loads: a sweep's worker uses one BLAS and one Numba thread as well.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[name] = "1"

import platform
import statistics
import time
from pathlib import Path

import hwmodels
import loraq_sim as lq
from loraq_sim.emulator.walk import run_layer
from loraq_sim.evaluate import reference_output, sample_rows, solve_split
from loraq_sim.machine import cost_split, datapath_for
from loraq_sim.split import parse_split

ROOT = Path(__file__).parent.parent
SPLITS = ("W4A4", "W8A8", "W4A4+W16A16r16", "W4A4+W8A8@fp16r16", "W4A8+W4A8@fp16r16")
CASES = {"tiny_pixart": "transformer_blocks.0.*", "minilm": "encoder.layer.2.*"}
PRESETS = ("fast", "balanced")
TOKENS = 256


def timed(function, *args, **options):
    """(result, CPU milliseconds)."""
    started = time.process_time()
    result = function(*args, **options)
    return result, 1e3 * (time.process_time() - started)


def measure(layer, split, accelerator, preset):
    """CPU milliseconds of each stage of one case."""
    x = sample_rows(layer.activations, TOKENS)
    path = datapath_for(accelerator)
    stages = {}
    solution, stages["solve"] = timed(
        solve_split, layer, split, method="loraq", preset=preset, seed=0
    )
    _, stages["emulate"] = timed(run_layer, x, solution, split, path, layer.bias)
    _, stages["reference"] = timed(reference_output, layer, x)
    _, stages["cost"] = timed(cost_split, layer.m, layer.n, layer.k, split, accelerator)
    _, stages["whole case"] = timed(
        lq.evaluate_layer, layer, split, accelerator, preset=preset, tokens=TOKENS
    )
    return stages


def main():
    """Measure, print and write the table."""
    accelerator = hwmodels.load_accelerator("aie2")
    lines = [
        "# Time of one sweep case",
        "",
        f"`python benchmarks/sweep_time.py`: CPU milliseconds, median over layers and splits, "
        f"{TOKENS} tokens, one thread. {platform.machine()}, Python {platform.python_version()}, "
        f"loraq-sim {lq.__version__}.",
        "",
        "| dump | preset | cases | solve | emulate | reference | cost | whole case |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for dump_name, pattern in CASES.items():
        dump = lq.read_layer_dump(ROOT / "examples" / f"{dump_name}.pt").select(pattern)
        layers = [dump[name] for name in dump]
        splits = [parse_split(text) for text in SPLITS]
        for split in splits:
            measure(layers[0], split, accelerator, "fast")
        for preset in PRESETS:
            found = [measure(la, sp, accelerator, preset) for la in layers for sp in splits]
            medians = [statistics.median(stages[name] for stages in found) for name in found[0]]
            cells = [dump_name, preset, str(len(found)), *(f"{ms:.1f}" for ms in medians)]
            lines.append(f"| {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (ROOT / "benchmarks" / "sweep_time.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
