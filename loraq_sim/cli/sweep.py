"""``loraq-sim sweep``: error and cost of every layer in every split, and the Pareto front."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.failures import BAD_INPUT, INTERRUPTED, SOME_FAILED, one_line_failures
from loraq_sim.cli.options import (
    AccBitsGrid,
    Accelerators,
    AccumulatorsGrid,
    ArrayGrid,
    Family,
    Force,
    Group,
    LayerDumpFile,
    Layers,
    Methods,
    OutFormat,
    OutputFormat,
    OverflowGrid,
    PFormat,
    Preset,
    ProductsPerAddGrid,
    Quiet,
    Seed,
    Splits,
    Tokens,
    Unfused,
    datapath_overrides,
    listed,
    whole_numbers,
)
from loraq_sim.cli.output import note, print_json, print_tables
from loraq_sim.cli.progress import sweep_progress
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.plan import ComposedSweep

__all__ = ["EXAMPLES", "sweep_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt\n\n"
    "loraq-sim sweep --hw aie2,a100 --layer-dump examples/minilm.pt --layers 'ffn_*' "
    "--split W4A4 --split W4A4+W8A8@fp16r32 --method svdquant,loraq --out runs/ffn\n\n"
    "loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt --dry-run"
)


@one_line_failures
def sweep_command(
    hw: Accelerators,
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    tokens: Tokens = None,
    seed: Seed = 0,
    unfused: Unfused = False,
    array: ArrayGrid = None,
    acc_bits: AccBitsGrid = None,
    overflow: OverflowGrid = None,
    products_per_add: ProductsPerAddGrid = None,
    accumulators: AccumulatorsGrid = None,
    p_format: PFormat = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the results. Default: runs/<dump>-<accelerators>.",
            show_default=False,
        ),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            metavar="N",
            min=0,
            help="Worker processes; 0 works in this one. Default: one per CPU.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and how long it may take.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    no_progress: Annotated[
        bool, typer.Option("--no-progress", help="Plain lines instead of a progress bar.")
    ] = False,
) -> None:
    """Evaluate layers in precision splits on accelerators; print the model's Pareto front.

    Results that are already in the folder's store are kept, so the same command continues an
    interrupted sweep. Every row is stored as soon as it is there.
    """
    from loraq_sim.sweep.plan import SweepPlan, compose

    composed = compose(
        SweepPlan(
            dump=str(layer_dump),
            accelerators=listed(hw),
            layers=listed(layers),
            splits=listed(splits),
            methods=listed(method) or ("loraq",),
            preset=preset,
            family=family,
            group=group,
            tokens=tokens,
            seed=seed,
            fused=not unfused,
            datapath=datapath_overrides(
                array=listed(array) or None,
                acc_bits=whole_numbers("--acc-bits", acc_bits),
                overflow=listed(overflow) or None,
                products_per_add=whole_numbers("--products-per-add", products_per_add),
                accumulators=whole_numbers("--accumulators", accumulators),
                p_format=p_format,
            ),
        )
    )
    names = "-".join(composed.accelerator_digests)
    folder = out or Path("runs") / f"{layer_dump.stem}-{names}"
    if dry_run:
        _print_forecast(composed, folder, jobs=jobs, force=force, output=output)
        return
    for remark in composed.notes:
        note(remark, quiet=quiet)
    _check_folder(folder, force=force)
    _run(composed, folder, jobs, force, output, quiet=quiet, bar=not no_progress)


def _run(
    composed: "ComposedSweep",
    folder: Path,
    jobs: int | None,
    force: bool,
    output: OutputFormat,
    *,
    quiet: bool,
    bar: bool,
) -> None:
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.run import run_sweep

    with ResultStore.open(folder / "results.sqlite", create=True) as store:
        with sweep_progress(bar=bar, quiet=quiet) as listener:
            outcome = run_sweep(composed, store, jobs=jobs, on_event=listener, force=force)
        if outcome.is_unreadable:
            note(f"error: no layer could be used: {outcome.first_failure}")
            raise typer.Exit(BAD_INPUT)
        if outcome.n_skipped:
            text = f"{outcome.n_skipped} cases were in the store already (--force does them again)"
            note(text, quiet=quiet)
        if outcome.interrupted:
            # No tables and pictures: whoever pressed Ctrl-C wants the prompt back.
            note(f"interrupted: {outcome.n_left} cases left; the same command continues")
            raise typer.Exit(INTERRUPTED)
        _report(composed, store, folder, output, quiet=quiet)
    if outcome.n_failed:
        note(f"error: {outcome.n_failed} cases failed; the first: {outcome.first_failure}")
        raise typer.Exit(SOME_FAILED)


def _report(
    composed: "ComposedSweep",
    store: "ResultStore",
    folder: Path,
    output: OutputFormat,
    *,
    quiet: bool,
) -> None:
    """CSV and picture beside the store; the front, or everything as JSON, on stdout."""
    from loraq_sim.pareto import mark_front
    from loraq_sim.totals import ERROR_FORMULA, model_totals
    from reports.figures import pareto_figure, save_figure
    from reports.tables import front_table, result_table, totals_table

    rows = store.rows(composed.case_ids)
    store.export_csv(folder / "results.csv", composed.case_ids)
    totals = mark_front(model_totals(rows, layers=composed.layers), by=("dump", "accelerator"))
    front = [row for row in totals if row["pareto"]]
    made = ["results.sqlite", "results.csv"]
    if front:
        figure = pareto_figure(
            totals,
            x=("latency_s", "weight_bytes")
            if len(composed.accelerator_digests) == 1
            else "latency_s",
            model=Path(composed.plan.dump).name,
            layers=len(composed.layers),
            provenance=_footer(composed),
        )
        save_figure(figure, folder / "pareto.png")
        made.append("pareto.png")
    if output is OutputFormat.JSON:
        provenance = store.provenance()
        print_json(
            {
                "rows": rows,
                "front": front,
                "model": totals,
                "error_formula": ERROR_FORMULA,
                "provenance": provenance[-1] if provenance else {},
            }
        )
    elif output is OutputFormat.CSV:
        print_tables([result_table(rows)], output)
    else:
        per_step = f"{len(composed.layers)} layers, per denoising step"
        rest = [row for row in totals if not row["pareto"]]
        tables = [
            front_table(front, title=f"Pareto front of output error and latency ({per_step})")
        ]
        if rest:
            tables.append(totals_table(rest, title="Not on the front"))
        print_tables(tables, output)
        note(ERROR_FORMULA, quiet=quiet)
    for name in made:
        note(f"wrote {folder / name}", quiet=quiet)


def _footer(composed: "ComposedSweep") -> dict[str, Any]:
    from loraq_sim import __version__

    return {
        "loraq-sim": __version__,
        "seed": composed.plan.seed,
        "dump": composed.dump_digest[:12],
        **{name: digest[:12] for name, digest in composed.accelerator_digests.items()},
    }


def _check_folder(folder: Path, *, force: bool) -> None:
    """Files of a sweep may replace those of an earlier one, never something else's."""
    if force or (folder / "results.sqlite").exists():
        return
    for name in ("results.csv", "pareto.png"):
        if (folder / name).exists():
            raise InputError(
                f"{folder / name} is there but no result store beside it; "
                "choose another --out, or --force to replace it"
            )


def _print_forecast(
    composed: "ComposedSweep",
    folder: Path,
    *,
    jobs: int | None,
    force: bool,
    output: OutputFormat,
) -> None:
    from contextlib import nullcontext

    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.executors import available_cpus
    from loraq_sim.sweep.forecast import estimate
    from reports.tables import result_table

    path = folder / "results.sqlite"
    jobs = available_cpus() if jobs is None else jobs
    with ResultStore.open(path) if path.exists() else nullcontext() as store:
        forecast = estimate(composed, store, jobs=jobs, force=force)
    row = {
        "layers": forecast.n_layers,
        "splits": ", ".join(composed.plan.splits),
        "cases": forecast.n_cases,
        "already_there": forecast.n_done,
        "to_run": forecast.n_to_run,
        "jobs": forecast.jobs,
        "estimated_s": forecast.seconds,
        "basis": forecast.basis,
        "out": str(folder),
    }
    if output is OutputFormat.TABLE:
        for remark in composed.notes:
            typer.echo(remark)
        width = max(map(len, row))
        for name, value in row.items():
            shown = f"{value:.0f}" if isinstance(value, float) else value
            typer.echo(f"{name.replace('_', ' '):{width}}  {shown}")
    elif output is OutputFormat.JSON:
        print_json(row | {"notes": list(composed.notes)})
    else:
        print_tables([result_table([row])], output)
