"""One number for every layer in every case: the matrices behind the heat map.

They are most of a large page. So a line of equal values is one value, what the page can divide
itself is not stored twice, and a page of many cells has three digits instead of five.
"""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from loraq_sim.results.units import is_missing
from reports.report_data import ReportData

__all__ = ["common_prefix", "layer_cells", "rounded"]

Row = Mapping[str, Any]

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
# Digits that survive in the page; the CSV files beside it hold all of them.
_DIGITS = 5
_MANY_CELLS = 20_000
_FEW_DIGITS = 3


def common_prefix(names: Sequence[str]) -> str:
    """Leading dotted parts that all names share and that none consists of alone."""
    prefix = os.path.commonprefix(list(names)) if len(names) > 1 else ""
    return prefix[: prefix.rfind(".") + 1]


def rounded(value: Any, digits: int = _DIGITS) -> Any:
    """Numbers cut to the digits a reader sees; what JSON cannot hold as null."""
    if is_missing(value) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def layer_cells(data: ReportData, context: str) -> dict[str, Any]:
    """Layers, cases and the known quantities of one context, ``z[case][layer]`` each.

    A line ``z[case]`` of equal values is that value. A quantity without ``z`` is the one it is
    ``of``, each line divided by its number in ``by``.
    """
    rows = [row for row in data.rows if row["context"] == context]
    names = list(dict.fromkeys(str(row["layer"]) for row in rows))
    kinds = {str(row["layer"]): str(row.get("kind") or "") for row in rows}
    labels = _by_error(data, context, rows)
    cells = {(row["label"], str(row["layer"])): row for row in rows}
    prefix = common_prefix(names)
    place = {label: i for i, label in enumerate(labels)}
    column = {name: j for j, name in enumerate(names)}
    digits = _FEW_DIGITS if len(data.rows) > _MANY_CELLS else _DIGITS
    found: dict[str, Any] = {
        "names": [name.removeprefix(prefix) for name in names],
        "prefix": prefix,
        "kinds": [kinds[name] for name in names],
        "labels": labels,
        "bounds": _codes([[(cells.get((c, n)) or {}).get("bound") for n in names] for c in labels]),
        "failed": [
            [place[row["label"]], column[str(row["layer"])]]
            for row in rows
            if row.get("status") != "ok"
        ],
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
        matrix = _matrix(key, labels, names, cells, digits)
        if any(value is not None for line in matrix for value in line):
            known.add(key)
            lines = [_line(line) for line in matrix]
            found["quantities"].append({"key": key, "heading": heading, "z": lines})
    return found


def _by_error(data: ReportData, context: str, rows: Sequence[Row]) -> list[str]:
    """Labels from the largest error to the least; those without a total last."""
    errors = {row["label"]: row.get(data.error) for row in data.totals_of(context)}
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return sorted(labels, key=lambda label: -(errors.get(label) or 0.0))


def _codes(words: list[list[Any]]) -> dict[str, Any]:
    """Repeated words as a list of them and indices, -1 for none."""
    names = list(dict.fromkeys(word for line in words for word in line if word))
    index = {name: i for i, name in enumerate(names)}
    return {"names": names, "at": [_line([index.get(w, -1) for w in line]) for line in words]}


def _line(values: list[Any]) -> Any:
    return values[0] if len(values) > 1 and len(set(values)) == 1 else values


def _matrix(
    key: str,
    labels: Sequence[str],
    names: Sequence[str],
    cells: Mapping[tuple, Row],
    digits: int,
) -> list[list[Any]]:
    way, _, column = key.rpartition(":")
    matrix = []
    for label in labels:
        own = [cells.get((label, name)) or {} for name in names]
        values = [row.get(column) if row.get("status") == "ok" else None for row in own]
        if way == "share":
            # One call's cost times the calls, over the sum of all layers.
            times = [
                None if is_missing(value) else value * (row.get("calls_per_step") or 1)
                for value, row in zip(values, own, strict=True)
            ]
            values = _over(times, sum(value for value in times if value is not None))
        matrix.append([rounded(value, digits) for value in values])
    return matrix


def _over(values: Sequence[Any], whole: float | None) -> list[float | None]:
    return [None if is_missing(value) or not whole else value / whole for value in values]
