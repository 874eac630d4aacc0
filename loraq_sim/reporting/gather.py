"""What a report shows, computed from the rows of a store by the rooms that own the computations.

`gather` is the only place where rows become totals, fronts, parts of a cost and validation for a
page; it also allocates one split per layer and says what that saves against uniform splits.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import hwmodels
from hwmodels.gates import COLUMN_PARTS
from loraq_sim.allocation import Allocation, allocate
from loraq_sim.allocation.frontier import compare_with_uniform, frontier_rows
from loraq_sim.allocation.problem import MACHINE
from loraq_sim.errors import InputError, LoraqError, counted
from loraq_sim.layers import is_after_gelu
from loraq_sim.machine import datapath_for, transforms_asked, workload_for
from loraq_sim.reporting.points import machine_grid
from loraq_sim.reporting.report_data import (
    COSTS,
    MixedModel,
    ReportData,
    answers,
    shown_records,
)
from loraq_sim.results.choice import (
    FEWEST_ROWS,
    latency_accuracy,
    objectives_of,
    rows_of_usual_kernels,
)
from loraq_sim.results.front import mark_front
from loraq_sim.results.rows import IDENTITY, AnyRow, Row, StoredRow, add_columns, cells_of
from loraq_sim.results.totals import ERROR_FORMULA, WEIGHT_ERROR_FORMULA, as_asked, model_totals
from loraq_sim.results.verdict import said_of_a_part, verdict_of
from loraq_sim.results.wording import context_of, labels_of
from loraq_sim.settings import ARRAY_KEYS
from loraq_sim.split import parse_split
from loraq_sim.version import __version__

__all__ = [
    "gather",
    "machines_of",
]


# Stored latencies are reproduced to the last bits; more than that is another description.
_SAME = 1e-9


def gather(
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Row],
    *,
    title: str | None = None,
    missing: Sequence[Row] = (),
    before: Sequence[Mapping[str, Any]] = (),
    before_missing: Sequence[Row] = (),
) -> "ReportData":
    """What a report of these rows shows.

    Parameters
    ----------
    rows : sequence of mappings
        Rows of a store.
    runs : sequence of dict
        Its provenance.
    title : str, optional
        By default the names of the dumps.
    missing : sequence of mappings
        What the store's sweeps planned and it has no row of.
    before, before_missing : sequence of mappings
        Rows of another store to compare these with, and what it has no row of.
    """
    shown, runs, missing = shown_records(rows), shown_records(runs), shown_records(missing)
    # The caller's rows may be nobody else's: each is gone as soon as it has its names.
    del rows
    dumps = list(dict.fromkeys(str(row.get("dump")) for row in shown))
    rows = _named(shown, dumps)
    error, _ = objectives_of(rows)
    accelerators = list(dict.fromkeys(str(row["accelerator"]) for row in rows))
    machines, notes = machines_of(accelerators, runs)
    parts, more_notes = _parts(rows, machines)
    notes += more_notes
    validation, devices, uncertainty = _validation(machines)
    data = ReportData(
        title=title or ", ".join(dumps),
        error=error,
        rows=rows,
        totals=_totals(rows, dumps, error, missing),
        missing=missing,
        kinds=_kinds(rows, dumps),
        parts=parts,
        validation=validation,
        devices=devices,
        uncertainty=uncertainty,
        machines={name: _facts(machine) for name, machine in machines.items()},
        runs=runs,
        notes=notes,
        formulas=(ERROR_FORMULA, WEIGHT_ERROR_FORMULA),
        version=__version__,
    )
    grids, more_notes = _grids(data, machines)
    data = replace(data, arrays=_arrays(data, machines), grids=grids, notes=[*notes, *more_notes])
    if before:
        data = replace(data, **_compared(data, before, before_missing, dumps))
    return replace(data, mixed=mixed_models(data))


def _compared(
    data: ReportData,
    before: Sequence[Mapping[str, Any]],
    missing: Sequence[Row],
    dumps: Sequence[str],
) -> Row:
    """Totals and verdict of another store, under the names of this one, and what to note."""
    rows = shown_records(before)
    if len(dumps) == 1 and len({row.get("dump") for row in rows}) == 1:
        # A model under another file name is the same one.
        rows = [{**row, "dump": dumps[0]} for row in rows]
        missing = [{**case, "dump": dumps[0]} if case else {} for case in missing]
    dumps = list(dict.fromkeys(str(row.get("dump")) for row in rows))
    totals = _totals(_named(rows, dumps), dumps, data.error, missing)
    now, then = ({row["layer"] for row in some} for some in (data.rows, rows))
    notes = list(data.notes)
    if now != then:
        notes.append(
            f"the stores compared are of {len(then)} and {counted(len(now), 'layer')}, "
            f"{len(now & then)} in both: their totals are sums of different layers"
        )
    verdict = said_of_a_part(verdict_of(totals), rows, missing)
    return {"before": totals, "verdict_before": verdict, "notes": notes}


def _grids(
    data: ReportData, machines: "dict[str, hwmodels.Accelerator]"
) -> tuple[dict[str, Row], list[str]]:
    """Costs on other machines, by context, and notes on what was too much."""
    found, notes = {}, []
    for context in data.contexts:
        machine = machines.get(data.accelerator_of(context))
        if machine is None or not (own := [x for x in data.parts if x["context"] == context]):
            continue
        grid = machine_grid(data.totals_of(context), own, machine)
        if grid is None:
            notes.append(f"the cases on {context} are too many to price them on other machines")
        else:
            found[context] = grid
    return found, notes


def _named(rows: list[Any], dumps: Sequence[str]) -> list[StoredRow]:
    """`rows`, used up, as they were asked for, with ``run_split``, ``label`` and ``context``."""
    run_splits = [row["split"] for row in rows]
    for place, row in enumerate(rows):
        rows[place] = as_asked(row)
    columns = zip(run_splits, *_names_of(rows, dumps), strict=True)
    add_columns(rows, ("run_split", "label", "context"), columns)
    return rows


def _names_of(rows: Sequence[Any], dumps: Sequence[str]) -> tuple[list[str], list[str]]:
    """The label and the context of each row."""
    several = len(dumps) > 1
    return labels_of(rows), [context_of(row, several_dumps=several) for row in rows]


def _totals(
    rows: list[StoredRow], dumps: Sequence[str], error: str, missing: Sequence[Row]
) -> list[Row]:
    totals = _with_names(model_totals(rows, missing=missing), rows, dumps)
    marks = {
        cost: [row["pareto"] for row in mark_front(totals, (error, cost), by=("context",))]
        for cost in COSTS
    }
    return [
        row | {"pareto": marks[COSTS[0]][i], "fronts": tuple(c for c in COSTS if marks[c][i])}
        for i, row in enumerate(totals)
    ]


def _with_names(
    totals: Sequence[Row], rows: Sequence[StoredRow], dumps: Sequence[str]
) -> list[Row]:
    """Totals under the labels of their rows: both name what tells the rows apart."""
    keys = [name for name in IDENTITY if name != "layer"]
    labels = dict(zip(cells_of(rows, keys), (row["label"] for row in rows), strict=True))
    _, contexts = _names_of(totals, dumps)
    return [
        {**row, "label": labels[tuple(map(row.get, keys))], "context": context}
        for row, context in zip(totals, contexts, strict=True)
    ]


def _kinds(rows: list[StoredRow], dumps: Sequence[str]) -> list[Row]:
    found = []
    by_kind: dict[str | None, list[StoredRow]] = {}
    for row in rows:
        by_kind.setdefault(row.get("kind"), []).append(row)
    for kind, own in by_kind.items():
        totals = _with_names(model_totals(own), own, dumps)
        found += [row | {"kind": kind or "other"} for row in totals if row["status"] == "ok"]
    return found


def machines_of(
    names: Sequence[str], runs: Sequence[Row]
) -> "tuple[dict[str, hwmodels.Accelerator], list[str]]":
    """Descriptions by name: shipped ones, and files that the sweeps named and that still exist."""
    asked = [str(a) for run in runs for a in (run.get("plan") or {}).get("accelerators") or ()]
    found: dict[str, hwmodels.Accelerator] = {}
    for source in dict.fromkeys([*reversed(asked), *names]):
        try:
            machine = hwmodels.load_accelerator(source)
        except (hwmodels.AcceleratorError, OSError):
            continue
        found.setdefault(machine.name, machine)
    missing = [name for name in names if name not in found]
    notes = [
        f"the description of {name} is not at hand: no cost breakdown and no sources for it"
        for name in missing
    ]
    return {name: found[name] for name in names if name in found}, notes


def _facts(machine: "hwmodels.Accelerator") -> Row:
    return {
        "title": machine.title,
        "facts": hwmodels.describe(machine),
        "dram_bytes_per_s": machine.memories.dram.bandwidth_bytes_per_s,
    }


def _parts(
    rows: Iterable[AnyRow], machines: "dict[str, hwmodels.Accelerator]"
) -> tuple[list[Row], list[str]]:
    """Parts of the cost of every shape, where the description still gives the stored latency."""
    shapes: dict[tuple, Row] = {}
    changed: set[str] = set()
    for row in rows:
        name = row["accelerator"]
        if row.get("status") != "ok" or name not in machines or name in changed:
            continue
        if row.get("m") is None:
            # Rows per call are not known, so there never was a cost.
            continue
        sizes = tuple(map(row.get, ("kind", "m", "n", "k")))
        key = (row["context"], row["label"], *sizes, row["run_split"], row["rank"])
        if key in shapes:
            shapes[key]["n_layers"] += 1
            shapes[key]["calls"] += row.get("calls_per_step") or 1
            continue
        shape = _shape(row, machines[name])
        if shape is None:
            changed.add(name)
        else:
            shapes[key] = shape
    notes = [
        f"the description of {name} has changed since the sweep: no cost breakdown for it"
        for name in sorted(changed)
    ]
    return [shape for shape in shapes.values() if shape["accelerator"] not in changed], notes


def _arrays(data: "ReportData", machines: "dict[str, hwmodels.Accelerator]") -> list[Row]:
    """Arrays of the split that is the answer where there are several: area by part, and error."""
    found = []
    for answer in answers(data):
        best = answer.best
        if best is None or not answer.verdict.area:
            continue
        rows = {row["label"]: row for row in data.rows_of(answer.context)}
        for total in data.totals_of(answer.context):
            apart = ("options", "seed", *ARRAY_KEYS)
            same = all(total.get(k) == best.get(k) for k in IDENTITY if k not in apart)
            if not same or total.get("seed") != best.get("seed") or not total.get("area_ge"):
                continue
            row, machine = rows[total["label"]], machines.get(str(total["accelerator"]))
            parts = None if machine is None else _array_parts(row, machine)
            found.append(
                {key: total.get(key) for key in _ARRAY_SHOWN}
                | {"error": total.get(data.error), "parts": parts or {}}
                | {"is_answer": total["label"] == answer.verdict.label}
            )
    return found


_ARRAY_SHOWN = (
    *("context", "label", "acc_bits", "overflow", "products_per_add", "accumulators"),
    *("area_ge", "area_mm2", "array_energy_j", "overflow_count"),
)


def _array_parts(row: AnyRow, machine: "hwmodels.Accelerator") -> dict[str, float] | None:
    """GE per MAC by part, where the machine's description still gives the area of the row."""
    try:
        options = json.loads(row.get("options") or "{}")
        array = {name: row[name] for name in ARRAY_KEYS if row.get(name) is not None}
        path = datapath_for(machine, {**(options.get("datapath") or {}), **array})
        split = parse_split(row["run_split"], family=row["family"], group=row["group_size"])
        work = workload_for(1, row["n"], row["k"], split, 0, path, fused=True)
        cost = hwmodels.array_of(work, machine, mac=path.mac, zero_point=path.zero_point)
    except (LoraqError, hwmodels.AcceleratorError, TypeError, ValueError, KeyError):
        return None
    if cost is None or abs(cost.area_ge / row["area_ge"] - 1) > _SAME:
        return None
    parts = {part: cost.gates.parts[part] for part in COLUMN_PARTS}
    more = cost.area_ge - sum(parts.values())
    return parts | ({"other": more} if more > _SAME * cost.area_ge else {})


def _shape(row: AnyRow, machine: "hwmodels.Accelerator") -> Row | None:
    try:
        options = json.loads(row.get("options") or "{}")
        split = parse_split(row["run_split"], family=row["family"], group=row["group_size"])
        if row.get("rotation") is None:
            split = split.after_gelu(is_after_gelu(row["kind"]))
        # Without a value the machine's own holds, as in rows of stores that had no such columns.
        array = {name: row[name] for name in ARRAY_KEYS if row.get(name) is not None}
        path = datapath_for(machine, {**(options.get("datapath") or {}), **array})
        machine = hwmodels.machine_with_array(machine, path.mac)
        sizes = (row["m"], row["n"], row["k"])
        fused = options.get("fused", True)
        # A method may choose a smoothing of its own, whose strength no row states.
        chosen = [row["smooth"]] if row.get("smooth") is not None else [None, 1.0]
        # What a condition chose, the message says in words only: it is what the latency is of.
        rotations = [row.get("rotation")]
        rotations += ["hadamard"] if row.get("condition") and not rotations[0] else []
        costs = []
        for smooth, rotate in itertools.product(chosen, rotations):
            transforms = transforms_asked(row["k"], split, path, smooth=smooth, rotate=rotate)
            work = workload_for(
                *sizes, split, row["rank"], path, feedback_rank=row.get("feedback_rank") or 0,
                fused=fused, transforms=transforms,
            )  # fmt: skip
            cost = hwmodels.estimate_cost(work, machine, kernel=options.get("kernel"))
            costs.append((cost, work))
    except (LoraqError, hwmodels.AcceleratorError, TypeError, ValueError, KeyError):
        return None
    seconds = row["latency_s"] or 0.0
    cost, work = min(costs, key=lambda found: abs(found[0].latency_s - seconds))
    if not seconds or abs(cost.latency_s / seconds - 1) > _SAME:
        return None
    names = ("context", "accelerator", "label", "kind", "m", "n", "k", "rank", "bound")
    return {
        **{name: row.get(name) for name in names},
        "split": row["run_split"],
        "n_layers": 1,
        "calls": row.get("calls_per_step") or 1,
        "parts": {cost_name: dict(cost.parts[cost_name]) for cost_name in COSTS},
        "roofline_latency_s": cost.roofline_latency_s,
        "call": (work, path.mac, options.get("kernel")),
        "macs": work.macs_main + work.macs_branch,
        "peak_macs_per_s": (work.macs_main + work.macs_branch)
        / (cost.utilization * cost.latency_s),
    }


def _validation(
    machines: "dict[str, hwmodels.Accelerator]",
) -> tuple[list[Row], list[Row], dict[str, Row]]:
    """Every measured row, of other devices too: they show what the model is worth elsewhere."""
    shipped = {name: hwmodels.load_accelerator(name) for name in hwmodels.list_accelerators()}
    shipped.update(machines)
    rows = [row for machine in shipped.values() for row in hwmodels.validate(machine)]
    accuracy = {
        name: _accuracy(name, rows_of_usual_kernels(machine, _of(machine, rows)))
        for name, machine in machines.items()
    }
    return rows, hwmodels.summarize(rows), accuracy


def _of(machine: "hwmodels.Accelerator", rows: Sequence[Row]) -> list[Row]:
    """Rows of a machine and of its variants."""
    return [
        row
        for row in rows
        if machine.name in (row["accelerator"], row["accelerator"].partition("@")[0])
    ]


def _accuracy(name: str, rows: Sequence[Row]) -> Row:
    """How far the latencies of a machine may be off, by `rows` of kernels that a layer gets."""
    own = hwmodels.summarize(rows, "accelerator")
    worst, seen = latency_accuracy(name)
    measured = own[0] if own and own[0]["rows"] >= FEWEST_ROWS else {}
    return {"bound": worst, "seen": seen, **measured}


_COSTS = ("latency_s", "weight_bytes")
_MOST_POINTS = 200
_MANY_LAYERS = 100
_UNIFORM = (
    *("split", "family", "group_size", "rotation", "smooth", "condition", "finish", "method"),
    *("preset", "seed"),
)


def mixed_models(data: "ReportData") -> list["MixedModel"]:
    """Frontiers of each context on the data path its answer was found on, one for each cost.

    Prices (Lagrangian) choose the allocations, which takes a fraction of a second for a whole
    model; each frontier point is then optimal, and what is said to be saved is a lower bound.
    """

    found: list[MixedModel] = []
    for answer in answers(data):
        if answer.best is None:
            continue
        rows = _rows_beside(data, answer.best)
        if len({row["split"] for row in rows}) > 1:
            labels = {_settings(row): row["label"] for row in rows}
            allocation = None
            for cost in _COSTS:
                allocation = _allocation(data, rows, cost, allocation)
                if mix := allocation and _mixed(data, answer.context, allocation, labels, cost):
                    found.append(mix)
    return found


def _rows_beside(data: "ReportData", best: AnyRow) -> list[AnyRow]:
    """Rows that could run beside the answer: same dump, machine and measurement."""
    keys = [name for name in MACHINE if name != "options"]
    wanted = tuple(map(best.get, keys))
    rows = data.rows_of(best["context"])
    return [
        row
        for row, (options, *own) in zip(rows, cells_of(rows, ("options", *keys)), strict=True)
        if (options or "") == (best.get("options") or "") and tuple(own) == wanted
    ]


def _allocation(
    data: "ReportData", rows: Sequence[AnyRow], cost: str, other: "Allocation | None"
) -> "Allocation | None":
    """An allocation that may spend all it likes of `cost`; None where there is nothing to trade.

    The problem of the `other` cost is taken where the same rows know this one.
    """

    budget = {cost: _ample(rows, cost)}
    if other is not None and cost in other.problem.contributions:
        usable = sum(
            row.get("status") == "ok" and None not in (row.get(data.error), row.get(cost))
            for row in rows
        )
        if usable == sum(map(len, other.problem.options)):
            return replace(other, budget=budget)
    try:
        return allocate(rows, budget, minimize=data.error, method="lagrangian")
    except InputError:
        # No layer knows both columns.
        return None


def _mixed(
    data: "ReportData", context: str, allocation: "Allocation", labels: dict[tuple, str], cost: str
) -> "MixedModel | None":
    try:
        frontier = frontier_rows(allocation.problem, cost, data.error, most=_MOST_POINTS)
        uniform = compare_with_uniform(
            allocation, on_front=len(allocation.problem.layers) > _MANY_LAYERS
        )
    except InputError:
        return None
    if len(frontier) < 2:
        return None
    gains = [
        {**row, "label": labels[_settings(row)], "mixed_error": row[f"mixed_{data.error}"]}
        for row in uniform
        if _settings(row) in labels
    ]
    return MixedModel(
        context=context,
        cost=cost,
        error=data.error,
        frontier=frontier,
        gains=gains,
    )


def _ample(rows: Sequence[AnyRow], cost: str) -> float:
    """A budget that every allocation meets."""
    return 1.0 + sum((row.get(cost) or 0) * (row.get("calls_per_step") or 1) for row in rows)


def _settings(row: AnyRow) -> tuple:
    return tuple(map(row.get, _UNIFORM))
