"""Pictures of the trained models at W4A4 and W4A8, and what the residual input adds to them.

    python benchmarks/image_pictures.py                   # all models, writes image_pictures.md
    python benchmarks/image_pictures.py emoji --draw      # one model; --draw: anew
    python benchmarks/image_pictures.py emoji --images 8  # fewer

The U-Net (`terrain`) is that of examples/terrain_unet.py, which says what to install; where that is
missing it is left out.

Every layer that SVDQuant quantizes runs on the emulated data path of `aie2`; branches have the
bytes of a 16-bit one. SVDQuant is as published: its grid of smoothing, 100 iterations, 4-bit codes
without sign behind GELU. Calibration takes noise of another seed than the pictures that are
compared. Gains are means of the differences in PSNR picture by picture, with standard errors. A
picture that is lost holds values beyond the range of a float format; means are of the others.
"""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import argparse
import json
import textwrap
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from loraq_sim.diffusion import (
    CALIBRATION_IMAGES,
    CALIBRATION_ROWS,
    CALIBRATION_SEED,
    ImageStudy,
    ImageVariant,
    capture_transformer,
    compare_images,
    load_decoder,
    load_transformer,
)

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "benchmarks" / "image_pictures.md"
FEW = 40  # Pictures that `loraq-sim images` draws in a few minutes, among many.
AUTO = {"condition": "auto", "finish": "data"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is drawn, how, and the rank whose bytes at 16 bits all branches have."""

    checkpoint: str
    rank: int
    images: int
    seeds: tuple[int, ...] = (0,)
    steps: int = 25
    guidance: float = 3.0
    needs: str = ""
    floats: str = "fp16"


MODELS = {
    "emoji": Model(checkpoint="examples/emoji", rank=8, images=24, guidance=2.0),
    "tiny_pixart": Model(checkpoint="examples/tiny_pixart", rank=4, images=400),
    "terrain": Model(
        checkpoint="examples/terrain_unet.py:terrain", rank=8, images=20, steps=1, guidance=1.0,
        needs="terrain_diffusion", floats="bf16",
    ),
}  # fmt: skip
# What a reader sees, split without its size, options of `plan_layers`.
VARIANTS = {
    "W4A4 round to nearest": ("W4A4", {"method": "rtn"}),
    "W4A4 SVDQuant": ("W4A4g+W16A16", {"method": "svdquant_published"}),
    "W4A4 LoRaQ, W8A8 branch": ("W4A4u+W8A8", AUTO),
    "W4A4 LoRaQ, residual W8A8": ("W4A4u~W8A8", AUTO),
    "W4A4 LoRaQ, W4A8 branch": ("W4A4u+W4A8", AUTO),
    "W4A4 LoRaQ, residual W4A8": ("W4A4u~W4A8", AUTO),
    "W4A4 LoRaQ, grid chosen": ("W4A4a~W8A8", AUTO),
    "W4A8 LoRaQ": ("W4A8+W8A8", AUTO),
}
# Gain of the first over the second.
PAIRS = (
    ("W4A4 LoRaQ, residual W8A8", "W4A4 LoRaQ, W8A8 branch"),
    ("W4A4 LoRaQ, residual W4A8", "W4A4 LoRaQ, W4A8 branch"),
    ("W4A4 LoRaQ, grid chosen", "W4A4 SVDQuant"),
    ("W4A4 LoRaQ, residual W4A8", "W4A4 SVDQuant"),
    ("W4A8 LoRaQ", "W4A4 LoRaQ, grid chosen"),
)
# Rows of the pictures in README and documentation, with what stands beside them.
SHOWN = {
    "W4A4 round to nearest": "W4A4, rounded",
    "W4A4 SVDQuant": "W4A4, SVDQuant",
    "W4A4 LoRaQ, grid chosen": "W4A4, LoRaQ",
    "W4A8 LoRaQ": "W4A8, LoRaQ",
}


def split_of(text, model):
    """The split with a branch of the model's bytes, and floats whose range it stays within."""
    if "W16" in text:
        if model.floats != "fp16":
            text = text.replace("16", f"16[{model.floats}]")
        return f"{text}r{model.rank}"
    return f"{text}@fp16r{model.rank}" if "+" in text or "~" in text else text


def measured(name, model, options, kept, folder):
    """PSNR of every picture by variant and seed, into `kept`; the pictures themselves to disk."""
    transformer = load_transformer(ROOT / model.checkpoint)
    sampling = {"steps": model.steps, "guidance": model.guidance}
    calibration = None
    images = options.images or model.images
    for seed in model.seeds:
        wanted = [v for v in options.variants if f"{name}|{v}|{seed}" not in kept or options.draw]
        if not wanted:
            continue
        if calibration is None:
            calibration = capture_transformer(
                transformer, images=CALIBRATION_IMAGES, seed=CALIBRATION_SEED,
                tokens=CALIBRATION_ROWS, **sampling,
            )  # fmt: skip
        study = ImageStudy(
            transformer, load_decoder(ROOT / model.checkpoint, transformer), "aie2",
            calibration=calibration, images=images, seed=seed, **sampling,
        )  # fmt: skip
        _keep(folder / f"{name} {seed} full precision.npy", study.reference)
        for variant in wanted:
            text, settings = VARIANTS[variant]
            split = split_of(text, model)
            started = time.process_time()
            found = study.run(ImageVariant(label=variant, source=split, options=settings))
            assert compare_images(
                found.images, study.reference, data_range=2.0, allow_non_finite=True
            ).mean_psnr_db == found.row["psnr_db"]  # fmt: skip
            _keep(folder / f"{name} {seed} {variant}.npy", found.images)
            kept[f"{name}|{variant}|{seed}"] = {
                "split": split, "psnr_db": found.error.psnr_db.tolist(),
                "ssim": found.error.mean_ssim, "bits": found.row["bits_per_weight"],
                "n_layers": found.row["n_layers"], "note": found.row["message"],
                "cpu_seconds": time.process_time() - started,
            }  # fmt: skip
            print(f"{name}, {variant}, seed {seed}: {found.row['psnr_db']:.2f} dB", flush=True)
            options.results.write_text(json.dumps(kept))


def _keep(path, images):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, images[:40].astype(np.float16))


def table(kept):
    """The report: a table of variants and one of gains for each model."""
    lines = [
        "# Pictures at W4A4 and W4A8", "",
        "Written by `python benchmarks/image_pictures.py`; PSNR in dB against full precision",
        "at the same noise, on the emulated data path of `aie2`. Calibration: other noise.",
    ]  # fmt: skip
    for name, model in MODELS.items():
        psnr = {
            variant: np.concatenate(
                [kept[f"{name}|{variant}|{seed}"]["psnr_db"] for seed in model.seeds]
            )
            for variant in VARIANTS
            if all(f"{name}|{variant}|{seed}" in kept for seed in model.seeds)
        }
        if not psnr:
            continue
        n = len(next(iter(psnr.values())))
        few = n > FEW
        first = kept[f"{name}|{next(iter(psnr))}|{model.seeds[0]}"]
        lines += [
            "", f"## {name}", "",
            f"{n} pictures, steps: {model.steps}, guidance {model.guidance:g}, "
            f"{first['n_layers']} layers emulated.", "",
            f"| | split | bits per weight | PSNR, mean |{f' of the first {FEW} |' * few} "
            "spread over pictures | SSIM |",
            "|---|---|---|---|---|---|" + "---|" * few,
        ]  # fmt: skip
        for variant, values in psnr.items():
            row = kept[f"{name}|{variant}|{model.seeds[0]}"]
            ssim = "-" if row["ssim"] is None else f"{row['ssim']:.3f}"
            lines.append(
                f"| {variant} | `{row['split']}` | {row['bits']:.2f} | {_mean(values)} | "
                f"{f'{_mean(values[:FEW])} | ' * few}{values[np.isfinite(values)].std():.1f} | "
                f"{ssim} |"
            )
        lines += ["", "| gain, picture by picture | mean, dB | standard error | pictures better |"]
        lines.append("|---|---|---|---|")
        for new, old in PAIRS:
            if new in psnr and old in psnr and len(psnr[new]) == len(psnr[old]):
                gains = psnr[new] - psnr[old]
                better = np.mean(gains > 0)
                gains = gains[np.isfinite(gains)]
                error = gains.std(ddof=1) / len(gains) ** 0.5
                lines.append(
                    f"| {new}, over {old} | {gains.mean():+.2f} | {error:.2f} | {better:.0%} |"
                )
    return "\n".join(lines) + "\n"


def _mean(values):
    """The mean in dB of the pictures that are finite, and how many are not."""
    finite = values[np.isfinite(values)]
    lost = len(values) - len(finite)
    return f"{finite.mean():.2f}" + f" ({lost} lost)" * (lost > 0)


def pictures(name, kept, folder, chosen, path, *, captions=(), scale=3, colors="gray"):
    """One row of pictures an arithmetic; letters in a gray that reads on white and on black."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [("full precision", "", np.load(folder / f"{name} 0 full precision.npy"))]
    for variant, label in SHOWN.items():
        psnr = np.array(kept[f"{name}|{variant}|0"]["psnr_db"])
        psnr = psnr[np.isfinite(psnr)].mean()
        images = np.load(folder / f"{name} 0 {variant}.npy")
        rows.append((label, f"{psnr:.1f} dB", images))
    size = rows[0][2].shape[-1] * scale / 150
    gap, left, head = 0.05, 1.35, 0.42 if captions else 0.05
    width = left + len(chosen) * (size + gap)
    height = head + len(rows) * (size + gap)
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    gray = "#7d8590"
    for i, caption in enumerate(captions):
        x = (left + i * (size + gap) + size / 2) / width
        lines = textwrap.fill(caption, 12)
        figure.text(x, 1 - 0.2 / height, lines, ha="center", va="center", size=6, color=gray)
    for r, (label, note, images) in enumerate(rows):
        bottom = height - head - (r + 1) * size - r * gap
        middle = (bottom + size / 2) / height
        end = (left - 0.12) / width
        figure.text(
            end, middle, label, ha="right", va="bottom" if note else "center", size=9, color=gray
        )
        figure.text(end, middle - 0.03 / height, note, ha="right", va="top", size=9, color=gray)
        for i, number in enumerate(chosen):
            place = ((left + i * (size + gap)) / width, bottom / height)
            axes = figure.add_axes((*place, size / width, size / height))
            shown = np.clip(images[number].astype(np.float32).transpose(1, 2, 0) / 2 + 0.5, 0, 1)
            one = {"cmap": colors, "vmin": 0, "vmax": 1} if shown.shape[2] == 1 else {}
            axes.imshow(shown.squeeze(), interpolation="nearest", **one)
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, transparent=True, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; default: all")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--images", type=int, help="pictures, in place of each model's number")
    parser.add_argument("--draw", action="store_true", help="measure again what is there")
    parser.add_argument("--report", action="store_true", help="write what is there, draw nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "image_pictures.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(options.results.read_text()) if options.results.exists() else {}
    folder = options.results.with_suffix("")
    there = [name for name, model in MODELS.items() if not model.needs or find_spec(model.needs)]
    for name in () if options.report else options.models or there:
        measured(name, MODELS[name], options, kept, folder)
    if not options.images:
        TABLE.write_text(table(kept), encoding="utf-8")
    names = ROOT / "examples" / "emoji" / "captions.txt"
    docs = ROOT / "docs" / "images"
    if all(f"terrain|{variant}|0" in kept for variant in SHOWN):
        path = docs / "terrain_samples.png"
        pictures("terrain", kept, folder, range(5), path, scale=1, colors="terrain")
    if all(f"emoji|{variant}|0" in kept for variant in SHOWN) and names.exists():
        captions = names.read_text(encoding="utf-8").splitlines()
        many = range(min(12, len(captions)))
        shown = [captions[i] for i in many]
        pictures("emoji", kept, folder, many, docs / "emoji_samples.png", captions=shown)
        pictures("emoji", kept, folder, range(8), docs / "emoji_row.png")


if __name__ == "__main__":
    main()
