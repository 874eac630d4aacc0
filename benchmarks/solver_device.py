"""The solver on the CPU and on another device, side by side: weight errors and wall time.

    python benchmarks/solver_device.py                   # cuda
    python benchmarks/solver_device.py --device cuda:1 --preset balanced
    python benchmarks/solver_device.py --small           # bundled layers only

Rounding decisions multiply differences: of two runs whose sums differ in the last bit, codes differ
after some steps. So each row also shows by how much the CPU's own error moves when the weight is
changed by 1e-7 of itself (``cpu_spread``, the largest of a few draws): a device agrees to rounding
where ``difference`` is of that size.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import loraq_sim as lq

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LAYERS = {
    "minilm": ("encoder.layer.2.attention.self.query", "encoder.layer.2.intermediate.dense"),
    "tiny_pixart": ("transformer_blocks.3.ff.net.2",),
}
SYNTHETIC = ((1152, 1152), (4608, 1152))
FORMATS = (
    ("int4/g64", "int8/g32"),
    ("int4/g64", "int4/g16"),
    ("mxint4", "mxint8"),
    ("mxfp4", "int8/g32"),
    ("nvfp4", "int8/g32"),
)
N_DRAWS = 2


def heavy_tailed(shape, seed=0):
    """A weight with tails and column scales, float32."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(8, shape) * np.exp(0.15 * rng.standard_normal(shape[1]))
    return (0.02 * weight).astype(np.float32)


def weights(is_small):
    """Name and weight of each layer to solve."""
    for dump, names in LAYERS.items():
        layers = torch.load(EXAMPLES / f"{dump}.pt", weights_only=True)["layers"]
        for name in names:
            if name in layers:
                yield f"{dump} {name}", layers[name]["weight"].float().numpy()
    if not is_small:
        for shape in SYNTHETIC:
            yield "synthetic", heavy_tailed(shape)


def solved(weight, device, **options):
    """Weight error and seconds of one solve."""
    started = time.perf_counter()
    error = lq.solve(weight, budget="fp16@16", device=device, **options).weight_error
    return error, time.perf_counter() - started


def nudged(weight, seed):
    """`weight` changed by about its own rounding."""
    noise = np.random.default_rng(seed).standard_normal(weight.shape, dtype=np.float32)
    return weight * (1 + np.float32(1e-7) * noise)


def compared(name, weight, device, options):
    """One row of the table."""
    expected, cpu_seconds = solved(weight, "cpu", **options)
    # The first call of a device also starts it.
    solved(weight[:64, :64], device, **options)
    found, seconds = solved(weight, device, **options)
    draws = [solved(nudged(weight, seed), "cpu", **options)[0] for seed in range(N_DRAWS)]
    return {
        "layer": name,
        "shape": "x".join(map(str, weight.shape)),
        "main": options["main"],
        "branch": options["branch"],
        "cpu": expected,
        "device": found,
        "difference": found / expected - 1,
        "cpu_spread": max(abs(draw / expected - 1) for draw in draws),
        "cpu_s": cpu_seconds,
        "device_s": seconds,
    }


def line(row):
    """One row of a Markdown table."""
    cells = [row["layer"], row["shape"], row["main"], row["branch"]]
    cells += [f"{row[name]:.5f}" for name in ("cpu", "device")]
    cells += [f"{row['difference']:+.3%}", f"{row['cpu_spread']:.3%}"]
    cells += [f"{row[name]:.2f}" for name in ("cpu_s", "device_s")]
    return "| " + " | ".join(cells) + " |"


def main():
    """Print the table and its summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--small", action="store_true", help="bundled layers only")
    arguments = parser.parse_args()
    device = arguments.device
    try:
        solved(heavy_tailed((64, 64)), device, preset="fast")
    except lq.InputError as error:
        sys.exit(str(error))
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{name} against {platform.processor() or platform.machine()}, {arguments.preset}\n")
    columns = ("layer", "shape", "main", "branch", "cpu", device, "difference", "cpu_spread")
    print("| " + " | ".join((*columns, "cpu s", "device s")) + " |")
    print("|" + "---|" * (len(columns) + 2))
    rows = []
    for layer, weight in weights(arguments.small):
        for main_format, branch in FORMATS:
            options = {"main": main_format, "branch": branch, "preset": arguments.preset}
            rows.append(compared(layer, weight, device, options))
            print(line(rows[-1]), flush=True)
    worst = max(abs(row["difference"]) for row in rows)
    spread = max(row["cpu_spread"] for row in rows)
    gain = statistics.median(row["cpu_s"] / row["device_s"] for row in rows)
    print(f"\nLargest difference {worst:.3%}, CPU against itself {spread:.3%}; {gain:.2f}x as fast")


if __name__ == "__main__":
    main()
