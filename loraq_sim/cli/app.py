"""The ``loraq-sim`` program: the list of its commands."""

from typing import Annotated

import typer

from loraq_sim.cli import (
    allocate,
    cost,
    doctor,
    dump,
    emulate,
    explain,
    explore,
    hw,
    images,
    model,
    pareto,
    schema,
    solve,
    steps,
    stores,
    sweep,
    vectors,
)
from loraq_sim.cli.output import name_commands, set_debug, set_wide
from loraq_sim.version import __version__

__all__ = ["app"]

app = typer.Typer(
    name="loraq-sim",
    help="Error against cost of 4-bit + low-rank diffusion transformers on NPUs and GPUs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 ok, 1 some cases failed, 2 usage or bad input, 3 a threshold was missed, "
        "130 interrupted."
    ),
)

# One line a command.
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep_command)
app.command("solve", epilog=solve.EXAMPLES)(solve.solve_command)
app.command("emulate", epilog=emulate.EXAMPLES)(emulate.emulate_command)
app.command("images", epilog=images.EXAMPLES)(images.images_command)
app.command("cost", epilog=cost.EXAMPLES)(cost.cost_command)
app.command("pareto", epilog=pareto.EXAMPLES)(pareto.pareto_command)
app.command("report", epilog=stores.REPORT_EXAMPLES)(stores.report_command)
app.command("allocate", epilog=allocate.EXAMPLES)(allocate.allocate_command)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain_command)
app.command("explore", epilog=explore.EXAMPLES)(explore.explore_command)
app.command("steps", epilog=steps.EXAMPLES)(steps.steps_command)
app.command("compare", epilog=stores.COMPARE_EXAMPLES)(stores.compare_command)
app.command("merge", epilog=stores.MERGE_EXAMPLES)(stores.merge_command)
app.command("export", epilog=stores.EXPORT_EXAMPLES)(stores.export_command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor_command)
app.command("schema", epilog=schema.EXAMPLES)(schema.schema_command)
app.command("vectors", epilog=vectors.EXAMPLES)(vectors.vectors_command)
app.add_typer(dump.app, name="dump", help="Look into, make, convert and capture layer dumps.")
app.add_typer(model.app, name="model", help="Look into and convert quantized models.")
app.add_typer(hw.app, name="hw", help="Look into accelerator descriptions.")
name_commands(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"loraq-sim {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback instead of a one-line error.")
    ] = False,
    wide: Annotated[
        bool,
        typer.Option("--wide", help="Show all columns of tables, however narrow the terminal."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version
    set_debug(debug)
    set_wide(wide)
