"""``loraq-sim model``: what a quantized model holds, and its layers in the layouts of others."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import Force, OutFormat, OutputFormat, Quiet
from loraq_sim.cli.output import note, one_line_failures, print_json, print_table
from loraq_sim.dumps import read_layer_dump
from loraq_sim.errors import InputError, counted
from loraq_sim.reporting.tables import result_table

if TYPE_CHECKING:
    import numpy as np

    from loraq_sim.solvers import Solution

__all__ = ["Layout", "app", "read_solved"]

app = typer.Typer(no_args_is_help=True)

_INFO = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim model info runs/quantized.safetensors\n\n"
    "loraq-sim model info runs/nunchaku.safetensors --layout nunchaku"
)
_CONVERT = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim solve --layer-dump F --split W4A4+W16A16r32 --save runs/quantized.safetensors\n\n"
    "loraq-sim model convert runs/quantized.safetensors runs/nunchaku.safetensors --to nunchaku "
    "--layer-dump F\n\n"
    "loraq-sim model convert runs/deepcompressor runs/quantized.safetensors "
    "--from deepcompressor --to loraq\n\n"
    "loraq-sim model convert published.safetensors runs/layers.safetensors --from nunchaku "
    "--to layers\n\n"
    "loraq-sim model convert runs/quantized.safetensors runs/quantized.onnx --to onnx "
    "--split W4A4+W8A8@fp16r32 --hw aie2 --layer-dump F"
)


class Layout(StrEnum):
    """Whose keys and byte order a quantized model has."""

    LORAQ = "loraq"
    NUNCHAKU = "nunchaku"
    DEEPCOMPRESSOR = "deepcompressor"
    ONNX = "onnx"
    LAYERS = "layers"


@app.command("info", epilog=_INFO)
@one_line_failures
def info_command(
    source: Annotated[Path, typer.Argument(help="Quantized model: a file or a folder.")],
    layout: Annotated[Layout, typer.Option("--layout", help="Layout of SOURCE.")] = Layout.LORAQ,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """List the layers of a quantized model: shape, formats, rank and bytes."""

    solutions, _ = read_solved(source, layout)
    rows = [_facts(name, solutions[name]) for name in solutions]
    if output is OutputFormat.JSON:
        print_json(rows, {"path": str(source), "layers": rows})
    else:
        shown = [row | {"smoothed": "yes" if row["smoothed"] else ""} for row in rows]
        print_table(result_table(shown), output)


@app.command("convert", epilog=_CONVERT)
@one_line_failures
def convert_command(
    source: Annotated[Path, typer.Argument(help="Quantized model to read.")],
    target: Annotated[Path, typer.Argument(help="File (or, for deepcompressor, folder) to write.")],
    to: Annotated[Layout, typer.Option("--to", help="Layout of TARGET.")],
    origin: Annotated[Layout, typer.Option("--from", help="Layout of SOURCE.")] = Layout.LORAQ,
    layer_dump: Annotated[
        Path | None,
        typer.Option(
            "--layer-dump",
            help="Dump or checkpoint with the biases (zeros without); a nunchaku file also takes "
            "what is not quantized from it, and the config.json beside it.",
            metavar="FILE",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            metavar="SPLIT",
            help="What activations are rounded to in an ONNX graph, such as W4A4+W8A8@fp16r32.",
            show_default=False,
        ),
    ] = None,
    hw: Annotated[
        str | None,
        typer.Option(
            "--hw",
            metavar="NAME",
            help="Accelerator whose formats of P and y an ONNX graph has. "
            "Default: P as the branch, y in fp16.",
            show_default=False,
        ),
    ] = None,
    gelu_shift: Annotated[
        bool,
        typer.Option(
            "--gelu-shift/--no-gelu-shift",
            help="For nunchaku and deepcompressor: biases take back the 0.171875 that kernels of "
            "FLUX and Qwen-Image add to 4-bit inputs behind GELU.",
        ),
    ] = True,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Write a quantized model in the layout of another engine, or read one.

    nunchaku stores W4A4 in groups of 64, or NVFP4, with a 16-bit branch, deepcompressor the former;
    other formats and rotated layers are refused. An ONNX graph has each layer's data path, from
    NAME.x to NAME.y; `layers` is a dump of the weights that the model stands for.
    """

    if (to is Layout.ONNX) != (split is not None) or (hw is not None and split is None):
        raise InputError(
            "--split and --hw say how an ONNX graph rounds: give --split with --to onnx"
        )
    solutions, biases = read_solved(source, origin)
    if layer_dump is not None:
        biases = _biases(layer_dump, solutions)
    elif to is not Layout.LORAQ and not biases:
        note(f"{source} holds no biases: zeros are written; --layer-dump has them", quiet=quiet)
    others: dict[str, np.ndarray] = {}
    config: dict[str, object] = {}
    if to is Layout.NUNCHAKU and layer_dump is not None:
        others, config = _carried_along(layer_dump, solutions)
        if others:
            text = f"{counted(len(others), 'tensor', 'is')} not quantized and carried along"
            note(f"{text}, such as {next(iter(others)):.100}", quiet=quiet)
    shifts: dict[str, float] = {}
    if gelu_shift and to in (Layout.NUNCHAKU, Layout.DEEPCOMPRESSOR):
        from loraq_sim.nunchaku import gelu_shifts

        shifts = gelu_shifts(solutions)
    if shifts:
        text = f"inputs behind GELU are shifted by {next(iter(shifts.values())):g} in"
        note(f"{text} {counted(len(shifts), 'layer')}, such as {next(iter(shifts))}", quiet=quiet)
    if to is Layout.ONNX:
        _write_onnx(target, solutions, biases, str(split), hw, force=force)
    else:
        _write(target, to, solutions, biases, others, config, shifts, force=force)
    row = {"file": str(target), "layout": to.value, "layers": len(solutions)}
    row["bytes"] = sum(path.stat().st_size for path in _files(target))
    if output is OutputFormat.JSON:
        print_json([row], row)
    else:
        print_table(result_table([row], title=f"wrote {target}"), output)


def read_solved(
    source: Path, layout: Layout
) -> tuple["Mapping[str, Solution]", "Mapping[str, np.ndarray | None]"]:
    """Solutions and biases of a quantized model, by layer name.

    Raises
    ------
    InputError
        If the file is no such model, or of a layout that is only written.
    """
    if layout is Layout.LORAQ:
        from loraq_sim.quantized_model import read_quantized_model

        return read_quantized_model(source), {}
    from loraq_sim.nunchaku import read_deepcompressor, read_nunchaku

    if layout in (Layout.ONNX, Layout.LAYERS):
        raise InputError(
            f"{source}: {layout.value} is written, not read; `dump info` lists the weights"
        )
    if layout is Layout.DEEPCOMPRESSOR:
        return read_deepcompressor(source)
    left_out: list[str] = []
    found = read_nunchaku(source, left_out=left_out)
    if left_out:
        count = counted(len(left_out), "layer")
        note(f"left out: {count} of AWQ (weights alone), such as {left_out[0]:.100}", quiet=False)
    return found


def _write(
    target: Path,
    layout: Layout,
    solutions: "Mapping[str, Solution]",
    biases: "Mapping[str, np.ndarray | None]",
    others: "Mapping[str, np.ndarray]",
    config: Mapping[str, object],
    shifts: Mapping[str, float],
    *,
    force: bool,
) -> None:
    if layout is Layout.LORAQ:
        from loraq_sim.quantized_model import write_quantized_model

        write_quantized_model(target, solutions, overwrite=force)
        return
    from loraq_sim.nunchaku import write_deepcompressor, write_nunchaku

    if layout is Layout.LAYERS:
        from loraq_sim.dumps.kinds import kinds_of
        from loraq_sim.dumps.write import write_layer_dump
        from loraq_sim.layers import Layer

        kinds = kinds_of(solutions)
        layers = (
            Layer(name=name, weight=x.reconstruct(), bias=biases.get(name), kind=kinds[name])
            for name, x in solutions.items()
        )
        write_layer_dump(target, layers, dtype="bfloat16", overwrite=force)
        return
    if layout is Layout.DEEPCOMPRESSOR:
        write_deepcompressor(target, solutions, biases=biases, shifts=shifts, overwrite=force)
        return
    more: dict[str, Any] = {"others": others, "config": config, "shifts": shifts}
    write_nunchaku(target, solutions, biases=biases, **more, overwrite=force)


def _write_onnx(
    target: Path,
    solutions: "Mapping[str, Solution]",
    biases: "Mapping[str, np.ndarray | None]",
    split: str,
    hw: str | None,
    *,
    force: bool,
) -> None:
    import hwmodels
    from loraq_sim.machine import datapath_for
    from loraq_sim.nunchaku import write_onnx_model

    datapath = None if hw is None else datapath_for(hwmodels.load_accelerator(hw))
    write_onnx_model(target, solutions, split, biases=biases, datapath=datapath, overwrite=force)


def _carried_along(
    path: Path, solutions: "Mapping[str, Solution]"
) -> tuple[dict[str, "np.ndarray"], dict[str, object]]:
    """Tensors of a checkpoint that are not quantized, by name, and its ``config.json``."""
    from loraq_sim.dumps.checkpoint_folder import read_config

    dump = read_layer_dump(path)
    found = dump.others()
    for name in dump:
        if name not in solutions:
            layer = dump[name]
            found[f"{name}.weight"] = layer.weight
            if layer.bias is not None:
                found[f"{name}.bias"] = layer.bias
    return found, read_config(dump.config)


def _biases(path: Path, solutions: "Mapping[str, Solution]") -> dict[str, "np.ndarray | None"]:

    dump = read_layer_dump(path)
    absent = [name for name in solutions if name not in dump]
    if absent:
        raise InputError(
            f"{path}: has no layer {absent[0]!r} ({counted(len(absent), 'layer', 'is')} missing)"
        )
    biases = {}
    for name in solutions:
        bias, n = dump[name].bias, solutions[name].main.shape[0]
        if bias is not None and len(bias) != n:
            raise InputError(
                f"{path}: layer {name!r} has {counted(len(bias), 'output')}, the model {n}"
            )
        biases[name] = bias
    return biases


def _files(target: Path) -> list[Path]:
    return sorted(target.glob("*.pt")) if target.is_dir() else [target]


def _facts(name: str, solution: "Solution") -> dict[str, Any]:
    right = solution.right
    return {
        "layer": name,
        "n": solution.main.shape[0],
        "k": solution.main.shape[1],
        "main": str(solution.main.format),
        "branch": "" if right is None else str(right.format),
        "rank": solution.rank,
        "rotation": None if solution.rotation is None else f"hadamard:{solution.rotation}",
        "smoothed": solution.smooth is not None,
        "bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
    }
