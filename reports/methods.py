"""Solvers compared where they store the same bytes for the same main branch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from loraq_sim.results.columns import column_for
from loraq_sim.results.units import is_missing
from reports.report_data import ReportData
from reports.split_names import main_and_branch

__all__ = ["MethodClass", "compare_methods", "method_sentences"]

Row = Mapping[str, Any]

# Ranks are whole, so two branches of one budget differ by less than a rank's bytes.
_EQUAL_BYTES = 0.01


@dataclass(frozen=True, kw_only=True)
class MethodClass:
    """Totals of one context, one main precision and weights of (within 1 %) the same bytes.

    `best` holds each method's total of least `error`; `bits` (per weight) and `name` say what the
    class is.
    """

    context: str
    main: str
    bits: float
    name: str
    error: str
    best: Mapping[str, Row]


def compare_methods(data: ReportData) -> list[MethodClass]:
    """Classes in which two methods or more have a result, by context, main precision and bytes."""
    classes = []
    for context in data.contexts:
        rows = [
            row
            for row in data.totals_of(context)
            if row.get("weight_bytes")
            and not any(is_missing(row.get(key)) for key in (data.error, "bits_per_weight"))
        ]
        by_main: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda r: r["weight_bytes"]):
            by_main.setdefault(main_and_branch(str(row["split"]))[0], []).append(row)
        for main, own in by_main.items():
            for members in _equal_bytes(own):
                found = _class(context, main, members, data.error)
                if len(found.best) > 1:
                    classes.append(found)
    return classes


def _equal_bytes(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows, sorted by bytes, in runs that end 1 % above their first."""
    runs: list[list[Row]] = []
    for row in rows:
        if runs and row["weight_bytes"] <= runs[-1][0]["weight_bytes"] * (1 + _EQUAL_BYTES):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _class(context: str, main: str, members: Sequence[Row], error: str) -> MethodClass:
    best: dict[str, Row] = {}
    for row in sorted(members, key=lambda r: r[error]):
        best.setdefault(str(row.get("method")), row)
    bits = members[0]["bits_per_weight"]
    return MethodClass(
        context=context,
        main=main,
        bits=bits,
        name=f"{main}, {bits:.2f} bits per weight",
        error=error,
        best=dict(sorted(best.items())),
    )


def method_sentences(classes: Sequence[MethodClass], context: str) -> list[str]:
    """How often and by how much each pair of methods differs, one sentence a pair."""
    own = [item for item in classes if item.context == context]
    sentences = []
    for first, second in combinations(sorted({m for item in own for m in item.best}), 2):
        ratios = [
            item.best[first][item.error] / item.best[second][item.error]
            for item in own
            if first in item.best and second in item.best and item.best[second][item.error]
        ]
        if ratios:
            sentences.append(_sentence(first, second, ratios, column_for(own[0].error).heading))
    return sentences


def _sentence(first: str, second: str, ratios: Sequence[float], error: str) -> str:
    wins = sum(ratio < 1 for ratio in ratios)
    if wins * 2 < len(ratios):
        first, second = second, first
        ratios = [1 / ratio for ratio in ratios if ratio]
        wins = sum(ratio < 1 for ratio in ratios)
    change = 100 * (1 - median(ratios))
    times = f"in {wins} of {len(ratios)} comparisons" if len(ratios) > 1 else "in the only case"
    if not wins:
        return f"{first} and {second} have the same {error} at equal bytes."
    return (
        f"At equal bytes {first} has less {error} than {second} {times}; "
        f"at the median {abs(change):.0f} % {'less' if change >= 0 else 'more'}."
    )
