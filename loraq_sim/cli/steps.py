"""``loraq-sim steps``: which layers and time steps dominate the error, and calibration on some."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.aggregates import DEFAULT_AGGREGATE, aggregate_of
from loraq_sim.cli.failures import case_failure, end_with, one_line_failures
from loraq_sim.cli.options import (
    AccBits,
    Accelerators,
    Accumulators,
    AggregateName,
    Family,
    Force,
    Group,
    LayerDumpFile,
    Layers,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    Overflow,
    PFormat,
    Preset,
    ProductsPerAdd,
    Quiet,
    Seed,
    Smooth,
    Splits,
    datapath_overrides,
    listed,
)
from loraq_sim.cli.output import note
from loraq_sim.cli.progress import tracked
from loraq_sim.cli.steps_output import check_folder, print_reports, write_reports
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from loraq_sim.dumps import LayerDump
    from loraq_sim.time_steps import StepErrors

__all__ = ["EXAMPLES", "steps_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim steps --hw aie2 --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8 "
    "--out runs/steps\n\n"
    "loraq-sim steps --hw aie2 --layer-dump examples/tiny_pixart.pt --layers ffn_down "
    "--split W4A4+W8A8r8 --method qera --calibrate-on all,first,1000..800,last:5"
)
_DEFAULT_SPLIT = "W4A4+W8A8@fp16r32"


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
    aggregate: AggregateName = DEFAULT_AGGREGATE,
    acc_bits: AccBits = None,
    overflow: Overflow = None,
    products_per_add: ProductsPerAdd = None,
    accumulators: Accumulators = None,
    p_format: PFormat = None,
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
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.dumps.capture_steps import require_steps
    from loraq_sim.split import parse_split
    from loraq_sim.time_steps import CALIBRATED_METHODS, step_report

    aggregate_of("output_error", aggregate)
    texts = listed(splits) or (_DEFAULT_SPLIT,)
    chosen = [parse_split(text, family=family, group=group) for text in texts]
    check_folder(out, force)
    dump = read_layer_dump(layer_dump)
    dump = dump.select(listed(layers)) if layers else dump
    require_steps(dump)
    methods, calibrations = listed(method) or ("loraq",), listed(calibrate_on) or ("all",)
    names = _measurable(dump, methods, calibrations, quiet)
    if calibrate_on and smooth is None and not set(methods) & set(CALIBRATED_METHODS):
        calibrated = ", ".join(CALIBRATED_METHODS)
        text = f"--calibrate-on changes nothing without --smooth or a method of {calibrated}"
        note(text, quiet=quiet)
    datapath = datapath_overrides(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=products_per_add,
        accumulators=accumulators,
        p_format=p_format,
    )
    options = {"preset": preset, "smooth": smooth, "tokens": tokens, "seed": seed}
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
    from loraq_sim.dumps.capture_steps import step_counts
    from loraq_sim.errors import unknown_name
    from loraq_sim.solvers import METHODS
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
        left_out = f"{len(dump) - len(names)} of {len(dump)} layers have no activations"
        note(f"{left_out} and are left out", quiet=quiet)
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
    import hwmodels
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
            case = {"method": method, "calibrate_on": steps, "solution": solution}
            try:
                errors = evaluate_steps(dump, name, split, machine, **case, **options)
                solution = errors.solution
                found[i * len(machines) + j].append(errors)
                row["status"] = errors.case["status"]
                if errors.case["clipped_count"]:
                    text = f"{errors.case['clipped_count']:,} values beyond their float format"
                    row["message"] = f"{text}, first {errors.case['first_clipped']}"
            except Exception as error:
                row |= {"status": "failed", "message": case_failure(error)}
            rows.append(row)
    return found, rows
