"""Units of an array in gates: what one is, and the table of those that were synthesized.

A *column* sums C products in a tree and adds them to one of P accumulators: multiplier, tree,
accumulator and saturation. Apart from it stand a shift-round-saturate and the sum over groups. The
table counts transistors of generic CMOS gates; ``loraq-sim hw synth --fill`` made it from the RTL
that the emulator is compared with.

Between its rows stands a closed form: a few terms a part, each a count of cells that the part is
built of.

    multiplier   cells of partial products, adders below them, extended signs, bits of the product
    tree         bits of its adders, and of their carry lookahead
    accumulator  20 a flip-flop; bits of the adder that get a chunk, bits of the accumulator, one
                 multiplexer a bit where there are several accumulators or a start value; three
                 accumulators are built as four, for an index addresses a power of two
    saturation   bits that are clamped, bits that are compared
    group_sum    bits of its adder, of its shifter, and of what lies above it
    depth        gates in a row: logarithms of what each part adds up

Under wrap only the low bits of a sum matter, so multiplier and tree lose what lies above the
accumulator. No coefficient is negative: a wider unit is never smaller. `loraq_sim.silicon` fits the
coefficients to the table; here they are only read.
"""

import csv
import functools
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hwmodels.errors import AcceleratorError, read_text

__all__ = [
    *("COLUMN_PARTS", "FLIP_FLOP", "GATES_CSV", "MODEL_JSON", "Column", "GroupSum", "Narrowing"),
    *("Terms", "Unit", "UnitGates", "depth_terms", "flip_flops_of", "gates_text", "modeled"),
    *("part_terms", "read_gates", "units_per_transistor"),
]

GATES_CSV = Path(__file__).parent / "synthesized_gates.csv"
MODEL_JSON = Path(__file__).parent / "synthesized_model.json"
FLIP_FLOP = 20
Terms = dict[str, float]
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
    def words(self) -> int:
        """Accumulators that are built: an index addresses a power of two of them."""
        return 1 << (self.accumulators - 1).bit_length()

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


def part_terms(unit: Unit) -> dict[str, Terms]:
    """What each part's transistors are a sum of, by part; without flip-flops, which are counted."""
    if isinstance(unit, Narrowing):
        stages = min(6, math.ceil(math.log2(unit.acc_bits)) + 1)
        rounds = float(unit.modes != "floor")
        terms = {
            "shifter": unit.acc_bits * stages,
            "increment": unit.acc_bits * rounds,
            "modes": float(unit.modes == "all"),
            "out": unit.out_bits,
            "one": 1.0,
        }
        return {"srs": terms}
    if isinstance(unit, GroupSum):
        shifted = unit.acc_bits + (2**unit.shift_bits - 1 if unit.shift_bits else 0)
        terms = {
            "adder": unit.wide_bits,
            "shifter": unit.acc_bits * unit.shift_bits,
            "clamp": float(unit.overflow != "wrap") * unit.wide_bits,
            # Bits above the wide accumulator are added and compared to tell whether an add fits.
            "beyond": max(shifted - unit.wide_bits, 0),
        }
        return {"group_sum": terms}
    return {
        "multiplier": _multiplier_terms(unit),
        "tree": _tree_terms(unit),
        "accumulator": _accumulator_terms(unit),
        "saturation": _saturation_terms(unit),
    }


def _needed_bits(unit: Column) -> int:
    """Low bits of a chunk's sum that can change a result."""
    tree_wraps = not unit.tree_bits or unit.tree_overflow == "wrap"
    needed = unit.chunk_bits
    if unit.tree_bits and tree_wraps:
        needed = min(needed, unit.tree_bits)
    if unit.overflow == "wrap" and tree_wraps:
        needed = min(needed, unit.acc_bits)
    return needed


def _multiplier_terms(unit: Column) -> Terms:
    count, needed = unit.products_per_add, _needed_bits(unit)
    long, short = max(unit.a_bits, unit.w_bits), min(unit.a_bits, unit.w_bits)
    # Partial products are `short` rows of `long` bits; a column of h cells takes h - 1 adders.
    heights = [
        min(column + 1, short, long + short - 1 - column)
        for column in range(min(long + short - 1, needed))
    ]
    # A product's own sign extends its rows; the tree extends the product behind that.
    extended = sum(max(min(needed, unit.product_bits) - long - row, 0) for row in range(short))
    return {
        "cells": float(count * sum(heights)),
        "adders": float(count * sum(height - 1 for height in heights)),
        "signs": float(count * extended * (unit.a_signed or unit.w_signed)),
        "both_signs": float(count * extended * (unit.a_signed and unit.w_signed)),
        "bits": float(count * min(unit.product_bits, needed)),
    }


def _tree_terms(unit: Column) -> Terms:
    needed = _needed_bits(unit)
    widths = [min(width, needed) for width in _adder_widths(unit)]
    return {
        "bits": float(sum(widths)),
        "lookahead": sum(width * math.log2(width) for width in widths),
    }


def _adder_widths(unit: Column) -> list[int]:
    """Output bits of every adder of a balanced tree, as the RTL splits it."""

    def below(leaves: int) -> list[int]:
        if leaves == 1:
            return []
        depth = math.ceil(math.log2(leaves))
        left = 2 ** (depth - 1)
        return [*below(left), *below(leaves - left), unit.product_bits + depth]

    return below(unit.products_per_add)


def _accumulator_terms(unit: Column) -> Terms:
    bits, several = unit.acc_bits, unit.accumulators > 1
    return {
        "bits": float(bits),
        "lookahead": bits * math.log2(bits),
        "added": float(min(unit.kept_bits, bits)),
        "start": float(unit.zero_point * bits),
        "held": float(several * bits * unit.words),
        "merged": float(several * bits),
        "over": float(unit.overflow != "wrap"),
    }


def _saturation_terms(unit: Column) -> Terms:
    clamps = unit.overflow != "wrap"
    symmetric = unit.overflow == "saturate_symmetric"
    tree_clamps = bool(unit.tree_bits) and unit.tree_overflow != "wrap"
    spare = max(unit.kept_bits - unit.acc_bits, 0) + 1
    return {
        "clamped": float(clamps * unit.acc_bits + tree_clamps * unit.tree_bits),
        "compared": float(clamps * spare + tree_clamps * max(unit.chunk_bits - unit.tree_bits, 0)),
        "symmetric": float(symmetric * unit.acc_bits),
    }


def flip_flops_of(unit: Unit) -> int:
    """Flip-flops: the accumulators that are built, and two counters where they take turns."""
    if isinstance(unit, Narrowing):
        return 0
    if isinstance(unit, GroupSum):
        return unit.wide_bits
    return unit.acc_bits * unit.words + 2 * (unit.accumulators - 1).bit_length()


def depth_terms(unit: Unit) -> Terms:
    """What the gates between two registers are a sum of."""
    if isinstance(unit, Narrowing):
        rounds = float(unit.modes != "floor")
        return {"one": 1.0, "acc": math.log2(unit.acc_bits), "carry": rounds * unit.acc_bits}
    if isinstance(unit, GroupSum):
        return {
            "one": 1.0,
            "acc": float(unit.acc_bits),
            "wide": math.log2(unit.wide_bits),
            "bits": float(unit.wide_bits),
            "shift": float(unit.shift_bits),
            "clamps": float(unit.overflow != "wrap"),
        }
    needed = _needed_bits(unit)
    return {
        "rows": math.log2(min(unit.a_bits, unit.w_bits, needed)),
        "product": math.log2(min(unit.product_bits, needed)),
        "levels": float(math.ceil(math.log2(unit.products_per_add))),
        "acc": math.log2(unit.acc_bits),
        "carry": float(unit.acc_bits),
        # The multiplexer in front of the adder keeps its carries from being looked ahead.
        "turns": (unit.accumulators > 1) * unit.acc_bits / math.log2(2 * unit.accumulators),
        "clamps": float(unit.overflow != "wrap"),
        "tree_clamps": float(bool(unit.tree_bits) and unit.tree_overflow != "wrap"),
    }


@functools.cache
def _model_file() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(read_text(MODEL_JSON, "model of gates", _MAX_FILE_BYTES))
    return loaded


def units_per_transistor(part: str) -> float:
    """Energy of one cycle of random operands per transistor of a part of a column.

    In loads of one gate input that change once; `loraq_sim.silicon.toggles` counts them.
    """
    return float(_model_file()["energy"]["units_per_transistor"][part])


def modeled(unit: Unit) -> tuple[dict[str, float], int, float]:
    """Transistors by part, flip-flops and depth of a unit that nobody needs to synthesize.

    Raises
    ------
    AcceleratorError
        If the file of coefficients cannot be read.
    """
    known = _model_file()["coefficients"]
    flops = flip_flops_of(unit)
    parts = {
        part: sum(known[part].get(name, 0.0) * value for name, value in terms.items())
        for part, terms in part_terms(unit).items()
    }
    registers = "accumulator" if isinstance(unit, Column) else next(iter(parts))
    parts[registers] += FLIP_FLOP * flops
    kind = "depth_" + ("column" if isinstance(unit, Column) else next(iter(parts)))
    depth = sum(known[kind].get(name, 0.0) * value for name, value in depth_terms(unit).items())
    return parts, flops, depth
