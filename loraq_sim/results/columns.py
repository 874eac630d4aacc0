"""What each result column is called and how its numbers are shown.

A result row keeps plain names and base units; this table gives the heading and the quantity that
decides scale, unit and digits. A column that is not listed is read from its suffix
(``_s`` seconds, ``_j`` joules, ``_bytes``, ``_db``), so new columns print sensibly at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraq_sim.plain_text import shown_line
from loraq_sim.results.units import (
    NO_VALUE,
    Unit,
    choose_unit,
    format_count,
    format_numbers,
    is_missing,
)

__all__ = ["Column", "cells", "column_for", "plain_value", "plain_rows", "settings_that_matter"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: row key, heading without unit, and quantity.

    `quantity` is ``text``, ``count``, ``mark`` (a flag shown as ``*``) or one that `choose_unit`
    knows. `digits` is the number of significant digits shown.
    """

    key: str
    heading: str
    quantity: str = "text"
    digits: int = 3

    @property
    def is_text(self) -> bool:
        """Whether cells are words (left-aligned) rather than numbers (right-aligned)."""
        return self.quantity in ("text", "mark")


_KNOWN = {
    column.key: column
    for column in (
        Column(key="bits_per_weight", heading="bits per weight", quantity="number"),
        Column(key="weight_error", heading="weight error", quantity="percent"),
        Column(key="output_error", heading="output error", quantity="percent"),
        Column(key="max_abs_error", heading="max abs error", quantity="number"),
        Column(key="sqnr_db", heading="SQNR", quantity="decibel"),
        Column(key="latency_s", heading="latency", quantity="time"),
        Column(key="seconds", heading="run time", quantity="time"),
        Column(key="energy_j", heading="energy", quantity="energy"),
        Column(key="dram_bytes", heading="DRAM traffic", quantity="bytes"),
        Column(key="weight_bytes", heading="weight memory", quantity="bytes"),
        Column(key="peak_activation_bytes", heading="peak activations", quantity="bytes"),
        Column(key="working_set_bytes", heading="working set", quantity="bytes"),
        Column(key="utilization", heading="utilization", quantity="percent"),
        Column(key="pareto", heading="front", quantity="mark"),
    )
}
# A missing value turns a DataFrame's integers into floats, so counts are listed, not guessed.
for _key in (
    *(
        "rank",
        "cycles",
        "overflow_count",
        "clipped_count",
        "safe_acc_bits",
        "guaranteed_acc_bits",
        "calls_per_step",
        "n_layers",
    ),
    *("m", "n", "k", "tokens", "seed", "group_size"),
    *("acc_bits", "products_per_add", "accumulators", "outputs_affected"),
):
    _KNOWN[_key] = Column(key=_key, heading=_key.replace("_", " "), quantity="count")
_SUFFIXES = {"_s": "time", "_j": "energy", "_bytes": "bytes", "_db": "decibel", "_error": "percent"}


def column_for(key: str, values: Iterable[Any] = ()) -> Column:
    """Column of a row key: the listed one, else by suffix, else by the type of its values."""
    if key in _KNOWN:
        return _KNOWN[key]
    # Keys may come from a file, like the values.
    heading = shown_line(key.replace("_", " "))
    for suffix, quantity in _SUFFIXES.items():
        if key.endswith(suffix):
            kept = heading if quantity == "percent" else heading.removesuffix(suffix[1:]).rstrip()
            return Column(key=key, heading=kept, quantity=quantity)
    present = [value for value in values if not is_missing(value)]
    if present and all(isinstance(value, bool) for value in present):
        return Column(key=key, heading=heading, quantity="mark")
    if present and all(isinstance(value, int) for value in present):
        return Column(key=key, heading=heading, quantity="count")
    if present and all(isinstance(value, int | float) for value in present):
        return Column(key=key, heading=heading, quantity="number")
    return Column(key=key, heading=heading)


def cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Unit symbol of a column (empty if none) and its cells as text, one a row.

    A missing value shows as ``-``. A cell whose value does not fit the quantity (a word in a
    number column) is shown as it is.
    """
    values = [row.get(column.key) for row in rows]
    if column.quantity == "mark":
        return "", ["*" if value == 1 else "" for value in values]
    if column.quantity == "text":
        return "", [
            NO_VALUE if is_missing(value) or value == "" else shown_line(str(value))
            for value in values
        ]
    numbers = [value if _is_number(value) else None for value in values]
    unit, texts = _numeric_cells(column, numbers)
    shown = [
        text if _is_number(value) or is_missing(value) else shown_line(str(value))
        for value, text in zip(values, texts, strict=True)
    ]
    return unit.symbol, shown


def _numeric_cells(column: Column, numbers: list[float | None]) -> tuple[Unit, list[str]]:
    if column.quantity == "count":
        texts = [NO_VALUE if is_missing(number) else format_count(number) for number in numbers]
        return Unit(symbol="", size=1.0), texts
    unit = choose_unit(numbers, column.quantity)
    scaled = [None if is_missing(number) else number / unit.size for number in numbers]
    return unit, format_numbers(scaled, column.digits)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def plain_rows(rows: Any) -> list[dict[str, Any]]:
    """Rows as a list of dicts of Python scalars; takes a DataFrame or an iterable of mappings."""
    records = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    return [{str(key): plain_value(value) for key, value in row.items()} for row in records]


def settings_that_matter(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Those of `keys` in which rows of one split (of one layer on one accelerator) differ.

    A split without a branch is always solved by plain rounding, so that methods differ between
    splits says nothing; that they differ within a split does.
    """
    values: dict[tuple, set[Any]] = {}
    for row in rows:
        case = tuple(row.get(key) for key in ("dump", "accelerator", "layer", "split"))
        for key in keys:
            values.setdefault((key, case), set()).add(row.get(key))
    return [key for key in keys if any(k == key and len(v) > 1 for (k, _), v in values.items())]


def plain_value(value: Any) -> Any:
    """Python scalar of a NumPy scalar; None for a pandas missing value; anything else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return None if type(value).__name__ in ("NAType", "NaTType") else value
