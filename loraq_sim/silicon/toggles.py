"""Energy of an array on given operands: toggles of its gates, cycle by cycle.

The netlist of a column has no memory but its accumulator, and the emulator knows what that holds
before every cycle. So all cycles can be evaluated at once, 64 a word, and a net's toggles are the
bits in which neighboring cycles differ. Each toggle moves the charge of what the net drives: inputs
of gates, the driver's own output and a share of wire for each input. The unit is one NAND2 input;
a node's picojoules come from one published figure, the product of two int8 codes (of random
operands, as those figures are measured).

Gates answer at once here, so that glitches are left out; ``glitches=True`` plays every change with
one step of delay a gate instead, which counts them. Real gates filter short pulses, so that the
truth lies between the two.

Energy per multiply-accumulate on a layer's own operands stands beside that of random ones: the
codes that the main branch of a split multiplies, weights and activations rounded to its formats, in
its groups, in their order. Both runs use the same netlist and the same count of cycles, so that
their ratio is what the operands save.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hwmodels
from hwmodels.gates import Column
from hwmodels.synthesis import column_of
from loraq_sim.emulator.gemm import emulate_gemm
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.kernels.toggles import OPERATIONS, ripple, settle
from loraq_sim.layers import Layer
from loraq_sim.quantizers.quantize import quantize
from loraq_sim.silicon.netlist import Netlist
from loraq_sim.silicon.synthesize import kept_netlists, netlist_of
from loraq_sim.split import PrecisionSplit

__all__ = [
    "Cycles",
    "DATAFLOWS",
    "OperandEnergy",
    "ToggleEnergy",
    "activity",
    "clocked_units",
    "column_cycles",
    "layer_energy",
    "random_energy",
    "toggle_energy",
]


DATAFLOWS = ("output", "weight")
# Loads of one input of each gate in inputs of a NAND2: pairs of transistors behind the pin.
_PIN_LOADS = {"$_XOR_": 2.0, "$_XNOR_": 2.0, "$_MUX_": 1.5, "$_NMUX_": 1.5}
_DRIVER_LOAD = 1.0
_WIRE_LOAD = 0.5
# A clock edge each way, two inputs' worth inside a flip-flop.
_CLOCK_UNITS = 4.0


@dataclass(frozen=True, kw_only=True)
class Cycles:
    """What a column sees, cycle by cycle.

    Attributes
    ----------
    a, w : ndarray of shape (T, C), int64
        Codes of the chunk.
    before, after : ndarray of shape (T,), int64
        The accumulator as the cycle starts and ends.
    """

    a: NDArray[np.int64]
    w: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ToggleEnergy:
    """Energy of a run of cycles in units of one NAND2 input that changes once.

    Attributes
    ----------
    units : dict
        By part, of all cycles.
    cycles, macs : int
        Changes from cycle to cycle, and products in them.
    """

    units: dict[str, float]
    cycles: int
    macs: int

    @property
    def units_per_mac(self) -> float:
        """Units of one product and its share of adds."""
        return sum(self.units.values()) / self.macs


def column_cycles(
    a: NDArray[np.integer],
    w: NDArray[np.integer],
    mac: MacArray,
    *,
    group: int | None = None,
    dataflow: str = "output",
) -> Cycles:
    """The cycles in which one column computes (M, N) outputs, sums taken from the emulator.

    Parameters
    ----------
    a : ndarray of shape (M, K)
        Activation codes.
    w : ndarray of shape (N, K)
        Weight codes.
    mac : MacArray
        With one accumulator.
    group : int or None
        Products after which a sum starts again at zero; None is all of K.
    dataflow : {"output", "weight"}
        Whether a column finishes an output before the next one (both operands change every cycle),
        or keeps its weights while all rows pass.

    Raises
    ------
    InputError
        If shapes do not fit, the dataflow is unknown, or the array has several accumulators.
    """
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise InputError(f"a (M, K) and w (N, K) must have one K, got {a.shape} and {w.shape}")
    if mac.accumulators != 1:
        raise InputError(f"toggles need a column with one accumulator, got {mac.accumulators}")
    if dataflow not in DATAFLOWS:
        raise InputError(unknown_name("dataflow", dataflow, DATAFLOWS))
    k, c = a.shape[1], mac.products_per_add
    size = k if group is None else group
    starts, chunks = [], []
    before, after = [], []
    for first in range(0, k, size):
        state = np.zeros((a.shape[0], w.shape[0]), np.int64)
        for low in range(first, min(first + size, k), c):
            high = min(low + c, first + size, k)
            before.append(state)
            starts.append(low)
            chunks.append(high - low)
            added = emulate_gemm(a[:, low:high], w[:, low:high], mac, init=state)
            state = added.astype(np.int64)
            after.append(state)
    # (chunks, M, N), then in the order in which the column takes them.
    order = (1, 2, 0) if dataflow == "output" else (2, 0, 1)
    sums = [np.stack(s).transpose(order).reshape(-1) for s in (before, after)]
    spread = np.indices((len(starts), a.shape[0], w.shape[0]))
    chunk, row, column = (index.transpose(order).reshape(-1) for index in spread)
    lanes = np.arange(c)
    place = np.array(starts)[chunk][:, None] + lanes
    filled = lanes < np.array(chunks)[chunk][:, None]
    place = np.minimum(place, k - 1)
    return Cycles(
        a=np.where(filled, a[row[:, None], place], 0).astype(np.int64),
        w=np.where(filled, w[column[:, None], place], 0).astype(np.int64),
        before=sums[0],
        after=sums[1],
    )


def toggle_energy(
    netlist: Netlist, cycles: Cycles, *, a_bits: int, w_bits: int, glitches: bool = False
) -> ToggleEnergy:
    """Energy of a column's netlist over `cycles`, by part.

    Raises
    ------
    InputError
        If operands do not fit the netlist, or the netlist's next accumulator is not the emulator's:
        it then is another array's.
    """
    acc = netlist.ports["result"]
    for name, bits, codes in (("a", a_bits, cycles.a), ("w", w_bits, cycles.w)):
        if len(netlist.ports[name]) != bits * codes.shape[1]:
            raise InputError(
                f"the netlist takes {len(netlist.ports[name])} bits of {name} a cycle, "
                f"the operands have {codes.shape[1]} codes of {bits} bits"
            )
    inputs: dict[int, NDArray[np.uint64]] = dict.fromkeys(
        [*netlist.ports["load"], *netlist.ports.get("merge", ()), *netlist.ports["clk"]],
        _bit_words(np.zeros(cycles.before.size, np.int64), 1)[0],
    )
    inputs |= dict(zip(acc, _bit_words(cycles.before, len(acc)), strict=True))
    for name, bits, codes in (("a", a_bits, cycles.a), ("w", w_bits, cycles.w)):
        words = [row for lane in codes.T for row in _bit_words(lane, bits)]
        inputs |= dict(zip(netlist.ports[name], words, strict=True))
    for net in netlist.ports.get("init", ()):
        inputs.setdefault(net, np.zeros_like(next(iter(inputs.values()))))
    for net, value in netlist.constants.items():
        inputs[net] = np.full_like(next(iter(inputs.values())), np.uint64(2**64 - 1) * value)
    program = _Program(netlist, inputs)
    watched = np.array([dict((q, d) for d, q in netlist.registers)[net] for net in acc], np.int32)
    toggles, seen = program.settle(watched)
    expected = _bit_words(cycles.after, len(acc))
    if not np.array_equal(seen, np.stack(expected)):
        raise InputError("the netlist adds otherwise than the emulated array; check its settings")
    if glitches:
        toggles = program.ripple()
    loads = _loads(netlist)
    parts = dict.fromkeys(netlist.transistors, 0.0)
    driven_by = {gate.output: gate.part for gate in netlist.gates}
    driven_by |= dict.fromkeys((*netlist.ports["a"], *netlist.ports["w"]), "multiplier")
    for net, count in enumerate(toggles.tolist()):
        if count:
            parts[driven_by.get(net, "accumulator")] += count * loads.get(net, 0.0)
    changes = cycles.before.size - 1
    parts["accumulator"] += _CLOCK_UNITS * netlist.flip_flops * changes
    return ToggleEnergy(units=parts, cycles=changes, macs=changes * cycles.a.shape[1])


def clocked_units(netlist: Netlist, inputs: Mapping[str, NDArray[np.uint64]]) -> float:
    """Energy of a cycle of any netlist with registers, in the units of `ToggleEnergy`.

    Parameters
    ----------
    netlist : Netlist
    inputs : mapping of str to ndarray of shape (cycles, bits), uint64
        What ports see, a run in each of 64 bits; registers and ports that are not named start at
        and hold 0.
    """
    cycles = len(next(iter(inputs.values())))
    given = dict.fromkeys(net for nets in netlist.ports.values() for net in nets)
    given |= dict.fromkeys(output for _, output in netlist.registers)
    driven = {gate.output for gate in netlist.gates}
    words = {net: np.zeros(1, np.uint64) for net in given if net not in driven}
    words |= {net: np.full(1, 2**64 - 1 if high else 0, np.uint64) for net, high in
              netlist.constants.items()}  # fmt: skip
    program = _Program(netlist, words)
    place = {net: row for row, net in enumerate(words)}
    every = np.arange(program.n_nets, dtype=np.int32)
    loads = _loads(netlist)
    weights = np.array([loads.get(net, 0.0) for net in range(program.n_nets)])
    units, last = 0.0, None
    for t in range(cycles):
        for port, bits in inputs.items():
            for net, word in zip(netlist.ports[port], bits[t], strict=True):
                program.words[place[net]] = word
        _, seen = program.settle(every)
        if last is not None:
            changed = np.unpackbits((seen ^ last).view(np.uint8), axis=1).sum(axis=1)
            units += float(weights @ changed)
        last = seen
        for data, output in netlist.registers:
            program.words[place[output]] = seen[data]
    runs = 64 * (cycles - 1)
    return units / runs + _CLOCK_UNITS * netlist.flip_flops


def _loads(netlist: Netlist) -> dict[int, float]:
    """What each net drives, in inputs of a NAND2."""
    loads: dict[int, float] = {}
    for gate in netlist.gates:
        pin = _PIN_LOADS.get(gate.kind, 1.0)
        loads[gate.output] = loads.get(gate.output, 0.0) + _DRIVER_LOAD
        for net in gate.inputs:
            loads[net] = loads.get(net, 0.0) + pin + _WIRE_LOAD
    for data, output in netlist.registers:
        loads[data] = loads.get(data, 0.0) + 1.0 + _WIRE_LOAD
        loads[output] = loads.get(output, 0.0) + _DRIVER_LOAD
    return loads


def _bit_words(values: NDArray[np.int64], bits: int) -> list[NDArray[np.uint64]]:
    """Bit i of all values as words of 64 cycles, the last cycle repeated to fill the last word."""
    spare = -values.size % 64
    filled = np.concatenate([values, np.repeat(values[-1:], spare)])
    return [
        np.packbits(((filled >> i) & 1).astype(np.uint8), bitorder="little").view(np.uint64)
        for i in range(bits)
    ]


class _Program:
    """A netlist's gates as arrays, with the words of its inputs."""

    def __init__(self, netlist: Netlist, inputs: Mapping[int, NDArray[np.uint64]]) -> None:
        numbers = {kind: index for index, kind in enumerate(OPERATIONS)}
        gates = netlist.gates
        self._kinds = np.array([numbers[gate.kind] for gate in gates], np.uint8)
        reads = [(gate.inputs + gate.inputs[:1] * 4)[:4] for gate in gates]
        self._reads = np.array(reads, np.int32).reshape(-1, 4)
        self._drives = np.array([gate.output for gate in gates], np.int32)
        self._given = np.array(list(inputs), np.int32)
        self.words = np.ascontiguousarray(np.stack(list(inputs.values())))
        used = [*self._drives.tolist(), *self._given.tolist(), *self._reads.ravel().tolist()]
        self.n_nets = max(used) + 1
        self._depth = netlist.depth

    def settle(self, watched: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        toggles, seen = settle(
            self._kinds, self._reads, self._drives, self._given, self.words, self.n_nets, watched
        )
        return toggles, seen

    def ripple(self) -> NDArray[np.int64]:
        toggles: NDArray[np.int64] = ripple(
            self._kinds,
            self._reads,
            self._drives,
            self._given,
            self.words,
            self.n_nets,
            self._depth,
        )
        return toggles


_RANDOM_K = 256
_GLITCH_CYCLES = 2048


@dataclass(frozen=True, kw_only=True)
class OperandEnergy:
    """What one MAC of a layer takes.

    Attributes
    ----------
    pj_per_mac, random_pj_per_mac : float
        On the layer's operands, and on random codes of the same widths; without glitches.
    glitch_factor : float
        Energy with one step of delay a gate over energy without delay, on a sample: an upper
        bound, since real gates filter short pulses.
    parts : dict
        pJ per MAC by part, on the layer's operands.
    cycles : int
        Cycles that were counted.
    """

    pj_per_mac: float
    random_pj_per_mac: float
    glitch_factor: float
    parts: dict[str, float]
    cycles: int


def layer_energy(
    layer: Layer,
    split: PrecisionSplit,
    mac: MacArray,
    *,
    node_nm: int = 7,
    dataflow: str = "output",
    cycles: int = 65536,
    seed: int = 0,
) -> OperandEnergy:
    """Energy of the main branch's MACs of `layer` on an array, against random operands.

    Parameters
    ----------
    layer : Layer
        With activations.
    split : PrecisionSplit
        Integer formats in the main branch.
    mac : MacArray
        With one accumulator. Its netlist ships with the program or is synthesized.
    node_nm : int
        Process whose figure calibrates.
    dataflow : {"output", "weight"}
        As for `loraq_sim.silicon.toggles.column_cycles`.
    cycles : int
        Cycles to count at most; rows and columns are taken evenly from the layer.
    seed : int
        Of the random operands.

    Raises
    ------
    InputError
        If the layer has no activations or an operand is no integer of 2 to 16 bits.
    """
    if split.has_branch:
        raise InputError(
            f"{split.text}: energy of operands is counted for weights that are rounded as they "
            f"are; a branch leaves others to the main part, so name {split.labels[0]} alone"
        )
    if layer.activations is None:
        raise InputError(f"layer {layer.name!r} has no activations; `dump capture` records them")
    formats = {"a": split.main_activation, "w": split.main_weight}
    for name, fmt in formats.items():
        if not fmt.element.is_integer or fmt.zero is not None or not fmt.element.is_signed:
            raise InputError(f"{split.text}: {name} is {fmt}; toggles need symmetric integers")
    group = formats["w"].group_size
    chunks = -(-layer.weight.shape[1] // mac.products_per_add)
    side = max(2, int(np.sqrt(cycles / chunks)))
    x = layer.activations[_evenly(len(layer.activations), side)]
    w = layer.weight[_evenly(len(layer.weight), side)]
    codes = [
        quantize(values, fmt).codes for values, fmt in zip((x, w), formats.values(), strict=True)
    ]
    bits = [fmt.element.bits for fmt in formats.values()]
    netlist = netlist_of(column_of(mac, a_bits=bits[0], w_bits=bits[1]))
    rng = np.random.default_rng(seed)
    random = [
        rng.integers(-(2 ** (width - 1)), 2 ** (width - 1), array.shape)
        for width, array in zip(bits, codes, strict=True)
    ]
    run = functools.partial(_energy, netlist, mac, bits, group, dataflow)
    own, other = run(*codes), run(*random)
    sample = [array[: max(2, int(np.sqrt(_GLITCH_CYCLES / chunks)))] for array in codes]
    factor = run(*sample, glitches=True).units_per_mac / run(*sample).units_per_mac
    pj = hwmodels.load_node(node_nm).multiply_pj / _multiply_units()
    return OperandEnergy(
        pj_per_mac=own.units_per_mac * pj,
        random_pj_per_mac=other.units_per_mac * pj,
        glitch_factor=factor,
        parts={part: units * pj / own.macs for part, units in own.units.items()},
        cycles=own.cycles,
    )


def _evenly(count: int, wanted: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(np.int64))


def _energy(
    netlist: Netlist,
    mac: MacArray,
    bits: list[int],
    group: int | None,
    dataflow: str,
    a: NDArray[Any],
    w: NDArray[Any],
    *,
    glitches: bool = False,
) -> ToggleEnergy:
    cycles = column_cycles(a, w, mac, group=group, dataflow=dataflow)
    return toggle_energy(netlist, cycles, a_bits=bits[0], w_bits=bits[1], glitches=glitches)


def random_energy(column: Column, netlist: Netlist, *, seed: int = 0) -> ToggleEnergy:
    """Energy of a column over cycles of random operands, one after the other."""
    mac = MacArray(
        acc_bits=column.acc_bits,
        overflow=column.overflow,
        products_per_add=column.products_per_add,
    )
    rng = np.random.default_rng(seed)
    a, w = (
        rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (16, _RANDOM_K))
        for bits in (column.a_bits, column.w_bits)
    )
    return _energy(netlist, mac, [column.a_bits, column.w_bits], None, "output", a, w)


@functools.cache
def _multiply_units() -> float:
    """Units of one product of two random int8 codes."""
    column = Column(acc_bits=24)
    energy = random_energy(column, netlist_of(column))
    return energy.units["multiplier"] / energy.macs


def activity() -> dict[str, Any]:
    """Units of random operands per transistor and cycle, by part: the mean of kept netlists."""
    found: dict[str, list[float]] = {}
    for column, netlist in kept_netlists().items():
        energy = random_energy(column, netlist)
        for part, transistors in netlist.transistors.items():
            if transistors:
                share = energy.units[part] / energy.cycles / transistors
                found.setdefault(part, []).append(share)
    means = {part: round(float(np.mean(shares)), 6) for part, shares in found.items()}
    return {"multiply_units": round(_multiply_units(), 3), "units_per_transistor": means}
