"""16-bit attention products and depthwise convolutions: a roofline, since neither has a split.

Attention runs as one kernel that keeps the scores on chip (as FlashAttention): MACs at the
sustained rate of the 16-bit mode, one exponential and one rescaling per score on the vector unit,
and queries, keys, values and outputs through DRAM once. Depthwise taps run on the vector unit.

    latency = dispatch + DRAM latency + max(MACs, vector work, DRAM bytes)
"""

from dataclasses import dataclass

from hwmodels.description import Accelerator
from hwmodels.inventory import InventoryEntry
from hwmodels.modes import choose_mode

__all__ = ["ProductCost", "product_cost"]

_BYTES = 2  # 16-bit elements
_PJ = 1e-12


@dataclass(frozen=True, kw_only=True)
class ProductCost:
    """Cost of one call; field meanings as in `hwmodels.Cost`."""

    latency_s: float
    energy_j: float
    dram_bytes: int
    weight_bytes: int
    bound: str
    peak_activation_bytes: int


def product_cost(entry: InventoryEntry, hw: Accelerator) -> ProductCost:
    """Cost of one call of an attention or depthwise entry on `hw`."""
    macs = entry.macs / entry.calls
    weight_bytes = 0
    if entry.op == "depthwise":
        vector, mac_work = macs, 0.0
        weight_bytes = entry.n * entry.k * _BYTES
        moved = 2 * entry.m * entry.n * _BYTES + weight_bytes
    else:
        scores = entry.m * entry.n if entry.op == "attention" else entry.m * entry.k
        vector, mac_work = 2.0 * entry.batch * scores, macs
        moved = entry.batch * (2 * entry.m + 2 * entry.n) * entry.k * _BYTES
    mode = choose_mode(hw, 16, 16).mode
    clock = hw.units.clock_hz
    rate = mode.sustained_macs_per_cycle * hw.units.count * clock
    lanes = hw.vector_rate("combine") * hw.units.vector_units * clock
    busy = {
        "compute": mac_work / rate,
        "vector": vector / lanes,
        "dram": moved / hw.memories.dram.sustained_bytes_per_s,
    }
    bound = max(busy, key=busy.__getitem__)
    overhead = hw.dispatch.launch_s + hw.memories.dram.latency_s
    latency = overhead + busy[bound]
    energy = hw.energy
    picojoules = mac_work * mode.energy_pj_per_mac + vector * energy.combine_pj_per_element
    picojoules += moved * (energy.dram_pj_per_byte + energy.l2_pj_per_byte)
    return ProductCost(
        latency_s=latency,
        energy_j=picojoules * _PJ + energy.static_w * latency,
        dram_bytes=moved,
        weight_bytes=weight_bytes,
        bound="dispatch" if hw.dispatch.launch_s > busy[bound] else bound,
        peak_activation_bytes=moved - weight_bytes,
    )
