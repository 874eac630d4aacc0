"""``loraq-sim dump convert``: a dump in another file format or storage dtype."""

import time
from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.dump_synth import StorageDtype
from loraq_sim.cli.dump_written import layer_progress, print_written, seconds_since
from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force, Layers, NoProgress, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import note
from loraq_sim.errors import DumpError
from loraq_sim.files import refuse_existing

__all__ = ["EXAMPLES", "convert_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim dump convert examples/tiny_pixart.pt runs/tiny_pixart.safetensors\n\n"
    "loraq-sim dump convert examples/minilm.pt runs/ffn.npz --layers 'ffn_*' --dtype float32"
)


@one_line_failures
def convert_command(
    source: Annotated[Path, typer.Argument(help="Dump to read: .pt, .safetensors or .npz.")],
    target: Annotated[Path, typer.Argument(help="Dump to write; its suffix chooses the format.")],
    layers: Layers = None,
    dtype: StorageDtype = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Copy a dump to another format; values, names, roles and shared inputs are kept."""
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.dumps.convert import convert_dump

    refuse_existing(target, overwrite=force, error=DumpError)
    started = time.monotonic()
    dump = read_layer_dump(source)
    patterns = listed(layers)
    names = list(dump.select(patterns) if patterns else dump)
    if dump.skipped:
        note(f"{len(dump.skipped)} tensors that are no linear layer stay behind", quiet=quiet)
    with layer_progress(names, "converting", quiet=quiet or no_progress) as on_layer:
        convert_dump(
            source, target, dtype=dtype, patterns=patterns, overwrite=force, on_layer=on_layer
        )
    print_written(target, seconds=seconds_since(started), output=output)
