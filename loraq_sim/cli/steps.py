"""``loraq-sim steps``: which layers and time steps dominate the error, and calibration on some.

Prints the largest shares, or the cases side by side; ``--out`` writes every cell as CSV and a heat
map of each case.
"""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwmodels
from loraq_sim.cli.options import (
    AccBits,
    Accelerators,
    Accumulators,
    AggregateName,
    Condition,
    Family,
    Finish,
    Force,
    Group,
    LayerDumpFile,
    Layers,
    Lora,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    Overflow,
    PFormat,
    Preset,
    ProductsPerAdd,
    Quiet,
    Rotate,
    Seed,
    Smooth,
    Splits,
    SynthesizeInputs,
    ZeroPoint,
    datapath_overrides,
    listed,
)
from loraq_sim.cli.output import (
    case_failure,
    end_with,
    note,
    one_line_failures,
    open_dump,
    print_json,
    print_tables,
    tracked,
)
from loraq_sim.dumps.steps import require_steps, step_counts
from loraq_sim.errors import InputError, counted, unknown_name
from loraq_sim.files import make_folder, refuse_existing
from loraq_sim.metrics import DEFAULT_AGGREGATE, aggregate_of
from loraq_sim.reporting.tables import result_table
from loraq_sim.results.rows import Row
from loraq_sim.solvers import METHODS
from loraq_sim.split import parse_split
from loraq_sim.version import __version__

if TYPE_CHECKING:
    from loraq_sim.dumps import LayerDump
    from loraq_sim.time_steps import StepErrors, StepReport

__all__ = [
    "EXAMPLES",
    "check_folder",
    "steps_command",
]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim steps --hw aie2 --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8 "
    "--out runs/steps\n\n"
    "loraq-sim steps --hw aie2 --layer-dump examples/tiny_pixart.pt --layers ffn_down "
    "--split W4A4+W8A8r8 --method qera --calibrate-on all,first,1000..800,last:5"
)
_DEFAULT_SPLIT = "W4A4+W8A8@fp16r32"
_TABLES = ("cells", "layers", "steps")
_SETTINGS = ("accelerator", "split", "method", "calibration")
_TRANSFORMS = ("rotation", "smooth", "condition", "finish")
_LARGEST = 10


@one_line_failures
def steps_command(
    hw: Accelerators,
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    calibrate_on: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate-on",
            metavar="STEPS",
            help="Time steps whose activations the solver sees: all, first, last, first:N, last:N, "
            "a value, a range such as 1000..800, or several joined by +; repeat or separate by "
            "commas to compare. Default: all.",
            show_default=False,
        ),
    ] = None,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            metavar="T",
            help="Activation rows the error is measured on, every time step among them. Default: "
            "all rows.",
            show_default=False,
        ),
    ] = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    aggregate: AggregateName = DEFAULT_AGGREGATE,
    acc_bits: AccBits = None,
    overflow: Overflow = None,
    products_per_add: ProductsPerAdd = None,
    accumulators: Accumulators = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write cells.csv, layers.csv, steps.csv and a heat map (PNG and SVG) of each case "
            "into this folder.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Report which layers and time steps dominate the output error, on the emulated data path.

    The dump has to record time steps, as captured and synthetic ones do.
    """
    from loraq_sim.time_steps import CALIBRATED_METHODS, step_report

    aggregate_of("output_error", aggregate)
    texts = listed(splits) or (_DEFAULT_SPLIT,)
    chosen = [parse_split(text, family=family, group=group) for text in texts]
    check_folder(out, force)
    dump = open_dump(
        layer_dump, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    dump = dump.select(listed(layers)) if layers else dump
    require_steps(dump)
    methods, calibrations = listed(method) or ("loraq",), listed(calibrate_on) or ("all",)
    names = _measurable(dump, methods, calibrations, quiet)
    has_data = any(value is not None for value in (smooth, condition, finish)) or any(
        one.feedback is not None for one in chosen
    )
    if calibrate_on and not has_data and not set(methods) & set(CALIBRATED_METHODS):
        note(
            "--calibrate-on changes nothing without --smooth, --condition, --finish, a residual "
            f"input (~) or a method of {', '.join(CALIBRATED_METHODS)}",
            quiet=quiet,
        )
    datapath = datapath_overrides(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=products_per_add,
        accumulators=accumulators,
        p_format=p_format,
        zero_point=zero_point,
    )
    options: dict[str, Any] = {"preset": preset, "tokens": tokens, "seed": seed}
    options |= {"smooth": smooth, "rotate": rotate, "condition": condition, "finish": finish}
    solves = list(itertools.product(chosen, methods, calibrations))
    found, rows = _measured(
        dump, names, solves, listed(hw), options | {"datapath": datapath}, quiet or no_progress
    )

    def show(_: bool) -> None:
        reports = [step_report(errors, aggregate=aggregate) for errors in found if errors]
        if out is not None:
            write_reports(out, reports, dump=str(layer_dump), quiet=quiet)
        print_reports(reports, output, title=str(layer_dump))

    end_with(rows, show)


def _measurable(
    dump: "LayerDump", methods: tuple[str, ...], calibrations: tuple[str, ...], quiet: bool
) -> list[str]:
    """Layers with activations (or that cannot be read); refuses what no layer can be solved with.

    Raises
    ------
    InputError
        For an unknown method, steps that are not recorded, or a dump without activations.
    """
    from loraq_sim.time_steps import chosen_steps

    for method in methods:
        if method not in METHODS:
            raise InputError(unknown_name("method", method, METHODS))
    names = []
    for name in dump:
        try:
            steps = step_counts(dump, name)
        except InputError:
            # Such a layer gets a failed row of its own.
            names.append(name)
            continue
        if steps is not None:
            names.append(name)
            for text in calibrations:
                chosen_steps(text, steps[0])
    if not names:
        raise InputError(f"{dump.path}: no layer has activations, so there is no error to split")
    if len(names) < len(dump):
        left_out = f"{len(dump) - len(names)} of {len(dump)} layers left out"
        note(f"{left_out}: no activations", quiet=quiet)
    return names


def _measured(
    dump: "LayerDump",
    names: list[str],
    solves: list[tuple[Any, str, str]],
    hw: tuple[str, ...],
    options: dict[str, Any],
    quiet: bool,
) -> tuple[list[list["StepErrors"]], list[dict[str, Any]]]:
    """Errors of each case (machines one after the other within a solve), and a row a layer."""
    from loraq_sim.time_steps import evaluate_steps

    machines = [hwmodels.load_accelerator(name) for name in hw]
    found: list[list[StepErrors]] = [[] for _ in range(len(solves) * len(machines))]
    rows = []
    work = list(itertools.product(names, range(len(solves))))
    for name, i in tracked(work, "time steps", quiet=quiet):
        split, method, steps = solves[i]
        solution = None
        for j, machine in enumerate(machines):
            row = {"layer": name, "status": "ok", "message": ""}
            try:
                errors = evaluate_steps(
                    dump,
                    name,
                    split,
                    machine,
                    method=method,
                    calibrate_on=steps,
                    solution=solution,
                    **options,
                )
                solution = errors.solution
                found[i * len(machines) + j].append(errors)
                row["status"] = errors.case["status"]
                if errors.case["clipped_count"]:
                    text = counted(errors.case["clipped_count"], "value")
                    text = (
                        f"{text} beyond {'its' if text.startswith('1 ') else 'their'} float format"
                    )
                    row["message"] = f"{text}, first {errors.case['first_clipped']}"
            except Exception as error:
                row |= {"status": "failed", "message": case_failure(error)}
            rows.append(row)
    return found, rows


def check_folder(out: Path | None, force: bool) -> None:
    """Raise InputError if the folder has tables of an earlier run, unless they may be replaced."""
    if out is not None:
        refuse_existing(*(out / f"{name}.csv" for name in _TABLES), overwrite=force)


def write_reports(folder: Path, reports: Sequence["StepReport"], *, dump: str, quiet: bool) -> None:
    """Write the tables of all cases and a heat map of each."""
    from loraq_sim.reporting.figures import save_figure
    from loraq_sim.reporting.layer_figures import step_heat_map
    from loraq_sim.results.store_records import write_csv

    make_folder(folder)
    written = []
    for name in _TABLES:
        rows = _flat(reports, name)
        written.append(folder / f"{name}.csv")
        write_csv(written[-1], rows, list(rows[0]))
    for one, label in zip(reports, _labels(reports), strict=True):
        stem = "heat_map" + ("_" + re.sub(r"[^\w.+@-]+", "_", label).strip("_") if label else "")
        provenance = {"dump": dump, "loraq-sim": __version__, "seed": one.case["seed"]}
        figure = step_heat_map(one.case, one.cells, provenance=provenance)
        written += [save_figure(figure, folder / f"{stem}{end}") for end in (".png", ".svg")]
    for path in written:
        note(f"wrote {path}", quiet=quiet)


def print_reports(reports: Sequence["StepReport"], output: OutputFormat, *, title: str) -> None:
    """Tables for people; for programs everything as JSON, or the cells as CSV."""

    if output is OutputFormat.JSON:
        print_json(
            _flat(reports, "cells"),
            {
                "cases": [
                    {"case": one.case, "layers": one.layers, "steps": one.steps, "cells": one.cells}
                    for one in reports
                ]
            },
        )
        return
    if output is OutputFormat.CSV:
        print_tables([result_table(_flat(reports, "cells"))], output)
        return
    columns = [
        *_SETTINGS,
        *(name for name in _TRANSFORMS if any(one.case[name] is not None for one in reports)),
        *("n_layers", "tokens", "output_error", "half_layers", "dominant_layer"),
        *("half_steps", "dominant_step"),
    ]
    cases = [one.case | _named_step(one.case, "dominant_step") for one in reports]
    summary = result_table(cases, columns, title=f"{title}: time steps")
    if len(reports) > 1:
        tables = [
            result_table(
                _side_by_side(reports, f"{key}s", key), title=f"Output error of each {key}"
            )
            for key in ("step", "layer")
        ]
    else:
        tables = _tables(reports[0])
    print_tables([summary, *tables], output)


def _tables(one: "StepReport") -> list[Any]:

    def by_share(rows: Sequence[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: -(row["run_share"] or 0.0))

    largest = by_share(one.cells)[:_LARGEST]
    columns = ("rows", "output_error", "share", "run_share")
    return [
        result_table(
            _columns_of(one.steps, "step", *columns, "dominant_layer"), title="Time steps"
        ),
        result_table(
            _columns_of(by_share(one.layers), "layer", "tokens", *columns[1:], "dominant_step"),
            title="Layers, largest share first",
        ),
        result_table(
            _columns_of(largest, "layer", "step", *columns),
            title=f"The {len(largest)} largest parts",
        ),
    ]


def _columns_of(rows: Sequence[Row], *keys: str) -> list[Row]:
    """Rows with the columns `keys`, and steps as words."""
    named = [row | _named_step(row, "step", "dominant_step") for row in rows]
    return [{key: row[key] for key in keys} for row in named]


def _named_step(row: Row, *keys: str) -> Row:
    """Time steps as words: three digits, as of a measured number, could not tell them apart."""
    return {key: str(row[key]) for key in keys if row.get(key) is not None}


def _side_by_side(reports: Sequence["StepReport"], table: str, key: str) -> list[Row]:
    """The output error of each case, one column a case."""
    names = _labels(reports)
    rows: dict[Any, Row] = {}
    for one, name in zip(reports, names, strict=True):
        for i, row in enumerate(getattr(one, table)):
            # Steps may repeat a value and are told apart by their place; a layer may have failed.
            place = i if key == "step" else row[key]
            rows.setdefault(place, {key: str(row[key])})[f"{name}_error"] = row["output_error"]
    columns = [key, *(f"{name}_error" for name in names)]
    return [dict.fromkeys(columns) | row for row in rows.values()]


def _labels(reports: Sequence["StepReport"]) -> list[str]:
    """What tells the cases apart; one case has no label."""
    differ = [key for key in _SETTINGS if len({one.case[key] for one in reports}) > 1]
    labels = [" ".join(str(one.case[key]) for key in differ) for one in reports]
    # Two files may describe machines of one name.
    return [
        f"{label} #{i}".strip() if labels.count(label) > 1 else label
        for i, label in enumerate(labels, start=1)
    ]


def _flat(reports: Sequence["StepReport"], table: str) -> list[Row]:
    return [
        {key: one.case[key] for key in (*_SETTINGS, *_TRANSFORMS)} | row
        for one in reports
        for row in getattr(one, table)
    ]
