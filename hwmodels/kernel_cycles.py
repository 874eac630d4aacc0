"""What one kernel asks of a compute unit, for every candidate tile: busy cycles, and energy.

A tile of m x n outputs is made of register blocks. Per block, over the depth K in slices of tile_k:

    cycles = K' * max(block_m * block_n / rate, operand bytes / load width)
           + ceil(K / tile_k) * (a + b * block bytes of partial sums / 64)

with K' rounded up to the instruction's depth. The form and a, b: `kernel` block of the file. A
systolic array has a closed form in place of it, see `systolic_cycles`.

Energy is counted: MACs by mode, bytes by level, elementwise work. Movement between L2 and L1 is
charged for the legal tile that needs the least of it, which is not always the fastest tile; the two
differ by a few percent of the total. Charging the fastest tile instead would let energy fall when a
layer grows, whenever the search moves to another tile. Padding lanes multiply zeros and are not
charged.
"""

from dataclasses import dataclass

import numpy as np

from hwmodels.branch import FusedBranch, GemmKernel
from hwmodels.description import Accelerator, Dataflow, Mode
from hwmodels.modes import ModeChoice
from hwmodels.traffic import (
    DramTraffic,
    Floats,
    Tiles,
    blocks_of,
    ceil_div,
    depth_share,
    l1_fill_bytes,
    l2_read_bytes,
    passes,
    right_elements,
    single_tile,
)

__all__ = [
    "BusyCycles",
    "Phase",
    "busy_cycles",
    "conversion_cycles",
    "kernel_energy",
    "make_phase",
    "single_core_cycles",
    "systolic_busy_cycles",
    "systolic_cycles",
    "transform_cycles",
]


_PJ = 1e-12


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One loop nest of a kernel, as busy cycles per candidate tile."""

    mac: Floats
    combine: Floats
    together: Floats


@dataclass(frozen=True, kw_only=True)
class BusyCycles:
    """Busy cycles of a compute unit per candidate tile, over the whole kernel.

    phases : main loop and, with a fused branch, both projections, one after the other.
    tile : start and output drain of each tile. conversion : work beside the MACs.
    """

    phases: dict[str, Phase]
    tile: Floats
    conversion: Floats

    @property
    def pipeline(self) -> Floats:
        """Everything that happens in order on the unit."""
        total = self.tile
        for phase in self.phases.values():
            total = total + phase.together
        return total


def busy_cycles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> BusyCycles:
    """Busy cycles of `kernel` on one unit of `hw`, for every tile in `tiles`."""
    runs = passes(hw, kernel, tiles)
    share = depth_share(hw, kernel, tiles)
    blocks = blocks_of(hw, tiles)
    outputs = runs * tiles.m * tiles.n
    slowed = _power_slowdown(hw, kernel, tiles)

    def phase(mode: Mode, depth: int | Floats, n_blocks: Floats, combined: Floats) -> Phase:
        cycles = slowed * n_blocks * _block_cycles(hw, mode, depth, tiles.k, kernel)
        return make_phase(hw, cycles, combined)

    phases: dict[str, Phase] = {
        kernel.role: phase(
            kernel.choice.mode,
            kernel.k * share,
            runs * blocks,
            outputs * kernel.combines * share,
        )
    }
    branch = kernel.branch
    if branch is not None and branch.forms_p:
        p_share = _p_elements(hw, kernel, branch, tiles, runs)
        phases["branch_down"] = phase(
            branch.down.mode, kernel.k, p_share / _block_area(hw), p_share * branch.down_combines
        )
    if branch is not None:
        phases["branch_up"] = phase(
            branch.up.mode, branch.rank, runs * blocks, outputs * branch.up_combines
        )
    return BusyCycles(
        phases=phases,
        tile=runs * _tile_cycles(hw, kernel, tiles),
        conversion=conversion_cycles(hw, kernel, tiles, runs),
    )


def _power_slowdown(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats | float:
    """Factor on the MACs' time by which the power limit lowers the clock, for each tile."""
    if hw.units.power_fraction == 1 or hw.units.organization != "grid":
        return 1.0
    blocks = ceil_div(kernel.m, tiles.m) * ceil_div(kernel.n, tiles.n) * tiles.splits
    busy = np.minimum(1.0, blocks / hw.units.count)
    return np.maximum(1.0, busy / hw.units.power_fraction)


def make_phase(hw: Accelerator, mac: Floats, combined: Floats | float) -> Phase:
    """MAC cycles and the scaling of `combined` partial sums, overlapped if the file says so."""
    combine = np.zeros_like(mac) + combined / hw.vector_rate("combine")
    overlaps = hw.vector.combine_overlaps_mac
    together = np.maximum(mac, combine) if overlaps else mac + combine
    return Phase(mac=mac, combine=combine, together=together)


def single_core_cycles(
    hw: Accelerator, kernel: GemmKernel, tile_mkn: tuple[int, int, int]
) -> float:
    """Cycles of one unit for one tile whose operands are already in L1."""
    tile, block = single_tile(*tile_mkn), hw.kernel
    blocks = ceil_div(tile.m, block.register_block_m) * ceil_div(tile.n, block.register_block_n)
    cycles = blocks * _block_cycles(hw, kernel.choice.mode, tile_mkn[1], tile.k, kernel)
    return float(cycles[0])


def _block_area(hw: Accelerator) -> int:
    return hw.kernel.register_block_m * hw.kernel.register_block_n


def _p_elements(
    hw: Accelerator, kernel: GemmKernel, branch: FusedBranch, tiles: Tiles, runs: Floats
) -> Floats:
    """Elements of P one unit forms, padded to whole instructions: its share, or each tile's."""
    mode = branch.down.mode
    columns = ceil_div(branch.down_rank, mode.instruction_n) * mode.instruction_n
    if branch.down_place == "per_tile":
        return runs * tiles.m * columns
    rows = ceil_div(kernel.m, mode.instruction_m) * mode.instruction_m
    return np.full_like(runs, kernel.down_share * rows * columns / hw.units.count)


def _block_cycles(
    hw: Accelerator, mode: Mode, depth: int | Floats, tile_k: Floats, kernel: GemmKernel
) -> Floats:
    block = hw.kernel
    load = block.register_block_m * mode.activation_bits + block.register_block_n * mode.weight_bits
    rate = mode.sustained_macs_per_cycle
    if kernel.branch is not None:
        rate *= block.fused_rate_fraction
    per_k = max(_block_area(hw) / rate, load / 8 / block.load_bytes_per_cycle)
    padded = ceil_div(depth, mode.instruction_k) * mode.instruction_k
    partial = block.partial_cycles_per_64_bytes * _block_area(hw) * kernel.partial_bits / 8 / 64
    return padded * per_k + ceil_div(depth, tile_k) * (block.block_overhead_cycles + partial)


def _tile_cycles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    l1 = hw.memories.l1
    # A single output buffer cannot be refilled while it drains, and y is read back the same way.
    moved = tiles.m * tiles.n * kernel.out_bits / 8 * (2 if kernel.reread_bytes else 1)
    if hw.kernel.split_k_max > 1 and kernel.branch is None:
        # The sums of a cut tile are written and added up in fp32 or int32.
        cut = (tiles.splits > 1) | (hw.kernel.balance == "stream_k")
        moved = np.where(cut, tiles.m * tiles.n * 2 * 4, moved)
    is_exposed = l1.output_buffers == 1
    exposed = moved / l1.drain_bytes_per_cycle if is_exposed else np.zeros_like(moved)
    return hw.kernel.tile_overhead_cycles + exposed


def conversion_cycles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles, runs: Floats) -> Floats:
    """Unpacking of narrow operands per tile, and quantizing X and P."""
    unpacked = _unpacked_elements(hw, kernel, tiles, runs)
    rounded = _quantized_elements(kernel, tiles) / hw.units.vector_units
    return unpacked / hw.vector_rate("unpack") + rounded / hw.vector_rate("quantize")


def _quantized_elements(kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Elements all units round, for each tile: again in each column of tiles that forms its P."""
    times = np.ones_like(tiles.n)
    if kernel.branch is not None and kernel.branch.down_place == "per_tile":
        times = ceil_div(kernel.n, tiles.n)
    return kernel.quantized * times + kernel.rounded_x


def transform_cycles(hw: Accelerator, kernel: GemmKernel) -> dict[str, float]:
    """Cycles in which all vector units smooth and rotate X, before the first MAC.

    An operation per element is one of the combining pipeline, in its format (`datapath.combine`),
    unless the file gives transforms a rate of their own.
    Rounding is elementwise and hides beside the MACs; a block of channels has to be mixed first.
    """
    lanes = hw.vector_rate("transform") * hw.units.vector_units
    return {part: ops / lanes for part, ops in kernel.transform_ops.items()}


def _unpacked_elements(hw: Accelerator, kernel: GemmKernel, tiles: Tiles, runs: Floats) -> Floats:
    """Elements one unit widens to the width of a MAC mode, for each tile, in `runs` passes."""
    unpacked = np.zeros_like(tiles.m)
    if kernel.choice.unpack_activations:
        unpacked = unpacked + runs * tiles.m * kernel.k
    if kernel.choice.unpack_weights:
        unpacked = unpacked + runs * tiles.n * kernel.k
    branch = kernel.branch
    if branch is None:
        return unpacked
    if branch.forms_p and branch.down.unpack_activations:
        shared = kernel.down_share * kernel.m * kernel.k / hw.units.vector_units
        per_tile = branch.down_place == "per_tile"
        unpacked = unpacked + (runs * tiles.m * kernel.k if per_tile else shared)
    if branch.forms_p and branch.down.unpack_weights:
        unpacked = unpacked + right_elements(hw, kernel, branch, tiles)
    if branch.up.unpack_activations:
        unpacked = unpacked + runs * tiles.m * branch.rank
    if branch.up.unpack_weights:
        unpacked = unpacked + runs * tiles.n * branch.rank
    return unpacked


def kernel_energy(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, dram: DramTraffic
) -> dict[str, float]:
    """Joules by component, idle power excluded (it needs the whole latency)."""
    energy = hw.energy
    part = "mac_feedback" if kernel.role.startswith("feedback") else "mac_main"
    parts = {part: _mac_pj(kernel.m * kernel.n * kernel.k, kernel.choice)}
    operand_bytes = _operand_bytes(hw, kernel.m * kernel.n * kernel.k, kernel.choice)
    combined: float = kernel.m * kernel.n * kernel.combines
    if kernel.branch is not None:
        branch = kernel.branch
        down, up = kernel.m * branch.down_rank * kernel.k, kernel.m * branch.rank * kernel.n
        parts["mac_branch"] = _mac_pj(up, branch.up)
        operand_bytes += _operand_bytes(hw, up, branch.up)
        combined += kernel.m * kernel.n * branch.up_combines
        if branch.side_unit is not None:
            parts["mac_branch"] += kernel.down_share * down * branch.side_unit.energy_pj_per_mac
        elif branch.forms_p:
            # Of the tiles that form P again, the widest does it least often.
            times = kernel.down_share
            if branch.down_place == "per_tile":
                times = float(ceil_div(kernel.n, tiles.n).min())
            parts["mac_branch"] += times * _mac_pj(down, branch.down)
            operand_bytes += times * _operand_bytes(hw, down, branch.down)
            combined += times * kernel.m * branch.down_rank * branch.down_combines
    for name, ops in kernel.transform_ops.items():
        parts[name] = ops * energy.transform_pj
    parts["vector"] = (
        combined * energy.combine_pj_per_element
        + float(_quantized_elements(kernel, tiles).min()) * energy.quantize_pj_per_element
    )
    l1, l2, unpack = _movement_pj(hw, kernel, tiles)
    parts["l1"] = l1 + operand_bytes * energy.l1_pj_per_byte
    # What DRAM reads is written to L2 once, and outputs pass through it once.
    parts["l2"] = l2 + dram.total * energy.l2_pj_per_byte
    parts["unpack"] = unpack
    parts["dram"] = dram.total * energy.dram_pj_per_byte
    return {name: value * _PJ for name, value in parts.items()}


def _mac_pj(macs: int, choice: ModeChoice) -> float:
    return macs * choice.mode.energy_pj_per_mac


def _operand_bytes(hw: Accelerator, macs: int, choice: ModeChoice) -> float:
    """L1 bytes the register blocks read, at the width of the mode."""
    per_mac = choice.mode.activation_bits / hw.kernel.register_block_n
    per_mac += choice.mode.weight_bits / hw.kernel.register_block_m
    return macs * per_mac / 8


def _movement_pj(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> tuple[float, float, float]:
    """Picojoules in L1 (fills and partial sums), L2 (reads) and unpacking of the least tile."""
    energy = hw.energy
    a_bytes, w_bytes = l1_fill_bytes(hw, kernel, tiles)
    l1 = (a_bytes + w_bytes) * hw.units.vector_units * energy.l1_pj_per_byte
    if hw.kernel.partials == "l1":
        slices = ceil_div(kernel.k, tiles.k)
        if kernel.branch is not None:
            slices = slices + ceil_div(kernel.branch.rank, tiles.k)
        traffic = 2 * kernel.m * kernel.n * kernel.partial_bits / 8 * slices
        l1 = l1 + traffic * energy.l1_pj_per_byte
    l2 = l2_read_bytes(hw, kernel, tiles) * energy.l2_pj_per_byte
    unpacked = _unpacked_elements(hw, kernel, tiles, passes(hw, kernel, tiles))
    unpack = unpacked * hw.units.vector_units * energy.unpack_pj_per_element
    best = int(np.argmin(l1 + l2 + unpack))
    return float(l1[best]), float(l2[best]), float(unpack[best])


def systolic_cycles(
    m: int, n: int, k: int, *, rows: int, columns: int, dataflow: Dataflow = "weight_stationary"
) -> int:
    """Cycles of x (m, k) times w (n, k) transposed on a rows x columns array, in closed form.

    An operand stays in the elements while another streams through in T steps:

        cycles = ceil(D1 / rows) * ceil(D2 / columns) * (T + load + rows + columns - 2) - 1

        weight stationary   D1, D2, T = K, N, M    load = rows
        input stationary    D1, D2, T = K, M, N    load = rows
        output stationary   D1, D2, T = M, N, K    load = 0

    as SCALE-Sim 3.0.0 counts, with which all three agree exactly: each fold loads its operand
    (rows), skews in and drains (rows + columns - 2); loads do not overlap the fold before. Outputs
    that stay have nothing to load. The paper (Samajdar et al., ISPASS 2020) counts 2 rows there
    too, as if the sums were shifted out row by row before the next fold; version 3.0.0 does not.
    """
    folded: dict[Dataflow, tuple[int, int, int, int]] = {
        "weight_stationary": (k, n, m, rows),
        "output_stationary": (m, n, k, 0),
        "input_stationary": (k, m, n, rows),
    }
    down, across, steps, load = folded[dataflow]
    return -(-down // rows) * -(-across // columns) * (steps + load + rows + columns - 2) - 1


def systolic_busy_cycles(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, dataflow: Dataflow
) -> BusyCycles:
    """Busy cycles of a systolic array: main product, then both factors where the branch is fused.

    Partial sums of folds along K stay in the accumulators beside the array and never go to DRAM.
    The branch runs as folds of its own after the main product.
    """
    units = hw.units

    def phase(mode: Mode, m: int, n: int, k: int, combines: int, share: float = 1.0) -> Phase:
        counted = systolic_cycles(
            m, n, k, rows=units.rows, columns=units.columns, dataflow=dataflow
        )
        # SCALE-Sim numbers its cycles from 0: one element alone would beat its own peak by one.
        cycles = max(counted, m * n * k / units.count)
        rate = mode.sustained_macs_per_cycle
        return make_phase(hw, np.array([share * cycles / rate]), share * m * n * combines)

    branch = kernel.branch
    phases: dict[str, Phase] = {
        kernel.role: phase(kernel.choice.mode, kernel.m, kernel.n, kernel.k, kernel.combines)
    }
    if branch is not None and branch.forms_p:
        phases["branch_down"] = phase(
            branch.down.mode,
            kernel.m,
            branch.down_rank,
            kernel.k,
            branch.down_combines,
            kernel.down_share,
        )
    if branch is not None:
        phases["branch_up"] = phase(
            branch.up.mode, kernel.m, kernel.n, branch.rank, branch.up_combines
        )
    added = 0.0
    if kernel.reread_bytes and hw.vector.add_elements_per_cycle is not None:
        added = kernel.m * kernel.n / hw.vector.add_elements_per_cycle
    conversion = conversion_cycles(hw, kernel, tiles, np.ones(1))
    return BusyCycles(phases=phases, tile=np.array([added]), conversion=conversion)
