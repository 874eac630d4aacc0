"""``loraq-sim pareto``: the front of a result store, for any objectives, and the best in limits."""

import dataclasses
import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import AggregateName, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import (
    note,
    note_unfinished,
    one_line_failures,
    print_json,
    print_tables,
    print_verdict,
    store_file,
)
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing
from loraq_sim.metrics import DEFAULT_AGGREGATE
from loraq_sim.reporting.tables import front_table, result_table
from loraq_sim.results.cards import first_failure
from loraq_sim.results.columns import column_for, parse_limits
from loraq_sim.results.planned import unfinished
from loraq_sim.results.rows import EVALUATED, IDENTITY

if TYPE_CHECKING:
    from loraq_sim.results.rows import Row, StoredRow
    from loraq_sim.results.verdict import Verdict

__all__ = ["EXAMPLES", "pareto_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim pareto runs/demo\n\n"
    "loraq-sim pareto runs/demo --minimize output_error,weight_bytes,energy_j\n\n"
    "loraq-sim pareto runs/demo --under latency_s=3ms,weight_bytes=400MB\n\n"
    "loraq-sim pareto runs/demo --by kind --format csv"
)


class Grouping(enum.StrEnum):
    """What has a front of its own."""

    MODEL = "model"
    KIND = "kind"
    LAYER = "layer"


_KEYS = {
    Grouping.MODEL: ("dump", "accelerator"),
    Grouping.KIND: ("dump", "accelerator", "kind"),
    Grouping.LAYER: ("dump", "accelerator", "layer"),
}


@one_line_failures
def pareto_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    minimize: Annotated[
        list[str] | None,
        typer.Option(
            "--minimize",
            metavar="COLUMN",
            help="Objectives, smaller is better; repeat or separate by commas. "
            "Default: output_error,latency_s.",
            show_default=False,
        ),
    ] = None,
    maximize: Annotated[
        list[str] | None,
        typer.Option(
            "--maximize",
            metavar="COLUMN",
            help="Objectives, larger is better.",
            show_default=False,
        ),
    ] = None,
    under: Annotated[
        list[str] | None,
        typer.Option(
            "--under",
            metavar="COLUMN=LIMIT",
            help="Only rows within limits such as latency_s=3ms, weight_bytes=400MB, "
            "output_error=5%; the best of them in the first objective is shown first.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[
        Grouping,
        typer.Option("--by", help="A front for each model, layer kind or layer (per accelerator)."),
    ] = Grouping.MODEL,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Short for --by layer.")] = False,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            metavar="COLUMN=VALUE",
            help="Reference point of the hypervolume. Default: the worst value of each objective.",
            show_default=False,
        ),
    ] = None,
    aggregate: AggregateName = DEFAULT_AGGREGATE,
    figure: Annotated[
        Path | None,
        typer.Option(
            "--figure",
            metavar="FILE",
            help="Draw the model's error against its first cost (.png, .svg or .pdf).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing figure.")] = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Print the rows that no other row beats in every objective, the best within limits, and the
    verdict: which split to build.

    Latencies carry the accuracy of the cost model on their accelerator (see `hw validate`).
    """
    from loraq_sim.results.choice import with_latency_bounds
    from loraq_sim.results.front import best_under, survey_front, within
    from loraq_sim.results.store import ResultStore
    from loraq_sim.results.verdict import said_of_a_part

    grouping = Grouping.LAYER if per_layer else by
    with ResultStore.open(store_file(store)) as opened:
        rows, missing = opened.possible_rows(), opened.missing()
    if not rows:
        raise InputError(f"{store}: holds no row yet; run loraq-sim sweep into it first")
    if figure is not None and grouping is not Grouping.MODEL:
        raise InputError(f"--figure draws the whole model; leave out --by {grouping}")
    keys = _KEYS[grouping]
    candidates = _candidates(rows, missing, grouping, aggregate)
    goals = (
        listed(minimize) or (() if maximize else _default_goals(candidates)),
        listed(maximize),
    )
    columns = dict.fromkeys(name for row in candidates for name in row)
    limits = parse_limits(under or (), columns)
    point = parse_limits(reference or (), (*goals[0], *goals[1]))
    best: list[dict[str, Any]] = []
    if limits:
        meets = within(candidates, limits)
        _check_some_fit(candidates, meets, limits, keys, quiet=quiet)
        candidates = [row for row, fits in zip(candidates, meets, strict=True) if fits]
        objective = (*goals[0], *goals[1])[0]
        if objective in goals[0]:
            best = best_under(candidates, limits, objective, by=keys)
    front = survey_front(candidates, *goals, by=keys, reference=point)
    verdict = None
    if grouping is Grouping.MODEL:
        verdict = said_of_a_part(_verdict(candidates, goals[0]), rows, missing)
        front = _with_verdict(front, candidates, verdict)
    front = with_latency_bounds(front, by=keys)
    if figure is not None:
        _draw(_marked(candidates, front), goals[0], verdict, figure, force=force)
    if best:
        best = with_latency_bounds(best, by=keys)
    if not any(row.get("status") in EVALUATED for row in rows):
        note(f"error: {first_failure(rows)}")
    more = {"unfinished": unfinished(len(rows), missing)}
    more |= {"verdict": verdict.as_dict()} if verdict else {}
    _print(front, best, limits, grouping, goals, verdict, more, output)
    if verdict is None or output is OutputFormat.CSV:
        note_unfinished(len(rows), missing)


_ARRAY = ("acc_bits", "overflow", "products_per_add")


def _default_goals(candidates: list[dict[str, Any]]) -> tuple[str, ...]:
    """Error and latency, or what a store without them has instead; area where arrays compete."""
    from loraq_sim.results.verdict import verdict_of

    verdict = verdict_of(candidates)
    area = (verdict.area,) if verdict.area else ()
    return (verdict.error, verdict.cost or "latency_s", *area)


def _verdict(candidates: list[dict[str, Any]], minimize: tuple[str, ...]) -> "Verdict":
    """The verdict by the error and the cost that are asked for, where both are."""
    from loraq_sim.results.choice import COSTS
    from loraq_sim.results.verdict import verdict_of

    errors = [name for name in minimize if name in ("output_error", "weight_error")]
    costs = [name for name in minimize if name in COSTS]
    if errors and costs:
        return verdict_of(candidates, error=errors[0], cost=costs[0])
    return verdict_of(candidates)


def _with_verdict(
    front: list[dict[str, Any]], candidates: list[dict[str, Any]], verdict: "Verdict"
) -> list[dict[str, Any]]:
    """The front with ``is_verdict``, and the verdict's row where only bytes put it ahead."""
    chosen = {_identity(v.row) for v in verdict.on.values() if v.row is not None}
    members = {_identity(row) for row in front}
    volumes = {(row["dump"], row["accelerator"]): row["hypervolume"] for row in front}
    more = [
        row | {"pareto": False, "hypervolume": volumes.get((row["dump"], row["accelerator"]))}
        for row in candidates
        if _identity(row) in chosen - members
    ]
    marks = [(row, _identity(row) in chosen) for row in (*front, *more)]
    # The knee of the front beyond ties: there is one recommendation.
    return [row | {"is_verdict": mark, "is_knee": mark} for row, mark in marks]


def _candidates(
    rows: "list[StoredRow]", missing: "list[Row]", grouping: Grouping, aggregate: str
) -> list[dict[str, Any]]:
    from loraq_sim.results.totals import model_totals

    if grouping is Grouping.LAYER:
        return [row.as_dict() for row in rows]
    if grouping is Grouping.MODEL:
        return model_totals(rows, missing=missing, aggregate=aggregate)
    kinds: dict[str, list[StoredRow]] = {}
    for row in rows:
        kinds.setdefault(row.get("kind") or "", []).append(row)
    return [
        {"kind": kind} | total
        for kind, members in kinds.items()
        for total in model_totals(members, aggregate=aggregate)
    ]


def _check_some_fit(
    candidates: list[dict[str, Any]],
    meets: Any,
    limits: dict[str, float],
    keys: tuple[str, ...],
    *,
    quiet: bool,
) -> None:
    """Refuse limits that no row meets; name the groups in which none does."""
    from loraq_sim.results.front import group_members, least_possible

    if not meets.any():
        raise InputError(least_possible(candidates, limits))
    for members in group_members(candidates, keys):
        if not meets[members].any():
            own = [candidates[index] for index in members]
            place = " ".join(str(own[0].get(key)) for key in keys[1:])
            try:
                note(f"{place}: {least_possible(own, limits)}", quiet=quiet)
            except InputError as error:
                note(f"{place}: {error}", quiet=quiet)


def _print(
    front: list[dict[str, Any]],
    best: list[dict[str, Any]],
    limits: dict[str, float],
    grouping: Grouping,
    goals: tuple[tuple[str, ...], tuple[str, ...]],
    verdict: "Verdict | None",
    more: dict[str, Any],
    output: OutputFormat,
) -> None:

    what = {"model": "the model", "kind": "each kind of layer", "layer": "each layer"}[grouping]
    if output in (OutputFormat.JSON, OutputFormat.CSV):
        rows = front
        if best:
            chosen = {_identity(row) for row in best}
            rows = [row | {"best_under": _identity(row) in chosen} for row in front]
            # Who asks for the best within limits reads the first row.
            rows.sort(key=lambda row: not row["best_under"])
        if output is OutputFormat.CSV:
            print_tables([result_table(rows)], output)
        else:
            print_json(rows, more)
        return
    tables = []
    asked = " and ".join(f"{column} <= {limit:.6g}" for column, limit in limits.items())
    if best:
        objective = (*goals[0], *goals[1])[0]
        title = f"Least {objective} of {what} with {asked}"
        tables.append(_with_bounds(best, title, goals, grouping))
    tables.append(_with_bounds(front, f"Pareto front of {what}", goals, grouping))
    if output is OutputFormat.TABLE and front:
        tables.append(result_table(_fronts(front, grouping), title="What the fronts say"))
    print_tables(tables, output)
    if verdict is not None:
        print_verdict(verdict, output, within=asked)


def _identity(row: dict[str, Any]) -> tuple:

    return tuple(row.get(name) for name in (*IDENTITY, "kind"))


def _with_bounds(
    rows: list[dict[str, Any]],
    title: str,
    goals: tuple[tuple[str, ...], tuple[str, ...]],
    grouping: Grouping,
) -> Any:
    """The usual table of a front with its objectives, its knee and the bounds of its latency."""

    word = "verdict" if grouping is Grouping.MODEL else "knee"
    rows = [row | {"point": word if row.get("is_knee") else ""} for row in rows]
    table = front_table(rows, title=title)
    shown = {column.key: column for column in table.columns}
    wanted = [name for name in (*goals[0], *goals[1]) if name not in shown]
    if "latency_s" in shown and any(row.get("latency_lo_s") is not None for row in rows):
        wanted += ["latency_lo_s", "latency_hi_s"]
    columns = list(table.columns)
    if grouping is Grouping.KIND and "kind" not in shown:
        columns.insert(0, column_for("kind"))
    columns += [column_for(name, [row.get(name) for row in rows]) for name in wanted]
    if "area_ge" in goals[0]:
        # Which array a row is on is what its area means.
        named = [name for name in _ARRAY if name not in shown]
        columns = [*(column_for(name, [row.get(name) for row in rows]) for name in named), *columns]
    return dataclasses.replace(table, columns=tuple(columns))


def _fronts(front: list[dict[str, Any]], grouping: Grouping) -> list[dict[str, Any]]:
    from loraq_sim.results.choice import latency_accuracy

    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in front:
        groups.setdefault(tuple(row.get(key) for key in _KEYS[grouping]), []).append(row)
    rows = []
    for key, members in groups.items():
        knee = next((row["split"] for row in members if row["is_knee"]), "none")
        word = "verdict" if grouping is Grouping.MODEL else "knee"
        n_members = sum(row["pareto"] for row in members)
        facts = dict(zip(_KEYS[grouping], key, strict=True)) | {"members": n_members}
        facts |= {word: knee, "hypervolume": members[0]["hypervolume"]}
        if members[0].get("latency_lo_s") is not None:
            worst, seen = latency_accuracy(facts["accelerator"])
            alike = sum(row["within_uncertainty"] > 0 for row in members)
            facts |= {"latency_error": worst, "latency_alike": f"{alike} of {len(members)}"}
            facts |= {"accuracy": seen}
        rows.append(facts)
    return rows


def _marked(candidates: list[dict[str, Any]], front: list[dict[str, Any]]) -> list[dict[str, Any]]:
    members = {_identity(row) for row in front if row["pareto"]}
    return [row | {"pareto": _identity(row) in members} for row in candidates]


def _draw(
    totals: list[dict],
    minimize: tuple[str, ...],
    verdict: "Verdict | None",
    path: Path,
    *,
    force: bool,
) -> None:
    from loraq_sim.reporting.figures import pareto_figure, save_figure

    refuse_existing(path, overwrite=force)
    errors = [name for name in minimize if name.endswith("error")]
    costs = [name for name in minimize if not name.endswith("error")]
    if not errors or not costs:
        raise InputError(
            "--figure needs an error and a cost among --minimize, "
            f"got {', '.join(minimize) or 'none'}"
        )
    save_figure(pareto_figure(totals, x=costs[0], y=errors[0], verdict=verdict), path)
