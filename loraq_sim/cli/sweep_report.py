"""What ``loraq-sim sweep`` writes and prints: CSV, picture, front, forecast of a dry run."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import note, print_json, print_tables, print_verdict, say
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from loraq_sim.reporting.tables import ResultTable
    from loraq_sim.results.store import ResultStore
    from loraq_sim.results.verdict import Verdict
    from loraq_sim.sweeps.plan import ComposedSweep
    from loraq_sim.sweeps.scheduler import Place

__all__ = ["check_folder", "print_forecast", "report_sweep"]


def report_sweep(
    composed: "ComposedSweep",
    store: "ResultStore",
    folder: Path,
    output: OutputFormat,
    *,
    quiet: bool,
) -> None:
    """CSV and picture beside the store; front and verdict, or everything as JSON, on stdout."""
    from loraq_sim.reporting.figures import save_figure
    from loraq_sim.reporting.tables import result_table
    from loraq_sim.results.rows import clipped_note
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
            {
                "rows": rows,
                "front": front,
                "model": totals,
                "verdict": verdict.as_dict(),
                "error_formula": _formula(verdict),
                "notes": [*composed.notes, *([beyond] if beyond else [])],
                "provenance": provenance[-1] if provenance else {},
            }
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
    composed: "ComposedSweep", totals: list[dict[str, Any]], verdict: "Verdict"
) -> "list[ResultTable]":
    from loraq_sim.reporting.tables import front_table, totals_table
    from loraq_sim.results.columns import column_for

    told = " and ".join(column_for(name).heading for name in (verdict.error, verdict.cost) if name)
    per_step = f"{len(composed.layers)} layers, per denoising step"
    chosen = [own.row for own in verdict.on.values()]
    named = [row | {"point": "verdict" if _is_total(row, chosen) else ""} for row in totals]
    # The verdict may lie beside the front, where only bytes put it ahead of a tie.
    front = [row for row in named if row["pareto"] or row["point"]]
    rest = [row for row in named if not row["pareto"] and not row["point"]]
    tables = [front_table(front, title=f"Pareto front of {told} ({per_step})")]
    return tables + ([totals_table(rest, title="Not on the front")] if rest else [])


def _is_total(row: dict[str, Any], chosen: list[dict[str, Any] | None]) -> bool:
    return any({name: row.get(name) for name in total} == total for total in chosen if total)


def _formula(verdict: "Verdict") -> str:
    from loraq_sim.results.totals import ERROR_FORMULA, WEIGHT_ERROR_FORMULA

    return WEIGHT_ERROR_FORMULA if verdict.error == "weight_error" else ERROR_FORMULA


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

    from loraq_sim.reporting.tables import result_table
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
