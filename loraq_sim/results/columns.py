"""Numbers of result columns as people read and write them: headings, units, digits, and limits.

Rows keep SI base units (seconds, joules, bytes, fractions). Only what a person reads is scaled: one
unit a column, which stands in the heading, and three significant digits, so that the cells of a
column compare at a glance. Powers of 1024 carry binary symbols (KiB, MiB); times and energies use
powers of 1000. A column that `column_for` does not list is read from its suffix (``_s`` seconds,
``_j`` joules, ``_bytes``, ``_db``), so that new columns print sensibly at once.

People write limits the same way round: ``latency_s=3ms``, ``weight_bytes=400MB``,
``output_error=5%``. A number alone is in base units; units of a column are those of its suffix;
K, M and G are powers of 1000, Ki, Mi and Gi of 1024.
"""

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import shown_line
from loraq_sim.results.rows import COLUMNS, cells_of, every_name, plain_value

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Column",
    "Limits",
    "Unit",
    "cells",
    "checked_limits",
    "choose_unit",
    "column_for",
    "format_count",
    "format_number",
    "format_numbers",
    "frame_of",
    "in_own_units",
    "in_unit",
    "is_missing",
    "number_names",
    "number_of",
    "parse_limits",
    "plain_rows",
    "settings_that_matter",
]


_NO_VALUE = "-"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A display unit: `symbol` is printed, `size` is how many base units one of it holds."""

    symbol: str
    size: float


# Largest first; the first unit that the typical value reaches is taken, else the last.
_UNITS = {
    "time": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)),
    "energy": (("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("nJ", 1e-9), ("pJ", 1e-12)),
    "bytes": (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)),
    "percent": (("%", 1e-2),),
    "decibel": (("dB", 1.0),),
    "macs": (("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0)),
    "number": (("", 1.0),),
    "count": (("", 1.0),),
    # Of keys that name the unit they are in.
    **{unit: ((unit, 1.0),) for unit in ("pJ", "GE", "um2", "mm2", "nm", "ms", "%")},
}


def is_missing(value: Any) -> bool:
    """True for None, NaN of any float type, and pandas' NA and NaT."""
    if value is None or isinstance(value, float):
        return value is None or math.isnan(value)
    return type(value).__name__ in ("NAType", "NaTType")


def number_of(row: Mapping[str, Any], name: str) -> float | None:
    """The number a row has under `name`; None where it is missing."""
    value = row.get(name)
    return None if is_missing(value) else value


def number_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names under which some row has a number, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if any(_is_number(row.get(name)) for row in rows)]


def choose_unit(values: Iterable[float | None], quantity: str) -> Unit:
    """Unit in which the median of the finite non-zero values is at least 1.

    Parameters
    ----------
    values : iterable of float or None
        In base units (s, J, bytes, fraction). Missing values are skipped.
    quantity : str
        A name of `_UNITS`: ``time``, ``energy``, ``bytes``, ``percent``, ``number`` and so on.
    """
    sizes = _sizes(values)
    ladder = [Unit(symbol=symbol, size=size) for symbol, size in _UNITS[quantity]]
    if not sizes:
        return ladder[0]
    typical = statistics.median(sizes)
    # The margin keeps a value that prints as 1.00 from falling to the next unit by float dust.
    return next((unit for unit in ladder if typical >= unit.size * (1 - 1e-9)), ladder[-1])


def in_unit(value: float, unit: Unit) -> float | Decimal:
    """`value` in units of `unit`; a `Decimal` beyond floats, as 1e308 in percent."""
    scaled = value / unit.size
    if math.isinf(scaled) and math.isfinite(value):
        return Decimal(value) / Decimal(unit.size)
    return scaled


def format_number(value: float | Decimal, digits: int = 3) -> str:
    """Value with `digits` significant digits and thousands separators; whole digits are kept.

    >>> [format_number(v) for v in (1234.5, 12.345, 0.012345, 1.2e-7, 0.0)]
    ['1,234', '12.3', '0.0123', '1.2e-07', '0']
    """
    if isinstance(value, Decimal):
        return f"{Context(prec=digits).plus(value).normalize():g}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e9:
        return f"{value:.{digits}g}"
    return f"{value:,.{_decimals(value, digits)}f}"


def format_count(value: float) -> str:
    """Whole number with thousands separators, or `format_number` where it is not whole."""
    return (
        f"{int(value):,}" if math.isfinite(value) and value == int(value) else format_number(value)
    )


def format_numbers(values: Sequence[float | Decimal | None], digits: int = 3) -> list[str]:
    """Values of one column with equal decimals where their range allows it, else one by one.

    The decimals are those that show the smallest value with `digits` significant digits, so
    right-aligned cells line up at the point. Above a range of 1000 that would print noise.
    """
    sizes = _sizes(values)
    # A Decimal is beyond all that is printed with decimals.
    is_plain = not any(isinstance(size, Decimal) for size in sizes)
    even = is_plain and bool(sizes) and min(sizes) >= 1e-4 and max(sizes) < 1000 * min(sizes)
    decimals = _decimals(min(sizes), digits) if even else 0

    def cell(value: float | Decimal | None) -> str:
        if value is None or is_missing(value):
            return _NO_VALUE
        if even and not isinstance(value, Decimal) and math.isfinite(value):
            return f"{value:,.{decimals}f}"
        return format_number(value, digits)

    return [cell(value) for value in values]


def _sizes(values: Iterable[Any]) -> list[Any]:
    """Magnitudes of those that are there, finite and not zero."""
    known = (value for value in values if value is not None and not is_missing(value))
    return [abs(value) for value in known if value and math.isfinite(value)]


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))


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
        Column(key="psnr_gain_db", heading="gain", quantity="decibel"),
        Column(key="psnr_gain_se_db", heading="error of gain", quantity="decibel", digits=2),
        Column(key="node_nm", heading="node", quantity="nm", digits=1),
        Column(key="latency_s", heading="latency", quantity="time"),
        Column(key="seconds", heading="run time", quantity="time"),
        Column(key="energy_j", heading="energy", quantity="energy"),
        Column(key="dram_bytes", heading="DRAM traffic", quantity="bytes"),
        Column(key="weight_bytes", heading="weight memory", quantity="bytes"),
        Column(key="peak_activation_bytes", heading="peak activations", quantity="bytes"),
        Column(key="working_set_bytes", heading="working set", quantity="bytes"),
        Column(key="utilization", heading="utilization", quantity="percent"),
        Column(key="share", heading="share", quantity="percent"),
        Column(key="error", heading="error", quantity="percent"),
        Column(key="macs", heading="MACs", quantity="macs"),
        Column(key="macs_per_cycle_per_unit", heading="MACs/cycle", quantity="count"),
        Column(key="activations", heading="A bits", quantity="count"),
        Column(key="weights", heading="W bits", quantity="count"),
        Column(key="pj_per_mac", heading="energy per MAC", quantity="pJ"),
        Column(key="peak_tops", heading="peak TOPS", quantity="number"),
        Column(key="sustained_tops", heading="sustained TOPS", quantity="number"),
        Column(key="area_ge", heading="GE per MAC", quantity="number"),
        Column(key="area_mm2", heading="area", quantity="mm2"),
        Column(key="array_energy_j", heading="energy in the array", quantity="energy"),
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
_SUFFIXES = {
    **{"_s": "time", "_j": "energy", "_bytes": "bytes", "_db": "decibel"},
    **{"_error": "percent", "_share": "percent", "_pj_per_mac": "pJ", "_pj": "pJ", "_ge": "GE"},
    **{"_um2": "um2", "_mm2": "mm2", "_nm": "nm", "_ms": "ms", "_percent": "%"},
}


def column_for(key: str, values: Iterable[Any] = ()) -> Column:
    """Column of a row key: the listed one, else by suffix, else by the type of its values."""
    if key in _KNOWN:
        return _KNOWN[key]
    # Keys may come from a file, like the values.
    heading = shown_line(key.replace("_", " "))
    for suffix, quantity in _SUFFIXES.items():
        if key.endswith(suffix):
            unit = suffix[1:].replace("_", " ")
            kept = heading if quantity == "percent" else heading.removesuffix(unit).rstrip()
            kept = f"{kept} per MAC".lstrip() if suffix == "_pj_per_mac" else kept
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
            _NO_VALUE if is_missing(value) or value == "" else shown_line(str(value))
            for value in values
        ]
    numbers = [value if _is_number(value) else None for value in values]
    unit, texts = _numeric_cells(column, numbers)
    shown = [
        text if _is_number(value) or is_missing(value) else shown_line(str(value))
        for value, text in zip(values, texts, strict=True)
    ]
    return unit.symbol, shown


def in_own_units(parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a ``quantity`` and a ``value`` for people: each quantity in a unit that it names."""
    told = []
    for quantity in dict.fromkeys(part["quantity"] for part in parts):
        own = [part for part in parts if part["quantity"] == quantity]
        column = column_for(quantity)
        unit, values = cells(column, [{quantity: part["value"]} for part in own])
        name = f"{column.heading} ({unit})" if unit else column.heading
        width = max(map(len, values))
        told += [
            {**part, "quantity": name, "value": value.rjust(width)}
            for part, value in zip(own, values, strict=True)
        ]
    return told


def _numeric_cells(column: Column, numbers: list[float | None]) -> tuple[Unit, list[str]]:
    if column.quantity == "count":
        texts = [_NO_VALUE if n is None or is_missing(n) else format_count(n) for n in numbers]
        return Unit(symbol="", size=1.0), texts
    unit = choose_unit(numbers, column.quantity)
    scaled = [None if n is None or is_missing(n) else in_unit(n, unit) for n in numbers]
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


Limits = Mapping[str, float]
"""Largest value of each column, in base units."""

_SI = {"n": -9, "u": -6, "µ": -6, "m": -3, "": 0}
_LARGE = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30}
# Exact sizes, so that 2.95ms is the number 0.00295.
_WRITTEN_UNITS = {
    "_s": {f"{prefix}s": Decimal(10) ** power for prefix, power in _SI.items()},
    "_j": {f"{prefix}J": Decimal(10) ** power for prefix, power in {**_SI, "p": -12}.items()},
    "_bytes": {f"{prefix}B": Decimal(10) ** power for prefix, power in _LARGE.items()}
    | {f"{prefix}B": Decimal(2) ** power for prefix, power in _BINARY.items()},
    "_error": {"%": Decimal("0.01")},
    "_mm2": {"mm2": Decimal(1), "um2": Decimal("1e-6")},
    "_ge": {"GE": Decimal(1)},
}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*((?:[^\d\s.]+2?)?)")


def parse_limits(
    texts: Iterable[str] | Mapping[str, float | str], known: Iterable[str]
) -> dict[str, float]:
    """Limits of texts such as ``latency_s=3ms,weight_bytes=400MB``; `known` are the columns.

    In Python, of a mapping such as ``{"latency_s": "3ms", "weight_bytes": 4e8}``.

    Raises
    ------
    InputError
        If a text is not of this form, a column is unknown or named twice, or a unit is not one of
        the column's.
    """
    limits: dict[str, float] = {}
    if isinstance(texts, Mapping):
        known = list(known)
        for column, value in texts.items():
            limits |= checked_limits({column: 0.0}, known)
            limits[column] = _number(column, value) if isinstance(value, str) else value
        return checked_limits(limits, known)
    for text in (part.strip() for given in texts for part in given.split(",") if part.strip()):
        column, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not column or not value:
            raise InputError(f"limit {text!r} must look like latency_s=3ms or weight_bytes=400MB")
        if column in limits:
            raise InputError(f"{column} has two limits; give one")
        limits[column] = _number(column, value)
    return checked_limits(limits, known)


def checked_limits(limits: Limits, known: Iterable[str]) -> dict[str, float]:
    """`limits` as floats, each of a known column and a number.

    Raises
    ------
    InputError
        If a column is unknown or a limit is not a number.
    """
    names = list(known)
    for column, limit in limits.items():
        if column not in names:
            raise InputError(unknown_name("column", column, names))
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not is_number or math.isnan(limit):
            raise InputError(f"the limit of {column} must be a number, got {limit!r}")
    return {column: float(limit) for column, limit in limits.items()}


def _number(column: str, text: str) -> float:
    units = next((units for suffix, units in _WRITTEN_UNITS.items() if column.endswith(suffix)), {})
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] and match[2] not in units):
        accepted = ", ".join(units) or "no unit"
        raise InputError(f"{column}={text}: want a number, with {accepted} if any unit")
    return float(Decimal(match[1]) * units.get(match[2], 1))


_NUMBERS = {int, float, type(None)}
# What fits into caches: rows are taken apart in half the time.
_ROWS_AT_ONCE = 256
# Of these no two rows say the same, or nobody groups by them.
_PLAIN_TEXTS = ("message", "first_overflow", "first_clipped", "rests_on", "case_id")


def frame_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> "pandas.DataFrame":
    """Rows as a DataFrame with a type a column; of all columns of a store, or those of `names`.

    Texts that repeat are categories in order of appearance, missing ones NaN; counts are integers,
    ``Int64`` where some are missing; other numbers are floats, missing ones NaN.
    """
    import numpy as np
    import pandas

    names = names or every_name(rows)
    types = {column.name: column.sql_type for column in COLUMNS}
    columns: dict[str, Any] = {}
    for name, values in _columns(rows, names):
        kinds = set(map(type, values))
        # Nearly always; asking each value takes seconds.
        if not kinds <= {int, str, type(None)} and not (kinds <= _NUMBERS and name != "pareto"):
            values = [plain_value(value) for value in values]
            kinds = set(map(type, values))
        sql_type = types.get(name)
        if name == "pareto":
            columns[name] = np.fromiter(map(bool, values), bool, len(values))
        elif sql_type == "TEXT" and name not in _PLAIN_TEXTS:
            order = [value for value in dict.fromkeys(values) if value is not None]
            places = {value: place for place, value in enumerate(order)} | {None: -1}
            codes = np.fromiter(map(places.__getitem__, values), np.intp, len(values))
            columns[name] = pandas.Categorical.from_codes(codes, order)
        elif sql_type == "INTEGER" and kinds == {int}:
            columns[name] = np.array(values, dtype=np.int64)
        elif sql_type == "INTEGER" and kinds <= {int, type(None)}:
            columns[name] = pandas.array(values, dtype="Int64")
        elif sql_type == "REAL" and kinds <= _NUMBERS:
            columns[name] = np.array(values, dtype=np.float64)
        elif sql_type in ("INTEGER", "REAL"):
            columns[name] = pandas.to_numeric(pandas.Series(values, dtype=object))
        else:
            columns[name] = pandas.Series(values, dtype=object)
    return pandas.DataFrame(columns, columns=names)


def _columns(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[tuple[str, list[Any]]]:
    """Each name and the values under it, None for what a row lacks."""
    columns: list[list[Any]] = [[] for _ in names]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        cells = cells_of(rows[start : start + _ROWS_AT_ONCE], names)
        for column, values in zip(columns, zip(*cells, strict=True), strict=True):
            column.extend(values)
    return zip(names, columns, strict=True)
