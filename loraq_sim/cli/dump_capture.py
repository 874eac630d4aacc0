"""``loraq-sim dump capture``: weights and sampled inputs of a torch model while it runs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraq_sim.cli.dump_synth import DumpOut, StorageDtype
from loraq_sim.cli.dump_written import layer_progress, print_written, seconds_since
from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force, Layers, NoProgress, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import note
from loraq_sim.errors import DumpError
from loraq_sim.files import refuse_existing

if TYPE_CHECKING:
    from loraq_sim.dumps.capture import CaptureSource

__all__ = ["EXAMPLES", "capture_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump capture examples/capture_entry.py:two_layers --out runs/two_layers.safetensors"
    "\n\n"
    "loraq-sim dump capture examples/tiny_pixart --steps 25 --images 10 --guidance 3 "
    "--out runs/tiny.safetensors\n\n"
    "loraq-sim dump capture pixart_folder --layers 'transformer_blocks.*' --tokens 256 "
    "--dtype float16 --out runs/pixart.safetensors\n\n"
    "A Python entry point takes no argument and returns (model, calls): a torch module, and an "
    "iterable of (time step, inputs) with a dict, tuple or tensor for each model call; a generator "
    "is sent the model's output. See examples/capture_entry.py."
)


@one_line_failures
def capture_command(
    source: Annotated[
        str,
        typer.Argument(
            help="module:function or file.py:function of your own, or the folder of a diffusers "
            "PixArt or SANA transformer (needs loraq-sim\\[diffusion])."
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
        int, typer.Option("--steps", metavar="N", help="Denoising steps (folders only).")
    ] = 20,
    images: Annotated[
        int, typer.Option("--images", metavar="N", help="Images denoised at once (folders only).")
    ] = 2,
    guidance: Annotated[
        float, typer.Option("--guidance", metavar="X", help="Guidance scale (folders only).")
    ] = 4.5,
    captions: Annotated[
        Path | None,
        typer.Option(
            "--captions",
            metavar="FILE",
            help="Text embeddings (captions, tokens, channels) as safetensors, the unconditional "
            "one last (folders only). Default: captions.safetensors of the folder, else random.",
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
    """Run a model over its time steps and write every Linear and 1x1 convolution with its inputs.

    Inputs are sampled uniformly over all calls; layers that read the same tensor store it once. The
    dump records the time step of every row.
    """
    from loraq_sim.dumps.capture import capture_layers
    from loraq_sim.dumps.convert import stream_dump

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
        found = _load_entry(source, seed)
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
    calls, values = dump.meta["model_calls"], dump.meta["time_steps"]["values"]
    note(f"{len(dump)} layers ran in {calls} calls over {len(values)} time steps", quiet=quiet)
    if dump.skipped:
        first = next(iter(dump.skipped))
        note(f"{len(dump.skipped)} layers did not run, such as {first}", quiet=quiet)
    with layer_progress(list(dump), "writing layers", quiet=silent) as on_layer:
        stream_dump(out, dump, dtype=dtype, overwrite=force, on_layer=on_layer)
    print_written(out, seconds=seconds_since(started), output=output)


def _load_entry(source: str, seed: int) -> "CaptureSource":
    from loraq_sim.dumps.capture_entry import load_entry

    if ":" not in source:
        raise DumpError(f"{source}: no such folder, and no entry point such as my_model.py:calls")
    return load_entry(source, seed=seed)
