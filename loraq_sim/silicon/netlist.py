"""A netlist of generic gates, as Yosys writes it: its transistors by part, flip-flops and depth.

Area is counted, not placed: static CMOS transistors a cell, four of which (a NAND2) are one gate
equivalent (GE); 20 a flip-flop. Depth is the most gates between two registers, of any kind. Both
need no process kit; `hwmodels` turns them into mm2 and pJ for a node.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraq_sim.errors import LoraqError

__all__ = [
    *("FLIP_FLOP", "GATES", "Gate", "Netlist", "packed_netlist", "read_netlist"),
    "unpacked_netlist",
]

FLIP_FLOP = "$_DFF_P_"
# name: transistors, and the gate's inputs in the order of the cell's ports.
GATES: dict[str, tuple[int, str]] = {
    "$_BUF_": (4, "A"),
    "$_NOT_": (2, "A"),
    "$_NAND_": (4, "AB"),
    "$_NOR_": (4, "AB"),
    "$_AND_": (6, "AB"),
    "$_OR_": (6, "AB"),
    "$_XOR_": (12, "AB"),
    "$_XNOR_": (12, "AB"),
    "$_AOI3_": (6, "ABC"),
    "$_OAI3_": (6, "ABC"),
    "$_AOI4_": (8, "ABCD"),
    "$_OAI4_": (8, "ABCD"),
    "$_NMUX_": (10, "ABS"),
    "$_MUX_": (12, "ABS"),
}
_FLIP_FLOP_TRANSISTORS = 20
# Words of instance names in the RTL, and the part that what they hold belongs to.
_PARTS = {
    "multiplier": "multiplier",
    "adders": "tree",
    "narrow_tree": "saturation",
    "narrow_sum": "saturation",
}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate: what it computes, the nets it reads and the net it drives, and whose part it is."""

    kind: str
    inputs: tuple[int, ...]
    output: int
    part: str


@dataclass(frozen=True, kw_only=True)
class Netlist:
    """Gates in an order in which each comes after those that it reads.

    Attributes
    ----------
    gates : tuple of Gate
    registers : tuple of (int, int)
        Nets in front of and behind each flip-flop.
    ports : dict
        Nets of each port by name, the lowest bit first.
    constants : dict
        Nets that hold 0 or 1 always.
    levels : dict
        Gates in front of each net, counted from registers and inputs.
    """

    gates: tuple[Gate, ...]
    registers: tuple[tuple[int, int], ...]
    ports: dict[str, tuple[int, ...]]
    constants: dict[int, int]
    levels: dict[int, int]

    @property
    def flip_flops(self) -> int:
        """Number of flip-flops."""
        return len(self.registers)

    @property
    def depth(self) -> int:
        """Most gates on a path between inputs or registers and registers or outputs."""
        return max(self.levels.values(), default=0)

    @property
    def transistors(self) -> dict[str, int]:
        """Transistors by part: multiplier, tree, saturation, and accumulator, which is the rest."""
        counts = dict.fromkeys(("multiplier", "tree", "accumulator", "saturation"), 0)
        for gate in self.gates:
            counts[gate.part] += GATES[gate.kind][0]
        counts["accumulator"] += _FLIP_FLOP_TRANSISTORS * self.flip_flops
        return counts


def read_netlist(text: str, top: str) -> Netlist:
    """Read the flat module of a Yosys JSON file (``write_json``).

    Raises
    ------
    LoraqError
        If the file has no such module, a cell that is no gate of `GATES`, or a loop of gates.
    """
    modules = json.loads(text)["modules"]
    if top not in modules:
        raise LoraqError(f"synthesis left no module {top}, only {', '.join(modules) or 'nothing'}")
    module = modules[top]
    nets = _Nets()
    gates: list[Gate] = []
    registers = []
    for name, cell in module["cells"].items():
        wires = {port: nets.of(bits[0]) for port, bits in cell["connections"].items()}
        kind = cell["type"]
        if kind == FLIP_FLOP:
            registers.append((wires["D"], wires["Q"]))
        elif kind in GATES:
            inputs = tuple(wires[port] for port in GATES[kind][1])
            gates.append(Gate(kind=kind, inputs=inputs, output=wires["Y"], part=_part_of(name)))
        else:
            raise LoraqError(
                f"cell {name} of {top} is a {kind}, which is none of the gates counted"
            )
    ordered, levels = _in_order(gates)
    ports = {
        name: tuple(nets.of(bit) for bit in port["bits"]) for name, port in module["ports"].items()
    }
    return Netlist(
        gates=tuple(ordered),
        registers=tuple(registers),
        ports=ports,
        constants=nets.constants,
        levels=levels,
    )


def packed_netlist(netlist: Netlist) -> dict[str, Any]:
    """The netlist as small lists for JSON; `unpacked_netlist` reads them."""
    kinds, parts = list(GATES), list(netlist.transistors)
    return {
        "gates": [
            [kinds.index(gate.kind), parts.index(gate.part), gate.output, *gate.inputs]
            for gate in netlist.gates
        ],
        "registers": [list(pair) for pair in netlist.registers],
        "ports": {name: list(nets) for name, nets in netlist.ports.items()},
        "constants": [list(pair) for pair in netlist.constants.items()],
    }


def unpacked_netlist(record: Mapping[str, Any]) -> Netlist:
    """The netlist that `packed_netlist` wrote."""
    kinds = list(GATES)
    parts = ("multiplier", "tree", "accumulator", "saturation")
    gates = [
        Gate(kind=kinds[kind], inputs=tuple(inputs), output=output, part=parts[part])
        for kind, part, output, *inputs in record["gates"]
    ]
    ordered, levels = _in_order(gates)
    return Netlist(
        gates=tuple(ordered),
        registers=tuple((data, output) for data, output in record["registers"]),
        ports={name: tuple(nets) for name, nets in record["ports"].items()},
        constants={net: value for net, value in record["constants"]},
        levels=levels,
    )


class _Nets:
    """Numbers nets from 0, constants among them."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.constants: dict[int, int] = {}

    def of(self, bit: int | str) -> int:
        number = self._numbers.setdefault(bit, len(self._numbers))
        if isinstance(bit, str):
            # An undefined bit may be either; Yosys has taken it where that saves a gate.
            self.constants[number] = int(bit == "1")
        return number


def _part_of(cell_name: str) -> str:
    """Flattened cells carry the instances that they come from: ``$flatten\\array.\\lane[0]...``."""
    words = cell_name.replace("\\", "").replace("$", ".").split(".")
    return next((_PARTS[word] for word in words if word in _PARTS), "accumulator")


def _in_order(gates: Sequence[Gate]) -> tuple[list[Gate], dict[int, int]]:
    """Gates after what they read, and the gates in front of each net."""
    drivers: Mapping[int, int] = {gate.output: index for index, gate in enumerate(gates)}
    waiting = [sum(net in drivers for net in set(gate.inputs)) for gate in gates]
    readers: dict[int, list[int]] = {}
    for index, gate in enumerate(gates):
        for net in set(gate.inputs):
            readers.setdefault(net, []).append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    ordered: list[Gate] = []
    levels: dict[int, int] = {}
    while ready:
        gate = gates[ready.pop()]
        ordered.append(gate)
        levels[gate.output] = 1 + max((levels.get(net, 0) for net in gate.inputs), default=0)
        for index in readers.get(gate.output, ()):
            waiting[index] -= 1
            if waiting[index] == 0:
                ready.append(index)
    if len(ordered) < len(gates):
        raise LoraqError(f"{len(gates) - len(ordered)} gates of the netlist read themselves")
    return ordered, levels
