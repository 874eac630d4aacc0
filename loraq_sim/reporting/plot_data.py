"""What the scripts of the page draw, as plain values for JSON: every number once, no markup.

The keys of the result are the names the scripts use. Colors come in pairs, light and dark.

The matrices behind the heat map, one number for every layer in every case, are most of a large
page. So a line of equal values is one value, what the page can divide itself is not stored twice,
and a page of many cells has three digits instead of five.
"""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from loraq_sim.reporting.labels import (
    NO_BRANCH,
    SERIES_COLORS,
    branch_markers,
    dark_color,
    main_and_branch,
    main_colors,
    part_colors,
)
from loraq_sim.reporting.points import GRID_COSTS, case_texts
from loraq_sim.reporting.report_data import (
    COSTS,
    PART_NAMES,
    Answer,
    ReportData,
    image_anchors,
)
from loraq_sim.reporting.sections import MethodClass
from loraq_sim.results.columns import choose_unit, column_for, is_missing
from loraq_sim.results.rows import AnyRow, cells_of
from loraq_sim.results.wording import pretty_unit

__all__ = [
    "folded_bits",
    "layer_cells",
    "plot_data",
    "rounded",
]


_SHARES = {"latency_s": "share of the model's latency", "energy_j": "share of the model's energy"}
_LAYER_VALUES = {
    "output_error": "output error",
    "relative:output_error": "output error, of the model's in that case",
    "weight_error": "weight error",
    "relative:weight_error": "weight error, of the model's in that case",
    **{f"share:{key}": heading for key, heading in _SHARES.items()},
    "safe_acc_bits": "safe accumulator bits",
    "overflow_count": "overflows",
}
_CELLS = (
    *("label", "layer", "kind", "status", "bound", "calls_per_step"),
    *dict.fromkeys(key.rpartition(":")[2] for key in _LAYER_VALUES),
)
# Digits that survive in the page; the CSV files beside it hold all of them.
_DIGITS = 5
_MANY_CELLS = 20_000
# Bits between the sums of one case and of the next, or the array's, that an axis shows.
_WIDEST_GAP = 4
_MOST_BITS = 128
# Cases, each of which comes with a kilobyte to copy.
_MOST_TEXTS = 60
_FEW_DIGITS = 3


def common_prefix(names: Sequence[str]) -> str:
    """Leading dotted parts that all names share and that none consists of alone."""
    prefix = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    return prefix[: prefix.rfind(".") + 1]


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """Numbers cut to the digits a reader sees; what JSON cannot hold as null."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return None if is_missing(value) else value


def layer_cells(data: ReportData, context: str) -> dict[str, Any]:
    """Layers, cases and the known quantities of one context, ``z[case][layer]`` each.

    A line ``z[case]`` of equal values is that value. A quantity without ``z`` is the one it is
    ``of``, each line divided by its number in ``by``.
    """
    rows = data.rows_of(context)
    columns = dict(zip(_CELLS, map(list, zip(*cells_of(rows, _CELLS), strict=True)), strict=True))
    layers, is_done = list(map(str, columns["layer"])), [s == "ok" for s in columns["status"]]
    column = {name: j for j, name in enumerate(dict.fromkeys(layers))}
    kinds = dict(zip(layers, columns["kind"], strict=True))
    labels = _by_error(data, context, columns["label"])
    place = {label: i for i, label in enumerate(labels)}
    at = [(place[case], column[name]) for case, name in zip(columns["label"], layers, strict=True)]

    def lines(values: Iterable[Any], nothing: Any = None) -> list[list[Any]]:
        """``[case][layer]``; nothing is known of a case that did not run."""
        found = [[nothing] * len(column) for _ in labels]
        for (i, j), value in zip(at, values, strict=True):
            found[i][j] = value
        return found

    def known_of(key: str) -> list[Any]:
        return [v if ok else None for v, ok in zip(columns[key], is_done, strict=True)]

    prefix = common_prefix(list(column))
    digits = _FEW_DIGITS if len(data.rows) > _MANY_CELLS else _DIGITS
    found: dict[str, Any] = {
        "names": [name.removeprefix(prefix) for name in column],
        "prefix": prefix,
        "kinds": [str(kinds[name] or "") for name in column],
        "labels": labels,
        "bounds": _codes(lines(columns["bound"])),
        "failed": [list(where) for where, ok in zip(at, is_done, strict=True) if not ok],
        "quantities": [],
    }
    totals = {row["label"]: row for row in data.totals_of(context)}
    known: set[str] = set()
    for key, heading in _LAYER_VALUES.items():
        way, _, of = key.rpartition(":")
        if way == "relative":
            by = [totals.get(label, {}).get(of) or None for label in labels]
            if of in known and any(by):
                divided = {"of": of, "by": [rounded(whole) for whole in by]}
                found["quantities"].append({"key": key, "heading": heading} | divided)
            continue
        if way == "share":
            # One call's cost times the calls, over the sum of all layers.
            calls = [count or 1 for count in columns["calls_per_step"]]
            times = [
                None if is_missing(cost) else cost * count
                for cost, count in zip(known_of(of), calls, strict=True)
            ]
            matrix = [_of_whole(line) for line in lines(times)]
        else:
            matrix = lines(known_of(key))
        matrix = [[rounded(value, digits) for value in line] for line in matrix]
        if any(value is not None for line in matrix for value in line):
            known.add(key)
            found["quantities"].append(
                {"key": key, "heading": heading, "z": [_line(line) for line in matrix]}
            )
    return found


def _by_error(data: ReportData, context: str, labels: Iterable[str]) -> list[str]:
    """Labels from the largest error to the least; those without a total last."""
    errors = {row["label"]: row.get(data.error) for row in data.totals_of(context)}
    return sorted(dict.fromkeys(labels), key=lambda label: -(errors.get(label) or 0.0))


def _codes(words: list[list[Any]]) -> dict[str, Any]:
    """Repeated words as a list of them and indices, -1 for none."""
    names = list(dict.fromkeys(word for line in words for word in line if word))
    index = {name: i for i, name in enumerate(names)}
    return {"names": names, "at": [_line([index.get(w, -1) for w in line]) for line in words]}


def _line(values: list[Any]) -> Any:
    return values[0] if len(values) > 1 and len(set(values)) == 1 else values


def _of_whole(values: Sequence[Any]) -> list[float | None]:
    whole = sum(value for value in values if value is not None)
    return [None if value is None or not whole else value / whole for value in values]


_SYMBOLS = {
    **{"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "p": "pentagon"},
    **{"X": "x", "v": "triangle-down", "P": "cross", "<": "triangle-left", "h": "hexagon"},
    **{"*": "star", ">": "triangle-right"},
}
_FACETS = {
    **{"main": "Main precision", "branch": "Low-rank branch", "method": "Method"},
    **{"preset": "Preset", "family": "Elements", "group_size": "Group", "seed": "Seed"},
    **{"acc_bits": "Accumulator bits", "overflow": "Overflow rule"},
    **{"products_per_add": "Products per add", "accumulators": "Accumulators"},
    **{"token_limit": "Tokens", "options": "Other settings"},
}
_POINT_VALUES = (
    *("output_error", "weight_error", "sqnr_db", "bits_per_weight", *COSTS),
    *("overflow_count", "safe_acc_bits", "utilization"),
)


def plot_data(
    data: ReportData, found: Sequence[Answer], methods: Sequence[MethodClass]
) -> dict[str, Any]:
    """Everything the page draws."""
    contexts = data.contexts
    splits = [str(row["split"]) for row in data.totals]
    return {
        "contexts": contexts,
        "answers": {a.context: a.best["label"] for a in found if a.best is not None},
        "answerCosts": {a.context: a.cost for a in found if a.best is not None},
        "error": data.error,
        "columns": _columns(data),
        "looks": {
            "main": {name: _pair(color) for name, color in main_colors(splits).items()},
            "branch": {name: _SYMBOLS[mark] for name, mark in branch_markers(splits).items()},
            "series": [_pair(color) for color in SERIES_COLORS],
            "parts": {name: _pair(color) for name, color in part_colors(_all_parts(data)).items()},
        },
        "partNames": PART_NAMES,
        "facets": _facets(data),
        "uncertainty": {
            context: {key: data.uncertainty[name][key] for key in ("bound", "seen")}
            for context in contexts
            if (name := data.accelerator_of(context)) in data.uncertainty
        },
        "points": [_point(row) for row in data.totals if row.get("status") == "ok"],
        "grids": {context: _grid(grid) for context, grid in data.grids.items()},
        "cases": case_texts_of(data),
        "anchors": _anchors() if data.error == "output_error" else None,
        "bandwidths": {
            context: data.machines[name].get("dram_bytes_per_s")
            for context in contexts
            if (name := data.accelerator_of(context)) in data.machines
        },
        "before": [_before(row) for row in data.before],
        "layers": {context: layer_cells(data, context) for context in contexts},
        "kinds": [_kind(row, data.error) for row in data.kinds],
        "parts": [_part(row) for row in data.parts],
        "accumulators": data.accumulators,
        "accumulatorAxes": {
            context: folded_bits(row for row in data.accumulators if row["context"] == context)
            for context in contexts
        },
        "arrays": [_array(row) for row in data.arrays],
        "methods": [_method(item) for item in methods],
        "mixed": [_mix(mix) for mix in data.mixed],
        "validation": [
            {
                key: rounded(row[key])
                for key in ("device", "kernel", "m", "n", "k", "measured_ms", "predicted_ms")
            }
            for row in data.validation
        ],
    }


def folded_bits(rows: Iterable[AnyRow]) -> dict[str, list[list[float]] | list[float]]:
    """An axis for the bits of `ReportData.accumulators` that leaves out what no case comes near.

    Returns
    -------
    axis : dict
        ``at``: pairs of a number of bits and its place; ``breaks``: places where numbers were left
        out. Neighbors are one apart, so that a bar is as long as the bits it stands for.
    """
    known: set[int] = set()
    for row in rows:
        # A store of anyone may say more than any sum has.
        known.update(range(row["low"], min(row["high"], row["low"] + _MOST_BITS) + 1))
        known.add(row["high"])
        known.update(int(row[key]) for key in ("guaranteed", "array") if row[key] is not None)
    at: list[list[float]] = []
    breaks: list[float] = []
    for bits in sorted(known):
        if at and bits - at[-1][0] <= _WIDEST_GAP:
            last, place = at[-1]
            at += [[last + i, place + i] for i in range(1, bits - int(last) + 1)]
        elif at:
            breaks.append(at[-1][1] + 1)
            at.append([bits, at[-1][1] + 2])
        else:
            at.append([bits, bits])
    return {"at": at, "breaks": breaks}


def _anchors() -> dict[str, Any]:
    """Errors in images without the images, which the page shows already."""
    known = image_anchors()
    names = ("split", "output_error", "psnr_db")
    found = [{name: anchor[name] for name in names} for anchor in known["anchors"]]
    return {"about": known["about"], "line": known["line"], "anchors": found}


def case_texts_of(data: ReportData) -> dict[str, dict[str, dict[str, str]]]:
    """What to copy of each case, by context and label; of very many cases, of those on a front."""
    totals = [row for row in data.totals if row.get("status") == "ok"]
    if len(totals) > _MOST_TEXTS:
        totals = [row for row in totals if row["fronts"]][:_MOST_TEXTS]
    found: dict[str, dict[str, dict[str, str]]] = {context: {} for context in data.contexts}
    for row in totals:
        found[row["context"]][row["label"]] = case_texts(data, row)
    return found


def _grid(grid: AnyRow) -> dict[str, Any]:
    costs = {
        name: [[rounded(value) for value in line] for line in grid[name]] for name in GRID_COSTS
    }
    return {**grid, **costs}


def _before(row: AnyRow) -> dict[str, Any]:
    names = ("context", "label")
    return {name: row[name] for name in names} | {
        key: rounded(row.get(key)) for key in _POINT_VALUES
    }


def _array(row: AnyRow) -> dict[str, Any]:
    numbers = ("area_ge", "area_mm2", "array_energy_j", "error")
    parts = {part: rounded(value) for part, value in row["parts"].items()}
    return {**row, **{key: rounded(row[key]) for key in numbers}, "parts": parts}


def _pair(color: str) -> list[str]:
    return [color, dark_color(color)]


def _columns(data: ReportData) -> dict[str, dict[str, Any]]:
    """Heading and units of each drawn column; the unit is chosen per context, so cells compare."""
    found = {}
    for key in dict.fromkeys((data.error, *_POINT_VALUES)):
        column = column_for(key)
        units = {}
        for context in data.contexts:
            values = [row.get(key) for row in data.totals_of(context)]
            unit = choose_unit(values, column.quantity)
            units[context] = [pretty_unit(unit.symbol), unit.size]
        unit = choose_unit([row.get(key) for row in data.totals], column.quantity)
        known = any(not is_missing(row.get(key)) for row in data.totals)
        found[key] = {
            "heading": column.heading[:1].upper() + column.heading[1:],
            "quantity": column.quantity,
            "units": units,
            "unit": [pretty_unit(unit.symbol), unit.size],
            "known": known,
        }
    return found


def _facet_values(row: AnyRow) -> dict[str, str]:
    main, branch = main_and_branch(str(row["split"]))
    values = {"main": main, "branch": "no branch" if branch == NO_BRANCH else branch}
    for key in _FACETS:
        if key not in values:
            value = row.get(key)
            values[key] = "default" if value is None or value == "" else str(value)
    return values


def _facets(data: ReportData) -> list[dict[str, Any]]:
    """What points can be filtered by: everything that takes more than one value."""
    values: dict[str, dict[str, None]] = {key: {} for key in _FACETS}
    telling: set[str] = set()
    for context in data.contexts:
        rows = [_facet_values(row) for row in data.totals_of(context)]
        for key in _FACETS:
            own = dict.fromkeys(row[key] for row in rows)
            values[key].update(own)
            # What only differs between accelerators is theirs and no choice.
            if len(own) > 1:
                telling.add(key)
    return [
        {"key": key, "heading": _FACETS[key], "values": _in_order(found)}
        for key, found in values.items()
        if key in telling
    ]


def _in_order(values: Iterable[str]) -> list[str]:
    return sorted(values, key=lambda v: (v != "no branch", float(v) if v.isdigit() else 0, v))


def _point(row: AnyRow) -> dict[str, Any]:
    return {
        "context": row["context"],
        "label": row["label"],
        "facets": _facet_values(row),
        "rank": row.get("rank"),
        "branchKey": main_and_branch(str(row["split"]))[1],
        "fronts": list(row["fronts"]),
        **{key: rounded(row.get(key)) for key in _POINT_VALUES},
    }


def _kind(row: AnyRow, error: str) -> dict[str, Any]:
    main, branch = main_and_branch(str(row["split"]))
    return {
        **{key: row[key] for key in ("context", "label", "kind", "n_layers")},
        "main": main,
        "branch": branch,
        "error": rounded(row.get(error)),
    }


def _all_parts(data: ReportData) -> list[str]:
    return [part for row in data.parts for cost in COSTS for part in row["parts"][cost]]


def _part(row: AnyRow) -> dict[str, Any]:
    keys = ("context", "label", "kind", "m", "n", "k", "rank", "n_layers", "calls", "bound")
    costs = {
        cost: {name: rounded(value) for name, value in row["parts"][cost].items() if value}
        for cost in COSTS
    }
    numbers = {"macs": row["macs"], "peak": rounded(row["peak_macs_per_s"])}
    return {**{key: row[key] for key in keys}, **numbers, "costs": costs}


def _method(item: MethodClass) -> dict[str, Any]:
    return {
        "context": item.context,
        "name": item.name,
        "cases": [
            {"method": method, "label": row["label"], "error": rounded(row[item.error])}
            for method, row in item.best.items()
        ],
    }


def _mix(mix: Any) -> dict[str, Any]:
    def point(row: AnyRow) -> dict[str, Any]:
        numbers = {"cost": rounded(row[mix.cost]), "error": rounded(row[mix.error])}
        return numbers | {"name": str(row.get("label") or row.get("mix") or "")}

    return {
        "context": mix.context,
        "cost": mix.cost,
        "frontier": [point(row) for row in mix.frontier],
        "uniform": [point(row) for row in mix.gains],
    }
