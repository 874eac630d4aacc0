"""``loraq-sim cost``: memory, latency and energy of a shape or of a dump's layers, no arrays."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
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
_DEFAULT_SPLITS = ("W4A4", "W4A8", "W8A8", "W4A4+W16A16r32", "W4A4+W8A8@fp16r32")
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
    from loraq_sim.evaluate import cost_split
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    sizes = _sizes(listed(shape), layer_dump, listed(layers))
    accelerators = [hwmodels.load_accelerator(name) for name in listed(hw)]
    rows = []
    for name, (m, k, n) in sizes.items():
        for text in listed(splits) or _DEFAULT_SPLITS:
            split = parse_split(text, group=group)
            for accelerator in accelerators:
                rank, cost = cost_split(m, n, k, split, accelerator, fused=not unfused)
                rows.append(
                    {
                        "layer": name,
                        **{"m": m, "k": k, "n": n, "split": split.text, "rank": rank},
                        "accelerator": accelerator.name,
                        "weight_bytes": cost.weight_bytes,
                        "latency_s": cost.latency_s,
                        "cycles": cost.cycles,
                        "roofline_latency_s": cost.roofline_latency_s,
                        "energy_j": cost.energy_j,
                        "dram_bytes": cost.dram_bytes,
                        "utilization": cost.utilization,
                        "bound": cost.bound,
                        "parts": cost.parts,
                    }
                )
    shown = [name for name in _SHOWN if name != "layer" or layer_dump is not None]
    print_table(result_table(rows, shown, title="Cost of one call"), output)


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
