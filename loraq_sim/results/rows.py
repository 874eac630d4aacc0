"""The result row: every column once, with its SQL type, unit and meaning.

The store, the CSV file, the DataFrame and the JSON objects all take their columns, and the order
of them, from `COLUMNS`. A value that is missing or not a number is None in a row, NULL in the
store, an empty CSV field and NaN in a DataFrame. Infinities are kept as they are: the SQNR of an
exact result, and the errors of an output that is not finite (status ``overflow``). JSON has none:
there they are null. What rows say about values beyond their float format is one sentence for all
doors (`clipped_note`).
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from loraq_sim.errors import InputError, counted

if TYPE_CHECKING:
    pass

__all__ = [
    "AnyRow",
    "COLUMNS",
    "COLUMN_NAMES",
    "Column",
    "EVALUATED",
    "IDENTITY",
    "ResultRow",
    "Row",
    "ShownRow",
    "StoredRow",
    "add_columns",
    "cells_of",
    "clipped_note",
    "every_name",
    "failed_row",
    "plain_value",
]


Row = dict[str, Any]
"""One result as ``{column: value}``, as rows are put together; `ResultRow` has the types."""

AnyRow = Mapping[str, Any]
"""A row of any table to be read: results (`Row`, `StoredRow`), totals, parts of a cost, runs."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a result row; `unit` is empty for names, counts and plain ratios."""

    name: str
    sql_type: str
    unit: str
    meaning: str


_TABLE = (
    ("layer", "TEXT", "", "name of the layer in its dump"),
    ("kind", "TEXT", "", "role of the layer in the model, such as self_q or ffn_up"),
    ("group", "TEXT", "", "layers of one group read the same input"),
    ("m", "INTEGER", "rows", "rows of one model call, all samples (cost model)"),
    ("m_source", "TEXT", "", "where m comes from: dump, activation rows, config, model, given"),
    ("n", "INTEGER", "", "output features"),
    ("k", "INTEGER", "", "input features"),
    ("tokens", "INTEGER", "rows", "activation rows the output error was measured on"),
    (
        "inputs",
        "TEXT",
        "",
        "what those rows are: dump, synthetic (drawn by kind of layer), or synthetic model (its "
        "weights are drawn, too)",
    ),
    ("calls_per_step", "INTEGER", "", "calls of the layer per denoising step"),
    ("split", "TEXT", "", "precision split, such as W4A4+W8A8r64"),
    ("rotation", "TEXT", "", "rotation of the input channels, such as hadamard; missing: none"),
    ("smooth", "REAL", "", "strength of smoothing; missing: none, or the method's own"),
    (
        "condition",
        "TEXT",
        "",
        "how smoothing and rotation were chosen, such as auto; missing: given",
    ),
    ("finish", "TEXT", "", "data: codes of the solver refined on activations; missing: not"),
    ("method", "TEXT", "", "solver"),
    ("preset", "TEXT", "", "effort of the solver"),
    ("accelerator", "TEXT", "", "name of the accelerator description"),
    ("rank", "INTEGER", "", "rank of the branch, 0 without one"),
    ("feedback_rank", "INTEGER", "", "of the rank: components that deflate the input"),
    (
        "weight_bytes",
        "INTEGER",
        "bytes",
        "codes, scales and padding of the stored weight; not the sums of codes that zero points of "
        "activations need, which traffic, `cost` and `explain` count",
    ),
    ("bits_per_weight", "REAL", "bits", "8 * weight_bytes / (n * k)"),
    ("weight_error", "REAL", "", "relative Frobenius error of the reconstructed weight"),
    ("output_error", "REAL", "", "relative Frobenius error of the emulated output"),
    ("sqnr_db", "REAL", "dB", "-20 log10(output_error)"),
    ("cosine", "REAL", "", "cosine of emulated and full-precision output"),
    ("max_abs_error", "REAL", "output units", "largest absolute output error"),
    ("output_rms", "REAL", "output units", "root mean square of the full-precision output"),
    ("overflow_count", "INTEGER", "", "accumulator overflows during emulation"),
    ("safe_acc_bits", "INTEGER", "bits", "narrowest accumulator without overflow on this input"),
    ("guaranteed_acc_bits", "INTEGER", "bits", "narrowest without overflow on any input"),
    ("first_overflow", "TEXT", "", "GEMM and index along K of the first overflow"),
    ("clipped_count", "INTEGER", "", "float values beyond their format: infinite, NaN or clamped"),
    ("first_clipped", "TEXT", "", "tensor, format and activation row of the first of them"),
    ("activation_error_share", "REAL", "", "of the squared error: rounding X in the main branch"),
    ("p_error_share", "REAL", "", "of the squared error: rounding P between the factors"),
    ("wide_p_error", "REAL", "", "output error if P had 16 bits (fp16)"),
    ("p_format", "TEXT", "", "format P is rounded to"),
    ("arithmetic", "TEXT", "", "bit exact, or which model of float sums was emulated"),
    ("latency_s", "REAL", "s", "time of one call"),
    ("cycles", "INTEGER", "cycles", "clock cycles of one call"),
    ("energy_j", "REAL", "J", "energy of one call"),
    ("dram_bytes", "INTEGER", "bytes", "off-chip traffic of one call"),
    ("utilization", "REAL", "", "used MACs over available MACs, 0 to 1"),
    ("bound", "TEXT", "", "what limits the latency"),
    ("peak_activation_bytes", "INTEGER", "bytes", "X, P and y of one call, all rows of it"),
    ("working_set_bytes", "INTEGER", "bytes", "the same and the stored weight"),
    ("fits_in", "TEXT", "", "innermost memory that holds the working set: l1, l2 or dram"),
    ("kernel", "TEXT", "", "kernel family whose fitted numbers the latency assumes"),
    (
        "confidence",
        "TEXT",
        "",
        "of the latency: measured (by rows of its range), extrapolated, assumed",
    ),
    ("latency_low_s", "REAL", "s", "latency less the error to expect of it"),
    ("latency_high_s", "REAL", "s", "latency plus the error to expect of it"),
    (
        "rests_on",
        "TEXT",
        "",
        "on a sketched machine: assumed keys of its file that the latency rests on, as JSON of "
        "elasticities (0.4: 10 % of it moves the latency by 4 %)",
    ),
    (
        "area_ge",
        "REAL",
        "GE",
        "gates of the array per MAC, from synthesis, in two-input NANDs: multiplier, tree, "
        "accumulator and its overflow rule in the integer mode of the main branch; no operand "
        "registers, no shift-round-saturate",
    ),
    (
        "area_mm2",
        "REAL",
        "mm2",
        "placed area of such an array with as many MACs as the machine has in that mode; missing "
        "where the machine's node has no figures",
    ),
    (
        "array_energy_j",
        "REAL",
        "J",
        "energy of the main branch's MACs of one call in these gates, on random operands, without "
        "glitches; `energy_j` differs between arrays by the same gates",
    ),
    ("status", "TEXT", "", "ok, overflow (the output is not finite) or failed"),
    ("message", "TEXT", "", "why the case failed, or a remark"),
    ("seconds", "REAL", "s", "wall time this case took to evaluate"),
    ("seed", "INTEGER", "", "seed of the solver"),
    ("pareto", "INTEGER", "", "whether the row is on its layer's Pareto front"),
    ("dump", "TEXT", "", "file name of the layer dump"),
    ("family", "TEXT", "", "element family of the split"),
    ("group_size", "INTEGER", "elements", "elements per scale along K"),
    ("token_limit", "INTEGER", "rows", "activation rows asked for; missing means all"),
    ("acc_bits", "INTEGER", "bits", "accumulator width emulated"),
    ("overflow", "TEXT", "", "overflow rule of the accumulators"),
    ("products_per_add", "INTEGER", "", "products summed before each add"),
    ("accumulators", "INTEGER", "", "partial accumulators"),
    ("options", "TEXT", "", "other settings that differ from their default, as JSON"),
)

COLUMNS: tuple[Column, ...] = tuple(
    Column(name=name, sql_type=sql_type, unit=unit, meaning=meaning)
    for name, sql_type, unit, meaning in _TABLE
)
"""All columns, in the order of tables and files. A row may carry further keys after these."""

COLUMN_NAMES: tuple[str, ...] = tuple(column.name for column in COLUMNS)

EVALUATED = ("ok", "overflow")
"""Statuses of rows that were evaluated; an output that is not finite has status ``overflow``."""

IDENTITY = (
    *("dump", "layer", "split", "family", "group_size", "rotation", "smooth"),
    *("condition", "finish", "method", "preset"),
    *("accelerator", "seed", "token_limit", "acc_bits", "overflow", "products_per_add"),
    *("accumulators", "options"),
)
"""What a reader tells two rows apart by. Rows equal in these differ only in what produced them."""


class ResultRow(TypedDict, total=False):
    """The columns of a result row with their types; `COLUMNS` says what they mean.

    A row may lack columns that only a sweep knows, and hold further keys.
    """

    layer: str
    kind: str | None
    group: str | None
    m: int | None
    m_source: str | None
    n: int
    k: int
    tokens: int | None
    inputs: str | None
    calls_per_step: int | None
    split: str
    rotation: str | None
    smooth: float | None
    condition: str | None
    finish: str | None
    method: str | None
    preset: str | None
    accelerator: str
    rank: int | None
    feedback_rank: int | None
    weight_bytes: int | None
    bits_per_weight: float | None
    weight_error: float | None
    output_error: float | None
    sqnr_db: float | None
    cosine: float | None
    max_abs_error: float | None
    output_rms: float | None
    overflow_count: int | None
    safe_acc_bits: int | None
    guaranteed_acc_bits: int | None
    first_overflow: str | None
    clipped_count: int | None
    first_clipped: str | None
    activation_error_share: float | None
    p_error_share: float | None
    wide_p_error: float | None
    p_format: str | None
    arithmetic: str | None
    latency_s: float | None
    cycles: float | None  # of a model, so not whole; SQLite keeps a fraction in its INTEGER column
    energy_j: float | None
    dram_bytes: int | None
    utilization: float | None
    bound: str | None
    peak_activation_bytes: int | None
    working_set_bytes: int | None
    fits_in: str | None
    kernel: str | None
    confidence: str | None
    latency_low_s: float | None
    latency_high_s: float | None
    rests_on: str | None
    area_ge: float | None
    area_mm2: float | None
    array_energy_j: float | None
    status: Literal["ok", "overflow", "failed"]
    message: str | None
    seconds: float | None
    seed: int | None
    pareto: bool | None
    dump: str | None
    family: str | None
    group_size: int | None
    token_limit: int | None
    acc_bits: int | None
    overflow: str | None
    products_per_add: int | None
    accumulators: int | None
    options: str | None


def failed_row(message: str, known: Mapping[str, Any]) -> Row:
    """Row of a case that could not be evaluated: `known` columns, status, message, None elsewhere.

    Raises
    ------
    InputError
        If `known` holds a name that is no column.
    """
    for name in known:
        if name not in COLUMN_NAMES:
            near = difflib.get_close_matches(name, COLUMN_NAMES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{name!r} is not a column of a result row{hint}")
    row: Row = dict.fromkeys(COLUMN_NAMES)
    return row | dict(known) | {"status": "failed", "message": message, "pareto": False}


class StoredRow(Mapping[str, Any]):
    """A row that stays as it is, in a third of the memory of a dict.

    Its values are a tuple, whose names it shares with all rows that have the same: 100,000 rows of
    60 columns are 60 MB, not 160.
    """

    __slots__ = ("cells", "places")

    def __init__(self, places: Mapping[str, int], cells: tuple[Any, ...]) -> None:
        self.places = places
        self.cells = cells

    @classmethod
    def of(cls, names: Sequence[str], cells: tuple[Any, ...]) -> "StoredRow":
        """The row with `cells` under `names`, which do not repeat."""
        return cls(_places_of(tuple(names)), cells)

    def __getitem__(self, name: str) -> Any:
        return self.cells[self.places[name]]

    def get(self, name: str, default: Any = None) -> Any:
        """The value under `name`, or `default`."""
        place = self.places.get(name)
        return default if place is None else self.cells[place]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.cells)

    def __or__(self, other: Mapping[str, Any]) -> Row:
        return self.as_dict() | dict(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.as_dict()})"

    def as_dict(self) -> Row:
        """The row as a dict of its own."""
        return dict(zip(self.places, self.cells, strict=True))


@lru_cache(maxsize=1000)
def _places_of(names: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def add_columns(rows: list[Any], names: Sequence[str], columns: Iterable[tuple]) -> None:
    """Replace each of `rows` by a `StoredRow` that also has its tuple of `columns` under `names`.

    They do not have the names yet. One row after the other, so that a large list is not in memory
    twice.
    """
    old: Mapping[str, int] | None = None
    for place, (row, more) in enumerate(zip(rows, columns, strict=True)):
        if not isinstance(row, StoredRow):
            row = StoredRow.of(tuple(row), tuple(row.values()))
        # Neighbors nearly always have the same names.
        if row.places is not old:
            old, new = row.places, _places_of((*row.places, *names))
        rows[place] = StoredRow(new, (*row.cells, *more))


def cells_of(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Iterator[tuple]:
    """Of each row the values under `names`, None for one it lacks."""
    places: Mapping[str, int] | None = None
    take: Callable[[tuple], tuple] | None = None
    # Nearly all rows have all names, and then it takes half the time.
    of_all = itemgetter(*names) if len(names) > 1 else None
    for row in rows:
        if isinstance(row, StoredRow):
            if row.places is not places:
                places, take = row.places, _taker(row.places, names)
            if take is not None:
                yield take(row.cells)
                continue
        elif of_all is not None:
            try:
                yield of_all(row)
                continue
            except KeyError:
                of_all = None
        yield tuple(map(row.get, names))


def _taker(places: Mapping[str, int], names: Sequence[str]) -> Callable[[tuple], tuple] | None:
    if len(names) < 2 or not all(name in places for name in names):
        return None
    return itemgetter(*(places[name] for name in names))


def every_name(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Columns, then the other keys in order of appearance, then ``case_id``."""
    # Rows of a store have their keys in few patterns.
    patterns = dict.fromkeys(map(tuple, rows))
    known = frozenset(COLUMN_NAMES)
    others = dict.fromkeys(name for keys in patterns for name in keys if name not in known)
    others.pop("case_id", None)
    return [*COLUMN_NAMES, *others, "case_id"]


def plain_value(value: Any) -> Any:
    """A value SQLite and JSON can hold: NumPy scalars become Python ones, missing ones None.

    Missing are NaN and pandas' NA and NaT.
    """
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def clipped_note(rows: "Sequence[Row] | Sequence[ResultRow]") -> str | None:
    """How many cases have values beyond a float format, and the first; None without any.

    Parameters
    ----------
    rows : sequence of Row
        Result rows of layers.
    """
    clipped = [row for row in rows if row.get("clipped_count")]
    if not clipped:
        return None
    wild = [row for row in clipped if row.get("status") == "overflow"]
    first = (wild or clipped)[0]
    what = f"{first['layer']} in {first.get('split')} on {first.get('accelerator')}"
    found = f"{counted(first['clipped_count'] or 0, 'value')}, first {first.get('first_clipped')}"
    have = "has" if len(clipped) == 1 else "have"
    parts = [f"{len(clipped)} of {len(rows)} cases {have} values beyond their float format"]
    if wild:
        parts.append(
            f"the output of {len(wild)} is not finite (status overflow, infinite error), none of "
            "which is recommended"
        )
    return f"{'; '.join(parts)}; such as {what} ({found})"


class ShownRow(dict[str, Any]):
    """A row that shows its errors and costs in a few lines; in all else a dict of its columns."""

    def __repr__(self) -> str:
        def listed(names: Sequence[str]) -> str:
            known = ((name, plain_value(self.get(name))) for name in names)
            return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v!r}"
                             for k, v in known if v not in (None, ""))  # fmt: skip

        lines = [text for names in _SHOWN_LINES if (text := listed(names))]
        n_more = len(self.keys() - {name for names in _SHOWN_LINES for name in names})
        return "\n".join([*lines, *([f"... {n_more} more columns"] if n_more > 0 else [])])


_SHOWN_LINES = (
    ("layer", "kind", "m", "n", "k"),
    ("split", "method", "preset", "rank", "accelerator"),
    ("output_error", "weight_error", "sqnr_db"),
    ("latency_s", "energy_j", "dram_bytes", "bound"),
    ("weight_bytes", "bits_per_weight"),
    ("overflow_count", "safe_acc_bits", "clipped_count"),
    ("status", "message"),
)
