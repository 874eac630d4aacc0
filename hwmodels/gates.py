"""Units of an array in gates: what one is, and the table of those that were synthesized.

A *column* sums C products in a tree and adds them to one of P accumulators: multiplier, tree,
accumulator and saturation. Apart from it stand a shift-round-saturate and the sum over groups. The
table counts transistors of generic CMOS gates; ``loraq-sim hw synth --fill`` made it from the RTL
that the emulator is compared with.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hwmodels.errors import AcceleratorError, read_text

__all__ = [
    *("COLUMN_PARTS", "GATES_CSV", "Column", "GroupSum", "Narrowing", "Unit", "UnitGates"),
    *("gates_text", "read_gates"),
]

GATES_CSV = Path(__file__).parent / "synthesized_gates.csv"
COLUMN_PARTS = ("multiplier", "tree", "accumulator", "saturation")
_MAX_FILE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column as the RTL has it; `tree_bits` 0 is an exact tree. Signed operands by default."""

    a_bits: int = 8
    w_bits: int = 8
    a_signed: bool = True
    w_signed: bool = True
    products_per_add: int = 1
    accumulators: int = 1
    acc_bits: int = 32
    overflow: str = "wrap"
    tree_bits: int = 0
    tree_overflow: str = "wrap"
    zero_point: bool = False

    @property
    def product_bits(self) -> int:
        """Width of one product; two unsigned operands need a sign."""
        return self.a_bits + self.w_bits + (not self.a_signed and not self.w_signed)

    @property
    def chunk_bits(self) -> int:
        """Width of the exact sum of a chunk."""
        return self.product_bits + math.ceil(math.log2(self.products_per_add))

    @property
    def kept_bits(self) -> int:
        """Width of the chunk sum as it reaches the accumulator."""
        return self.tree_bits or self.chunk_bits


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """A shift-round-saturate from `acc_bits` to `out_bits` with one rounding mode or all ten."""

    acc_bits: int = 32
    out_bits: int = 8
    modes: str = "conv_even"


@dataclass(frozen=True, kw_only=True)
class GroupSum:
    """An accumulator of `wide_bits` that takes results of `acc_bits`, shifted by `shift_bits`."""

    acc_bits: int = 20
    shift_bits: int = 0
    wide_bits: int = 32
    overflow: str = "wrap"


Unit = Column | Narrowing | GroupSum
_UNITS: dict[str, type[Column] | type[Narrowing] | type[GroupSum]] = {
    "column": Column,
    "srs": Narrowing,
    "group_sum": GroupSum,
}


@dataclass(frozen=True, kw_only=True)
class UnitGates:
    """What synthesis gave: transistors by part, flip-flops, depth; the merged flow where it ran."""

    multiplier: int
    tree: int
    accumulator: int
    saturation: int
    flip_flops: int
    depth: int
    merged_transistors: int | None = None
    merged_depth: int | None = None

    @property
    def transistors(self) -> int:
        """All parts together."""
        return self.multiplier + self.tree + self.accumulator + self.saturation


_SETTINGS = tuple(dict.fromkeys(field.name for kind in _UNITS.values() for field in fields(kind)))
_MERGED = ("merged_transistors", "merged_depth")
_RESULTS = tuple(field.name for field in fields(UnitGates))


def gates_text(rows: Mapping[Unit, UnitGates], notes: Iterable[str]) -> str:
    """The table as a file: notes, then a line a unit, cells of other units' settings empty."""
    out = io.StringIO()
    out.writelines(f"# {note}\n" for note in notes)
    writer = csv.DictWriter(out, ("unit", *_SETTINGS, *_RESULTS), lineterminator="\n")
    writer.writeheader()
    kinds = {kind: name for name, kind in _UNITS.items()}
    for unit, gates in rows.items():
        settings = {key: int(v) if isinstance(v, bool) else v for key, v in asdict(unit).items()}
        writer.writerow({"unit": kinds[type(unit)]} | settings | asdict(gates))
    return out.getvalue()


def read_gates(path: Path = GATES_CSV) -> tuple[dict[Unit, UnitGates], list[str]]:
    """Rows of a table of gates by unit, and its notes.

    Raises
    ------
    AcceleratorError
        If the file cannot be read or a cell is not what its column holds.
    """
    text = read_text(path, "table of gates", _MAX_FILE_BYTES)
    lines = text.splitlines()
    notes = [line[2:] for line in lines if line.startswith("# ")]
    body = [line for line in lines if not line.startswith("#")]
    rows: dict[Unit, UnitGates] = {}
    for row in csv.DictReader(body):
        try:
            kind = _UNITS[row["unit"]]
            defaults = asdict(kind())
            settings = {key: type(given)(_cell(row[key])) for key, given in defaults.items()}
            results = {key: int(row[key]) for key in _RESULTS if row[key] or key not in _MERGED}
            gates = UnitGates(**results)
            rows[kind(**settings)] = gates
        except (KeyError, TypeError, ValueError) as error:
            raise AcceleratorError(
                f"{path}: line {len(rows) + len(notes) + 2} is no row of gates: {error}"
            ) from None
    return rows, notes


def _cell(text: str) -> Any:
    return int(text) if text.lstrip("-").isdigit() else text
