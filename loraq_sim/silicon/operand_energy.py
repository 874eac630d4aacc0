"""Energy per multiply-accumulate on a layer's own operands, beside that of random ones.

Operands are the codes that the main branch of a split multiplies: weights and activations rounded
to its formats, in its groups, in their order. Both runs use the same netlist and the same count of
cycles, so their ratio is what the operands save. Picojoules are calibrated by one figure of the
node: the product of two random int8 codes.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hwmodels
from hwmodels.gates import Column
from hwmodels.synthesis import column_of
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.quantizers.quantize import quantize
from loraq_sim.silicon.netlist import Netlist
from loraq_sim.silicon.synthesize import kept_netlists, netlist_of
from loraq_sim.silicon.toggles import ToggleEnergy, column_cycles, toggle_energy
from loraq_sim.split import PrecisionSplit

__all__ = ["OperandEnergy", "activity", "layer_energy", "random_energy"]

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
