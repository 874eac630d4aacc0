"""``loraq-sim allocate``: one split per layer, best for the whole model within budgets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import (
    AggregateName,
    Force,
    Layers,
    OutFormat,
    OutputFormat,
    Quiet,
    listed,
)
from loraq_sim.cli.output import (
    note,
    note_unfinished,
    one_line_failures,
    print_json,
    print_tables,
    store_file,
)
from loraq_sim.errors import InputError
from loraq_sim.files import refuse_existing
from loraq_sim.metrics import DEFAULT_AGGREGATE
from loraq_sim.reporting.tables import result_table
from loraq_sim.results.columns import parse_limits
from loraq_sim.results.planned import unfinished
from loraq_sim.results.wording import context_of, labels_of
from loraq_sim.settings import skipped
from loraq_sim.version import __version__

if TYPE_CHECKING:
    from loraq_sim.allocation import Allocation
    from loraq_sim.allocation.problem import AllocationProblem
    from loraq_sim.results.rows import AnyRow, StoredRow

__all__ = ["EXAMPLES", "allocate_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim allocate runs/demo --budget latency_s=2.95ms\n\n"
    "loraq-sim allocate runs/demo --budget output_error=5% --minimize energy_j --out runs/mixed\n\n"
    "loraq-sim allocate runs/demo --budget latency_s=3ms,weight_bytes=200kB --solver lagrangian"
)
_ARRAY = ("acc_bits", "overflow", "products_per_add", "accumulators")
_SHOWN_POINTS = 12
_TRANSFORMS = ("rotation", "smooth", "condition", "finish")
_SAME = (*_TRANSFORMS, "family", "group_size", "method", "preset", "seed")
_CHOSEN = (
    *("layer", "kind", "split", *_SAME, "rank", "output_error", "weight_error", "latency_s"),
    *("energy_j", "weight_bytes", "bound"),
)


@one_line_failures
def allocate_command(
    store: Annotated[Path, typer.Argument(help="Result store, or the folder a sweep wrote.")],
    budget: Annotated[
        list[str],
        typer.Option(
            "--budget",
            metavar="COLUMN=LIMIT",
            help="Largest total: latency_s=3ms, weight_bytes=400MB, energy_j=5mJ, output_error=5%; "
            "area_mm2, area_ge: of the one array for all layers; repeat or separate by commas; all "
            "of them hold.",
            show_default=False,
        ),
    ],
    minimize: Annotated[
        str | None,
        typer.Option(
            "--minimize",
            metavar="COLUMN",
            help="What is made small. Default: output_error, or latency_s under a budget on it.",
            show_default=False,
        ),
    ] = None,
    hw: Annotated[
        str | None,
        typer.Option(
            "--hw",
            metavar="NAME",
            help="Accelerator of the store; one allocation for each by default.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    solver: Annotated[
        str, typer.Option("--solver", metavar="NAME", help="exact or lagrangian (fast, bounded).")
    ] = "exact",
    aggregate: AggregateName = DEFAULT_AGGREGATE,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="S", help="Seconds for each exact solution.")
    ] = 60.0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write recipes (for solve --recipe) and CSV tables into this folder.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Choose a split per layer: least error within budgets, or least cost within an error."""
    from loraq_sim.allocation import allocate_each
    from loraq_sim.allocation.problem import AREAS, QUANTITIES
    from loraq_sim.results.store import ResultStore

    limits = parse_limits(budget, (*QUANTITIES, *AREAS))
    with ResultStore.open(store_file(store)) as opened:
        rows, runs, missing = opened.possible_rows(), opened.provenance(), opened.missing()
    found = allocate_each(
        _selected(rows, listed(layers)),
        limits,
        minimize=minimize,
        method=solver,
        accelerator=hw,
        aggregate=aggregate,
        time_limit_s=time_limit,
    )
    several = len({one.problem.machine.get("dump") for one in found}) > 1
    places = [context_of(one.problem.machine, several_dumps=several) for one in found]
    for one, place in zip(found, places, strict=True):
        areas = [name for name in AREAS if name in limits]
        array = ", ".join(f"{name} {one.problem.machine[name]}" for name in _ARRAY if areas)
        for text in (*([f"array of {array}"] if areas else []), *one.problem.notes):
            note(f"{place}: {text}", quiet=quiet)
    views = [_view(one) for one in found]
    left = unfinished(len(rows), missing)
    if out is not None:
        _write(out, found, views, runs, left, force=force, quiet=quiet)
    note_unfinished(len(rows), missing)
    layer_rows = [row for view in views for row in view["layers"]]
    if output is OutputFormat.JSON:
        print_json(layer_rows, {"unfinished": left, "allocations": views})
        return
    if output is OutputFormat.CSV:
        print_tables([result_table(layer_rows)], output)
        return
    tables = [_tables(*each) for each in zip(found, views, places, strict=True)]
    print_tables([table for some in tables for table in some], output)


def _selected(rows: "list[StoredRow]", patterns: tuple[str, ...]) -> "list[StoredRow]":

    if not patterns:
        return rows
    kept = [row for row in rows if skipped(row["layer"], row.get("kind") or "", patterns)]
    if not kept:
        raise InputError(f"no layer of the store matches {', '.join(patterns)}")
    return kept


def _view(one: "Allocation") -> dict[str, Any]:
    from loraq_sim.allocation.frontier import axes_of, compare_with_uniform, frontier_rows

    cost, error = axes_of(one)
    known = {cost, error} <= one.problem.contributions.keys()
    return {
        "machine": one.problem.machine,
        "budget": one.budget,
        "minimize": one.minimize,
        "aggregate": one.problem.aggregate,
        "totals": one.totals,
        "value": one.value,
        "bound": one.bound,
        "gap": one.gap,
        "method": one.method,
        "is_proven": one.is_proven,
        "notes": list(one.problem.notes),
        "axes": [cost, error],
        "layers": one.rows,
        "uniform": compare_with_uniform(one),
        "frontier": frontier_rows(one.problem, cost, error) if known else [],
    }


def _tables(one: "Allocation", view: dict[str, Any], place: str) -> list[Any]:
    from loraq_sim.allocation.frontier import spread

    cost, error = view["axes"]
    unlike = _telling_apart(one.problem)
    columns = [
        name
        for name in _CHOSEN
        if any(row.get(name) is not None for row in one.rows)
        and (name not in _SAME or name in _TRANSFORMS or name in unlike)
    ]
    tables = [
        result_table(_summary(one, view), title=f"{place}: the whole model"),
        result_table(one.rows, columns, title=f"{place}: split of each layer"),
    ]
    if view["uniform"]:
        rows = [row | {"in_budget": "yes" if row["in_budget"] else "no"} for row in view["uniform"]]
        keys = ("split", *_SAME, cost, error, f"mixed_{error}", "error_ratio", f"mixed_{cost}")
        shown = [*keys, "cost_ratio", "in_budget"]
        shown = [n for n in shown if n not in _SAME or len({row[n] for row in rows}) > 1]
        title = f"{place}: mixed splits against one everywhere, at its cost or its error"
        tables.append(result_table(rows, shown, title=title))
    if view["frontier"]:
        points = spread(view["frontier"], cost, error, _SHOWN_POINTS)
        title = (
            f"{place}: from all cheapest to all best, {len(points)} of "
            f"{len(view['frontier'])} allocations"
        )
        tables.append(result_table(points, [cost, error, "mix"], title=title))
    return tables


def _telling_apart(problem: "AllocationProblem") -> set[str]:
    """Settings in which options of one layer and split differ."""
    found: set[str] = set()
    for options in problem.options:
        first: dict[str, AnyRow] = {}
        for row in options:
            known = first.setdefault(row["split"], row)
            found |= {name for name in _SAME if known.get(name) != row.get(name)}
    return found


def _summary(one: "Allocation", view: dict[str, Any]) -> list[dict[str, Any]]:
    """The allocation, and under it the single split that does best within the same budgets."""
    facts = {"optimum": "proven" if one.is_proven else "", "gap": one.gap}
    if one.method == "exact" and not one.is_proven:
        facts["optimum"] = "time over"
    names = list(one.totals)
    rows = [{"choice": "per layer"} | one.totals | facts]
    within = [row for row in view["uniform"] if row["in_budget"]]
    if within:
        best = min(within, key=lambda row: row[one.minimize])
        text = f"one split: {labels_of([best])[0]}"
        rows.append({"choice": text} | {name: best.get(name) for name in names})
    return rows


def _write(
    folder: Path,
    found: "list[Allocation]",
    views: list[dict[str, Any]],
    runs: list[dict[str, Any]],
    left: dict[str, Any] | None,
    *,
    force: bool,
    quiet: bool,
) -> None:
    from loraq_sim.allocation.frontier import allocation_recipe
    from loraq_sim.recipe import write_recipe
    from loraq_sim.results.store_records import write_csv

    paths = _recipe_paths(folder, found)
    tables = {"allocation.csv": "layers", "frontier.csv": "frontier", "uniform.csv": "uniform"}
    refuse_existing(*paths, *(folder / name for name in tables), overwrite=force)
    for path, one in zip(paths, found, strict=True):
        facts = _origin(one, runs) | ({"partial": left["text"]} if left else {})
        recipe = allocation_recipe(one, facts)
        note(f"wrote {write_recipe(path, recipe, overwrite=force)}", quiet=quiet)
    for name, key in tables.items():
        rows = [row for view in views for row in view[key]]
        if rows:
            write_csv(folder / name, rows, list(dict.fromkeys(k for row in rows for k in row)))
            note(f"wrote {folder / name}", quiet=quiet)


def _recipe_paths(folder: Path, found: "list[Allocation]") -> list[Path]:
    if len(found) == 1:
        return [folder / "recipe.toml"]
    names = [one.accelerator for one in found]
    if len(set(names)) < len(names):
        names = [f"{name}_{number}" for number, name in enumerate(names, start=1)]
    return [folder / f"recipe_{name}.toml" for name in names]


def _origin(one: "Allocation", runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Digests of what the sweeps of the store read, of the latest that used this accelerator."""

    origin: dict[str, Any] = {"loraq_sim": __version__}
    for run in reversed(runs):
        digests = run.get("accelerator_digests") or {}
        if one.accelerator in digests:
            origin["accelerator_digest"] = digests[one.accelerator]
            origin["dump_digest"] = run.get("dump_digest")
            origin["swept"] = run.get("started")
            break
    return origin
