"""What a MAC array costs in silicon: gate equivalents, depth, and for a process area and energy.

A unit that the table has is *measured* (synthesized), any other *modeled* by a closed form. Between
measured units a modeled area never leaves what narrower and wider ones give, so that a wider array
is never smaller, whichever of the two a number is. Area counts gates: no wires, no clock tree, no
registers for operands. Processes turn gate equivalents (GE, one two-input NAND) into square
micrometers and picojoules; their figures carry sources in ``process_nodes.yaml``.

Energy is that of random operands, from toggles in front of every gate without glitches;
`loraq_sim.silicon` counts those of a layer's own operands.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hwmodels.errors import AcceleratorError, nearest, read_text
from hwmodels.gates import (
    COLUMN_PARTS,
    Column,
    GroupSum,
    Narrowing,
    Unit,
    UnitGates,
    modeled,
    read_gates,
    units_per_transistor,
)

__all__ = [
    *(
        "LIMITS",
        "NODES_YAML",
        "ProcessNode",
        "SynthesizedArray",
        "column_of",
        "load_node",
        "node_names",
    ),
    *("moved_energy", "synthesized_array", "unit_gates"),
]

NODES_YAML = Path(__file__).parent / "process_nodes.yaml"
OVERFLOW_RULES = ("wrap", "saturate", "saturate_symmetric")
TRANSISTORS_PER_GE = 4
_MAX_FILE_BYTES = 64 * 1024
# What the RTL and the emulator take.
LIMITS = {
    "a_bits": (2, 16),
    "w_bits": (2, 16),
    "products_per_add": (1, 64),
    "accumulators": (1, 64),
    "acc_bits": (8, 64),
    "tree_bits": (2, 64),
    "out_bits": (2, 32),
}
_OF_ALL = ("placed", "sram_filled", "fp32_lane_ge")
_ROUNDINGS = ("floor", "conv_even", "all")


@dataclass(frozen=True, kw_only=True, repr=False)
class ProcessNode:
    """One process: what a gate equivalent and a bit of SRAM take.

    Attributes
    ----------
    name : int
        The node's name in nm.
    nand2_um2, sram_um2_per_bit : float
        Area of one cell.
    multiply_pj : float
        Energy of one product of two int8 codes, which toggles are calibrated to.
    placed, sram_filled : float
        Share of placed logic, and of an SRAM macro, that cells fill.
    fp32_lane_ge : float
        Gate equivalents of one fp32 multiplier and adder.
    sources, confidence : dict
        By figure.
    """

    name: int
    nand2_um2: float
    multiply_pj: float
    sram_um2_per_bit: float
    placed: float
    sram_filled: float
    fp32_lane_ge: float
    sources: dict[str, str]
    confidence: dict[str, str]

    def __repr__(self) -> str:
        sizes = {n: getattr(self, n) for n in ("nand2_um2", "multiply_pj", "sram_um2_per_bit")}
        return f"ProcessNode({self.name} nm, {', '.join(f'{n}={v}' for n, v in sizes.items())})"

    def logic_mm2(self, gate_equivalents: float) -> float:
        """Area of so many gate equivalents as placed, in mm2."""
        return gate_equivalents * self.nand2_um2 / self.placed * 1e-6

    def sram_mm2(self, n_bytes: float) -> float:
        """Area of SRAM macros that hold so many bytes, in mm2."""
        return n_bytes * 8 * self.sram_um2_per_bit / self.sram_filled * 1e-6


def node_names() -> list[int]:
    """The nodes that have figures, in nm, the coarsest first."""
    return sorted(_node_file()["nodes"], reverse=True)


def load_node(node_nm: int) -> ProcessNode:
    """The figures of one node.

    Raises
    ------
    AcceleratorError
        If no figures are known for `node_nm`.
    """
    file = _node_file()
    if isinstance(node_nm, bool) or node_nm not in file["nodes"]:
        raise AcceleratorError(
            f"no figures for a node of {node_nm!r:.40} nm; {_known_nodes(node_nm)}"
        )
    figures = file["nodes"][node_nm] | {key: file[key] for key in _OF_ALL}
    return ProcessNode(
        name=int(node_nm),
        **{key: float(figure["value"]) for key, figure in figures.items()},
        sources={key: figure["source"] for key, figure in figures.items()},
        confidence={key: figure["confidence"] for key, figure in figures.items()},
    )


def _known_nodes(wanted: Any) -> str:
    """Which nodes have figures, and the next coarser and finer one of a number."""
    known = node_names()
    text = f"known: {', '.join(map(str, known))}"
    if isinstance(wanted, bool) or not isinstance(wanted, int | float):
        return text
    beside = [min((n for n in known if n > wanted), default=None)]
    beside += [max((n for n in known if n < wanted), default=None)]
    return f"{text}; nearest: {' or '.join(str(n) for n in beside if n is not None)}"


@functools.cache
def _node_file() -> dict[str, Any]:
    from ruamel.yaml import YAML

    text = read_text(NODES_YAML, "file of process nodes", _MAX_FILE_BYTES)
    loaded: dict[str, Any] = YAML(typ="safe").load(text)
    return loaded


@dataclass(frozen=True, kw_only=True, repr=False)
class SynthesizedArray:
    """A MAC array in gates, per multiply-accumulate (MAC) unit.

    Attributes
    ----------
    column : Column
        What was asked for, as the RTL has it.
    source : {"synthesized", "modeled"}
        Whether the column stands in the table of synthesized units.
    parts : dict
        GE per MAC: multiplier, tree, accumulator and saturation make the column. Apart from it,
        with one of each per column: ``zero_point`` (starting the accumulator at a correction),
        ``srs`` and ``group_sum``.
    column_ge, flip_flops, depth
        Of the whole column: GE, flip-flops, gates in a row between two registers.
    merged_ge : float or None
        GE of the column if synthesis may merge multiply and add; None where that did not run.
    node : ProcessNode or None
    """

    column: Column
    source: str
    parts: dict[str, float]
    column_ge: float
    flip_flops: int
    depth: int
    merged_ge: float | None
    node: ProcessNode | None = None

    def __repr__(self) -> str:
        column, energy, size = self.column, self.energy_pj_per_mac, self.area_um2
        node = "" if self.node is None else f", node_nm={self.node.name}"
        node += "" if energy is None else f", energy_pj_per_mac={energy:.4g}"
        node += "" if size is None else f", area_um2={size:.4g}"
        parts = ", ".join(f"{n} {self.parts[n]:.1f}" for n in COLUMN_PARTS if self.parts.get(n))
        return (
            f"SynthesizedArray({column.a_bits} x {column.w_bits} bits, acc_bits={column.acc_bits}, "
            f"products_per_add={column.products_per_add}, {self.source}{node})\n"
            f"{self.area_ge:.4g} GE per MAC ({parts}), depth {self.depth}"
        )

    @property
    def is_synthesized(self) -> bool:
        """Whether this very column was synthesized."""
        return self.source == "synthesized"

    @property
    def area_ge(self) -> float:
        """Gate equivalents of the column per MAC."""
        return self.column_ge / self.column.products_per_add

    @property
    def gate_equivalents(self) -> float:
        """The same as `area_ge`."""
        return self.area_ge

    @property
    def area_um2(self) -> float | None:
        """Placed area per MAC in um2; None without a node."""
        return None if self.node is None else self.node.logic_mm2(self.area_ge) * 1e6

    def area_mm2(self, macs: int) -> float | None:
        """Placed area of an array of so many MACs in mm2; None without a node."""
        return None if self.node is None else self.node.logic_mm2(self.area_ge) * macs

    @property
    def energy_pj_per_mac(self) -> float | None:
        """Energy of one MAC of random operands in pJ, without glitches; None without a node."""
        if self.node is None:
            return None
        units = sum(
            units_per_transistor(part) * self.parts[part] * TRANSISTORS_PER_GE
            for part in COLUMN_PARTS
        )
        reference = unit_gates(Column())[0]["multiplier"] * units_per_transistor("multiplier")
        return units / reference * self.node.multiply_pj


def synthesized_array(
    mac: Any = None,
    *,
    a_bits: int = 8,
    w_bits: int = 8,
    a_signed: bool = True,
    w_signed: bool = True,
    zero_point: bool = False,
    out_bits: int = 8,
    rounding: str = "conv_even",
    node_nm: int | None = None,
) -> SynthesizedArray:
    """Gates of an array with this accumulator, from the table of synthesized units and its model.

    Parameters
    ----------
    mac : object or None
        Anything with the fields of a MAC array: ``acc_bits``, ``overflow``, ``products_per_add``,
        ``accumulators``, ``tree_bits``, ``tree_overflow``; or with ``column`` and ``acc_bits``, a
        column whose sums a wider accumulator takes. None is 32 bits that wrap, one product an add.
    a_bits, w_bits : int
        Operand widths, 2 to 16.
    a_signed, w_signed : bool
    zero_point : bool
        Whether accumulators start at a correction; its gates then count in the column.
    out_bits : int
        Width behind the shift-round-saturate.
    rounding : {"floor", "conv_even", "all"}
        Its rounding: none, one mode, or all ten.
    node_nm : int or None
        Process for area and energy.

    Raises
    ------
    AcceleratorError
        If a width is out of range, a rule is unknown, or the node has no figures.
    """
    inner = getattr(mac, "column", mac)
    column = column_of(
        inner,
        a_bits=a_bits,
        w_bits=w_bits,
        a_signed=a_signed,
        w_signed=w_signed,
        zero_point=zero_point,
    )
    _check("out_bits", out_bits)
    if rounding not in _ROUNDINGS:
        raise AcceleratorError(f"rounding {rounding!r:.60}: {nearest(rounding, _ROUNDINGS)}")
    node = None if node_nm is None else load_node(node_nm)
    transistors, flip_flops, depth, gates = unit_gates(column)
    macs = column.products_per_add
    scale = 1 / (TRANSISTORS_PER_GE * macs)
    parts = {part: transistors[part] * scale for part in COLUMN_PARTS}
    wide = inner is not mac
    acc_bits = mac.acc_bits if wide else column.acc_bits
    start = sum(unit_gates(replace(column, zero_point=True))[0].values())
    plain = sum(unit_gates(replace(column, zero_point=False))[0].values())
    group = GroupSum(
        acc_bits=column.acc_bits,
        shift_bits=0 if wide else 4,
        wide_bits=acc_bits if wide else max(32, column.acc_bits),
        overflow=mac.overflow if wide and mac.overflow == "wrap" else "wrap",
    )
    if wide and mac.overflow != "wrap":
        group = replace(group, overflow="saturate")
    narrow = Narrowing(acc_bits=acc_bits, out_bits=out_bits, modes=rounding)
    parts |= {
        "zero_point": max(start - plain, 0.0) * scale,
        "srs": sum(unit_gates(narrow)[0].values()) * scale,
        "group_sum": sum(unit_gates(group)[0].values()) * scale,
    }
    merged = None if gates is None else gates.merged_transistors
    return SynthesizedArray(
        column=column,
        source="modeled" if gates is None else "synthesized",
        parts=parts,
        # Rounded, since shares of a total do not always add up to it in floats.
        column_ge=round(sum(transistors.values()) / TRANSISTORS_PER_GE, 6),
        flip_flops=flip_flops,
        depth=depth,
        merged_ge=merged / TRANSISTORS_PER_GE if merged else None,
        node=node,
    )


def moved_energy(said: float, before: float | None, after: float | None) -> float:
    """Energy of a MAC that a file says of one array, in another: the difference that gates make.

    `before` and `after` are what synthesis says of the two arrays, None where it says nothing. The
    result never grows negative, for where a file says less than synthesis the two go in proportion.
    """
    if before is None or after is None or before == after:
        return said
    return said + after - before if said >= before else said * after / before


def column_of(
    mac: Any,
    *,
    a_bits: int = 8,
    w_bits: int = 8,
    a_signed: bool = True,
    w_signed: bool = True,
    zero_point: bool = False,
) -> Column:
    """The column of an array: its fields checked, a tree that never narrows taken as exact.

    Raises
    ------
    AcceleratorError
        If a field is out of range, with its value and the rule.
    """
    settings: dict[str, Any] = {"a_bits": a_bits, "w_bits": w_bits}
    for field in ("acc_bits", "products_per_add", "accumulators"):
        settings[field] = getattr(mac, field, getattr(Column(), field))
    for field, value in settings.items():
        settings[field] = _check(field, value)
    rules = {"overflow": getattr(mac, "overflow", "wrap") if mac is not None else "wrap"}
    rules["tree_overflow"] = getattr(mac, "tree_overflow", None) or rules["overflow"]
    for field, rule in rules.items():
        if rule not in OVERFLOW_RULES:
            raise AcceleratorError(f"{field} {rule!r:.60}: {nearest(rule, OVERFLOW_RULES)}")
    signs: dict[str, Any] = {"a_signed": bool(a_signed), "w_signed": bool(w_signed)}
    column = Column(**settings, **signs, overflow=rules["overflow"], zero_point=bool(zero_point))
    tree_bits = getattr(mac, "tree_bits", None)
    if tree_bits is None or _check("tree_bits", tree_bits) >= column.chunk_bits:
        return column
    return replace(column, tree_bits=int(tree_bits), tree_overflow=rules["tree_overflow"])


def _check(field: str, value: Any) -> int:
    low, high = LIMITS[field]
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or not low <= value <= high:
        raise AcceleratorError(
            f"{field} must be a whole number from {low} to {high}, got {value!r}"
        )
    return int(value)


@functools.lru_cache(maxsize=4096)
def unit_gates(unit: Unit) -> tuple[dict[str, float], int, int, UnitGates | None]:
    """Transistors by part, flip-flops and depth of a unit, and its row of the table if it has one.

    The one part of a unit that is no column is called ``srs`` or ``group_sum``. Nobody changes
    what comes back: it is kept for the next call.
    """
    gates = _table().get(unit)
    parts, flip_flops, depth = modeled(unit)
    if gates is None:
        total = sum(parts.values())
        bounded = _between_neighbors(unit, total)
        parts = {part: value * bounded / total for part, value in parts.items()}
        return parts, flip_flops, round(depth), None
    if isinstance(unit, Column):
        parts = {part: float(getattr(gates, part)) for part in COLUMN_PARTS}
    else:
        parts = {next(iter(parts)): float(gates.transistors)}
    return parts, gates.flip_flops, gates.depth, gates


@functools.cache
def _table() -> Mapping[Unit, UnitGates]:
    return read_gates()[0]


def _between_neighbors(unit: Unit, total: float) -> float:
    """`total`, not below any measured unit that is narrower, nor above any that is wider."""
    low, high = 0.0, math.inf
    numbers, words = _sizes_and_words(unit)
    for theirs, other_words, transistors in _measured(type(unit).__name__):
        if words != other_words:
            continue
        if all(other <= mine for other, mine in zip(theirs, numbers, strict=True)):
            low = max(low, transistors)
        elif all(other >= mine for other, mine in zip(theirs, numbers, strict=True)):
            high = min(high, transistors)
    return min(max(total, low), high)


def _sizes_and_words(unit: Unit) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """What can be wider or narrower in a unit, and what is equal or not: a narrow tree is that."""
    fields = {name: value for name, value in vars(unit).items() if name != "tree_bits"}
    # A start value is gates on top of none; a sign is neither more nor less than none.
    sizes = {n: int(v) for n, v in fields.items() if type(v) is int or n == "zero_point"}
    words = [value for name, value in fields.items() if name not in sizes]
    return tuple(sizes.values()), (*words, getattr(unit, "tree_bits", 0))


@functools.cache
def _measured(kind: str) -> list[tuple[tuple[int, ...], tuple[Any, ...], int]]:
    return [
        (*_sizes_and_words(unit), gates.transistors)
        for unit, gates in _table().items()
        if type(unit).__name__ == kind
    ]
