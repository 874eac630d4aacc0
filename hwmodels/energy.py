"""Energy of one kernel from counts: MACs by mode, bytes by level, elementwise work, idle power.

Movement between L2 and L1 is charged for the legal tile that needs the least of it, which is not
always the fastest tile; the two differ by a few percent of the total. Charging the fastest tile
instead would let energy fall when a layer grows, whenever the search moves to another tile.
Padding lanes multiply zeros and are not charged.
"""

import numpy as np

from hwmodels.branch import GemmKernel
from hwmodels.description import Accelerator
from hwmodels.kernel_cycles import quantized_elements, unpacked_elements
from hwmodels.modes import ModeChoice
from hwmodels.tiling import Tiles, ceil_div, passes
from hwmodels.traffic import DramTraffic, l1_fill_bytes, l2_read_bytes

__all__ = ["kernel_energy"]

_PJ = 1e-12


def kernel_energy(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, dram: DramTraffic
) -> dict[str, float]:
    """Joules by component, idle power excluded (it needs the whole latency)."""
    energy = hw.energy
    parts = {"mac_main": _mac_pj(kernel.m * kernel.n * kernel.k, kernel.choice)}
    operand_bytes = _operand_bytes(hw, kernel.m * kernel.n * kernel.k, kernel.choice)
    combined = kernel.m * kernel.n * kernel.combines
    if kernel.branch is not None:
        branch = kernel.branch
        down, up = kernel.m * branch.rank * kernel.k, kernel.m * branch.rank * kernel.n
        parts["mac_branch"] = _mac_pj(up, branch.up)
        operand_bytes += _operand_bytes(hw, up, branch.up)
        combined += kernel.m * kernel.n * branch.up_combines
        if branch.down_place == "side":
            parts["mac_branch"] += kernel.down_share * down * hw.side_unit.energy_pj_per_mac
        elif kernel.forms_p:
            # Of the tiles that form P again, the widest does it least often.
            times = kernel.down_share
            if branch.down_place == "per_tile":
                times = float(ceil_div(kernel.n, tiles.n).min())
            parts["mac_branch"] += times * _mac_pj(down, branch.down)
            operand_bytes += times * _operand_bytes(hw, down, branch.down)
            combined += times * kernel.m * branch.rank * branch.down_combines
    for name, ops in kernel.transform_ops.items():
        parts[name] = ops * energy.combine_pj_per_element
    parts["vector"] = (
        combined * energy.combine_pj_per_element
        + float(quantized_elements(kernel, tiles).min()) * energy.quantize_pj_per_element
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
    unpacked = (
        unpacked_elements(hw, kernel, tiles, passes(hw, kernel, tiles)) * hw.units.vector_units
    )
    unpack = unpacked * energy.unpack_pj_per_element
    best = int(np.argmin(l1 + l2 + unpack))
    return float(l1[best]), float(l2[best]), float(unpack[best])
