"""Rows and runs as records of files: of the store, and back, and of CSV and Parquet.

A store may come from anyone, SQLite keeps any type in any column, and JSON text may be anything.
What comes back from here has the types of `rows.COLUMNS`, ``options`` that are a JSON object, and
provenance whose known facts have the types this package writes; everything else is one ValueError.
What is added up or drawn must also be possible (`check_possible`).

Files of result rows are replaced as a whole or not at all.
"""

import csv
import io
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

from loraq_sim.errors import StoreError
from loraq_sim.files import csv_cell, replaced_file
from loraq_sim.results.rows import (
    COLUMN_NAMES,
    COLUMNS,
    IDENTITY,
    Row,
    StoredRow,
    cells_of,
    every_name,
    plain_value,
)

__all__ = [
    "check_possible",
    "record_of",
    "trial_rows",
    "row_of",
    "run_facts",
    "write_csv",
    "write_parquet",
    "write_trials",
]


_NUMBER = (int, float)
_NONE = type(None)
_KNOWN_NAMES = frozenset((*COLUMN_NAMES, "case_id"))
_AS_IT_IS = frozenset((str, int, _NONE))
# Rows of a store have their types in few patterns; each is looked at once.
_seen: set[tuple[type, ...]] = set()
_MOST_SEEN = 1000
# Texts of a CSV file whose cells are remembered.
_MOST_CELLS = 10_000
_TYPES = tuple(str if column.sql_type == "TEXT" else _NUMBER for column in COLUMNS)
# Sizes and calls of a layer that is one.
_POSITIVE = ("m", "n", "k", "calls_per_step", "group_size")
_SIGNED = ("sqnr_db", "cosine", "seed", "pareto", "activation_error_share", "p_error_share")
# An error may be infinite, where the arithmetic overflowed; a time or a size may not.
_MAY_BE_INFINITE = (
    *("weight_error", "output_error", "sqnr_db", "max_abs_error", "output_rms", "cosine"),
)
_LIMITS = {
    column.name: (
        -math.inf if column.name in _SIGNED else 1 if column.name in _POSITIVE else 0,
        math.inf if column.name in _MAY_BE_INFINITE else sys.float_info.max,
    )
    for column in COLUMNS
    if column.sql_type != "TEXT"
}
# Of rows without further keys.
_STORED_PLACES = {name: place for place, name in enumerate((*COLUMN_NAMES, "case_id"))}
# Of a record: where its columns end, and where of them the options and the mark of the front are.
_END = 2 + len(COLUMN_NAMES)
_OPTIONS, _PARETO = map(COLUMN_NAMES.index, ("options", "pareto"))
_NEEDED = tuple((COLUMN_NAMES.index(name), name) for name in ("layer", "status"))
# Python parses integers of thousands of digits, and then refuses to print them.
_HUGE = re.compile(r"\d{19}")

_TEXTS = ("started", "ended", "cpu", "machine", "platform", "shard", "code_digest", "stopped")
_FACTS: dict[str, Any] = {
    **dict.fromkeys((*_TEXTS, "dump_digest", "scheduler"), str),
    **dict.fromkeys(("plan", "versions", "accelerator_digests", "code_digests"), dict),
    **dict.fromkeys(("command", "notes", "merged"), list),
    **dict.fromkeys(("cpus", "jobs", "n_cases", "n_layers", "n_ok", "n_failed", "n_skipped"), int),
    "seconds": _NUMBER,
    "interrupted": bool,
}


def record_of(case_id: str, row: Mapping[str, Any]) -> list[Any]:
    """What is stored of `row`: case id, columns, and other keys as JSON.

    A ``case_id`` of the row's own is left out.
    """
    if isinstance(row, StoredRow) and row.places is _STORED_PLACES:
        # As a store gave it.
        values, others = row.cells[:-1], []
    else:
        values = tuple(map(row.get, COLUMN_NAMES))
        others = [name for name in row if name not in _KNOWN_NAMES]
    known = [
        value
        if type(value) in _AS_IT_IS or (type(value) is float and value == value)
        else _storable(value)
        for value in values
    ]
    if not others:
        return [case_id, *known, "{}"]
    extra = {name: plain_value(row[name]) for name in others}
    return [case_id, *known, json.dumps(extra, default=str)]


def _storable(value: Any) -> Any:
    value = plain_value(value)
    return int(value) if isinstance(value, bool) else value


def row_of(record: tuple) -> StoredRow:
    """The row behind a record of case id, extra, columns, and facts that are no part of it.

    Raises
    ------
    ValueError, TypeError, RecursionError
        If no release wrote such a record.
    """
    case_id, extra = record[:2]
    values = record[2:_END]
    kinds = tuple(map(type, values))
    if kinds not in _seen:
        for kind, wanted, name in zip(kinds, _TYPES, COLUMN_NAMES, strict=True):
            if kind is not _NONE and not issubclass(kind, wanted):
                raise TypeError(f"{name} is of type {kind.__name__}")
        if len(_seen) < _MOST_SEEN:
            _seen.add(kinds)
    for place, name in _NEEDED:
        if values[place] is None:
            raise ValueError(f"it has no {name}")
    if not isinstance(case_id, str):
        raise TypeError("its case_id is no text")
    if values[_OPTIONS] and (changed := _checked_options(values[_OPTIONS])):
        both = dict(zip(COLUMN_NAMES, values, strict=True)) | changed
        values = tuple(both.values())
    pareto = values[_PARETO]
    if pareto is not None:
        values = (*values[:_PARETO], bool(pareto), *values[_PARETO + 1 :])
    if extra == "{}":
        return StoredRow(_STORED_PLACES, (*values, case_id))
    others = _json_object(extra, "extra")
    for name in others:
        if name in _KNOWN_NAMES:
            raise ValueError(f"extra holds the column {name!r}")
    return StoredRow.of((*COLUMN_NAMES, *others, "case_id"), (*values, *others.values(), case_id))


def _checked_options(text: str) -> Row:
    """What of a row is otherwise than it is stored: `smooth`, an option before schema 5."""
    options = _json_object(text, "options")
    for name in ("asked", "datapath"):
        if not isinstance(options.get(name, {}), dict):
            raise TypeError(f"{name} of the options is no JSON object")
    for name, value in options.get("asked", {}).items():
        if name not in COLUMN_NAMES or not isinstance(value, str | int | float | None):
            raise ValueError(f"the options ask for {str(name)[:60]!r}")
    if "smooth" not in options:
        return {}
    smooth = options.pop("smooth")
    if not isinstance(smooth, int | float) or isinstance(smooth, bool):
        raise TypeError(f"smooth of the options is of type {type(smooth).__name__}")
    return {"smooth": smooth, "options": json.dumps(options, sort_keys=True) if options else ""}


def check_possible(rows: Sequence[Mapping[str, Any]], where: str | Path) -> None:
    """Refuse rows with a number that no layer and no machine can have.

    A store keeps any number. What adds rows up or draws them asks this first: a negative time or a
    size of zero would make nonsense of the whole.

    Raises
    ------
    StoreError
        If there is one; the message begins with `where` and names the row, column and value.
    """
    for row, values in zip(rows, cells_of(rows, tuple(_LIMITS)), strict=True):
        if why := _impossible(values):
            layer = f"layer {row['layer']!r:.200}, split {row['split']!r:.50}"
            raise StoreError(
                f"{where}: cannot be used: in the row of {layer}, {why}; sweep it again with "
                "--force, or into a new --out"
            )


def _impossible(values: Iterable[Any]) -> str:
    """What is impossible of the values of the columns of `_LIMITS`; empty if all is possible."""
    for value, (name, (least, most)) in zip(values, _LIMITS.items(), strict=True):
        if value is not None and not least <= value <= most:
            return f"{name} is {value}"
    return ""


def run_facts(run: int, text: str) -> dict[str, Any]:
    """Provenance of one run, with its number.

    Raises
    ------
    ValueError, TypeError, RecursionError
        If the text is no JSON object, or a fact of it has another type than it is written with.
    """
    facts = _json_object(text, f"the provenance of run {run}")
    for name, wanted in _FACTS.items():
        value = facts.get(name)
        is_truth = isinstance(value, bool) and wanted is not bool
        if value is not None and (is_truth or not isinstance(value, wanted)):
            raise TypeError(f"{name} of run {run} is of type {type(value).__name__}")
    for name in ("accelerator_digests", "code_digests"):
        if not all(isinstance(value, str) for value in (facts.get(name) or {}).values()):
            raise TypeError(f"{name} of run {run} holds what is no text")
    if not all(isinstance(part, dict) for part in facts.get("merged") or ()):
        raise TypeError(f"merged of run {run} holds what is no JSON object")
    accelerators = (facts.get("plan") or {}).get("accelerators") or []
    if not isinstance(accelerators, list) or not all(isinstance(a, str) for a in accelerators):
        raise TypeError(f"the plan of run {run} names no list of accelerators")
    return {"run": run} | facts


def _json_object(text: str, what: str) -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError(f"{what} is no text")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise TypeError(f"{what} is no JSON object")
    if _HUGE.search(text) and _holds_huge(content):
        raise ValueError(f"{what} holds an integer of more than 64 bits")
    return content


def _holds_huge(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_holds_huge, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and not -(2**63) <= value < 2**64


def write_csv(
    path: str | Path,
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    *,
    line_end: str = "\r\n",
) -> None:
    """Write columns `names` of `rows` to `path`: UTF-8, a header line, missing values empty.

    Text that a spreadsheet would run as a formula gets a ``'`` in front (`csv_cell`). Floats are
    written with as many digits as it takes to read the same number back.

    Raises
    ------
    StoreError
        If the file cannot be written. A file that was there stays as it was.
    """
    with replaced_file(path, error=StoreError) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator=line_end)
        writer.writerow(map(csv_cell, names))
        # Texts repeat: a name of a layer stands in hundreds of rows.
        cell = lru_cache(maxsize=_MOST_CELLS)(csv_cell)
        writer.writerows(
            [cell(value) if type(value) is str else value for value in values]
            for values in cells_of(rows, names)
        )
        # Leaves `file` open, which ends up on the disk before it takes its place.
        text.detach()


_TRIAL_VALUES = (
    *("output_error", "weight_error", "latency_s", "energy_j", "dram_bytes", "weight_bytes"),
    "area_ge",
)
_TRIAL_PREFIX = re.compile(r"^(?:params|values|user_attrs)_")


def trial_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Row], list[str]]:
    """Rows as trials of a search, and their columns: those of Optuna's ``trials_dataframe``.

    ``values_*`` are what is minimized, ``params_*`` what a case was asked to be (`IDENTITY`),
    ``user_attrs_*`` everything else; those that no row has are left out. ``state`` is ``FAIL`` for
    a case that failed. When a case ran is not stored, only how long.
    """
    present = {name for row in rows for name, value in row.items() if value not in (None, "")}
    values = [name for name in _TRIAL_VALUES if name in present]
    params = [name for name in IDENTITY if name in present]
    taken = {*values, *params, "seconds", "status"}
    others = [name for name in every_name(rows) if name in present and name not in taken]
    trials = []
    for number, row in enumerate(rows):
        seconds = row.get("seconds")
        duration = None if seconds is None else timedelta(seconds=seconds)
        trial: Row = {"number": number}
        trial |= {f"values_{name}": row.get(name) for name in values}
        trial |= {"datetime_start": None, "datetime_complete": None, "duration": duration}
        trial |= {f"params_{name}": row.get(name) for name in params}
        trial |= {f"user_attrs_{name}": row.get(name) for name in others}
        trials.append(trial | {"state": "FAIL" if row.get("status") == "failed" else "COMPLETE"})
    return trials, list(trials[0]) if trials else []


def write_parquet(
    path: str | Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Write columns `names` of `rows` to `path`; columns have the types of the store.

    An integer column with a fractional value is written as floats. A column that is not in
    `loraq_sim.results.rows.COLUMNS` is text.

    Raises
    ------
    StoreError
        If pyarrow is missing or the file cannot be written. A file that was there stays as it was.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise StoreError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow"
        ) from None
    types = {"TEXT": pyarrow.string(), "INTEGER": pyarrow.int64(), "REAL": pyarrow.float64()}
    known = {column.name: types[column.sql_type] for column in COLUMNS}
    known |= {"pareto": pyarrow.bool_(), "number": pyarrow.int64(), "n_layers": pyarrow.int64()}
    known |= {"n_missing": pyarrow.int64(), "complete": pyarrow.bool_()}
    known |= {"duration": pyarrow.duration("us")}
    known |= dict.fromkeys(("datetime_start", "datetime_complete"), pyarrow.timestamp("us"))
    columns = {
        name: _column(rows, name, known.get(_TRIAL_PREFIX.sub("", name)), pyarrow) for name in names
    }
    table = pyarrow.table(columns)
    with replaced_file(path, error=StoreError) as file:
        parquet.write_table(table, file)


def _column(rows: Sequence[Mapping[str, Any]], name: str, kind: Any, pyarrow: Any) -> Any:
    values = [row.get(name) for row in rows]
    # SQLite keeps a fraction in an integer column; Parquet would cut it off.
    if kind == pyarrow.int64() and any(isinstance(value, float) for value in values):
        kind = pyarrow.float64()
    if kind is None:
        kind = pyarrow.string()
        values = [None if value is None else str(value) for value in values]
    return pyarrow.array(values, kind)


def write_trials(path: Path, trials: Sequence[Row], names: Sequence[str]) -> None:
    """Write trials of `trial_rows` as CSV or, by the end of `path`, as Parquet."""
    if path.suffix.lower() == ".csv":
        # As pandas writes a length of time, and reads it.
        spelled = [t | {"duration": _days(t["duration"])} for t in trials]
        write_csv(path, spelled, names)
    else:
        write_parquet(path, trials, names)


def _days(length: timedelta | None) -> str | None:
    if length is None:
        return None
    clock = str(length - timedelta(days=length.days))
    return f"{length.days} days {clock if clock[1].isdigit() else f'0{clock}'}"
