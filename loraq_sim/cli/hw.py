"""``loraq-sim hw``: the accelerators, what is known of them, and how far to trust it.

``list``, ``show`` and ``schema`` describe machines and their files. ``explain`` says where each
second, byte and joule of one layer call comes from. ``validate`` sets predicted against measured
GEMM times, row by row, and draws them on logarithmic axes.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwmodels
from loraq_sim.cli.cost import Sets, Variants, checked_schedule, chosen_machines
from loraq_sim.cli.options import (
    Family,
    Force,
    Group,
    OutFormat,
    OutputFormat,
    Rotate,
    SharedBy,
    Smooth,
    Splits,
    listed,
    sizes_of,
)
from loraq_sim.cli.output import (
    note,
    one_line_failures,
    print_json,
    print_table,
    print_tables,
    say,
)
from loraq_sim.errors import InputError, counted
from loraq_sim.files import refuse_existing
from loraq_sim.reporting.tables import json_text, result_table
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hwmodels import Accelerator, Cost
    from loraq_sim.split import PrecisionSplit

__all__ = ["THRESHOLD_MISSED", "app"]

app = typer.Typer(no_args_is_help=True)
_LIST_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw list\n\nloraq-sim hw list --format json"
_SHOW_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw show aie2\n\n"
    "loraq-sim hw show a100 --split W4A4+W16A16r32\n\n"
    "loraq-sim hw show aie2@emulated_int4\n\n"
    "loraq-sim hw show mi355x --family mxfp --split W4A8+W8A8r64"
)
_EXPLAIN_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw explain aie2 --shape 4096x1152x4608 --split W4A4+W8A8r64\n\n"
    "loraq-sim hw explain h100 --shape 4096x3072x3072 --split W4A4+W16A16r32 --schedule unfused"
)
_VALIDATE_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw validate\n\n"
    "loraq-sim hw validate --hw aie2,aie2p --max-error 0.15 --format json\n\n"
    "loraq-sim hw validate --measured mine.csv --hw h100 --figure validation.png"
)
_SCHEMA_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw schema > accelerator.schema.json"
_DEFAULT_SPLITS = ("W4A4+W8A8r32", "W4A8+W4A8r32", "W8A8+W6A6r32", "W16A16")
THRESHOLD_MISSED = 3
_SHOWN = (
    *("device", "kernel", "m", "n", "k", "out_bits", "tile_mkn", "measured_ms", "predicted_ms"),
    *("error", "bound"),
)
_BAND = 0.15


@app.command("list", epilog=_LIST_EXAMPLES)
@one_line_failures
def list_command(output: OutFormat = OutputFormat.TABLE) -> None:
    """List the accelerators that come with the program."""

    rows = []
    for name in hwmodels.list_accelerators():
        accelerator = hwmodels.load_accelerator(name)
        rows.append(
            {
                "name": name,
                "aliases": ", ".join(accelerator.aliases),
                "variants": ", ".join(variant.name for variant in accelerator.variants),
                "description": accelerator.title,
            }
        )
    print_table(result_table(rows), output)


@app.command("show", epilog=_SHOW_EXAMPLES)
@one_line_failures
def show_command(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="Accelerator, NAME@VARIANT, or YAML file."),
    ],
    splits: Splits = None,
    family: Family = "int",
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Show every number of an accelerator with its source, and the MAC mode each split uses."""

    accelerator = hwmodels.load_accelerator(name)
    modes = []
    for text in listed(splits) or _DEFAULT_SPLITS:
        split = parse_split(text, family=family)
        for mode in _modes_of(accelerator, split):
            modes.append({"split": split.text} | mode)
    facts = hwmodels.describe(accelerator)
    idle = [{"key": key, "why": why} for key, why in hwmodels.idle_keys(accelerator).items()]
    if output is OutputFormat.JSON:
        print_json(facts, {"name": accelerator.name, "facts": facts, "modes": modes, "idle": idle})
        return
    title = f"{accelerator.name}: {accelerator.title}"
    tables = [result_table(facts, title=title), result_table(modes, title="MAC modes of splits")]
    if idle:
        tables.append(result_table(idle, title="Values that change no result"))
    print_tables(tables, output)


def _modes_of(accelerator: "Accelerator", split: "PrecisionSplit") -> list[dict]:

    main, branch = split.costed
    return hwmodels.describe_modes(accelerator, main, branch=branch, family=split.family)


@app.command("explain", epilog=_EXPLAIN_EXAMPLES)
@one_line_failures
def explain_command(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="Accelerator, NAME@VARIANT, or YAML file."),
    ],
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="m=M,n=N,k=K|MxKxN",
            help="GEMM size: M rows, N output features, K input features.",
        ),
    ] = "4096x1152x4608",
    split: Annotated[
        str, typer.Option("--split", metavar="SPLIT", help="Precision split such as W4A4+W8A8r16.")
    ] = "W4A4",
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="NAME", help="How the branch runs; see cost.")
    ] = "fused",
    family: Family = "int",
    group: Group = 64,
    smooth: Smooth = None,
    rotate: Rotate = None,
    shared_by: SharedBy = 1,
    variants: Variants = None,
    sets: Sets = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Explain one cost: its parts, what is busy how long, and which numbers of the file matter."""
    from loraq_sim.machine import cost_split

    machines = chosen_machines([name], variants, sets, None)
    if len(machines) != 1:
        raise InputError("hw explain takes one machine; give one --variant")
    machine = machines[0][1]
    chosen = parse_split(split, family=family, group=group)
    m, n, k = sizes_of("--shape", shape)
    work, cost = cost_split(
        m, n, k, chosen, machine,
        schedule=checked_schedule(schedule, unfused=False),
        smooth=smooth, rotate=rotate, shared_by=shared_by,
    )  # fmt: skip
    parts = _parts(cost)
    effects = hwmodels.sensitivity(work, machine)
    facts = {row["key"]: row for row in hwmodels.describe(machine)}
    for row in effects:
        row["confidence"] = facts.get(_indexed(row["key"], machine), {}).get("confidence", "")
    summary = {
        "accelerator": machine.name, "shape": shape, "split": chosen.text, "schedule": schedule,
        "latency_s": cost.latency_s, "roofline_latency_s": cost.roofline_latency_s,
        "utilization": cost.utilization, "bound": cost.bound, "energy_j": cost.energy_j,
        "dram_bytes": cost.dram_bytes, "weight_bytes": cost.weight_bytes,
        "peak_activation_bytes": cost.peak_activation_bytes, "fits_in": cost.fits_in,
        "transforms": list(work.transforms), "shared_by": work.shared_by,
    }  # fmt: skip
    if output is OutputFormat.JSON:
        details = {"modes": cost.modes, "tile_mkn": cost.tile_mkn, "parts": parts}
        print_json(parts, summary | details | {"sensitivity": effects})
        return
    what = " ".join([f"M={m}, N={n}, K={k}: {chosen.text}", *work.transforms])
    what += f" shared by {shared_by}" if shared_by > 1 else ""
    tables = [
        result_table(parts, title=f"{what} on {machine.name}: {cost.bound}-bound"),
        result_table(effects, title="Change of the cost per change of a number (1: in proportion)"),
    ]
    print_tables(tables, output)


def _parts(cost: "Cost") -> list[dict[str, Any]]:
    totals = {"latency_s": cost.latency_s, "energy_j": cost.energy_j}
    totals |= {"dram_bytes": cost.dram_bytes, "weight_bytes": cost.weight_bytes}
    rows = []
    for quantity, total in totals.items():
        for part, value in cost.parts[quantity].items():
            if value:
                share = value / total
                rows.append({"quantity": quantity, "part": part, "value": value, "share": share})
    for resource, value in cost.busy_s.items():
        share = value / cost.latency_s
        rows.append({"quantity": "busy_s", "part": resource, "value": value, "share": share})
    return rows


def _indexed(key: str, machine: Any) -> str:
    """The key as `describe` writes it: modes by number."""
    for index, mode in enumerate(machine.modes):
        key = key.replace(f"modes.{mode.name}.", f"modes[{index}].")
    return key


@app.command("validate", epilog=_VALIDATE_EXAMPLES)
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

    if max_error is not None and not max_error > 0:
        raise InputError(f"--max-error must be a positive fraction such as 0.15, got {max_error}")
    if figure is not None:
        refuse_existing(figure, overwrite=force)
    path = measured or hwmodels.MEASURED_CSV
    table = hwmodels.measured_rows(path)
    machines = [hwmodels.load_accelerator(n) for n in listed(hw) or hwmodels.list_accelerators()]
    rows = [row for machine in machines for row in _predict(machine, table, search_tiles)]
    if not rows:
        known = ", ".join(sorted({row["device"] for row in table}))
        raise InputError(f"{path} has no row of the accelerators asked for; its devices: {known}")
    if not hw:
        _note_strangers(table, machines)
    devices = hwmodels.summarize(rows)
    overheads = hwmodels.branch_overheads(rows)
    worst = max(device["worst_error"] for device in devices)
    if figure is not None:
        from loraq_sim.reporting.figures import save_figure

        note(f"wrote {save_figure(validation_figure(rows), figure)}")
    if output is OutputFormat.JSON:
        passed = max_error is None or worst <= max_error
        report: dict[str, Any] = {"measured": path.name, "devices": devices}
        report |= {"overheads": overheads, "max_error": max_error, "passed": passed}
        print_json(rows, report)
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


def validation_figure(rows: list[dict[str, Any]]) -> "Figure":
    """Points per device around the line of equal times, with a band of 15 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5.0), layout="constrained")
    axes = figure.add_subplot()
    times = [row[name] for row in rows for name in ("measured_ms", "predicted_ms")]
    ends = [0.6 * min(times), 1.7 * max(times)]
    low, high = ([end * (1 + sign * _BAND) for end in ends] for sign in (-1, 1))
    axes.fill_between(ends, low, high, color="0.9", linewidth=0, label=f"within {_BAND:.0%}")
    axes.plot(ends, ends, color="0.5", linewidth=0.8)
    for marker, device in zip(
        "osD^v<>PX*ph" * 9, dict.fromkeys(r["device"] for r in rows), strict=False
    ):
        own = [row for row in rows if row["device"] == device]
        mean = sum(abs(row["error"]) for row in own) / len(own)
        axes.plot(
            [row["measured_ms"] for row in own],
            [row["predicted_ms"] for row in own],
            linestyle="none",
            marker=marker,
            markersize=5,
            label=f"{device}: {counted(len(own), 'row')}, {mean:.1%} mean",
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    axes.set(xlabel="measured time (ms)", ylabel="predicted time (ms)")
    axes.legend(frameon=False, fontsize="small")
    return figure


@app.command("schema", epilog=_SCHEMA_EXAMPLES)
@one_line_failures
def schema_command() -> None:
    """Print the JSON Schema of accelerator files, for editors and checkers."""
    from hwmodels.description import Accelerator

    # A document of a standard of its own, no rows.
    say(json_text(Accelerator.model_json_schema()), nl=False)
