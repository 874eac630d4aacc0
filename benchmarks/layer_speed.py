"""Time whole emulated layers as a sweep runs them, as a ratio to the exact `torch._int_mm`.

    python benchmarks/layer_speed.py               # a minute after the layers are solved
    python benchmarks/layer_speed.py --shape 256x512x512 --case "int W4A4+W8A8r32" --format json

What counts is all of `loraq_sim.run_layer` with the statistics that a result row has: activations
rounded, weights packed (a sweep meets each solution once), both branches through the MAC array,
their sums, the output in its format. `torch._int_mm` multiplies int8 matrices of the same shape,
once. One process, one thread, thread time, calls that take turns, medians.

Small and low-rank products of `emulate_gemm` follow: with packed weights and with an array, which
each call packs. `--images` (extra ``diffusion``) also draws 80 images in 25 steps with the bundled
diffusion transformer, as it is and emulated; the ratio is that of the two.
"""

import os

# Before NumPy loads: one thread for everything.
if __name__ == "__main__":
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from emulator_speed import processor_name, timed_medians

import hwmodels
from loraq_sim.cli.options import NoProgress, OutFormat, OutputFormat, Quiet, listed_shapes
from loraq_sim.cli.output import note, one_line_failures, print_table, tracked
from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import pack_weight
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.evaluate import RoundingWatch, solve_case
from loraq_sim.files import write_file
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for
from loraq_sim.reporting.tables import result_table
from loraq_sim.settings import CaseSettings
from loraq_sim.split import parse_split

SHAPES = ("1024x1152x1152",)
# Element family and split, and the most times `torch._int_mm` that a layer must and should take.
CASES = {
    "int W4A4+W8A8r32": (2.2, 1.6),
    "int W4A4u+W8A8r32": (2.64, None),
    "int W8A8+W8A8r32": (None, None),
    "mxint W4A4+W8A8r32": (3.0, 2.0),
    "mxfp W4A4+W8A8r32": (6.0, 3.0),
    "nvfp W4A4+W8A8r32": (8.0, 4.0),
}
TOY, IMAGE_SPLIT = Path(__file__).parents[1] / "examples/tiny_pixart", "W4A4+W8A8@fp16r4"
COLUMNS = ("shape", "what", "ms", "ratio", "must", "stretch", "verdict")
GEMMS = ("1x64x64", "1x1152x1152", "1024x1152x32", "1024x32x1152", "1024x1152x64", "1024x1152x1152")


def layer_row(
    size: tuple[int, int, int], case: str, accelerator: str, repeats: int
) -> dict[str, Any]:
    """Return one row: milliseconds of a layer, and the ratio of its time to the exact product."""
    m, n, k = size
    family, text = case.split(" ", 1)
    rng = np.random.default_rng(0)
    loud = 1 + 3 * (rng.random(k) > 0.98)
    layer = Layer(
        name="layer",
        kind="mlp_up",
        weight=(rng.standard_normal((n, k)) * 0.03).astype(np.float32),
        bias=rng.standard_normal(n).astype(np.float32),
        activations=(rng.standard_normal((m, k)) * loud).astype(np.float32),
    )
    split = parse_split(text, family=family, group=64)
    settings = CaseSettings(split=split, method="svdquant", preset="fast", seed=0)
    solution = solve_case(layer, settings)
    path = datapath_for(hwmodels.load_accelerator(accelerator), {})
    x = layer.activations

    def run() -> None:
        run_layer(x, solution, split, path, bias=layer.bias, on_step=RoundingWatch(m))

    mine, *theirs = timed_medians([run, *exact_product(size)], repeats)
    must, stretch = CASES.get(case, (None, None))
    row = dict.fromkeys(COLUMNS) | {"shape": f"{m}x{k}x{n}", "what": case, "ms": 1e3 * mine}
    if not theirs:
        return row
    ratio = mine / theirs[0]
    verdict = None
    if must is not None:
        is_stretch = stretch is not None and ratio <= stretch
        verdict = "missed" if ratio > must else "stretch" if is_stretch else "must"
    return row | {"ratio": ratio, "must": must, "stretch": stretch, "verdict": verdict}


def exact_product(size: tuple[int, int, int]) -> list[Callable[[], Any]]:
    """The exact int8 product of PyTorch of this size; no call where there is no PyTorch."""
    try:
        import torch
    except ImportError:
        return []
    torch.set_num_threads(1)
    m, n, k = size
    rng = np.random.default_rng(0)
    a, w = (
        torch.from_numpy(rng.integers(-128, 128, shape).astype(np.int8))
        for shape in ((m, k), (k, n))
    )
    # It refuses a few rows.
    return [lambda: torch._int_mm(a, w)] if m > 16 else []


def gemm_rows(repeats: int) -> Iterator[dict[str, Any]]:
    """Yield rows of plain products, weights packed before and by each call."""
    rng = np.random.default_rng(0)
    for text, (m, n, k) in listed_shapes("--shape", GEMMS).items():
        a, w = (rng.integers(-128, 128, shape).astype(np.int8) for shape in ((m, k), (n, k)))
        packed, calls = pack_weight(w), max(1, 2**21 // (m * k * n))

        def run(weight: Any, a: np.ndarray = a, calls: int = calls) -> None:
            for _ in range(calls):
                emulate_gemm(a, weight, MacArray(acc_bits=32))

        both = [lambda packed=packed: run(packed), lambda w=w: run(w)]
        *mine, exact = [*timed_medians([*both, *exact_product((m, n, k))], repeats), None][:3]
        for what, seconds in zip(("packed weights", "an array"), mine, strict=True):
            taken = seconds / calls
            ratio = None if exact is None else taken / exact
            yield dict.fromkeys(COLUMNS) | {
                "shape": text, "what": f"emulate_gemm, {what}", "ms": 1e3 * taken, "ratio": ratio,
            }  # fmt: skip


def image_rows() -> Iterator[dict[str, Any]]:
    """Yield rows of 80 images in 25 steps: the model as it is, then with every layer emulated."""
    import torch

    from loraq_sim.diffusion import emulate_model, load_transformer, sample_images

    torch.set_num_threads(1)
    transformer = load_transformer(TOY)
    emulated = emulate_model(transformer.model, IMAGE_SPLIT, "aie2", preset="fast")

    def draw(images: int, steps: int) -> None:
        sample_images(transformer, images=images, steps=steps, guidance=4.5, seed=0)

    def draw_emulated(images: int = 80, steps: int = 25) -> None:
        with emulated:
            draw(images, steps)

    draw_emulated(2, 1)  # compiles
    plain, mine = timed_medians([lambda: draw(80, 25), draw_emulated], 1)
    shape, what = "80 images, 25 steps", f"emulate_model, {IMAGE_SPLIT}"
    yield dict.fromkeys(COLUMNS) | {"shape": shape, "what": "the model as it is", "ms": 1e3 * plain}
    row = {"shape": shape, "what": what, "ms": 1e3 * mine, "ratio": mine / plain}
    yield dict.fromkeys(COLUMNS) | row


@one_line_failures
def layer_speed(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="MxKxN",
            help="Layer size: rows x input features x output features; repeatable.",
            show_default=" ".join(SHAPES),
        ),
    ] = None,
    case: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="'FAMILY SPLIT'",
            help="Element family and split; repeatable.",
            show_default="; ".join(CASES),
        ),
    ] = None,
    hw: Annotated[str, typer.Option("--hw", metavar="NAME|FILE", help="Accelerator.")] = "aie2",
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed calls of each; the median counts.")
    ] = 15,
    gemms: Annotated[
        bool, typer.Option("--gemms/--no-gemms", help="Also time small and low-rank products.")
    ] = True,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Also time images of the bundled model.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the table to this Markdown file."),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Time whole emulated layers as a sweep runs them, as a ratio to torch._int_mm."""
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    asked = [
        (size, name)
        for size in listed_shapes("--shape", shape or SHAPES).values()
        for name in case or CASES
    ]
    rows = []
    for size, name in tracked(asked, "timing", quiet=quiet or no_progress):
        rows.append(layer_row(size, name, hw, repeats))
    if gemms:
        rows += gemm_rows(repeats)
    if images:
        note("drawing images", quiet=quiet)
        rows += image_rows()
    title = f"Emulated layers on {hw} against torch._int_mm, 1 thread, {processor_name()}"
    table = result_table(rows, list(COLUMNS), title=title)
    print_table(table, output)
    if out is not None:
        write_file(out, f"**{title}**\n\n{table.to_markdown()}")
    missed = sum(row["verdict"] == "missed" for row in rows)
    note(f"{missed} of {sum(row['verdict'] is not None for row in rows)} goals missed", quiet=quiet)


if __name__ == "__main__":
    typer.run(layer_speed)
