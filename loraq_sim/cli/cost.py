"""``loraq-sim cost``: memory, latency and energy of a shape or of a dump's layers, no arrays."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import case_failure, end_with, one_line_failures
from loraq_sim.cli.options import (
    Accelerators,
    Group,
    Layers,
    OutFormat,
    OutputFormat,
    Splits,
    Unfused,
    listed,
)
from loraq_sim.cli.output import print_table
from loraq_sim.errors import InputError

__all__ = ["EXAMPLES", "cost_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim cost --hw aie2 --shape 4096x1152x4608 --split W4A4 --split W4A4+W8A8r64\n\n"
    "loraq-sim cost --hw aie2,a100 --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8"
)
_COLUMNS = (
    *("weight_bytes", "latency_s", "cycles", "roofline_latency_s", "energy_j", "dram_bytes"),
    *("utilization", "bound", "parts"),
)
_SHOWN = (
    *("layer", "m", "k", "n", "split", "rank", "accelerator", "weight_bytes", "latency_s"),
    *("roofline_latency_s", "energy_j", "dram_bytes", "utilization", "bound"),
)


@one_line_failures
def cost_command(
    hw: Accelerators,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="MxKxN",
            help="GEMM size: rows x input features x output features; repeatable.",
            show_default=False,
        ),
    ] = None,
    layer_dump: Annotated[
        Path | None,
        typer.Option("--layer-dump", metavar="FILE", help="Cost the layers of this dump instead."),
    ] = None,
    layers: Layers = None,
    splits: Splits = None,
    group: Group = 64,
    unfused: Unfused = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Cost layers without solving or emulating anything."""
    import hwmodels
    from loraq_sim.machine import cost_split
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    sizes = _sizes(listed(shape), layer_dump, listed(layers))
    accelerators = [hwmodels.load_accelerator(name) for name in listed(hw)]
    chosen = [parse_split(t, group=group) for t in listed(splits) or _default_splits(sizes)]
    rows = []
    for name, (m, k, n) in sizes.items():
        for split in chosen:
            for accelerator in accelerators:
                row = {"layer": name, "m": m, "k": k, "n": n, "split": split.text}
                row |= {"accelerator": accelerator.name, "status": "ok", "message": ""}
                try:
                    rank, cost = cost_split(m, n, k, split, accelerator, fused=not unfused)
                except Exception as error:
                    row |= {"status": "failed", "message": f"{name}: {case_failure(error)}"}
                else:
                    row["rank"] = rank
                    row |= {column: getattr(cost, column) for column in _COLUMNS}
                rows.append(row)

    def show(has_messages: bool) -> None:
        columns = [name for name in _SHOWN if name != "layer" or layer_dump is not None]
        columns += ["message"] if has_messages else []
        print_table(result_table(rows, columns, title="Cost of one call"), output)

    end_with(rows, show)


def _default_splits(sizes: dict[str, tuple[int, int, int]]) -> list[str]:
    """A rank that suits the narrowest layer: 32, or an eighth of its smaller side."""
    rank = max(1, min(32, min(min(k, n) for _, k, n in sizes.values()) // 8))
    branches = (f"W16A16r{rank}", f"W8A8r{rank}", f"W4A8r{rank}")
    return ["W4A4", "W4A8", "W8A8", *(f"W4A4+{branch}" for branch in branches)]


def _sizes(
    shapes: tuple[str, ...], layer_dump: Path | None, layers: tuple[str, ...]
) -> dict[str, tuple[int, int, int]]:
    """(m, k, n) by name."""
    if bool(shapes) == (layer_dump is not None):
        raise InputError("give either --shape MxKxN or --layer-dump FILE")
    if shapes:
        return {text: _parse_shape(text) for text in shapes}
    from loraq_sim.dumps import read_layer_dump

    dump = read_layer_dump(layer_dump)
    if layers:
        dump = dump.select(layers)
    infos = [dump.info(name) for name in dump]
    return {i.name: (i.rows_per_call or i.tokens or 1, i.k, i.n) for i in infos}


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise InputError(
            f"--shape must be MxKxN with positive integers, such as 4096x1152x4608, got {text!r}"
        )
    m, k, n = (int(part) for part in parts)
    return m, k, n
