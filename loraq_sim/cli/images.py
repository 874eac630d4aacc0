"""``loraq-sim images``: draw images with emulated layers and compare them with full precision."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

import hwmodels
from loraq_sim.cli.options import (
    AccBits,
    Accumulators,
    Captions,
    Condition,
    Family,
    Finish,
    Force,
    Group,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    Overflow,
    PFormat,
    Preset,
    ProductsPerAdd,
    Quiet,
    Rotate,
    Seed,
    Smooth,
    Splits,
    ZeroPoint,
    datapath_overrides,
    listed,
)
from loraq_sim.cli.output import (
    case_failure,
    end_with,
    layer_progress,
    note,
    one_line_failures,
    print_table,
)
from loraq_sim.errors import InputError, counted
from loraq_sim.files import make_folder, refuse_existing, replaced_file
from loraq_sim.reporting.tables import result_table
from loraq_sim.split import WITHOUT_BRANCH, PrecisionSplit, parse_split

if TYPE_CHECKING:
    from loraq_sim.diffusion import ImageStudy, ImageVariant, Transformer, VariantImages
    from loraq_sim.dumps.layer_dump import LayerDump

__all__ = ["EXAMPLES", "images_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim images --checkpoint examples/tiny_pixart --hw aie2 --split W4A4,W4A4+W8A8@fp16r4 "
    "--images 10 --steps 25 --guidance 3 --out runs/images\n\n"
    "loraq-sim images --checkpoint examples/tiny_pixart --hw aie2 --split W8A8 --acc-bits 16 "
    "--overflow saturate --images 4 --steps 5 --out runs/narrow\n\n"
    "loraq-sim images --checkpoint PixArt-Sigma --captions prompts.safetensors --hw aie2 "
    "--recipe recipe.toml --images 8 --steps 20 --device cuda --out runs/pixart"
)
_SHOWN = (
    *(
        "split",
        "method",
        "smooth",
        "rotation",
        "rank",
        "bits_per_weight",
        "psnr_db",
        "psnr_std",
        "psnr_gain_db",
        "psnr_gain_se_db",
        "ssim",
    ),
    *("overflow_count", "seconds"),
)
_GAINS = ("psnr_gain_db", "psnr_gain_se_db")
_CHOSEN = ("rotation", "condition", "finish")
_OF_INPUTS = ("smooth", "condition", "finish")


@one_line_failures
def images_command(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            metavar="FOLDER|ENTRY",
            help="Local diffusers folder of a PixArt or SANA transformer or pipeline "
            "(loraq-sim\\[diffusion]), or file.py:function of a model of your own, which returns "
            "it and a generator function that draws with it.",
            show_default=False,
        ),
    ],
    hw: Annotated[
        str, typer.Option("--hw", metavar="NAME|FILE", help="Accelerator name or YAML file.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder of samples.png and the images.", show_default=False
        ),
    ],
    splits: Splits = None,
    recipe: Annotated[
        list[Path] | None,
        typer.Option(
            "--recipe",
            metavar="FILE",
            help="Split and settings of each layer from a file (such as allocate writes); "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    method: Methods = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Layers to leave at 16 bits, by name or kind; 'none' for no layer. Default: the "
            "kinds SVDQuant leaves, and with a recipe what the recipe leaves.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[int, typer.Option("--images", metavar="N", help="Images to draw.")] = 10,
    steps: Annotated[int, typer.Option("--steps", metavar="N", help="Denoising steps.")] = 20,
    guidance: Annotated[
        float, typer.Option("--guidance", metavar="X", help="Scale of classifier-free guidance.")
    ] = 4.5,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            help="Images drawn at once. Default: what fits.",
            show_default=False,
        ),
    ] = None,
    captions: Captions = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Torch device of what is not emulated.")
    ] = "cpu",
    acc_bits: AccBits = None,
    overflow: Overflow = None,
    products_per_add: ProductsPerAdd = None,
    accumulators: Accumulators = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            metavar="MODE",
            help="How activations and P become codes: conv_even, floor, symmetric_inf, ... "
            "Default: the accelerator's.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Draw the same images with every layer emulated, and measure PSNR and SSIM.

    The reference is the model as it is, at the same noise. Every split (or recipe) is a row of the
    table and of samples.png; the images themselves are in images.npz. --seed is that of the noise
    and of the solver; calibration takes noise of another seed. Every row but the first says what it
    gains over the first: the mean of the differences image by image, and its standard error.
    """  # fmt: skip
    from loraq_sim.diffusion import ImageStudy, load_decoder, load_transformer
    from loraq_sim.diffusion.images import batch_sizes

    refuse_existing(out / "samples.png", out / "images.npz", overwrite=force)
    overrides = datapath_overrides(
        acc_bits=acc_bits, overflow=overflow, products_per_add=products_per_add,
        accumulators=accumulators, p_format=p_format,
        zero_point=zero_point, rounding=rounding,
    )  # fmt: skip
    options: dict[str, Any] = {
        "preset": preset, "family": family, "group": group, "smooth": smooth, "rotate": rotate,
        "condition": condition, "finish": finish, "seed": seed, "datapath": overrides,
    }  # fmt: skip
    if skip:
        options["skip"] = () if listed(skip) == ("none",) else listed(skip)
    variants = _variants(listed(splits), recipe or [], listed(method) or ("loraq",), options)
    _check_machine(hw, overrides)
    transformer = load_transformer(checkpoint, captions=captions, seed=seed, device=device)
    decoder = load_decoder(checkpoint, transformer)
    n_batches = len(batch_sizes(transformer, images=images, batch=batch))
    sampling = {"images": images, "steps": steps, "guidance": guidance, "seed": seed}
    calls = [""] * (steps * n_batches * (1 + len(variants)))
    with layer_progress(calls, "denoising", quiet=quiet or no_progress) as on_call:
        calibration, calibrated_on = _calibration(transformer, variants, sampling)
        study = ImageStudy(
            transformer,
            decoder,
            hw,
            calibration=calibration,
            calibrated_on=calibrated_on,
            on_call=lambda: on_call(""),
            batch=batch,
            **sampling,
        )
        rows, drawn = _drawn(study, variants, lambda: on_call(""))
    if calibrated_on:
        note(f"calibrated on {calibrated_on}", quiet=quiet)
    if drawn:
        _write(out, study, drawn, checkpoint)
        note(f"wrote {out / 'samples.png'} and {out / 'images.npz'}", quiet=quiet)

    def show(has_messages: bool) -> None:

        columns = [*_SHOWN, "message"] if has_messages else list(_SHOWN)
        used = [key for key in _CHOSEN if any(row.get(key) is not None for row in rows)]
        columns[columns.index("rank") : columns.index("rank")] = used
        over = next((row["gain_over"] for row in rows if row.get("gain_over")), None)
        if over is None:
            columns = [key for key in columns if key not in _GAINS]
        told = f"; gains over {over}, image by image, with standard errors" if over else ""
        title = f"{checkpoint}: images on {hw}{told}"
        print_table(result_table(rows, columns, title=title), output)

    end_with(rows, show)


def _check_machine(hw: str, overrides: dict[str, Any]) -> None:
    """Refuse an unknown accelerator or setting before a model is loaded."""
    from loraq_sim.machine import datapath_for

    datapath_for(hwmodels.load_accelerator(hw), overrides)


def _variants(
    splits: tuple[str, ...], recipes: list[Path], methods: tuple[str, ...], options: dict[str, Any]
) -> "list[ImageVariant]":
    """Every split with every method that differs for it, then the recipes."""
    from loraq_sim.diffusion import ImageVariant
    from loraq_sim.recipe import read_recipe

    if not splits and not recipes:
        raise InputError("nothing to draw with: give --split or --recipe")
    variants = []
    for text in splits:
        split = parse_split(text, family=options["family"], group=options["group"])
        # Without a branch every method that makes one is round to nearest.
        plain = tuple(name for name in methods if name in WITHOUT_BRANCH) or ("rtn",)
        for name in methods if split.has_branch else plain:
            variants.append(
                ImageVariant(label=split.text, source=split, options=options | {"method": name})
            )
    for path in recipes:
        source = read_recipe(path)
        variants.append(
            ImageVariant(label=path.stem, source=source, options=options | {"method": methods[0]})
        )
    return variants


def _calibration(
    transformer: "Transformer", variants: "list[ImageVariant]", sampling: dict[str, Any]
) -> "tuple[LayerDump | None, str | None]":
    """Captured input rows where a variant needs them, and what they are of."""
    from loraq_sim.diffusion import (
        CALIBRATION_IMAGES,
        CALIBRATION_ROWS,
        CALIBRATION_SEED,
        capture_transformer,
    )
    from loraq_sim.time_steps import CALIBRATED_METHODS

    methods = {variant.options["method"] for variant in variants}
    for variant in variants:
        entries = getattr(variant.source, "layers", {}).values()
        methods |= {entry.method for entry in entries}
    needs_rows = any(_needs_rows(variant) for variant in variants)
    if not needs_rows and not methods & set(CALIBRATED_METHODS):
        return None, None
    settings = {
        **sampling,
        "images": min(CALIBRATION_IMAGES, sampling["images"]),
        "seed": sampling["seed"] + CALIBRATION_SEED,
    }
    told = (
        f"{CALIBRATION_ROWS} input rows at most, of {counted(settings['images'], 'image')} of "
        f"noise seed {settings['seed']}, none that is compared"
    )
    return capture_transformer(transformer, tokens=CALIBRATION_ROWS, **settings), told


def _needs_rows(variant: "ImageVariant") -> bool:
    """Whether a variant smooths, conditions, finishes, or deflates inputs, in any layer."""
    if any(variant.options[key] is not None for key in _OF_INPUTS):
        return True
    if isinstance(variant.source, PrecisionSplit):
        return variant.source.feedback is not None
    entries = getattr(variant.source, "layers", {}).values()
    return any(
        any(getattr(entry, key) is not None for key in _OF_INPUTS) or "~" in (entry.split or "")
        for entry in entries
    )


def _drawn(
    study: "ImageStudy", variants: "list[ImageVariant]", on_call: Any
) -> "tuple[list[dict[str, Any]], list[VariantImages]]":
    rows, drawn = [], []
    for variant in variants:
        try:
            drawn.append(study.run(variant, on_call=on_call))
            rows.append(drawn[-1].row)
        except Exception as error:
            row = {"split": variant.label, "method": variant.options["method"]}
            rows.append(row | {"status": "failed", "message": case_failure(error)})
    return rows, drawn


def _write(out: Path, study: "ImageStudy", drawn: "list[VariantImages]", checkpoint: Path) -> None:

    from loraq_sim.reporting.figures import save_figure
    from loraq_sim.reporting.layer_figures import sample_grid

    make_folder(out)
    grid = {"full precision": (study.reference, "")}
    # Any: to a type checker, one of the names could be an option of `savez_compressed`.
    arrays: dict[str, Any] = {"reference": study.reference}
    for found in drawn:
        label = f"{found.row['split']} {found.row['method']}"
        said = f"{found.row['psnr_db']:.1f} dB ± {found.row['psnr_std']:.1f}"
        if found.row["status"] == "overflow":
            said = "values are not finite"
        grid[label] = np.nan_to_num(found.images, nan=0.0, posinf=0.0, neginf=0.0), said
        arrays[label] = found.images
    sampling = study.sampling
    options = drawn[0].row
    chosen = [f"{key} {options[key]}" for key in ("smooth", *_CHOSEN) if options.get(key)]
    subtitle = ", ".join(
        (
            counted(sampling["steps"], "step"),
            f"guidance {sampling['guidance']:g}",
            counted(sampling["images"], "image"),
            *chosen,
            f"noise seed {sampling['seed']}; PSNR against full precision at the same noise",
        )
    )
    title = f"{checkpoint.name} on {study.accelerator.name}"
    save_figure(sample_grid(grid, title=title, subtitle=subtitle), out / "samples.png")
    with replaced_file(out / "images.npz") as file:
        np.savez_compressed(file, **arrays)
