"""Time, bytes and energy of one dispatched kernel, in the family that runs it and in its state.

The values a family fits hold for its time. Bytes and energy are those of the chip: what has to
move, and what each byte takes.
A family with `overlap_fraction` f below 1 has

    f * max(compute, memory) + (1 - f) * (compute + memory)

in place of the larger. Weights and activations are read from DRAM (`weights="cold"`); ``warm`` is
the state of a loop over one call: what fits in the resident part of L2 is found there, and beyond
1.5 times it nothing is; ``flushed`` that of a benchmark which overwrites L2 before each call: as
many dirty lines are written back as the call reads, up to the size of L2; ``resident`` that of a
layer whose weights have stayed in L2 since the step before.
"""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hwmodels.branch import GemmKernel, split_into_kernels
from hwmodels.description import Accelerator, KernelFamily
from hwmodels.errors import AcceleratorError
from hwmodels.families import GENERIC, Trust, machine_under, serving_families, trust_in
from hwmodels.kernel_cycles import (
    BusyCycles,
    busy_cycles,
    kernel_energy,
    systolic_busy_cycles,
    transform_cycles,
)
from hwmodels.traffic import (
    DramTraffic,
    Floats,
    Tiles,
    dram_traffic,
    l1_fill_cycles,
    l2_read_bytes,
    legal_tiles,
    single_tile,
)
from hwmodels.workload import GemmWorkload

__all__ = ["KernelCost", "LaunchState", "Run", "WeightState", "padding_of"]

WeightState = Literal["cold", "warm", "flushed", "resident"]
LaunchState = Literal["stream", "graph"]
_STATES = {"weights": ("cold", "warm", "flushed", "resident"), "launch": ("stream", "graph")}
_THRASHED = 1.5  # Times the resident part of L2: a loop over more finds nothing of it again.


@dataclass(frozen=True, kw_only=True, repr=False)
class KernelCost:
    """Cost of one dispatched kernel.

    `latency_parts_s` sum to `latency_s`; `busy_s` are the overlapping resources, of which the
    longest paces the kernel; `tile_mkn` is the fastest core tile; `family` is the kernel family and
    `trust` how far its rows carry the latency; `units_share` is the part of the units it fills at
    most.
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
    family: str
    trust: Trust
    units_share: float

    def __repr__(self) -> str:
        return f"KernelCost(role={self.role!r}, latency_s={self.latency_s:.4g})"


class Run:
    """One call: its machine, its state, and its kernels under each family, made once."""

    def __init__(
        self,
        *,
        hw: Accelerator,
        work: GemmWorkload,
        tile_mkn: tuple[int, int, int] | None,
        weights: WeightState,
        launch: LaunchState,
    ) -> None:
        for name, value in (("weights", weights), ("launch", launch)):
            if value not in _STATES[name]:
                raise AcceleratorError(
                    f"{name}={value!r:.40} must be one of {', '.join(_STATES[name])}"
                )
        self.hw, self.work, self.tile_mkn = hw, work, tile_mkn
        self.weights, self.launch = weights, launch
        self._splits: dict[str, list[GemmKernel]] = {}

    def split(self, family: KernelFamily | None) -> list[GemmKernel]:
        """The kernels of the call as `family` runs them."""
        name = "" if family is None else family.name
        if name not in self._splits:
            self._splits[name] = split_into_kernels(self.work, machine_under(self.hw, family))
        return self._splits[name]

    def best_cost(self, index: int, named: KernelFamily | None) -> KernelCost:
        """Cost of one kernel in the family that runs it, the fastest where there are several."""
        kernel = self.split(None)[index]
        serves = "plain" if kernel.branch is None else "branch"
        families: list[KernelFamily] | list[None] = [None]
        if named is not None:
            families = [named]
        else:
            families = serving_families(self.hw, serves, kernel.choice.mode.name, kernel.m) or [
                None
            ]
        costs = [_cost(self, self.split(family)[index], family) for family in families]
        return min(costs, key=lambda cost: cost.latency_s)

    @property
    def fastest_bytes_per_s(self) -> float:
        """The most any family of the machine gets from DRAM."""
        key = "fastest_bytes_per_s"
        if key not in self.hw._cache:
            under = [self.hw, *(machine_under(self.hw, family) for family in self.hw.kernels)]
            self.hw._cache[key] = max(hw.memories.dram.sustained_bytes_per_s for hw in under)
        fastest: float = self.hw._cache[key]
        return fastest

    def launch_s(self, under: Accelerator) -> float:
        """Seconds to start one kernel."""
        in_graph = under.dispatch.graph_launch_s
        if self.launch == "graph" and in_graph is not None:
            return min(in_graph, under.dispatch.launch_s)
        return under.dispatch.launch_s

    def cold_share(self, kernel: GemmKernel) -> float:
        """Share of what the kernel reads that comes from DRAM."""
        if self.weights != "warm":
            return 1.0
        l2 = self.hw.memories.l2
        room = l2.capacity_bytes * l2.panel_fraction
        if not room:
            return 1.0
        resident = (kernel.first_x_bytes + kernel.w_bytes + kernel.factor_bytes) / room
        return min(1.0, max(0.0, (resident - 1) / (_THRASHED - 1)))

    def evicted_bytes(self, moved: Floats) -> Floats | float:
        """Bytes of dirty lines that what the kernel reads pushes out of L2."""
        if self.weights != "flushed" or not self.hw.memories.l2.panel_fraction:
            return 0.0
        return np.minimum(moved, self.hw.memories.l2.capacity_bytes)


def _cost(run: Run, kernel: GemmKernel, family: KernelFamily | None) -> KernelCost:
    chip, hw = run.hw, machine_under(run.hw, family)
    tile_mkn = run.tile_mkn
    _check_rows(hw, kernel)
    given = None if tile_mkn is None else _requested_tile(hw, kernel, tile_mkn)
    tiles = legal_tiles(hw, kernel, given)
    clock = hw.units.clock_hz
    dataflow = hw.units.dataflow
    if dataflow is None:
        busy = busy_cycles(hw, kernel, tiles)
    else:
        busy = systolic_busy_cycles(hw, kernel, tiles, dataflow)
    dram, moved = dram_traffic(hw, kernel, tiles, use_panels=tile_mkn is None)
    chip_tiles = tiles
    if tile_mkn is None and _changes_tiles(family):
        # What has to move and what it takes do not hang on whose kernels run.
        chip_tiles = legal_tiles(chip, kernel)
        dram, _ = dram_traffic(chip, kernel, chip_tiles)
    written = kernel.out_bytes
    cold = run.cold_share(kernel)
    moved = (moved - written) * cold + written + run.evicted_bytes(moved)
    if run.weights == "resident":
        moved = np.maximum(written, moved - kernel.w_bytes - kernel.factor_bytes)
    launch_s = run.launch_s(hw) if kernel.is_dispatched else 0.0
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
    hidden = hw.kernel.overlap_fraction
    if hidden < 1:
        memory = np.maximum.reduce([limits["l1"], limits["l2"], limits["dram"]])
        exposed = np.minimum(memory, pipeline_s) * (1 - hidden)
        pace = np.maximum(pace, np.maximum(memory, pipeline_s) + exposed)
    fill = _fill_s(hw, kernel, tiles) + hw.kernel.start_s
    transforms = transform_cycles(hw, kernel)
    before_s = sum(transforms.values()) / clock
    if not kernel.is_dispatched:
        # It goes on from what the kernel it is a part of has brought in.
        fill = np.zeros_like(fill)
    cast_s = _cast_s(hw, kernel, launch_s)
    total = launch_s + fill + before_s + pace + cast_s
    best = int(np.argmin(total))
    busy_s = {name: float(value[best]) for name, value in limits.items()}
    parts = _latency_parts(busy, best, clock)
    parts["stall"] = float(pace[best] - pipeline_s[best])
    parts["fill"] = float(fill[best])
    parts["dispatch"] = launch_s
    parts |= {name: cycles / clock for name, cycles in transforms.items()}
    parts |= {"cast": cast_s} if cast_s else {}
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
        energy_parts_j=_scaled(kernel_energy(chip, kernel, chip_tiles, dram), share),
        dram=dram if share == 1 else dram.shared(round(1 / share)),
        tile_mkn=tiles.at(best),
        modes=_mode_names(kernel),
        family=GENERIC if family is None else family.name,
        trust=trust_in(family, kernel),
        units_share=_units_share(hw, kernel, tiles, best),
    )


def _requested_tile(hw: Accelerator, kernel: GemmKernel, tile_mkn: Sequence[int]) -> Tiles:
    """The tile a user asked for in place of the search.

    Raises
    ------
    AcceleratorError
        If `tile_mkn` is not three positive whole numbers, each a multiple of what the instructions
        of the kernel's modes take; its lines are not whole words of DMA, or more than a descriptor
        moves; or the machine has no tiles.
    """
    shown = f"tile_mkn={tile_mkn!r:.80}"
    if hw.units.organization == "systolic":
        raise AcceleratorError(
            f"{shown}: {hw.name} is a systolic array, whose tile is the array; leave tile_mkn out"
        )
    try:
        sizes = [0 if isinstance(s, bool) else operator.index(s) for s in tile_mkn]
    except TypeError:
        sizes = []
    if len(sizes) != 3 or not all(1 <= size < 2**31 for size in sizes):
        raise AcceleratorError(
            f"{shown} must be three whole numbers (m, k, n) of at least 1, such as "
            f"({hw.kernel.register_block_m}, {hw.kernel.tile_k_step}, {hw.kernel.register_block_n})"
        )
    for axis, size in zip("mkn", sizes, strict=True):
        for mode in kernel.modes:
            step = getattr(mode, f"instruction_{axis}")
            if size % step:
                below, above = size // step * step, (size // step + 1) * step
                raise AcceleratorError(
                    f"{shown}: {axis}={size} is no multiple of {step}, instruction_{axis} of mode "
                    f"{mode.name} of {hw.name}; use {f'{below} or ' if below else ''}{above}"
                )
    m, k, n = sizes
    for what, lines, axis, bits in (
        ("activations", m, "m", kernel.a.bits),
        ("weights", n, "n", kernel.w.bits),
    ):
        _check_descriptor(hw, f"{shown}: {k} {what} of {bits} bits", (lines, axis), k, bits)
    return single_tile(m, k, n, hw)


def _rows_in_dram(kernel: GemmKernel) -> tuple[tuple[str, int, int], ...]:
    """(name, elements, bits) of the rows that DMA steps over: weights are laid out beforehand."""
    return ("X", kernel.k, kernel.a.bits), ("y", kernel.n, kernel.out_bits)


def _check_rows(hw: Accelerator, kernel: GemmKernel) -> None:
    """Refuse matrices whose rows lie further apart than a descriptor of the machine steps."""
    dma = hw.memories.dma
    if dma is None:
        return
    for name, elements, bits in _rows_in_dram(kernel):
        words, most = dma.words(elements, bits), dma.step_max_words
        if words > most:
            raise AcceleratorError(
                f"rows of {name}, {elements} elements of {bits} bits, are {words} words, more than "
                f"memories.dma.step_max_words={most} of {hw.name}; cut the layer"
            )


def padding_of(hw: Accelerator, kernel: GemmKernel) -> str:
    """What is padded in DRAM so that every row starts at a word of DMA; empty where nothing is."""
    dma = hw.memories.dma
    if dma is None:
        return ""
    padded = [
        f"{name} ({elements} x {bits} bit)"
        for name, elements, bits in _rows_in_dram(kernel)
        if dma.pads(elements, bits)
    ]
    rows = " and ".join(padded)
    return f"rows of {rows} are padded to words of {dma.word_bytes} bytes" if padded else ""


def _check_descriptor(
    hw: Accelerator, shown: str, lines: tuple[int, str], k: int, bits: int
) -> None:
    """Refuse lines of a tile that no single descriptor of the machine's DMA engines moves."""
    dma = hw.memories.dma
    if dma is None:
        return
    count, axis = lines
    words, most, room = dma.words(k, bits), dma.wrap_max_words, dma.length_max_words
    if dma.pads(k, bits):
        step = dma.line_step(bits)
        below, above = k // step * step, (k // step + 1) * step
        raise AcceleratorError(
            f"{shown} are no whole words of memories.dma.word_bytes={dma.word_bytes} of {hw.name}; "
            f"use k={f'{below} or ' if below else ''}{above}"
        )
    if words > most:
        raise AcceleratorError(
            f"{shown} are {words} words, more than memories.dma.wrap_max_words={most} of "
            f"{hw.name}; use k of at most {most * 8 * dma.word_bytes // bits}"
        )
    if count > most:
        raise AcceleratorError(
            f"{shown}: {axis}={count} lines are more than memories.dma.wrap_max_words={most} of "
            f"{hw.name}"
        )
    if count * words > room:
        raise AcceleratorError(
            f"{shown}: {axis}={count} lines are {count * words} words, more than one transfer, "
            f"memories.dma.length_max_words={room} of {hw.name}"
        )


_OF_TILES = ("units.", "kernel.tile", "kernel.m_axis", "kernel.split", "memories.l1", "memories.l2")


def _changes_tiles(family: KernelFamily | None) -> bool:
    """Whether the family's tiles, and what moves with them, are not those of the chip."""
    return family is not None and any(key.startswith(_OF_TILES) for key in family.set)


def _units_share(hw: Accelerator, kernel: GemmKernel, tiles: Tiles, best: int) -> float:
    """Part of the units that have work in the first pass of one tile."""
    if hw.units.organization == "systolic":
        return 1.0
    down = math.ceil(kernel.m / tiles.m[best])
    across = math.ceil(kernel.n / tiles.n[best])
    if hw.units.organization == "grid":
        return min(1.0, float(down * across * tiles.splits[best] / hw.units.count))
    along_m, along_n = down / tiles.units_m[best], across / tiles.units_n[best]
    return float(min(1.0, along_m) * min(1.0, along_n))


def _cast_s(hw: Accelerator, kernel: GemmKernel, launch_s: float) -> float:
    """Seconds of a second pass that reads the sums back and writes y narrower."""
    if hw.kernel.output_cast != "second_pass" or kernel.out_bits >= 32:
        return 0.0
    moved = kernel.m * kernel.n * 2 * 4  # Written and read once more, in fp32.
    return launch_s + moved / hw.memories.dram.bandwidth_bytes_per_s


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
