"""What each arithmetic does to the images of examples/tiny_pixart, and which layer error says so.

    python benchmarks/image_evidence.py            # measures, writes image_evidence.md and figures

Images of full precision and of each arithmetic start from the same noise. Results are kept in
runs/image_evidence.json as they come, so a run that was cut off goes on; ``--fresh`` starts again.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse
import hashlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from image_evidence_report import write_report

from loraq_sim.diffusion import (
    CALIBRATION_SEED,
    ImageStudy,
    ImageVariant,
    capture_transformer,
    compare_images,
    emulate_model,
    load_decoder,
    load_transformer,
    sample_images,
)
from loraq_sim.emulator.walk import run_layer
from loraq_sim.formats import Rounding
from loraq_sim.recipe import Recipe

ROOT = Path(__file__).parent.parent
STEPS, GUIDANCE = 25, 3.0
LORAQ = "W4A4+W8A8@fp16r4"
# Noise 4-bit activations make hides what the branch does; these show it.
SPLITS = {
    "rtn": ("W4A4", "W4A8", "W4A16", "W8A8"),
    "svdquant": ("W4A4+W16A16r4", "W4A8+W16A16r4"),
    "loraq": tuple(
        f"{main}+{branch}@fp16r4"
        for main in ("W4A4", "W4A8")
        for branch in ("W8A8", "W6A6", "W4A8", "W4A4")
    ),
}
SMOOTHED = (("rtn", "W4A4"), ("svdquant", "W4A4+W16A16r4"), ("loraq", LORAQ))
WIDTHS = (20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10)
# What a layer of a random recipe may run in; None leaves it at 16 bits.
MIXED = ("W4A4", "W4A8", "W8A8", LORAQ, "W4A4+W8A8r16", "W3A4", "W4A3", None)
N_MIXED = 30


def variants(layers):
    """(part, label, ImageVariant) of everything that is measured."""
    found = []

    def add(part, label, source, **options):
        found.append((part, label, ImageVariant(label=label, source=source, options=options)))

    for method, splits in SPLITS.items():
        for split in splits:
            add("splits", f"{method} {split}", split, method=method)
    for method, split in SMOOTHED:
        add("smoothing", f"{method} {split} smooth", split, method=method, smooth=0.5)
    for overflow in ("saturate", "wrap"):
        for bits in WIDTHS:
            path = {"acc_bits": bits, "overflow": overflow}
            add("widths", f"{overflow} {bits}", LORAQ, datapath=path)
    for mode in Rounding:
        add("rounding", mode.value, LORAQ, datapath={"rounding": mode.value})
    for combine in ("fp32", "bf16", "fp22"):
        add("combine", combine, LORAQ, datapath={"combine": combine})
    for layer in layers:
        add("alone", layer, {layer: "W4A4"}, method="rtn")
    rng = np.random.default_rng(0)
    for i in range(N_MIXED):
        chosen = {name: MIXED[int(rng.integers(len(MIXED)))] for name in layers}
        entries = {name: split or {"skip": True} for name, split in chosen.items()}
        add("mixed", f"recipe {i}", Recipe.model_validate({"layers": entries}), preset="fast")
    return found


def layer_errors(study, variant, dump):
    """Error and size of each emulated layer on captured inputs."""
    emulated = emulate_model(
        study.transformer.model, variant.source, study.accelerator, calibration=dump,
        **variant.options,
    )  # fmt: skip
    rows = []
    for plan in emulated.plans:
        layer = dump[plan.name]
        out = run_layer(
            layer.activations, plan.solution, plan.split, emulated.datapath, bias=layer.bias
        )
        exact = layer.activations.astype(np.float64) @ layer.weight.T.astype(np.float64)
        exact += layer.bias
        miss = float(((out.y - exact) ** 2).sum())
        rows.append(
            {
                "layer": plan.name, "kind": plan.kind, "n": layer.n, "k": layer.k,
                "calls": layer.calls_per_step, "miss": miss / len(exact),
                "size": float((exact**2).sum()) / len(exact),
                "weight_error": plan.solution.weight_error,
            }
        )  # fmt: skip
    return rows


def parts_of_seed(part, seed):
    """Which parts are drawn at which seed: single layers and recipes need one noise."""
    return seed == 0 or part not in ("alone", "mixed", "combine")


def measure(args, kept, save):
    """Fill `kept` with one record per (seed, part, label), and layer errors per (part, label)."""
    transformer = load_transformer(args.checkpoint)
    decoder = load_decoder(args.checkpoint, transformer)
    sampling = {"steps": STEPS, "guidance": GUIDANCE}
    dump = capture_transformer(transformer, images=10, seed=CALIBRATION_SEED, **sampling)
    # Emulated layers by default: what SVDQuant quantizes.
    layers = list(emulate_model(transformer.model, "W4A4", "aie2", preset="fast").layers)
    kept["about"]["floor_db"] = _unrelated(transformer, decoder, args.images, sampling)
    for seed in args.seeds:
        study = ImageStudy(
            transformer, decoder, "aie2", calibration=dump, images=args.images, seed=seed,
            **sampling,
        )  # fmt: skip
        for part, label, variant in variants(layers):
            key = f"{seed}|{part}|{label}"
            if key in kept["images"] or not parts_of_seed(part, seed):
                continue
            started = time.process_time()
            found = study.run(variant)
            row = {
                **found.row,
                "part": part,
                "label": label,
                "mse": float(((found.images - study.reference).astype(np.float64) ** 2).mean()),
                "cpu_seconds": time.process_time() - started,
            }
            kept["images"][key] = row
            if f"{part}|{label}" not in kept["layers"]:
                kept["layers"][f"{part}|{label}"] = layer_errors(study, variant, dump)
            save()
            print(f"{key}: {row['psnr_db']:.2f} dB, {row['cpu_seconds']:.1f} s", flush=True)


def _unrelated(transformer, decoder, images, sampling):
    """PSNR of images of one noise against those of another."""
    drawn = [
        decoder.decode(sample_images(transformer, images=images, seed=seed, **sampling))
        for seed in (0, 1)
    ]
    return compare_images(*drawn, data_range=2.0).mean_psnr_db


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "tiny_pixart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "image_evidence.json")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks" / "image_evidence.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = (args.checkpoint / "diffusion_pytorch_model.safetensors").read_bytes()
    about = {"checkpoint": hashlib.sha256(weights).hexdigest()[:12], "images": args.images}
    kept = {"about": about, "images": {}, "layers": {}}
    if args.results.exists() and not args.fresh:
        earlier = json.loads(args.results.read_text())
        kept = earlier if about.items() <= earlier["about"].items() else kept

    def save():
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(kept))

    measure(args, kept, save)
    write_report(kept, args.report, args.figures)


if __name__ == "__main__":
    main()
