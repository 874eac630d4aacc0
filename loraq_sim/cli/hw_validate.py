"""``loraq-sim hw validate``: predicted against measured GEMM times, row by row."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Force, OutFormat, OutputFormat, listed
from loraq_sim.cli.output import note, print_json, print_table, print_tables
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = ["EXAMPLES", "THRESHOLD_MISSED", "validate_command"]

THRESHOLD_MISSED = 3
EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw validate\n\n"
    "loraq-sim hw validate --hw aie2,aie2p --max-error 0.15 --format json\n\n"
    "loraq-sim hw validate --measured mine.csv --hw h100 --figure validation.png"
)
_SHOWN = (
    *("device", "kernel", "m", "n", "k", "out_bits", "tile_mkn", "measured_ms", "predicted_ms"),
    *("error", "bound"),
)


@one_line_failures
def validate_command(
    measured: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            metavar="FILE.csv",
            help="Measured rows: device, kernel, a_format, w_format, out_format, M, K, N, time_ms "
            "and, if known, tile_mkn. Default: the public rows that ship with the program.",
            show_default=False,
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            metavar="X",
            help="Exit with 3 if any row is off by more than this fraction of the measured time.",
            show_default=False,
        ),
    ] = None,
    hw: Annotated[
        list[str] | None,
        typer.Option(
            "--hw",
            metavar="NAME|FILE",
            help="Only these accelerators, and their aliases in the device column; repeatable.",
            show_default=False,
        ),
    ] = None,
    search_tiles: Annotated[
        bool,
        typer.Option("--search-tiles", help="Use the best tile found, not the one of the row."),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure",
            metavar="FILE",
            help="Draw predicted against measured as .png, .svg or .pdf.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Compare predicted with measured GEMM times, and fail where the model is too far off."""
    import hwmodels
    from reports.tables import result_table

    if max_error is not None and not max_error > 0:
        raise InputError(f"--max-error must be a positive fraction such as 0.15, got {max_error}")
    if figure is not None:
        refuse_existing(figure, overwrite=force)
    path = measured or hwmodels.MEASURED_CSV
    table = hwmodels.measured_rows(path)
    machines = [hwmodels.load_accelerator(n) for n in listed(hw) or hwmodels.list_accelerators()]
    rows = [row for machine in machines for row in _predict(machine, table, search_tiles)]
    if not rows:
        devices = ", ".join(sorted({row["device"] for row in table}))
        raise InputError(f"{path} has no row of the accelerators asked for; its devices: {devices}")
    if not hw:
        _note_strangers(table, machines)
    devices = hwmodels.summarize(rows)
    overheads = hwmodels.branch_overheads(rows)
    worst = max(device["worst_error"] for device in devices)
    if figure is not None:
        from loraq_sim.cli.hw_figure import validation_figure
        from reports.figures import save_figure

        note(f"wrote {save_figure(validation_figure(rows), figure)}")
    if output is OutputFormat.JSON:
        passed = max_error is None or worst <= max_error
        report = {"measured": str(path.name), "rows": rows, "devices": devices}
        report |= {"overheads": overheads, "max_error": max_error, "passed": passed}
        print_json(report)
    elif output is OutputFormat.CSV:
        print_table(result_table(rows), output)
    else:
        shown = result_table(rows, _SHOWN, title="Predicted and measured (error: of measured)")
        tables = [shown, result_table(devices, title="By device, absolute")]
        if overheads:
            tables.append(
                result_table(overheads, title="Overhead of the branch, of the plain time")
            )
        print_tables(tables, output)
    _fail_beyond(rows, max_error)


def _predict(
    machine: "Accelerator", table: list[dict[str, str]], search_tiles: bool
) -> list[dict[str, Any]]:
    import hwmodels

    return hwmodels.validate(machine, table, search_tiles=search_tiles)


def _note_strangers(table: list[dict[str, str]], machines: list[Any]) -> None:
    known = {name for machine in machines for name in (machine.name, *machine.aliases)}
    strangers = [row["device"] for row in table if row["device"].strip().lower() not in known]
    if strangers:
        names = ", ".join(dict.fromkeys(strangers))
        note(f"left out {len(strangers)} rows of devices without a description: {names}")


def _fail_beyond(rows: list[dict[str, Any]], max_error: float | None) -> None:
    beyond = [row for row in rows if max_error is not None and abs(row["error"]) > max_error]
    if not beyond:
        return
    row = max(beyond, key=lambda row: abs(row["error"]))
    note(
        f"error: {len(beyond)} of {len(rows)} rows are off by more than {max_error:g}; the worst: "
        f"{row['device']} {row['kernel']} {row['m']}x{row['n']}x{row['k']} {row['error']:+.3f}"
    )
    raise typer.Exit(THRESHOLD_MISSED)
