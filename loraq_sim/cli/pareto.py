"""``loraq-sim pareto``: the front of a result store, for any objectives."""

from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import OutFormat, OutputFormat, listed
from loraq_sim.cli.output import print_tables
from loraq_sim.cli.store_path import store_file
from loraq_sim.errors import InputError

__all__ = ["EXAMPLES", "pareto_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim pareto runs/demo\n\n"
    "loraq-sim pareto runs/demo --minimize output_error,weight_bytes\n\n"
    "loraq-sim pareto runs/demo --per-layer --format csv"
)


@one_line_failures
def pareto_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    minimize: Annotated[
        list[str] | None,
        typer.Option(
            "--minimize",
            metavar="COLUMN",
            help="Objectives, smaller is better; repeat or separate by commas. "
            "Default: output_error,latency_s.",
            show_default=False,
        ),
    ] = None,
    maximize: Annotated[
        list[str] | None,
        typer.Option(
            "--maximize",
            metavar="COLUMN",
            help="Objectives, larger is better.",
            show_default=False,
        ),
    ] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="One front per layer instead of the model's.")
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure",
            metavar="FILE",
            help="Draw the model's error against its first cost (.png, .svg or .pdf).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing figure.")] = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Print the rows that no other row beats in every objective."""
    from loraq_sim.pareto import mark_front, per_layer_front
    from loraq_sim.store import ResultStore
    from loraq_sim.totals import model_totals
    from reports.tables import front_table

    with ResultStore.open(store_file(store)) as opened:
        rows = opened.rows()
    goals = (
        listed(minimize) or (() if maximize else ("output_error", "latency_s")),
        listed(maximize),
    )
    if per_layer:
        if figure is not None:
            raise InputError("--figure draws the whole model; leave out --per-layer")
        front = per_layer_front(rows, *goals)
        print_tables([front_table(front, title="Pareto front of each layer")], output)
        return
    totals = mark_front(model_totals(rows), *goals, by=("dump", "accelerator"))
    if figure is not None:
        _draw(totals, goals[0], figure, force=force)
    front = [row for row in totals if row["pareto"]]
    print_tables([front_table(front, title="Pareto front of the model")], output)


def _draw(totals: list[dict], minimize: tuple[str, ...], path: Path, *, force: bool) -> None:
    from reports.figures import pareto_figure, save_figure

    if path.exists() and not force:
        raise InputError(f"{path} is there already; choose another name, or --force to replace it")
    errors = [name for name in minimize if name.endswith("error")]
    costs = [name for name in minimize if not name.endswith("error")]
    if not errors or not costs:
        raise InputError(
            "--figure needs an error and a cost among --minimize, "
            f"got {', '.join(minimize) or 'none'}"
        )
    save_figure(pareto_figure(totals, x=costs[0], y=errors[0]), path)
