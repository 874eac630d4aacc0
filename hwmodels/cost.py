"""Latency, energy and bytes of one layer on one accelerator.

latency = dispatch + fill + transforms + max(compute, vector, L1 streams, L2, DRAM), per kernel,
with the tile that makes it least. Transfers overlap compute (double buffering), so the busiest
resource sets the pace and is named as the bound; `stall` is what it adds to the compute time.
Smoothing and rotating X come before the first MAC and hide behind nothing. Of a kernel that several
layers share, each is charged an even part.

Every kernel runs in a family of the machine's file, whose fitted values hold for its time
(`hwmodels.families`, `hwmodels.kernel_cost`).

**The array of a mode.** What a machine says of its data path, or a case in its place, is one column
of multiply-accumulate units. `array_of` prices it from synthesis in the widths of the mode that the
main branch runs in, as many of them as the machine has: arrays that differ in nothing but their
accumulators are compared at equal throughput. `machine_with_array` is the machine whose integer
modes take the energy of such an array: what the file says, and the difference that synthesis finds
between the two arrays (`hwmodels.synthesis.moved_energy`). `hwmodels.overrides` moves energies by
the same rule where the data path of a machine is changed, so that an array costs the same whoever
brings it. A clock that deeper logic would slow down is not looked at.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hwmodels.branch import GemmKernel
from hwmodels.description import Accelerator, Mode
from hwmodels.errors import bar_text, html_card
from hwmodels.families import Confidence, family_named, weakest
from hwmodels.kernel_cost import KernelCost, LaunchState, Run, WeightState, padding_of
from hwmodels.modes import check_transforms, mode_of
from hwmodels.synthesis import (
    SynthesizedArray,
    load_node,
    moved_energy,
    node_names,
    synthesized_array,
)
from hwmodels.workload import GemmWorkload

__all__ = [
    *("ArrayCost", "Cost", "KernelCost", "array_of", "chip_area", "estimate_cost"),
    "machine_with_array",
]


# How a card shows each quantity: name, unit, units in one of the cost's.
_CARD_UNITS = {
    "latency_s": ("latency", "us", 1e6),
    "energy_j": ("energy", "uJ", 1e6),
    "dram_bytes": ("DRAM traffic", "KiB", 1 / 1024),
    "weight_bytes": ("stored weights", "KiB", 1 / 1024),
}

_MOST_PARTS = 5


@dataclass(frozen=True, kw_only=True, repr=False)
class Cost:
    """What one layer call costs on one accelerator.

    Attributes
    ----------
    latency_s, cycles : float
        Wall time of one call, and the same in clock cycles.
    energy_j : float
        Energy of MACs, vector work, memories and idle power; see the file's energy block.
    dram_bytes, weight_bytes : int
        Bytes moved, in the loop order and tile that move least (the fastest tile may move more,
        which its latency counts); bytes stored for main weight and factors.
    utilization : float
        Time the useful MACs need at the peak of their modes, over latency_s.
    bound : str
        What sets the pace: compute, vector, l1, l2, dram or dispatch.
    roofline_latency_s : float
        The larger of MACs at peak rate and compulsory bytes at DRAM bandwidth.
    parts : dict of dict
        Named parts of latency_s, energy_j, dram_bytes and weight_bytes; each sums to its total.
    busy_s : dict
        Seconds each overlapping resource is busy.
    modes : dict
        MAC mode name of main, branch_down and branch_up.
    tile_mkn : (m, k, n)
        Core tile of the main kernel.
    peak_activation_bytes, working_set_bytes : int
        X, P and y at once (`GemmWorkload.peak_activation_bytes`); these and the stored weights.
    fits_in : str
        Where the working set fits as a whole: l1 (of all units together), l2 or dram.
    kernel : str
        Kernel family of the main kernel; ``generic`` where the file lists none that serves.
    confidence : str
        ``measured``, ``extrapolated`` or ``assumed``, of the least sure kernel.
    latency_low_s, latency_high_s : float
        The latency less and plus the error to expect: the worst of the family's rows inside their
        range, twice that (0.3 at least) outside, 0.5 without rows.
    mean_error, worst_error : float or None
        Of the rows of the main kernel's family; None without rows.
    units_share : float
        The largest part of the units that one of the kernels fills.
    kernels : tuple of KernelCost
        One entry per dispatch.
    padding : str
        Which rows in DRAM are padded to whole words of DMA, where the file says what words are. The
        bytes of the padding are not counted.
    """

    latency_s: float
    cycles: float
    energy_j: float
    dram_bytes: int
    weight_bytes: int
    utilization: float
    bound: str
    roofline_latency_s: float
    parts: dict[str, dict[str, float]]
    busy_s: dict[str, float]
    modes: dict[str, str]
    tile_mkn: tuple[int, int, int]
    peak_activation_bytes: int
    working_set_bytes: int
    fits_in: str
    kernel: str
    confidence: Confidence
    latency_low_s: float
    latency_high_s: float
    mean_error: float | None
    worst_error: float | None
    units_share: float
    kernels: tuple[KernelCost, ...]
    padding: str

    def __repr__(self) -> str:
        parts = sorted(self.parts["latency_s"].items(), key=lambda part: -part[1])
        shares = ", ".join(
            f"{name} {seconds / self.latency_s:.0%}" for name, seconds in parts[:_MOST_PARTS]
        )
        return (
            f"Cost(latency_s={self.latency_s:.4g}, energy_j={self.energy_j:.4g}, "
            f"dram_bytes={self.dram_bytes}, weight_bytes={self.weight_bytes}, "
            f"utilization={self.utilization:.3f}, bound={self.bound!r})\n"
            f"latency: {shares}\n{self.confidence}: kernel {self.kernel}, from "
            f"{self.latency_low_s:.4g} to {self.latency_high_s:.4g} s"
        )

    def _repr_html_(self) -> str:
        return _card(self)


def estimate_cost(
    work: GemmWorkload,
    hw: Accelerator,
    *,
    tile_mkn: tuple[int, int, int] | None = None,
    kernel: str | None = None,
    weights: WeightState = "cold",
    launch: LaunchState = "stream",
) -> Cost:
    """Cost of one call of `work` on `hw`.

    Parameters
    ----------
    work : GemmWorkload
        Sizes, precisions and branch of the layer.
    hw : Accelerator
        From `load_accelerator`.
    tile_mkn : (m, k, n), optional
        Core tile to use instead of the search, with outputs stationary in DRAM blocking: whole
        numbers, each a multiple of the instruction's.
    kernel : str, optional
        Kernel family of the machine's file for every kernel, in place of the one it would run in.
    weights : str
        ``cold``, ``warm``, ``flushed`` or ``resident``: what L2 holds when the call starts.
    launch : str
        ``stream``, or ``graph`` for a call inside a recorded graph or chain of layers.

    Raises
    ------
    AcceleratorError
        If a precision has no mode wide enough, no tile fits, or the machine has no such family or
        transform.
    """
    check_transforms(hw, work.transforms, feedback_rank=work.feedback_rank)
    run = Run(hw=hw, work=work, tile_mkn=tile_mkn, weights=weights, launch=launch)
    named = None if kernel is None else family_named(hw, kernel)
    kernels = [run.best_cost(index, named) for index in range(len(run.split(None)))]
    split = run.split(None)
    latency = sum(kernel.latency_s for kernel in kernels)
    static_j = hw.energy.static_w * latency
    energy_parts = _sum_parts(kernel.energy_parts_j for kernel in kernels)
    energy_parts["static"] = static_j
    dram_parts = _sum_parts(_dram_parts(kernel) for kernel in kernels)
    stored = work.weight_bytes()
    working_set = work.peak_activation_bytes + sum(stored.values())
    peak_s, roofline_s = _roofline(split, hw, run)
    spread_s = math.fsum(item.trust.spread * item.latency_s for item in kernels)
    return Cost(
        latency_s=latency,
        cycles=latency * hw.units.clock_hz,
        energy_j=sum(energy_parts.values()),
        dram_bytes=sum(kernel.dram.total for kernel in kernels),
        weight_bytes=sum(stored.values()),
        utilization=peak_s / latency,
        bound=_overall_bound(kernels),
        roofline_latency_s=roofline_s,
        parts={
            "latency_s": _sum_parts(kernel.latency_parts_s for kernel in kernels),
            "energy_j": energy_parts,
            "dram_bytes": dram_parts,
            "weight_bytes": {**stored},
        },
        busy_s=_sum_parts(kernel.busy_s for kernel in kernels),
        modes={part: mode for kernel in kernels for part, mode in kernel.modes.items()},
        tile_mkn=kernels[0].tile_mkn,
        peak_activation_bytes=work.peak_activation_bytes,
        working_set_bytes=working_set,
        fits_in=_level_that_holds(hw, working_set),
        kernel=kernels[0].family,
        confidence=weakest([item.trust.confidence for item in kernels]),
        latency_low_s=max(roofline_s, latency - spread_s),
        latency_high_s=latency + spread_s,
        mean_error=kernels[0].trust.mean_error,
        worst_error=kernels[0].trust.worst_error,
        units_share=max(item.units_share for item in kernels),
        kernels=tuple(kernels),
        padding=padding_of(hw, split[0]),
    )


def _dram_parts(kernel: KernelCost) -> dict[str, int]:
    dram = kernel.dram
    if kernel.role == "main":
        parts = {"activations": dram.activations, "weights": dram.weights, "smooth": dram.smooth}
        return parts | {"factors": dram.factors, "output": dram.output, "p": dram.p}
    if kernel.role == "feedback_back":
        moved = dram.output + dram.partial_input
        return {"p": dram.activations, "factors": dram.weights, "activations": moved}
    if kernel.role in ("branch_down", "feedback_down"):
        parts = {"activations": dram.activations, "smooth": dram.smooth}
        return parts | {"factors": dram.weights, "p": dram.output}
    moved = dram.output + dram.partial_input
    return {"p": dram.activations, "factors": dram.weights, "output": moved}


def _roofline(kernels: list[GemmKernel], hw: Accelerator, run: Run) -> tuple[float, float]:
    """Seconds of the useful MACs at peak, and the roofline of any way to run the layer."""
    peak_cycles = math.fsum(kernel.peak_cycles for kernel in kernels)
    peak_s = peak_cycles / (hw.units.count * hw.units.clock_hz)
    # V is stored once, whichever of its two products reads it.
    weights = [kernel for kernel in kernels if kernel.role != "feedback_back"]
    stored = sum(kernel.share * kernel.w_bytes + kernel.factor_bytes for kernel in weights)
    stored += kernels[0].smooth_bytes
    if run.weights == "resident":
        stored = 0.0
    compulsory = (kernels[0].first_x_bytes + stored) * run.cold_share(kernels[0])
    compulsory += kernels[0].out_bytes
    return peak_s, max(peak_s, compulsory / run.fastest_bytes_per_s)


def _level_that_holds(hw: Accelerator, nbytes: int) -> str:
    """The innermost memory in which all of `nbytes` fit; the L1s of all units count together."""
    l1 = hw.memories.l1
    if nbytes <= (l1.capacity_bytes - l1.reserved_bytes) * hw.units.vector_units:
        return "l1"
    return "l2" if nbytes <= hw.memories.l2.capacity_bytes else "dram"


def _overall_bound(kernels: list[KernelCost]) -> str:
    paced_s = _sum_parts({kernel.bound: kernel.latency_s} for kernel in kernels)
    return max(paced_s, key=paced_s.__getitem__)


def _sum_parts(groups: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for group in groups:
        for name, value in group.items():
            total[name] = total.get(name, 0) + value
    return total


def _card(cost: Cost) -> str:
    """Totals of a cost, then every part of each with its share."""
    facts = {
        "latency": f"{cost.latency_s * 1e6:,.5g} us ({cost.cycles:,.0f} cycles)",
        "bound by": cost.bound,
        "utilization": f"{cost.utilization:.1%} of peak MACs",
        "energy": f"{cost.energy_j * 1e6:,.4g} uJ",
        "DRAM traffic": f"{cost.dram_bytes / 1024:,.1f} KiB",
        "stored weights": f"{cost.weight_bytes / 1024:,.1f} KiB",
        "MAC modes": ", ".join(f"{part} in {mode}" for part, mode in cost.modes.items()),
    }
    rows = [
        _part_row(quantity, part, value, sum(cost.parts[quantity].values()))
        for quantity in _CARD_UNITS
        for part, value in cost.parts[quantity].items()
        if value
    ]
    return html_card("Cost of one call", facts, rows)


def _part_row(quantity: str, part: str, value: float, total: float) -> dict[str, str]:
    name, unit, scale = _CARD_UNITS[quantity]
    share = value / total
    return {
        "quantity": name,
        "part": part,
        "value": f"{value * scale:,.4g} {unit}",
        "share": f"{share:.1%}",
        "": bar_text(share),
    }


@dataclass(frozen=True, kw_only=True)
class ArrayCost:
    """What the array costs that the main branch of a layer runs in.

    Attributes
    ----------
    area_ge : float
        Gate equivalents per multiply-accumulate unit (MAC).
    area_mm2 : float or None
        Placed area of all MACs of the machine; None where its node has no figures.
    energy_pj_per_mac : float or None
        Of random operands, without glitches.
    depth : int
        Gates in a row between two registers.
    macs : int
        MACs of the machine in this mode.
    mode : str
    gates : SynthesizedArray
    """

    area_ge: float
    area_mm2: float | None
    energy_pj_per_mac: float | None
    depth: int
    macs: int
    mode: str
    gates: SynthesizedArray


def array_of(
    work: GemmWorkload, hw: Accelerator, *, mac: Any = None, zero_point: str = "initial"
) -> ArrayCost | None:
    """Cost of an array for the main branch of `work`, from synthesis; None in a float mode.

    Parameters
    ----------
    work : GemmWorkload
    hw : Accelerator
        Its mode says the widths of operands and how many MACs there are, its node the process.
    mac : object, optional
        Anything with the fields of a MAC array, hashable; by default the machine's data path.
    zero_point : {"initial", "after"}
        Whether zero points start the accumulators, which takes gates.

    Raises
    ------
    AcceleratorError
        If no mode is wide enough, or a field of the array is out of range.
    """
    mode = mode_of(hw, work, "main").mode
    if mode.kind != "int":
        return None
    w, a = work.main_operands
    signs = {
        "a_signed": not a.is_unsigned or a.bits < mode.activation_bits,
        "w_signed": not w.is_unsigned or w.bits < mode.weight_bits,
    }
    starts = zero_point == "initial" and (w.needs_correction or a.needs_correction)
    return _array_cost(hw, mode, mac, zero_point=starts, **signs)


def _array_cost(
    hw: Accelerator, mode: Mode, mac: Any, *, a_signed: bool, w_signed: bool, zero_point: bool
) -> ArrayCost:
    key = ("array", mode.name, mac, a_signed, w_signed, zero_point)
    mac = hw.datapath if mac is None else mac
    if key not in hw._cache:
        gates = synthesized_array(
            mac,
            a_bits=mode.activation_bits,
            w_bits=mode.weight_bits,
            a_signed=a_signed,
            w_signed=w_signed,
            zero_point=zero_point,
            node_nm=_known_node(hw),
        )
        area_ge = gates.area_ge
        if hasattr(mac, "column"):
            # One wide accumulator takes the sums of a column of so many products.
            shared = gates.column.products_per_add / mac.column_k
            area_ge += gates.parts["group_sum"] * min(shared, 1.0)
        macs = round(mode.macs_per_cycle * hw.units.count)
        placed = None if gates.node is None else gates.node.logic_mm2(area_ge) * macs
        hw._cache[key] = ArrayCost(
            area_ge=area_ge,
            area_mm2=placed,
            energy_pj_per_mac=gates.energy_pj_per_mac,
            depth=gates.depth,
            macs=macs,
            mode=mode.name,
            gates=gates,
        )
    cost: ArrayCost = hw._cache[key]
    return cost


def _known_node(hw: Accelerator) -> int | None:
    if "node" not in hw._cache:
        node = hw.energy.node_nm if hw.array is None else hw.array.node_nm
        hw._cache["node"] = int(node) if node in node_names() else None
    known: int | None = hw._cache["node"]
    return known


def chip_area(hw: Accelerator) -> dict[str, float]:
    """Placed area in mm2 of what a machine computes with and keeps on chip, by part.

    ``array``: MACs of every integer mode, each mode with multipliers of its own; ``columns``: a
    shift-round-saturate and a group sum for every column; ``vector``: fp32 lanes that scale and add
    group sums; ``sram``: L1 of all units and L2. Control, registers of operands, float modes,
    wires between units, clock and pads are not in it.

    Raises
    ------
    AcceleratorError
        If the machine's node has no figures.
    """
    node_nm = hw.energy.node_nm if hw.array is None else hw.array.node_nm
    node = load_node(int(node_nm) if node_nm == int(node_nm) else 0)
    parts = dict.fromkeys(("array", "columns"), 0.0)
    for mode in hw.modes:
        if mode.kind != "int":
            continue
        cost = _array_cost(hw, mode, None, a_signed=True, w_signed=True, zero_point=False)
        parts["array"] += node.logic_mm2(cost.area_ge) * cost.macs
        behind = cost.gates.parts["srs"] + cost.gates.parts["group_sum"]
        if hw.units.organization == "systolic":
            # One below each column, where the sums of its rows arrive.
            behind /= hw.units.rows * mode.macs_per_cycle / cost.gates.column.products_per_add
        parts["columns"] += node.logic_mm2(behind) * cost.macs
    lanes = hw.vector_rate("combine") * hw.units.vector_units
    stored = hw.memories.l1.capacity_bytes * hw.units.vector_units + hw.memories.l2.capacity_bytes
    parts["vector"] = node.logic_mm2(lanes * node.fp32_lane_ge)
    parts["sram"] = node.sram_mm2(stored)
    return parts


def machine_with_array(hw: Accelerator, mac: Any) -> Accelerator:
    """`hw` with the energy per MAC that its integer modes take with the array `mac`.

    It is `hw` itself where the array is the file's own, or no figures are known for its node.

    Raises
    ------
    AcceleratorError
        If a field of the array is out of range.
    """
    if _known_node(hw) is None:
        return hw
    key = ("with array", mac)
    if key not in hw._cache:
        modes = tuple(_with_array(hw, mode, mac) for mode in hw.modes)
        changed = hw if modes == hw.modes else hw.model_copy(update={"modes": modes})
        hw._cache[key] = changed
    machine: Accelerator = hw._cache[key]
    return machine


def _with_array(hw: Accelerator, mode: Mode, mac: Any) -> Mode:
    if mode.kind != "int":
        return mode
    own, other = (
        _array_cost(hw, mode, array, zero_point=False, a_signed=True, w_signed=True)
        for array in (None, mac)
    )
    said = mode.energy_pj_per_mac
    energy = moved_energy(said, own.energy_pj_per_mac, other.energy_pj_per_mac)
    return mode if energy == said else mode.model_copy(update={"energy_pj_per_mac": energy})
