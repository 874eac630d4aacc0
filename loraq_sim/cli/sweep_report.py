"""What ``loraq-sim sweep`` writes and prints: CSV, picture, front, forecast of a dry run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import note, print_json, print_tables, say
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from loraq_sim.cli.place import Place
    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.plan import ComposedSweep

__all__ = ["check_folder", "print_forecast", "report_sweep"]


def report_sweep(
    composed: "ComposedSweep",
    store: "ResultStore",
    folder: Path,
    output: OutputFormat,
    *,
    quiet: bool,
) -> None:
    """CSV and picture beside the store; the front, or everything as JSON, on stdout."""
    from loraq_sim.pareto import mark_front, objectives_of
    from loraq_sim.results.clipped import clipped_note
    from loraq_sim.totals import ERROR_FORMULA, WEIGHT_ERROR_FORMULA, model_totals
    from reports.figures import pareto_figure, save_figure
    from reports.tables import front_table, result_table, totals_table

    rows = store.rows(composed.case_ids)
    store.export_csv(folder / "results.csv", composed.case_ids)
    totals = model_totals(rows, layers=composed.layers)
    error, cost = objectives_of(totals)
    totals = mark_front(totals, (error, cost), by=("dump", "accelerator"))
    front = [row for row in totals if row["pareto"]]
    beyond = clipped_note(rows)
    made = ["results.sqlite", "results.csv"]
    if front and (error, cost) == ("output_error", "latency_s"):
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
                "notes": [beyond] if beyond else [],
                "provenance": provenance[-1] if provenance else {},
            }
        )
    elif output is OutputFormat.CSV:
        print_tables([result_table(rows)], output)
    else:
        per_step = f"{len(composed.layers)} layers, per denoising step"
        rest = [row for row in totals if not row["pareto"]]
        tables = [
            front_table(
                front, title=f"Pareto front of {_named(error)} and {_named(cost)} ({per_step})"
            )
        ]
        if rest:
            tables.append(totals_table(rest, title="Not on the front"))
        print_tables(tables, output)
        note(ERROR_FORMULA if error == "output_error" else WEIGHT_ERROR_FORMULA, quiet=quiet)
    if beyond:
        # Said under --quiet, too: without it a total would look like any other.
        note(beyond)
    for name in made:
        note(f"wrote {folder / name}", quiet=quiet)


def _named(objective: str) -> str:
    from loraq_sim.results.columns import column_for

    return column_for(objective).heading


def _footer(composed: "ComposedSweep") -> dict[str, Any]:
    from loraq_sim import __version__

    return {
        "loraq-sim": __version__,
        "seed": composed.plan.seed,
        "dump": composed.dump_digest[:12],
        **{name: digest[:12] for name, digest in composed.accelerator_digests.items()},
    }


def check_folder(folder: Path, *, force: bool) -> None:
    """Files of a sweep may replace those of an earlier one, never something else's."""
    if force or (folder / "results.sqlite").exists():
        return
    for name in ("results.csv", "pareto.png"):
        if (folder / name).exists():
            raise InputError(
                f"{folder / name} is there but no result store beside it; "
                "choose another --out, or --force to replace it"
            )


def print_forecast(
    composed: "ComposedSweep",
    folder: Path,
    *,
    place: "Place",
    force: bool,
    output: OutputFormat,
) -> None:
    """Print what a sweep would do, and the job script where there is one."""
    from contextlib import nullcontext

    from loraq_sim.store import ResultStore
    from loraq_sim.sweep.forecast import estimate
    from reports.tables import result_table

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
        for remark in composed.notes:
            say(remark)
        width = max(map(len, row))
        for name, value in row.items():
            shown = f"{value:.0f}" if isinstance(value, float) else value
            say(f"{name.replace('_', ' '):{width}}  {shown}")
        if script:
            say(f"\nscript of each job\n\n{script}")
    elif output is OutputFormat.JSON:
        print_json(row | {"notes": list(composed.notes), "job_script": script})
    else:
        print_tables([result_table([row])], output)
