"""A sweep at real size: a randomly initialized checkpoint, from `--layer-dump DIR` to report.

    python benchmarks/checkpoint_sweep.py write pixart-sigma runs/pixart    # bf16 shards, 1.2 GB
    python benchmarks/checkpoint_sweep.py write flux.1-dev runs/flux --headers-only
    python benchmarks/checkpoint_sweep.py sweep runs/pixart      # opens, sweeps, reports
    python benchmarks/checkpoint_sweep.py headers runs/flux      # inventory, dry run, cost
    python benchmarks/checkpoint_sweep.py capture runs/full      # weights and inputs, model run

`write` makes the folder that diffusers saves: shards of at most 512 MB, an index, `config.json`.
Values are normal with a standard deviation of 1 / sqrt(K), for there is no download here; times and
memory do not depend on them. Headers alone are files of the right size whose values were never
written: what reads no values takes as long as for the real model.

`capture` makes a PixArt-Sigma of full depth (611 M parameters, 512 pixels) by diffusers, saves it
in bf16, and captures denoising steps of one image with guidance: every layer with 256 input rows.
It needs `loraq-sim[diffusion]`, 6 GiB of memory and some minutes of one core.

`sweep` prints wall and processor seconds of each command and the largest resident memory of one of
its processes, workers included.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from loraq_sim.dumps.kinds import load_inventory

SHARD_BYTES = 512 * 2**20
SPLITS = ("W4A4", "W8A8", "W4A4+W16A16r32", "W4A4+W8A8@fp16r32")
LAYERS = "transformer_blocks.*"
# What config.json says of the image, for rows per call; the rest of it is not read.
CONFIGS = {
    "pixart-sigma": {"patch_size": 2, "sample_size": 128},
    "flux.1-dev": {"patch_size": 1},
}
PREFIX = "diffusion_pytorch_model"


def stored_shapes(model):
    """Shape of every weight and bias of a model by name, as diffusers stores them."""
    shapes = {}
    for layer in load_inventory(model).layers:
        edge = int(layer.op[4]) if layer.op.startswith("conv") else 0
        depth = 1 if "depthwise" in layer.op else layer.k // max(edge, 1) ** 2
        window = (edge, edge) if edge else ()
        shapes[f"{layer.name}.weight"] = (layer.n, depth, *window)
        if layer.has_bias:
            shapes[f"{layer.name}.bias"] = (layer.n,)
    return shapes


def shards_of(shapes):
    """Names in file order, divided into shards."""
    shards, size = [[]], 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def values(name, shape, seed):
    """Normal values of standard deviation 1 / sqrt(K), bf16, with a stream for each tensor."""
    rng = np.random.default_rng([seed, *name.encode()])
    scale = np.float32(max(math.prod(shape[1:]), 1) ** -0.5)
    return (scale * rng.standard_normal(shape, dtype=np.float32)).astype(ml_dtypes.bfloat16)


def write_folder(model, folder, *, headers_only=False, seed=0):
    """Write the checkpoint of `model` into `folder`, which must not exist."""
    folder.mkdir(parents=True)
    shapes = stored_shapes(model)
    shards = shards_of(shapes)
    where = {}
    for number, names in enumerate(shards, 1):
        file = f"{PREFIX}-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= dict.fromkeys(names, file)
        header, end = {}, 0
        for name in names:
            start, end = end, end + 2 * math.prod(shapes[name])
            entry = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
            header[name] = entry
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in () if headers_only else names:
                out.write(values(name, shapes[name], seed).tobytes())
            out.truncate(8 + len(text) + end)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{PREFIX}.safetensors.index.json").write_text(json.dumps(index))
    config = {"_class_name": load_inventory(model).model_class} | CONFIGS.get(model, {})
    (folder / "config.json").write_text(json.dumps(config))
    print(f"{folder}: {len(shards)} shards, {len(shapes)} tensors, {total / 1e9:.2f} GB")


def run(*words):
    """Wall seconds, processor seconds and the largest resident process (MiB) of one command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run([sys.executable, "-m", "loraq_sim", *map(str, words)], check=True)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # Kilobytes on Linux; never falls, so the largest command so far.
    print(
        f"{' '.join(map(str, words[:2]))}: {wall:.1f} s, {spent:.1f} s of processor time, "
        f"{after.ru_maxrss / 1024:.0f} MiB in the largest process",
        flush=True,
    )


def sweep(folder, out, jobs):
    """From the folder to the report."""
    run("dump", "info", folder, "--no-statistics", "--format", "csv")
    splits = [word for text in SPLITS for word in ("--split", text)]
    words = ("sweep", "--hw", "aie2", "--layer-dump", folder, "--layers", LAYERS, *splits)
    os.environ["LORAQ_SIM_CACHE"] = str(out / "cache")
    run(*words, "--preset", "fast", "--jobs", jobs, "--out", out, "--no-progress")
    run("report", out, "--out", out / "report.html")


def headers(folder):
    """What needs no values: inventory, dry run with its notes, cost."""
    run("dump", "info", folder, "--no-statistics", "--format", "csv")
    words = ("sweep", "--hw", "aie2", "--layer-dump", folder, "--model", "flux.1-dev")
    run(*words, "--split", "W4A4+W8A8@fp16r32", "--dry-run")
    costing = ("cost", "--hw", "b200", "--layer-dump", folder, "--rows", "4608")
    run(*costing, "--split", "W4A4+W16A16r32", "--format", "csv")


PIXART = {
    **{"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72},
    **{"in_channels": 4, "out_channels": 8, "sample_size": 64, "patch_size": 2},
    **{"cross_attention_dim": 1152, "caption_channels": 4096, "use_additional_conditions": False},
}
_SAVE = """
import json, sys, torch, diffusers
torch.manual_seed(0)
config = json.loads(sys.argv[2])
model = diffusers.PixArtTransformer2DModel(**config)
model.to(torch.bfloat16).save_pretrained(sys.argv[1], max_shard_size="512MB")
print(sum(p.numel() for p in model.parameters()), "parameters")
"""


def capture(folder, out, steps):
    """A whole model of random weights, captured while it denoises."""
    if not (folder / "config.json").exists():
        # A process of its own: its memory is none of the capture's.
        made = [sys.executable, "-c", _SAVE, str(folder), json.dumps(PIXART)]
        subprocess.run(made, check=True)
    words = ("dump", "capture", folder, "--steps", steps, "--images", 1, "--tokens", 256)
    before = time.monotonic()
    command = [sys.executable, "-m", "loraq_sim", *map(str, words), "--out", str(out)]
    command += ["--dtype", "float16", "--force", "--no-progress"]
    process = subprocess.Popen(command)
    _, status, used = os.wait4(process.pid, 0)
    print(
        f"dump capture: {time.monotonic() - before:.1f} s, {used.ru_utime + used.ru_stime:.1f} s "
        f"of processor time, {used.ru_maxrss / 1024:.0f} MiB; {out}: "
        f"{out.stat().st_size / 2**20:.0f} MiB",
        flush=True,
    )
    return status


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    writing = commands.add_parser("write")
    writing.add_argument("model")
    writing.add_argument("folder", type=Path)
    writing.add_argument("--headers-only", action="store_true")
    sweeping = commands.add_parser("sweep")
    sweeping.add_argument("folder", type=Path)
    sweeping.add_argument("--out", type=Path, default=Path("runs/checkpoint_sweep"))
    sweeping.add_argument("--jobs", type=int, default=2)
    opening = commands.add_parser("headers")
    opening.add_argument("folder", type=Path)
    capturing = commands.add_parser("capture")
    capturing.add_argument("folder", type=Path)
    capturing.add_argument("--out", type=Path, default=Path("runs/captured.safetensors"))
    capturing.add_argument("--steps", type=int, default=2)
    asked = parser.parse_args()
    if asked.command == "write":
        write_folder(asked.model, asked.folder, headers_only=asked.headers_only)
    elif asked.command == "sweep":
        asked.out.mkdir(parents=True, exist_ok=True)
        sweep(asked.folder, asked.out, asked.jobs)
    elif asked.command == "capture":
        sys.exit(os.waitstatus_to_exitcode(capture(asked.folder, asked.out, asked.steps)))
    else:
        headers(asked.folder)


if __name__ == "__main__":
    main()
