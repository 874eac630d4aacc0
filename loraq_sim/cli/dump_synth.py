"""``loraq-sim dump synth``: layers of a published model's true shapes, with drawn values."""

import time
from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.dump_written import layer_progress, print_written, seconds_since
from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force, Layers, NoProgress, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import note
from loraq_sim.errors import DumpError
from loraq_sim.files import refuse_existing

__all__ = ["EXAMPLES", "DumpOut", "StorageDtype", "synth_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump synth --model sana-1.6b --layers 'transformer_blocks.0.*' "
    "--out runs/sana.safetensors\n\n"
    "loraq-sim dump synth --model pixart-sigma --tokens 64 --out runs/pixart.safetensors\n\n"
    "loraq-sim dump synth --model pixart-sigma --all --layers 'transformer_blocks.*' "
    "--resolution 512 --out runs/pixart_blocks.safetensors"
)

DumpOut = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Dump to write: .safetensors, .npz or .pt.",
        show_default=False,
    ),
]
StorageDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="Storage of all tensors: float16, bfloat16 or float32. Default: as they are.",
        show_default=False,
    ),
]


@one_line_failures
def synth_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help="pixart-sigma, sana-0.6b, sana-1.6b, flux.1-dev or sd3.5-medium.",
            show_default=False,
        ),
    ],
    out: DumpOut,
    layers: Layers = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="T", help="Input rows of each layer, spread over 20 time steps."
        ),
    ] = 256,
    resolution: Annotated[
        int,
        typer.Option("--resolution", metavar="PIXELS", help="Image size: 1024 or 512."),
    ] = 1024,
    include_16_bit: Annotated[
        bool, typer.Option("--all", help="Also the layers that SVDQuant leaves at 16 bits.")
    ] = False,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="NAME", help="float16, bfloat16 or float32."),
    ] = "float16",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all values.")] = 0,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Write layers of a model's true shapes with the statistics of trained layers.

    Heavy-tailed weights with a decaying spectrum, inputs with outlier channels that drift over the
    time steps; each layer depends on the seed and its name alone.
    """
    from loraq_sim.dumps.convert import stream_dump
    from loraq_sim.dumps.synthesize import synthesize_layers

    refuse_existing(out, overwrite=force, error=DumpError)
    started = time.monotonic()
    dump = synthesize_layers(
        model,
        tokens=tokens,
        resolution=resolution,
        seed=seed,
        dtype=dtype,
        include_16_bit=include_16_bit,
    )
    if layers:
        dump = dump.select(listed(layers))
    n_values = sum(info.n * info.k for info in map(dump.info, dump))
    note(f"{model}: {len(dump)} layers, {n_values / 1e6:.4g} M weights", quiet=quiet)
    with layer_progress(list(dump), "drawing layers", quiet=quiet or no_progress) as on_layer:
        stream_dump(out, dump, overwrite=force, on_layer=on_layer)
    print_written(out, seconds=seconds_since(started), output=output)
