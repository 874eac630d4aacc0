"""``loraq-sim hw validate`` and ``hw fit``: the cost model against measured kernels.

``validate`` sets predicted against measured GEMM times: row by row, and by device, kernel family,
shape class and confidence; with ``--cross`` every row is predicted without its own source. ``fit``
fits one kernel family of a machine to rows of yours and says how far it can be trusted. What
``hw new --from-yaml`` says of the file of another tool is here, too.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwmodels
from loraq_sim.cli.cost import Sets, Variants, chosen_machines
from loraq_sim.cli.options import Force, OutFormat, OutputFormat, listed
from loraq_sim.cli.output import note, one_line_failures, print_json, print_table, print_tables, say
from loraq_sim.errors import InputError, counted
from loraq_sim.files import make_folder, refuse_existing, write_file
from loraq_sim.reporting.tables import result_table

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = [
    "FIT_EXAMPLES",
    "THRESHOLD_MISSED",
    "VALIDATE_EXAMPLES",
    "fit_command",
    "new_foreign",
    "validate_command",
]

VALIDATE_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw validate\n\n"
    "loraq-sim hw validate --hw aie2,aie2p --max-error 0.5 --format json\n\n"
    "loraq-sim hw validate --hw t4 --cross\n\n"
    "loraq-sim hw validate --measured mine.csv --hw h100 --figure validation.png"
)
FIT_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw fit hwmodels/measured_gemm.csv --hw t4 --kernel cublas\n\n"
    "loraq-sim hw fit mine.csv --hw ./my_npu.yaml --kernel my_kernels --out family.yaml"
)
THRESHOLD_MISSED = 3
_SHOWN = (
    *("device", "kernel_family", "confidence", "m", "n", "k", "main", "tile_mkn", "measured_ms"),
    *("predicted_ms", "error", "bound"),
)
_GROUPS = {"kernel_family": "kernel family", "shape": "shape class", "confidence": "confidence"}
MeasuredFile = Annotated[
    Path | None,
    typer.Option(
        "--measured",
        metavar="FILE.csv",
        help="Measured rows: device, kernel, a_format, w_format, out_format, M, K, N, time_ms and, "
        "if known, family, tile_mkn, weights (cold, warm, flushed), launch (stream, graph), notes "
        "and source. Default: the public rows that ship with the program.",
        show_default=False,
    ),
]


@one_line_failures
def validate_command(
    measured: MeasuredFile = None,
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
    variants: Variants = None,
    sets: Sets = None,
    cross: Annotated[
        bool,
        typer.Option(
            "--cross",
            help="Predict every row with families fitted without the rows of its source (slow: a "
            "fit for each source).",
        ),
    ] = False,
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
    if max_error is not None and not max_error > 0:
        raise InputError(f"--max-error must be a positive fraction such as 0.15, got {max_error}")
    if cross and search_tiles:
        raise InputError("--cross fits kernels to rows with their tiles; leave out --search-tiles")
    if variants and not hw:
        raise InputError("--variant is one of a machine: give --hw too")
    if figure is not None:
        refuse_existing(figure, overwrite=force)
    path = measured or hwmodels.MEASURED_CSV
    table = hwmodels.measured_rows(path)
    names = listed(hw) or tuple(hwmodels.list_accelerators())
    machines = [machine for _, machine in chosen_machines(names, variants, sets, None)]
    rows = [row for hw in machines for row in _predict(hw, table, search_tiles, cross=cross)]
    if not rows:
        known = ", ".join(sorted({row["device"] for row in table}))
        raise InputError(f"{path} has no row of the accelerators asked for; its devices: {known}")
    if not hw:
        _note_strangers(table, machines)
    devices = hwmodels.summarize(rows)
    groups = {key: hwmodels.summarize(rows, key) for key in _GROUPS}
    overheads = hwmodels.branch_overheads(rows)
    worst = max(device["worst_error"] for device in devices)
    if figure is not None:
        from loraq_sim.reporting.figures import save_figure
        from loraq_sim.reporting.machine_figures import validation_figure

        note(f"wrote {save_figure(validation_figure(rows), figure)}")
    if output is OutputFormat.JSON:
        passed = max_error is None or worst <= max_error
        report: dict[str, Any] = {"measured": path.name, "devices": devices}
        report |= {"groups": groups, "cross_validated": cross}
        report |= {"overheads": overheads, "max_error": max_error, "passed": passed}
        print_json(rows, report)
    elif output is OutputFormat.CSV:
        print_table(result_table(rows), output)
    else:
        how = "without rows of its source" if cross else "error: of measured"
        tables = [result_table(rows, _SHOWN, title=f"Predicted and measured ({how})")]
        tables.append(result_table(devices, title="By device, absolute"))
        for key, words in _GROUPS.items():
            tables.append(result_table(groups[key], title=f"By {words}, absolute"))
        if overheads:
            tables.append(
                result_table(overheads, title="Overhead of the branch, of the plain time")
            )
        print_tables(tables, output)
    _fail_beyond(rows, max_error)


@one_line_failures
def fit_command(
    measured: Annotated[
        Path, typer.Argument(metavar="FILE.csv", help="Measured rows, as for hw validate.")
    ],
    hw: Annotated[
        str, typer.Option("--hw", metavar="NAME|FILE", help="Accelerator the rows were taken on.")
    ],
    kernel: Annotated[
        str,
        typer.Option(
            "--kernel",
            metavar="NAME",
            help="Kernel family of its file; the numbers of its `set` are fitted.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.yaml",
            help="Write the family as an entry of the file's kernels list.",
            show_default=False,
        ),
    ] = None,
    variants: Variants = None,
    sets: Sets = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Fit a kernel family to measured rows, and say how far the fit can be trusted."""

    if out is not None:
        refuse_existing(out, overwrite=force)
    machines = chosen_machines([hw], variants, sets, None)
    if len(machines) != 1:
        raise InputError("hw fit takes one machine; give one --variant")
    machine = machines[0][1]
    rows = hwmodels.measured_rows(measured)
    fit = hwmodels.fit_family(machine, kernel, rows)
    text = hwmodels.family_text(hwmodels.fitted_family(machine, fit, rows))
    if out is not None:
        write_file(out, text)
        note(f"wrote {out}")
    values = [{"key": key, "value": value} for key, value in fit.values.items()]
    if output is OutputFormat.JSON:
        told = dataclasses.asdict(fit) | {"yaml": text}
        print_json(values, told | {"rows_fitted": told.pop("rows")})
        return
    facts = {key: value for key, value in dataclasses.asdict(fit).items() if key != "values"}
    facts |= {name: "-".join(map(str, dict.fromkeys(facts[name]))) for name in ("m", "n", "k")}
    facts["modes"] = ", ".join(fit.modes)
    tables = [
        result_table(values, title=f"{kernel} on {machine.name}: fitted values"),
        result_table(
            [facts], title="Rows, range and errors (held out: of rows the fit had not seen)"
        ),
    ]
    print_tables(tables, output)
    if fit.held_out_error is None:
        note(
            f"{counted(fit.rows, 'row')} of one source: too few to leave some out, so how far the "
            "fit holds on other calls is not known"
        )
    elif fit.sources == 1:
        note("all rows are of one source: how far the fit holds on others is not known")


def _predict(
    machine: "Accelerator", table: list[dict[str, str]], search_tiles: bool, *, cross: bool
) -> list[dict[str, Any]]:
    if cross:
        return hwmodels.cross_validate(machine, table)
    return hwmodels.validate(machine, table, search_tiles=search_tiles)


def _note_strangers(table: list[dict[str, str]], machines: list[Any]) -> None:
    known = {name for machine in machines for name in (machine.name, *machine.aliases)}
    strangers = [row["device"] for row in table if row["device"].strip().lower() not in known]
    if strangers:
        names = ", ".join(dict.fromkeys(strangers))
        note(f"left out {counted(len(strangers), 'row')} of devices without a description: {names}")


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


def new_foreign(
    path: Path, read: "hwmodels.ForeignMachine", *, force: bool, output: OutputFormat
) -> None:
    """Write the machine of another tool's file, and say what became of each of its keys."""
    refuse_existing(path, overwrite=force)
    make_folder(path.parent)
    write_file(path, hwmodels.sketch_text(read.machine))
    keys = [dict(key) for key in read.keys]
    taken = [key for key in keys if not key["becomes"].startswith("not taken")]
    n_assumed = len(hwmodels.assumed_keys(hwmodels.load_accelerator(path)))
    if output is OutputFormat.JSON:
        facts = {"path": str(path), "name": read.machine.name, "dialect": read.dialect}
        print_json(keys, facts | {"assumed_values": n_assumed})
        return
    title = f"What becomes of {len(taken)} of the {len(keys)} values of this {read.dialect} file"
    if output is not OutputFormat.TABLE:
        print_tables([result_table(keys, title=title)], output)
        return
    say(f"{path}\n")
    print_tables([result_table(taken, title=title)], output)
    rest = [key["key"] for key in keys if key not in taken]
    if rest:
        say(f"not taken, for no number here is like it: {', '.join(rest)}")
    note(f"{n_assumed} values are assumed, as the file says; replace those that you know")
    note(f"next: loraq-sim hw show {path}")
