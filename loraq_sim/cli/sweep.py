"""``loraq-sim sweep``: error and cost of every layer in every split, and the Pareto front.

Plan and flags become one plan. It runs in processes of this machine, on a Dask scheduler or as
Slurm jobs; all of them run the same cases into the same store. Beside it stand a CSV and a picture;
stdout has the front and the verdict.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraq_sim.cli.options import (
    AccBitsGrid,
    AcceleratorsOrPlan,
    AccumulatorsGrid,
    ArrayGrid,
    ArrayPoints,
    Batch,
    Condition,
    Family,
    Finish,
    Force,
    Group,
    Jobs,
    KernelFamily,
    LayerDumpOrPlan,
    Layers,
    Lora,
    Methods,
    NoProgress,
    OutFormat,
    OutputFormat,
    OverflowGrid,
    PFormat,
    Preset,
    ProductsPerAddGrid,
    Quiet,
    Resolution,
    Rotate,
    Rows,
    RowsOfModel,
    Scheduler,
    SchedulerOptions,
    Seed,
    Smooth,
    Splits,
    SynthesizeInputs,
    Tokens,
    Unfused,
    ZeroPoint,
    datapath_overrides,
    is_given,
    key_values,
    listed,
    whole_numbers,
)
from loraq_sim.cli.output import (
    note,
    one_line_failures,
    print_json,
    print_tables,
    print_verdict,
    say,
    sweep_progress,
)
from loraq_sim.errors import InputError, counted
from loraq_sim.reporting.tables import front_table, result_table, totals_table
from loraq_sim.results.columns import column_for
from loraq_sim.results.rows import clipped_note
from loraq_sim.results.wording import listing
from loraq_sim.settings import parse_override, parse_rows

if TYPE_CHECKING:
    from loraq_sim.reporting.tables import ResultTable
    from loraq_sim.results.rows import Row
    from loraq_sim.results.store import ResultStore
    from loraq_sim.results.totals import ModelRow
    from loraq_sim.results.verdict import Verdict
    from loraq_sim.sweeps.digests import SolutionCache
    from loraq_sim.sweeps.plan import ComposedSweep
    from loraq_sim.sweeps.scheduler import Place

__all__ = [
    "EXAMPLES",
    "sweep_command",
]


EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt\n\n"
    "loraq-sim sweep --hw aie2,a100 --layer-dump examples/minilm.pt --layers 'ffn_*' "
    "--split W4A4 --split W4A4+W8A8@fp16r32 --method svdquant,loraq --out runs/ffn\n\n"
    "loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt --dry-run\n\n"
    "loraq-sim sweep --plan examples/sweep_minilm.toml --set tokens=32 --set seeds=0\n\n"
    "loraq-sim sweep --hw aie2 --layer-dump examples/tiny_pixart.pt --split W8A8 "
    "--array-grid acc_bits=14..32:2,products_per_add=1,8,overflow=wrap,saturate\n\n"
    "loraq-sim sweep --plan examples/sweep_minilm.toml --shard 1/4 --out runs/part1\n\n"
    "loraq-sim sweep --plan examples/sweep_minilm.toml --scheduler tcp://head-node:8786\n\n"
    "loraq-sim sweep --plan examples/sweep_minilm.toml --scheduler slurm "
    "--scheduler-option cores=8 --scheduler-option queue=cpu --jobs 32 --dry-run"
)


# Points of a grid of arrays that lie beside the front, as far as people read them.
_MOST_ARRAYS = 24


@one_line_failures
def sweep_command(
    context: typer.Context,
    hw: AcceleratorsOrPlan = None,
    layer_dump: LayerDumpOrPlan = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            help="Sweep plan in TOML; the flags of this command line go before its keys.",
            show_default=False,
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of the plan, such as tokens=64 or datapath.acc_bits=16,24; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    tokens: Tokens = None,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    seed: Seed = 0,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    rows: Rows = None,
    model: RowsOfModel = None,
    resolution: Resolution = 1024,
    batch: Batch = 1,
    unfused: Unfused = False,
    kernel: KernelFamily = None,
    array: ArrayGrid = None,
    array_grid: ArrayPoints = None,
    acc_bits: AccBitsGrid = None,
    overflow: OverflowGrid = None,
    products_per_add: ProductsPerAddGrid = None,
    accumulators: AccumulatorsGrid = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN:KEY=VALUE",
            help="Settings of layers by name or kind: rank, budget, split, method, preset; "
            "repeatable, the last one wins.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Only part I of N, shared out by layer; `merge` makes the parts one.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder of the results. Default: the plan's, or runs/<dump>-<accelerators>.",
            show_default=False,
        ),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    jobs: Jobs = None,
    scheduler: Scheduler = None,
    scheduler_options: SchedulerOptions = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be done, how long it may take and in what memory."
        ),
    ] = False,
    solution_cache: Annotated[
        Path | None,
        typer.Option(
            "--solution-cache",
            metavar="DIR",
            help="Folder of solutions that sweeps share, at most 2 GiB. Default: the user's cache.",
            show_default=False,
        ),
    ] = None,
    no_solution_cache: Annotated[
        bool, typer.Option("--no-solution-cache", help="Solve everything, keep no solutions.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Fail if another process is writing the store."),
    ] = False,
) -> None:
    """Evaluate layers in precision splits on accelerators; print the model's Pareto front.

    Results that are already in the folder's store are kept, so the same command continues an
    interrupted sweep. Every row is stored as soon as it is there.
    """
    from loraq_sim.sweeps.plan import compose, parse_shard, take_shard
    from loraq_sim.sweeps.plan_file import plan_from_values, read_plan_values, set_values
    from loraq_sim.sweeps.scheduler import Place

    given = {
        "dump": None if layer_dump is None else str(layer_dump),
        "hw": listed(hw),
        "layers": listed(layers),
        "splits": listed(splits),
        "methods": listed(method),
        "presets": (preset,) if is_given(context, "preset") else None,
        "family": family if is_given(context, "family") else None,
        "group": group if is_given(context, "group") else None,
        "tokens": tokens,
        "synthesize_inputs": synthesize_inputs or None,
        "lora": tuple(lora or ()),
        "seeds": (seed,) if is_given(context, "seed") else None,
        "smooth": smooth,
        "rotate": rotate,
        "condition": condition,
        "finish": finish,
        "rows": parse_rows(rows or ()),
        "model": model,
        "resolution": resolution if is_given(context, "resolution") else None,
        "batch": batch if is_given(context, "batch") else None,
        "fused": False if unfused else None,
        "kernel": kernel,
        "override": tuple(parse_override(text) for text in override or ()),
        "out": None if out is None else str(out),
    }
    values = set_values(read_plan_values(plan) if plan else {}, assignments or ())
    values |= {key: value for key, value in given.items() if value not in (None, (), {})}
    values["datapath"] = values.get("datapath", {}) | datapath_overrides(
        array_grid,
        array=listed(array) or None,
        acc_bits=whole_numbers("--acc-bits", acc_bits),
        overflow=listed(overflow) or None,
        products_per_add=whole_numbers("--products-per-add", products_per_add),
        accumulators=whole_numbers("--accumulators", accumulators),
        p_format=p_format,
        zero_point=zero_point,
    )
    options = key_values("--scheduler-option", scheduler_options)
    place = Place(scheduler=scheduler, options=options, jobs=jobs)
    place.check()
    asked = plan_from_values(values)
    # A forecast needs sizes alone, unless it counts what a folder has already.
    composed = compose(asked, remember=not dry_run, contents=not dry_run or shard is not None)
    if dry_run and shard is None and Path(values.get("out") or _default_folder(composed)).exists():
        composed = compose(asked, remember=False)
    if shard is not None:
        composed = take_shard(composed, parse_shard(shard))
    folder = Path(values.get("out") or _default_folder(composed))
    for remark in composed.notes:
        note(remark, quiet=quiet)
    if dry_run:
        _print_forecast(composed, folder, place=place, force=force, output=output)
        return
    _check_folder(folder, force=force)
    how = _How(
        *(force, output, None if no_solution_cache else _solution_cache(solution_cache)),
        quiet=quiet,
        counts=not no_progress,
        wait=not no_wait,
    )
    _run(composed, folder, place, how)


def _default_folder(composed: "ComposedSweep") -> Path:
    names = "-".join(composed.accelerator_digests)
    part = f"-shard-{composed.shard.replace('/', '-of-')}" if composed.shard else ""
    return Path("runs") / f"{Path(composed.plan.dump).stem}-{names}{part}"


def _solution_cache(folder: Path | None) -> "SolutionCache":
    from loraq_sim.sweeps.digests import SolutionCache, default_solution_folder

    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--solution-cache {folder}: cannot make this folder ({error.strerror})"
            ) from None
    return SolutionCache(folder=str((folder or default_solution_folder()).absolute()))


@dataclass(frozen=True)
class _How:
    force: bool
    output: OutputFormat
    cache: "SolutionCache | None"
    quiet: bool
    counts: bool
    wait: bool


def _run(composed: "ComposedSweep", folder: Path, place: "Place", how: _How) -> None:
    from loraq_sim.results.store import ResultStore
    from loraq_sim.sweeps.forecast import worker_bytes
    from loraq_sim.sweeps.run import run_sweep

    def waiting(who: str) -> None:
        note(f"{who}; waiting until it has finished (--no-wait gives up)", quiet=how.quiet)

    wait_s = math.inf if how.wait else 0.0
    path = folder / "results.sqlite"
    with ResultStore.open(path, create=True, wait_s=wait_s, on_wait=waiting) as store:
        with (
            place.executor(worker_bytes(composed.tasks)) as (executor, jobs),
            sweep_progress(counts=how.counts, quiet=how.quiet) as listener,
        ):
            outcome = run_sweep(
                *(composed, store),
                jobs=jobs,
                executor=executor,
                on_event=listener,
                force=how.force,
                cache=how.cache,
            )
        if outcome.is_unreadable:
            note(f"error: no layer could be used: {outcome.first_failure}")
            raise typer.Exit(outcome.exit_code)
        if outcome.n_skipped:
            text = counted(outcome.n_skipped, "case", "was")
            text += " in the store already (--force evaluates again)"
            note(text, quiet=how.quiet)
        if outcome.interrupted:
            # No tables and pictures: whoever pressed Ctrl-C wants the prompt back.
            note(f"interrupted: {counted(outcome.n_left, 'case')} left; the same command continues")
            raise typer.Exit(outcome.exit_code)
        if outcome.stopped:
            note(f"error: {outcome.stopped} ({counted(outcome.n_left, 'case')} left)")
            raise typer.Exit(outcome.exit_code)
        _report_sweep(composed, store, folder, how.output, quiet=how.quiet)
    if outcome.n_failed:
        failed = counted(outcome.n_failed, "case")
        note(f"error: {failed} failed; the first: {outcome.first_failure}")
    raise typer.Exit(outcome.exit_code)


def _report_sweep(
    composed: "ComposedSweep",
    store: "ResultStore",
    folder: Path,
    output: OutputFormat,
    *,
    quiet: bool,
) -> None:
    """CSV and picture beside the store; front and verdict, or everything as JSON, on stdout."""
    from loraq_sim.reporting.figures import save_figure
    from loraq_sim.results.planned import unfinished
    from loraq_sim.study import Study

    study = Study.of_sweep(composed, store)
    verdict = study.verdict()
    rows, totals = study.rows, study.totals
    front = [row for row in totals if row["pareto"]]
    store.export_csv(folder / "results.csv", composed.case_ids)
    beyond = clipped_note(rows)
    made = ["results.sqlite", "results.csv"]
    if front and verdict.cost:
        save_figure(study.plot_front(), folder / "pareto.png")
        made.append("pareto.png")
    if output is OutputFormat.JSON:
        provenance = store.provenance()
        print_json(
            rows,
            {
                "front": front,
                "model": totals,
                "verdict": verdict.as_dict(),
                "error_formula": _formula(verdict),
                "unfinished": unfinished(len(rows), study.missing),
                "notes": [*composed.notes, *([beyond] if beyond else [])],
                "provenance": provenance[-1] if provenance else {},
            },
        )
    elif output is OutputFormat.CSV:
        print_tables([result_table(rows)], output)
    else:
        print_tables(_tables(composed, totals, verdict), output)
        print_verdict(verdict, output)
        note(_formula(verdict), quiet=quiet)
    if beyond:
        # Said under --quiet, too: without it a total would look like any other.
        note(beyond)
    for name in made:
        note(f"wrote {folder / name}", quiet=quiet)


def _tables(
    composed: "ComposedSweep", totals: "Sequence[ModelRow]", verdict: "Verdict"
) -> "list[ResultTable]":

    told = listing([column_for(name).heading for name in verdict.objectives])
    per_step = f"{counted(len(composed.layers), 'layer')}, per denoising step"
    chosen = [own.row for own in verdict.on.values()]
    named = [{**row, "point": "verdict" if _is_total(row, chosen) else ""} for row in totals]
    # The verdict may lie beside the front, where only bytes put it ahead of a tie.
    front = [row for row in named if row["pareto"] or row["point"]]
    rest = [row for row in named if not row["pareto"] and not row["point"]]
    title = f"Pareto front of {told} ({per_step})"
    tables = [front_table(front, title=title, among=totals if verdict.area else None)]
    if verdict.area and len(rest) > _MOST_ARRAYS:
        note(f"{counted(len(rest), 'array')} beside the front are in results.csv and in `report`")
        rest = []
    return tables + ([totals_table(rest, title="Not on the front")] if rest else [])


def _is_total(row: "ModelRow", chosen: "list[Row | None]") -> bool:
    return any({name: row.get(name) for name in total} == total for total in chosen if total)


def _formula(verdict: "Verdict") -> str:
    from loraq_sim.results.totals import ERROR_FORMULA, WEIGHT_ERROR_FORMULA

    return WEIGHT_ERROR_FORMULA if verdict.error == "weight_error" else ERROR_FORMULA


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
    place: "Place",
    force: bool,
    output: OutputFormat,
) -> None:
    """Print what a sweep would do, and the job script where there is one."""
    from loraq_sim.results.store import ResultStore
    from loraq_sim.sweeps.forecast import estimate

    path = folder / "results.sqlite"
    with ResultStore.open(path) if path.exists() else nullcontext() as store:
        forecast = estimate(composed, store, jobs=place.expected_jobs, force=force)
    row = {
        "layers": forecast.n_layers,
        **({"shard": composed.shard} if composed.shard else {}),
        "splits": ", ".join(composed.plan.splits),
        "cases": forecast.n_cases,
        "already_there": forecast.n_done,
        "to_run": forecast.n_to_run,
        "jobs": forecast.jobs,
        "estimated_s": forecast.seconds,
        "peak_memory_per_worker_mib": forecast.worker_bytes / 2**20,
        "basis": forecast.basis,
        "out": str(folder),
    }
    script = place.job_script(forecast.worker_bytes)
    if output is OutputFormat.TABLE:
        width = max(map(len, row))
        for name, value in row.items():
            shown = f"{value:.0f}" if isinstance(value, float) else value
            say(f"{name.replace('_', ' '):{width}}  {shown}")
        if script:
            say(f"\nscript of each job\n\n{script}")
    elif output is OutputFormat.JSON:
        print_json([row], row | {"notes": list(composed.notes), "job_script": script})
    else:
        print_tables([result_table([row])], output)
