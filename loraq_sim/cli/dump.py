"""``loraq-sim dump``: what a layer dump holds, and how to make one.

``info`` reads a dump's directory. ``convert`` writes another file format or storage dtype.
``capture`` samples weights and inputs of a torch model while it runs. ``synth`` draws layers of a
published model's true shapes with the statistics of trained ones.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import (
    Captions,
    Force,
    Layers,
    Lora,
    NoProgress,
    OutFormat,
    OutputFormat,
    Quiet,
    SynthesizeInputs,
    listed,
)
from loraq_sim.cli.output import (
    SOME_FAILED,
    layer_progress,
    note,
    one_line_failures,
    open_dump,
    print_json,
    print_table,
    print_written,
    seconds_since,
)
from loraq_sim.dumps import read_layer_dump
from loraq_sim.dumps.kinds import list_models
from loraq_sim.dumps.steps import step_statistics, summarize
from loraq_sim.dumps.write import convert_dump, stream_dump
from loraq_sim.errors import DumpError, InputError, counted
from loraq_sim.files import refuse_existing
from loraq_sim.reporting.tables import result_table

if TYPE_CHECKING:
    from loraq_sim.dumps.capture import CaptureSource

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
_SYNTH_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump synth --model sana-1.6b --layers 'transformer_blocks.0.*' "
    "--out runs/sana.safetensors\n\n"
    "loraq-sim dump synth --model pixart-sigma --tokens 64 --out runs/pixart.safetensors\n\n"
    "loraq-sim dump synth --model pixart-sigma --all --layers 'transformer_blocks.*' "
    "--resolution 512 --out runs/pixart_blocks.safetensors"
)
_CAPTURE_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump capture examples/capture_entry.py:two_layers --out runs/two_layers.safetensors"
    "\n\n"
    "loraq-sim dump capture examples/tiny_pixart --steps 25 --images 10 --guidance 3 "
    "--out runs/tiny.safetensors\n\n"
    "loraq-sim dump capture pixart_folder --layers 'transformer_blocks.*' --tokens 256 "
    "--dtype float16 --out runs/pixart.safetensors\n\n"
    "A Python entry point takes no argument and returns (model, calls): a torch module, and an "
    "iterable of (time step, inputs) with a dict, tuple or tensor for each model call; a generator "
    "is sent the model's output. Or (model, draw), as images takes it: a generator function of "
    "steps, images, guidance, seed and first. See examples/capture_entry.py."
)
_CONVERT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump convert examples/tiny_pixart.pt runs/tiny_pixart.safetensors\n\n"
    "loraq-sim dump convert examples/minilm.pt runs/ffn.npz --layers 'ffn_*' --dtype float32"
)
_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump info examples/tiny_pixart.pt\n\n"
    "loraq-sim dump info examples/minilm.pt --layers 'ffn_*' --format json\n\n"
    "loraq-sim dump info examples/tiny_pixart.pt --layers ffn_down --steps"
)
_SHOWN = (
    *("layer", "kind", "n", "k", "tokens", "dtype", "bytes"),
    *("weight_std", "weight_max_over_std", "weight_kurtosis"),
    *("activation_rms", "activation_outlier_ratio"),
)
_SHOWN_OF_STEPS = (
    *("layer", "step", "rows", "rms", "amax", "channel_amax_ratio", "kurtosis"),
    "first_step_correlation",
)
_META_WIDTH = 200
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


@app.callback()
def _group() -> None:
    """Look into layer dumps, make and convert them."""


@app.command("synth", epilog=_SYNTH_EXAMPLES)
@one_line_failures
def synth_command(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="NAME",
            help=f"{', '.join(list_models())}.",
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
    note(f"{model}: {counted(len(dump), 'layer')}, {n_values / 1e6:.4g} M weights", quiet=quiet)
    with layer_progress(list(dump), "drawing layers", quiet=quiet or no_progress) as on_layer:
        stream_dump(out, dump, overwrite=force, on_layer=on_layer)
    print_written(out, seconds=seconds_since(started), output=output)


# One line a command.
app.command("synth", epilog=_SYNTH_EXAMPLES)(synth_command)


@app.command("capture", epilog=_CAPTURE_EXAMPLES)
@one_line_failures
def capture_command(
    source: Annotated[
        str,
        typer.Argument(
            help="module:function or file.py:function of your own, or the folder of a diffusers "
            "transformer or U-Net: PixArt, SANA, FLUX, SD3, Qwen-Image, Wan, DiT, SD and SDXL "
            "(needs loraq-sim\\[diffusion])."
        ),
    ],
    out: DumpOut,
    layers: Layers = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", metavar="T", help="Rows kept of each input, sampled over all calls."
        ),
    ] = 256,
    steps: Annotated[
        int,
        typer.Option(
            "--steps", metavar="N", help="Denoising steps (folders, pipelines and own loops)."
        ),
    ] = 20,
    images: Annotated[
        int,
        typer.Option(
            "--images", metavar="N", help="Images denoised at once (folders and own loops)."
        ),
    ] = 2,
    guidance: Annotated[
        float,
        typer.Option("--guidance", metavar="X", help="Guidance scale (folders and own loops)."),
    ] = 4.5,
    captions: Captions = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Prompts, one a line, that a pipeline of an entry point is called with.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Torch device (folders only).")
    ] = "cpu",
    dtype: StorageDtype = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of noise and sample.")] = 0,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Run a model over its time steps and write every weight that it multiplies, with its inputs.

    Linear layers, convolutions (as the GEMMs of im2col, with their stride and padding), fused
    attention projections and experts.

    Inputs are sampled uniformly over all calls; layers that read the same tensor store it once. The
    dump records the time step of every row.
    """
    from loraq_sim.dumps.capture import capture_layers

    refuse_existing(out, overwrite=force, error=DumpError)
    started = time.monotonic()
    if Path(source).is_dir():
        from loraq_sim.dumps.capture_diffusers import load_diffusers_folder

        found = load_diffusers_folder(
            Path(source),
            steps=steps,
            images=images,
            guidance=guidance,
            captions=captions,
            seed=seed,
            device=device,
        )
    else:
        if captions is not None:
            raise InputError(f"--captions are for a folder; {source} draws with what it has")
        options = {"steps": steps, "images": images, "guidance": guidance}
        found = _load_entry(source, seed, prompts, options)
    silent = quiet or no_progress
    names = [f"call {i}" for i in range(found.n_calls or 0)]
    with layer_progress(names, "running the model", quiet=silent) as on_call:
        dump = capture_layers(
            found,
            tokens=tokens,
            patterns=listed(layers),
            seed=seed,
            on_call=lambda: on_call(""),
        )
    recorded: Any = dump.meta["time_steps"]
    calls: Any = dump.meta["model_calls"]
    ran = f"{counted(len(dump), 'layer')} ran in {counted(calls, 'call')}"
    note(f"{ran} over {counted(len(recorded['values']), 'time step')}", quiet=quiet)
    if dump.left_out:
        note(dump.left_out, quiet=quiet)
    if dump.skipped:
        first = next(iter(dump.skipped))
        note(f"{counted(len(dump.skipped), 'layer')} did not run, such as {first}", quiet=quiet)
    with layer_progress(list(dump), "writing layers", quiet=silent) as on_layer:
        stream_dump(out, dump, dtype=dtype, overwrite=force, on_layer=on_layer)
    print_written(out, seconds=seconds_since(started), output=output)


def _load_entry(
    source: str, seed: int, prompts: Path | None, options: dict[str, Any]
) -> "CaptureSource":
    from loraq_sim.dumps.capture import load_entry

    texts: list[str] = []
    if prompts is not None:
        try:
            texts = [line for line in prompts.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise InputError(f"--prompts {prompts}: cannot be read: {error}") from None
        if not texts:
            raise InputError(f"--prompts {prompts}: holds no prompt; write one on each line")

    if ":" not in source:
        raise DumpError(f"{source}: no such folder, and no entry point such as my_model.py:calls")
    return load_entry(source, seed=seed, prompts=texts, **options)


@app.command("convert", epilog=_CONVERT_EXAMPLES)
@one_line_failures
def convert_command(
    source: Annotated[Path, typer.Argument(help="Dump or checkpoint to read: a file or folder.")],
    target: Annotated[Path, typer.Argument(help="Dump to write; its suffix chooses the format.")],
    layers: Layers = None,
    dtype: StorageDtype = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens", metavar="T", help="Rows that --synthesize-inputs draws. Default: 256."
        ),
    ] = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Copy a dump to another format; values, names, roles and shared inputs are kept."""

    refuse_existing(target, overwrite=force, error=DumpError)
    started = time.monotonic()
    if tokens is not None and not synthesize_inputs:
        raise InputError("--tokens says how many rows --synthesize-inputs draws: give that too")
    drawn = synthesize_inputs and (tokens or True)
    dump = open_dump(
        source, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    patterns = listed(layers)
    names = list(dump.select(patterns) if patterns else dump)
    if dump.skipped:
        note(f"left behind: {counted(len(dump.skipped), 'tensor')} of no linear layer", quiet=quiet)
    with layer_progress(names, "converting", quiet=quiet or no_progress) as on_layer:
        convert_dump(
            *(source, target),
            dtype=dtype,
            patterns=patterns,
            synthesize_inputs=drawn,
            lora=lora or (),
            overwrite=force,
            on_layer=on_layer,
        )
    print_written(target, seconds=seconds_since(started), output=output)


@app.command("info", epilog=_EXAMPLES)
@one_line_failures
def info_command(
    file: Annotated[Path, typer.Argument(help="Layer dump or checkpoint: a file or folder.")],
    layers: Layers = None,
    lora: Lora = None,
    statistics: Annotated[
        bool, typer.Option("--statistics/--no-statistics", help="Read the tensors themselves.")
    ] = True,
    steps: Annotated[
        bool,
        typer.Option("--steps", help="Activation statistics of each layer at each time step."),
    ] = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """List layers, shapes, kinds, tokens and weight statistics of a dump, or its time steps."""

    if steps and not statistics:
        raise InputError("--steps reads the tensors: leave out --no-statistics")
    dump = read_layer_dump(file, lora=lora or ())
    if layers:
        dump = dump.select(listed(layers))
    rows = step_statistics(dump) if steps else summarize(dump, statistics=statistics)
    n_bad = sum(row["status"] != "ok" for row in rows)
    if output is OutputFormat.JSON:
        print_json(rows, {"file": str(file), "meta": dict(dump.meta)})
    else:
        shown = [name for name in (_SHOWN_OF_STEPS if steps else _SHOWN) if name in rows[0]]
        title = f"{file}: {counted(len(dump), 'layer')}{' at each time step' * steps}"
        columns = [*shown, "message"] if any(row["message"] for row in rows) else shown
        if steps and output is not OutputFormat.CSV:
            # As words: three digits, as of a measured number, could not tell steps apart.
            rows = [
                row | {"step": None if row["step"] is None else str(row["step"])} for row in rows
            ]
        print_table(result_table(rows, columns, title=title), output)
    for said in filter(None, (dump.left_out, dump.inputs_note)):
        note(said, quiet=quiet)
    for key, value in dump.meta.items():
        note(f"{key}: {_short(value)}", quiet=quiet or output is not OutputFormat.TABLE)
    if n_bad:
        # A layer that cannot be used has one row, of steps too.
        note(f"error: {n_bad} of {counted(len(dump), 'layer')} cannot be used", quiet=False)
        raise typer.Exit(SOME_FAILED if n_bad < len(rows) else 2)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _META_WIDTH else f"{text[: _META_WIDTH - 4]} ..."
