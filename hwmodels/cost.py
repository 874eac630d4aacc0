"""Latency, energy and bytes of one layer on one accelerator.

latency = dispatch + fill + transforms + max(compute, vector, L1 streams, L2, DRAM), per kernel,
with the tile that makes it least. Transfers overlap compute (double buffering), so the busiest
resource sets the pace and is named as the bound; `stall` is what it adds to the compute time.
Smoothing and rotating X come before the first MAC and hide behind nothing. Of a kernel that several
layers share, each is charged an even part.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from hwmodels.branch import GemmKernel, split_into_kernels
from hwmodels.description import Accelerator
from hwmodels.errors import bar_text, html_card
from hwmodels.kernel_cycles import (
    BusyCycles,
    busy_cycles,
    kernel_energy,
    transform_cycles,
)
from hwmodels.systolic import systolic_busy_cycles
from hwmodels.traffic import (
    DramTraffic,
    Floats,
    Tiles,
    dram_traffic,
    l1_fill_cycles,
    l2_read_bytes,
    legal_tiles,
    requested_tile,
)
from hwmodels.workload import GemmWorkload

__all__ = ["Cost", "KernelCost", "estimate_cost"]


# How a card shows each quantity: name, unit, units in one of the cost's.
_CARD_UNITS = {
    "latency_s": ("latency", "us", 1e6),
    "energy_j": ("energy", "uJ", 1e6),
    "dram_bytes": ("DRAM traffic", "KiB", 1 / 1024),
    "weight_bytes": ("stored weights", "KiB", 1 / 1024),
}


@dataclass(frozen=True, kw_only=True)
class KernelCost:
    """Cost of one dispatched kernel.

    `latency_parts_s` sum to `latency_s`; `busy_s` are the overlapping resources, of which the
    longest paces the kernel; `tile_mkn` is the fastest core tile.
    """

    role: str
    latency_s: float
    latency_parts_s: dict[str, float]
    busy_s: dict[str, float]
    bound: str
    energy_parts_j: dict[str, float]
    dram: DramTraffic
    tile_mkn: tuple[int, int, int]
    modes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
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
    kernels : tuple of KernelCost
        One entry per dispatch.
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
    kernels: tuple[KernelCost, ...]

    def _repr_html_(self) -> str:
        return _card(self)


def estimate_cost(
    work: GemmWorkload, hw: Accelerator, *, tile_mkn: tuple[int, int, int] | None = None
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

    Raises
    ------
    AcceleratorError
        If a precision has no mode wide enough, or no tile fits.
    """
    split = split_into_kernels(work, hw)
    kernels = [_kernel_cost(hw, kernel, tile_mkn) for kernel in split]
    latency = sum(kernel.latency_s for kernel in kernels)
    static_j = hw.energy.static_w * latency
    energy_parts = _sum_parts(kernel.energy_parts_j for kernel in kernels)
    energy_parts["static"] = static_j
    dram_parts = _sum_parts(_dram_parts(kernel) for kernel in kernels)
    weights = work.weight_bytes()
    working_set = work.peak_activation_bytes + sum(weights.values())
    peak_s, roofline_s = _roofline(split, hw)
    return Cost(
        latency_s=latency,
        cycles=latency * hw.units.clock_hz,
        energy_j=sum(energy_parts.values()),
        dram_bytes=sum(kernel.dram.total for kernel in kernels),
        weight_bytes=sum(weights.values()),
        utilization=peak_s / latency,
        bound=_overall_bound(kernels),
        roofline_latency_s=roofline_s,
        parts={
            "latency_s": _sum_parts(kernel.latency_parts_s for kernel in kernels),
            "energy_j": energy_parts,
            "dram_bytes": dram_parts,
            "weight_bytes": {**weights},
        },
        busy_s=_sum_parts(kernel.busy_s for kernel in kernels),
        modes={part: mode for kernel in kernels for part, mode in kernel.modes.items()},
        tile_mkn=kernels[0].tile_mkn,
        peak_activation_bytes=work.peak_activation_bytes,
        working_set_bytes=working_set,
        fits_in=_level_that_holds(hw, working_set),
        kernels=tuple(kernels),
    )


def _kernel_cost(
    hw: Accelerator, kernel: GemmKernel, tile_mkn: tuple[int, int, int] | None
) -> KernelCost:
    given = None if tile_mkn is None else requested_tile(hw, kernel, tile_mkn)
    tiles = legal_tiles(hw, kernel, given)
    clock = hw.units.clock_hz
    dataflow = hw.units.dataflow
    if dataflow is None:
        busy = busy_cycles(hw, kernel, tiles)
    else:
        busy = systolic_busy_cycles(hw, kernel, tiles, dataflow)
    dram, moved = dram_traffic(hw, kernel, tiles, use_panels=tile_mkn is None)
    pipeline_s = busy.pipeline / clock
    limits = {
        "compute": pipeline_s,
        "vector": busy.conversion / clock,
        "l1": l1_fill_cycles(hw, kernel, tiles) / clock,
        "l2": l2_read_bytes(hw, kernel, tiles) / hw.memories.l2.bandwidth_bytes_per_cycle / clock,
        "dram": moved / hw.memories.dram.sustained_bytes_per_s,
    }
    side_unit = None if kernel.branch is None else kernel.branch.side_unit
    if kernel.branch is not None and side_unit is not None:
        macs = kernel.down_share * kernel.m * kernel.branch.down_rank * kernel.k
        limits["side"] = np.full_like(pipeline_s, macs / side_unit.macs_per_cycle / clock)
    pace = np.maximum.reduce(list(limits.values()))
    fill = _fill_s(hw, kernel, tiles)
    transforms = transform_cycles(hw, kernel)
    before_s = sum(transforms.values()) / clock
    launch_s = hw.dispatch.launch_s if kernel.is_dispatched else 0.0
    if not kernel.is_dispatched:
        # It goes on from what the kernel it is a part of has brought in.
        fill = np.zeros_like(fill)
    total = launch_s + fill + before_s + pace
    best = int(np.argmin(total))
    busy_s = {name: float(value[best]) for name, value in limits.items()}
    parts = _latency_parts(busy, best, clock)
    parts["stall"] = float(pace[best] - pipeline_s[best])
    parts["fill"] = float(fill[best])
    parts["dispatch"] = launch_s
    parts |= {name: cycles / clock for name, cycles in transforms.items()}
    slowest = max(busy_s, key=busy_s.__getitem__)
    if slowest == "compute" and _scaling_leads(busy, best):
        slowest = "vector"
    if before_s > float(pace[best]):
        slowest = "vector"
    longest = max(before_s, float(pace[best]))
    share = kernel.share
    return KernelCost(
        role=kernel.role,
        latency_s=float(total[best]) * share,
        latency_parts_s=_scaled(parts, share),
        busy_s=_scaled(busy_s, share),
        bound="dispatch" if launch_s > longest else slowest,
        energy_parts_j=_scaled(kernel_energy(hw, kernel, tiles, dram), share),
        dram=dram if share == 1 else dram.shared(kernel.work.shared_by),
        tile_mkn=tiles.at(best),
        modes=_mode_names(kernel),
    )


def _scaled(parts: dict[str, float], share: float) -> dict[str, float]:
    return {name: value * share for name, value in parts.items()}


def _fill_s(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Seconds before the first MAC: DRAM latency, then the first slices into one unit's L1.

    The closed form of a systolic array has its own fill.
    """
    if hw.units.organization == "systolic":
        return np.full_like(tiles.m, hw.memories.dram.latency_s)
    l1 = hw.memories.l1
    a_bits = tiles.m * kernel.a_line_bits(tiles.k)
    w_bits = tiles.n * kernel.w_line_bits(tiles.k)
    first = np.maximum(a_bits, w_bits) if l1.fill_channels == "separate" else a_bits + w_bits
    return hw.memories.dram.latency_s + first / 8 / l1.fill_bytes_per_cycle / hw.units.clock_hz


def _latency_parts(busy: BusyCycles, best: int, clock_hz: float) -> dict[str, float]:
    """Seconds of each phase's MACs, the group scaling they do not hide, and the tile overheads."""
    parts = {name: float(phase.mac[best]) for name, phase in busy.phases.items()}
    parts["combine"] = sum(float((p.together - p.mac)[best]) for p in busy.phases.values())
    parts["tile"] = float(busy.tile[best])
    return {name: cycles / clock_hz for name, cycles in parts.items()}


def _scaling_leads(busy: BusyCycles, best: int) -> bool:
    """Whether scaling group sums takes longer than the MACs."""
    combine = sum(float(phase.combine[best]) for phase in busy.phases.values())
    return combine > sum(float(phase.mac[best]) for phase in busy.phases.values())


def _mode_names(kernel: GemmKernel) -> dict[str, str]:
    names: dict[str, str] = {kernel.role: kernel.choice.mode.name}
    if kernel.branch is not None:
        if kernel.branch.forms_p:
            names["branch_down"] = kernel.branch.down.mode.name
        names["branch_up"] = kernel.branch.up.mode.name
    return names


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


def _roofline(kernels: list[GemmKernel], hw: Accelerator) -> tuple[float, float]:
    """Seconds of the useful MACs at peak, and the roofline of any way to run the layer."""
    peak_cycles = math.fsum(kernel.peak_cycles for kernel in kernels)
    peak_s = peak_cycles / (hw.units.count * hw.units.clock_hz)
    # V is stored once, whichever of its two products reads it.
    weights = [kernel for kernel in kernels if kernel.role != "feedback_back"]
    stored = sum(kernel.share * kernel.w_bytes + kernel.factor_bytes for kernel in weights)
    stored += kernels[0].smooth_bytes
    compulsory = kernels[0].first_x_bytes + stored + kernels[0].out_bytes
    return peak_s, max(peak_s, compulsory / hw.memories.dram.sustained_bytes_per_s)


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
