"""``loraq-sim vectors``: test vectors and a testbench for a tile of a real layer."""

import enum
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import hwmodels
from loraq_sim.cli.options import (
    AccBits,
    Accumulators,
    Condition,
    Family,
    Finish,
    Force,
    Group,
    LayerDumpFile,
    Lora,
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
    SynthesizeInputs,
    Tokens,
    ZeroPoint,
    datapath_overrides,
    sizes_of,
)
from loraq_sim.cli.output import note, one_line_failures, open_dump, print_table
from loraq_sim.errors import InputError, counted
from loraq_sim.reporting.tables import result_table
from loraq_sim.solvers import METHODS
from loraq_sim.version import __version__

__all__ = ["EXAMPLES", "vectors_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim vectors --hw aie2 --layer-dump examples/tiny_pixart.pt "
    "--layer transformer_blocks.0.attn1.to_q --split W4A4+W8A8r8 --out runs/vectors\n\n"
    "loraq-sim vectors --hw aie2 --layer-dump examples/minilm.pt "
    "--layer encoder.layer.2.attention.self.query --split W8A8 --tile 8x64x8 --acc-bits 16 "
    "--overflow saturate --out runs/saturating"
)
_DEFAULT_TILE = (16, 16, 128)


class Part(enum.StrEnum):
    """Which GEMM of the layer."""

    MAIN = "main"
    DOWN = "down"
    UP = "up"
    FEEDBACK_DOWN = "feedback_down"
    FEEDBACK_BACK = "feedback_back"
    FEEDBACK_UP = "feedback_up"


@one_line_failures
def vectors_command(
    layer_dump: LayerDumpFile,
    layer: Annotated[
        str,
        typer.Option(
            "--layer", metavar="NAME", help="Name of one layer of the dump.", show_default=False
        ),
    ],
    hw: Annotated[
        str,
        typer.Option(
            "--hw", metavar="NAME|FILE", help="Accelerator name or YAML file.", show_default=False
        ),
    ],
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="SPLIT",
            help="Precision split such as W4A4 or W4A4+W8A8r16.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="Folder of the files.", show_default=False),
    ],
    part: Annotated[
        Part,
        typer.Option(
            "--part",
            help="GEMM: main branch, X R^T of the branch (down) or P L^T (up); of a residual input "
            "X V^T (feedback_down), P_f V (feedback_back) or P_f L_f^T (feedback_up).",
        ),
    ] = Part.MAIN,
    tile: Annotated[
        str | None,
        typer.Option(
            "--tile",
            metavar="m=M,n=N,k=K|MxKxN",
            help="First rows, columns and products taken. Default: m=16,n=16,k=128, or less.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", metavar="NAME", help=f"Solver: {', '.join(METHODS)}."),
    ] = "loraq",
    preset: Preset = "fast",
    family: Family = "int",
    group: Group = 64,
    tokens: Tokens = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    seed: Seed = 0,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    acc_bits: AccBits = None,
    overflow: Overflow = None,
    products_per_add: ProductsPerAdd = None,
    accumulators: Accumulators = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    array: Annotated[
        str | None,
        typer.Option(
            "--array",
            metavar="NAME",
            help="Array preset instead of the accelerator's own: its sums, its requantizer and "
            "where it corrects zero points (an unknown name lists them all).",
            show_default=False,
        ),
    ] = None,
    out_bits: Annotated[
        int, typer.Option("--out-bits", metavar="N", help="Width of an output, 2 to 32 bits.")
    ] = 8,
    shift: Annotated[
        int | None,
        typer.Option(
            "--shift",
            metavar="S",
            help="Right shift, -4 to 59 bits. Default: the smallest that clamps nothing.",
            show_default=False,
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            metavar="MODE",
            help="Rounding mode such as conv_even or floor. Default: the accelerator's.",
            show_default=False,
        ),
    ] = None,
    saturation: Annotated[
        str | None,
        typer.Option(
            "--saturation",
            metavar="MODE",
            help="saturate, symmetric or none. Default: the accelerator's.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Write operands, accumulators and outputs of a tile as hex, with a runnable testbench."""
    from loraq_sim.emulator.mac_array import MacArray
    from loraq_sim.emulator.presets import array_preset
    from loraq_sim.emulator.vector_files import write_vectors
    from loraq_sim.emulator.vectors import SrsSetting, gemm_operands, make_vectors
    from loraq_sim.evaluate import sample_rows, solve_case, transform_columns
    from loraq_sim.machine import datapath_for
    from loraq_sim.settings import CaseSettings

    accelerator = hwmodels.load_accelerator(hw)
    named = None if array is None else array_preset(array)
    if named is not None and named.requantize != "srs":
        _refuse_srs_options(named.name, named.requantize, shift, rounding, saturation)
    overrides = datapath_overrides(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=products_per_add,
        accumulators=accumulators,
        p_format=p_format,
        zero_point=zero_point or (named.zero_point if named else None),
    )
    if named is not None:
        overrides["array"] = named.name
    datapath = datapath_for(accelerator, overrides)
    if not isinstance(datapath.mac, MacArray):
        where = f"--array {named.name}" if named else f"--hw {hw}"
        raise InputError(
            f"{where}: {datapath.mac} has two levels, and vectors have the sums of one; "
            "choose another array"
        )
    settings = CaseSettings.of(
        split, family=family, group=group, method=method, preset=preset, seed=seed, smooth=smooth,
        rotate=rotate, condition=condition, finish=finish,
    )  # fmt: skip
    chosen = settings.split
    wanted = None if tile is None else sizes_of("--tile", tile)
    dump = open_dump(
        layer_dump, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    loaded = dump[layer]
    x = sample_rows(loaded.activations, tokens)
    if x is None:
        raise InputError(f"layer {layer!r} of {layer_dump} has no activations to take codes from")
    solution = solve_case(loaded, settings, accelerator=accelerator)
    run_split = chosen.for_layer(loaded, solution)
    operands = gemm_operands(part.value, x, solution, run_split, datapath)
    (m, k), n = operands[0].shape, operands[1].shape[0]
    setting = SrsSetting(
        out_bits=out_bits,
        shift=shift,
        rounding=rounding or (named or accelerator.datapath).rounding,
        saturation=saturation or (named or accelerator.datapath).saturation,
    )
    most_m, most_n, most_k = _DEFAULT_TILE
    taken = wanted or (min(most_m, m), min(most_n, n), min(most_k, k))
    vectors = make_vectors(
        *operands, taken, datapath.mac, setting, zero_point=datapath.zero_point, preset=named
    )
    facts = {
        "title": f"{layer}, {part.value} GEMM of {chosen.text} on {accelerator.name}",
        "dump": layer_dump.name,
        "dump_sha256": dump.digest(),
        "layer": layer,
        "layer_sha256": loaded.digest(),
        "part": part.value,
        "gemm": {"m": m, "k": k, "n": n},
        "split": chosen.text,
        "activation_format": str(operands[0].format),
        "weight_format": str(operands[1].format),
        "rank": solution.rank,
        "feedback_rank": solution.feedback_rank,
        **transform_columns(settings, solution),
        "hadamard_block": solution.rotation,
        "is_smoothed": solution.smooth is not None,
        "method": solution.method,
        "preset": preset,
        "seed": seed,
        "tokens": len(x),
        "inputs": loaded.inputs,
        "accelerator": accelerator.name,
        "array": None if named is None else named.name,
        "datapath_overrides": overrides,
        "versions": _versions(),
    }
    manifest = write_vectors(vectors, out, facts, force=force)
    print_table(_file_table(manifest, result_table), output)
    _say_how_to_run(manifest, out, quiet=quiet)


def _file_table(manifest: dict[str, Any], result_table: Any) -> Any:
    rows = [
        {
            "file": name,
            "what": entry["what"],
            "shape": "x".join(str(size) for size in entry.get("shape", [])),
            "words": entry.get("words"),
            "bits": entry.get("bits"),
            "sha256": entry["sha256"],
        }
        for name, entry in manifest["files"].items()
    ]
    shown = ["file", "what", "shape", "words", "bits"]
    return result_table(rows, shown, title=manifest["source"]["title"])


def _say_how_to_run(manifest: dict[str, Any], out: Path, *, quiet: bool) -> None:
    counts = manifest["counts"]
    how, where = "a scale for each column from its largest sum", "at an end of their range"
    if "srs" in manifest:
        how = f"shift {manifest['srs']['shift']} ({manifest['srs']['shift_reason']})"
        where = "out of range"
    note(
        f"{counted(counts['overflows'], 'accumulator overflow')}, "
        f"safe width {counts['safe_acc_bits']} bits; {how}, "
        f"{counted(counts['outputs_out_of_range'], 'output')} {where}",
        quiet=quiet,
    )
    if "simulate" in manifest:
        note(f"simulate: cd {out} && {' && '.join(manifest['simulate'])}", quiet=quiet)
    else:
        note(f"testbench: {manifest['testbench']}", quiet=quiet)


def _refuse_srs_options(name: str, rule: str, *values: object) -> None:
    for option, value in zip(("--shift", "--rounding", "--saturation"), values, strict=True):
        if value is not None:
            raise InputError(
                f"{option} {value}: array {name} requantizes by {rule}, which takes none; drop it"
            )


def _versions() -> dict[str, str]:

    return {
        "loraq_sim": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
