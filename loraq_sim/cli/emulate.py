"""``loraq-sim emulate``: what the accumulators of an accelerator do to a dump's layers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import hwmodels
from loraq_sim.cli.model import Layout, read_solved
from loraq_sim.cli.options import (
    AccBitsGrid,
    Accelerators,
    AccumulatorsGrid,
    ArrayGrid,
    Condition,
    Family,
    Finish,
    Group,
    LayerDumpFile,
    Layers,
    Lora,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    OverflowGrid,
    PFormat,
    Preset,
    ProductsPerAddGrid,
    Quiet,
    Rotate,
    Rows,
    Seed,
    Smooth,
    Splits,
    SynthesizeInputs,
    Tokens,
    ZeroPoint,
    datapath_overrides,
    listed,
    whole_numbers,
)
from loraq_sim.cli.output import (
    case_failure,
    end_with,
    one_line_failures,
    open_dump,
    print_table,
    tracked,
)
from loraq_sim.errors import InputError
from loraq_sim.reporting.tables import result_table
from loraq_sim.settings import datapath_grid, parse_rows, rows_of
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from loraq_sim.dumps import LayerDump
    from loraq_sim.layers import Layer
    from loraq_sim.solvers import Solution
    from loraq_sim.split import PrecisionSplit

__all__ = ["EXAMPLES", "emulate_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim emulate --hw aie2 --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8\n\n"
    "loraq-sim emulate --hw aie2 --layer-dump examples/minilm.pt --split W8A8 "
    "--acc-bits 18 --overflow saturate\n\n"
    "loraq-sim emulate --hw b200 --layer-dump F --quantized published.safetensors "
    "--layout nunchaku --split W4A4+W16A16r32"
)
_SHOWN = (
    *("layer", "kind", "split", "accelerator", "acc_bits", "overflow", "products_per_add"),
    *("output_error", "sqnr_db", "overflow_count", "first_overflow", "safe_acc_bits"),
    *("guaranteed_acc_bits", "seconds"),
)


@one_line_failures
def emulate_command(
    hw: Accelerators,
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    preset: Preset = "fast",
    family: Family = "int",
    group: Group = 64,
    tokens: Tokens = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    quantized: Annotated[
        Path | None,
        typer.Option(
            "--quantized",
            metavar="FILE",
            help="Take the solutions of this quantized model instead of solving; --split says what "
            "activations are rounded to.",
            show_default=False,
        ),
    ] = None,
    layout: Annotated[Layout, typer.Option("--layout", help="Layout of --quantized.")] = (
        Layout.LORAQ
    ),
    seed: Seed = 0,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    rows: Rows = None,
    array: ArrayGrid = None,
    acc_bits: AccBitsGrid = None,
    overflow: OverflowGrid = None,
    products_per_add: ProductsPerAddGrid = None,
    accumulators: AccumulatorsGrid = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Run layers through the emulated integer data path; count overflows and safe widths."""
    from loraq_sim.evaluate import evaluate_layer
    from loraq_sim.machine import datapath_for

    overrides = datapath_overrides(
        array=listed(array) or None,
        acc_bits=whole_numbers("--acc-bits", acc_bits),
        overflow=listed(overflow) or None,
        products_per_add=whole_numbers("--products-per-add", products_per_add),
        accumulators=whole_numbers("--accumulators", accumulators),
        p_format=p_format,
        zero_point=zero_point,
    )
    accelerators = [hwmodels.load_accelerator(name) for name in listed(hw)]
    paths = datapath_grid(overrides)
    for accelerator in accelerators:
        for path in paths:
            datapath_for(accelerator, path)
    chosen = [
        parse_split(text, family=family, group=group) for text in listed(splits) or ("W4A4", "W4A8")
    ]
    dump = open_dump(
        layer_dump, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    if layers:
        dump = dump.select(listed(layers))
    solutions: Mapping[str, Solution] = {}
    if quantized is not None:
        solutions, _ = read_solved(quantized, layout)
        names = [name for name in dump if name in solutions]
        if not names:
            first = next(iter(solutions))
            raise InputError(f"{quantized}: none of its layers, such as {first!r}, is in the dump")
        dump = dump.select(names)
    if all(_tokens(dump, name) is None for name in dump):
        raise InputError(
            f"{layer_dump}: holds no activations, so there is nothing to emulate; `dump capture` "
            "records them, and `solve` measures the weights alone"
        )
    cases = [
        (name, split, accelerator, name_of_method, path)
        for name in dump
        for split in chosen
        for name_of_method in listed(method) or ("loraq",)
        for accelerator in accelerators
        for path in paths
    ]
    counts = parse_rows(rows or ())
    found = []
    silent = quiet or no_progress
    for name, split, accelerator, name_of_method, path in tracked(cases, "emulating", quiet=silent):
        try:
            layer = dump[name]
            solution = solutions.get(name)
            if solution is not None:
                split = _split_of(layer, solution, split)
            row = evaluate_layer(
                layer,
                split,
                accelerator,
                seed=seed,
                method=name_of_method,
                preset=preset,
                tokens=tokens,
                smooth=smooth,
                rotate=rotate,
                condition=condition,
                finish=finish,
                rows=rows_of(layer.name, layer.kind, counts),
                datapath=path,
                solution=solution,
            )
        except Exception as error:
            row = {"layer": name, "split": split.text, "accelerator": accelerator.name}
            row |= {"method": name_of_method, "status": "failed", "message": case_failure(error)}
        found.append(row)
    title = f"{layer_dump}: emulated output"

    def show(has_messages: bool) -> None:
        columns = [*_SHOWN, "message"] if has_messages else list(_SHOWN)
        if any(row.get("clipped_count") for row in found):
            columns[-1:-1] = ["clipped_count", "status"]
        print_table(result_table(found, columns, title=title), output)

    end_with(found, show)


def _tokens(dump: "LayerDump", name: str) -> int | None:
    try:
        return dump.info(name).tokens
    except InputError:
        # Such a layer gets a failed row of its own.
        return 0


def _split_of(layer: "Layer", solution: "Solution", split: "PrecisionSplit") -> "PrecisionSplit":
    """The split with the stored formats and the rank of a solution.

    Raises
    ------
    InputError
        If the solution is of another shape, or only one of the two has a branch.
    """
    if solution.main.shape != layer.weight.shape:
        raise InputError(
            f"layer {layer.name!r}: the solution is of shape {solution.main.shape}, the weight "
            f"{layer.weight.shape}"
        )
    if (solution.right is not None) != split.has_branch:
        has = "has a" if solution.right is not None else "has no"
        raise InputError(f"layer {layer.name!r}: the solution {has} branch, unlike {split.text}")
    if solution.right is None:
        return replace(split, main_weight=solution.main.format)
    return replace(
        split,
        main_weight=solution.main.format,
        branch_weight=solution.right.format,
        rank=solution.rank,
    )
