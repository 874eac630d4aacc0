"""``loraq-sim dump``: what a layer dump holds; its other commands have files of their own."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli import dump_capture, dump_convert, dump_synth
from loraq_sim.cli.failures import SOME_FAILED, one_line_failures
from loraq_sim.cli.options import Layers, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import note, print_json, print_table
from loraq_sim.errors import InputError

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

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


# One line a command.
app.command("synth", epilog=dump_synth.EXAMPLES)(dump_synth.synth_command)
app.command("capture", epilog=dump_capture.EXAMPLES)(dump_capture.capture_command)
app.command("convert", epilog=dump_convert.EXAMPLES)(dump_convert.convert_command)

_META_WIDTH = 200


@app.callback()
def _group() -> None:
    """Look into layer dumps, make and convert them."""


@app.command("info", epilog=_EXAMPLES)
@one_line_failures
def info_command(
    file: Annotated[Path, typer.Argument(help="Layer dump: .pt, .safetensors or .npz.")],
    layers: Layers = None,
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
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.dumps.step_statistics import step_statistics
    from loraq_sim.dumps.summary import summarize
    from reports.tables import result_table

    if steps and not statistics:
        raise InputError("--steps reads the tensors: leave out --no-statistics")
    dump = read_layer_dump(file)
    if layers:
        dump = dump.select(listed(layers))
    rows = step_statistics(dump) if steps else summarize(dump, statistics=statistics)
    n_bad = sum(row["status"] != "ok" for row in rows)
    if output is OutputFormat.JSON:
        print_json({"file": str(file), "meta": dict(dump.meta), "rows": rows})
    else:
        shown = [name for name in (_SHOWN_OF_STEPS if steps else _SHOWN) if name in rows[0]]
        title = f"{file}: {len(dump)} layers{' at each time step' * steps}"
        columns = [*shown, "message"] if any(row["message"] for row in rows) else shown
        if steps and output is not OutputFormat.CSV:
            # As words: three digits, as of a measured number, could not tell steps apart.
            rows = [
                row | {"step": None if row["step"] is None else str(row["step"])} for row in rows
            ]
        print_table(result_table(rows, columns, title=title), output)
    for key, value in dump.meta.items():
        note(f"{key}: {_short(value)}", quiet=quiet or output is not OutputFormat.TABLE)
    if n_bad:
        # A layer that cannot be used has one row, of steps too.
        note(f"error: {n_bad} of {len(dump)} layers cannot be used", quiet=False)
        raise typer.Exit(SOME_FAILED if n_bad < len(rows) else 2)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _META_WIDTH else f"{text[: _META_WIDTH - 4]} ..."
