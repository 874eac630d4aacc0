"""Published diffusion transformers as shapes: what one denoising step runs, and products' cost.

`models/*.json` hold, per kind of layer, the GEMM sizes at 512 and 1024 pixels with both guidance
branches in one call (`guidance_batch`), the calls per step, and the precision: ``split`` where
SVDQuant quantizes, else a fixed one.

Attention products and depthwise convolutions are no layers with weights to split; they run in 16
bits, and `product_cost` gives their roofline. Attention runs as one kernel that keeps the scores on
chip (as FlashAttention): MACs at the sustained rate of the 16-bit mode, one exponential and one
rescaling per score on the vector unit, and queries, keys, values and outputs through DRAM once.
Depthwise taps run on the vector unit.

    latency = dispatch + DRAM latency + max(MACs, vector work, DRAM bytes)
"""

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, nearest
from hwmodels.modes import choose_mode

__all__ = [
    "InventoryEntry",
    "ModelInventory",
    "ProductCost",
    "RESOLUTIONS",
    "list_models",
    "load_model",
    "product_cost",
]

RESOLUTIONS = (512, 1024)
_MODELS = Path(__file__).parent / "models"
_BYTES = 2  # 16-bit elements
_PJ = 1e-12


@dataclass(frozen=True, kw_only=True)
class InventoryEntry:
    """Calls of one kind and shape in one denoising step.

    op : ``gemm``: y (m, n) from x (m, k); ``depthwise``: m rows of n channels with k taps each;
        ``attention`` and ``linear_attention``: `batch` heads of m queries, n keys, head size k.
    precision : ``split``, or the fixed precision of the kind such as ``W16A16``.
    """

    kind: str
    op: str
    m: int
    n: int
    k: int
    calls: int
    precision: str
    batch: int = 1

    def scaled(self, factor: Fraction) -> "InventoryEntry":
        """The same calls with `factor` times the images and guidance passes in each.

        Rows of a layer scale; queries and keys are of one image, so that the heads do.

        Raises
        ------
        AcceleratorError
            If the rows of one call do not divide so.
        """
        has_rows = self.op in ("gemm", "depthwise")
        known = self.m if has_rows else self.batch
        count = known * factor
        if count.denominator != 1:
            raise AcceleratorError(
                f"{self.kind}: {known} rows do not divide by {1 / factor}; "
                "give a --guidance that the rows of one call allow"
            )
        return replace(self, m=int(count)) if has_rows else replace(self, batch=int(count))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        per_call = {
            "gemm": self.m * self.n * self.k,
            "depthwise": self.m * self.n * self.k,
            "attention": 2 * self.batch * self.m * self.n * self.k,
            # Keys times values with a row of ones for the normalizer, then queries times that.
            "linear_attention": 2 * self.batch * self.m * self.k * (self.k + 1),
        }
        return per_call[self.op] * self.calls


@dataclass(frozen=True, kw_only=True)
class ModelInventory:
    """One model at one resolution."""

    name: str
    title: str
    source: str
    resolution: int
    guidance_batch: int
    entries: tuple[InventoryEntry, ...]


def list_models() -> list[str]:
    """Names of the models that ship with the package, sorted."""
    return sorted(path.name.removesuffix(".json") for path in _MODELS.glob("*.json"))


@lru_cache(maxsize=32)
def load_model(name: str, resolution: int = 1024) -> ModelInventory:
    """The inventory of a shipped model.

    Raises
    ------
    AcceleratorError
        If the model or the resolution is not there.
    """
    if name not in list_models():
        raise AcceleratorError(f"unknown model {name!r}; {nearest(name, list_models())}")
    if resolution not in RESOLUTIONS:
        known = " or ".join(map(str, RESOLUTIONS))
        raise AcceleratorError(f"resolution must be {known} pixels, got {resolution!r}")
    content = json.loads((_MODELS / f"{name}.json").read_text(encoding="utf-8"))
    size = str(resolution)
    layers = [InventoryEntry(**{**layer, "m": layer["m"][size]}) for layer in content["layers"]]
    products = [
        InventoryEntry(
            kind=part["kind"], op=part["op"], m=part["queries"][size], n=part["keys"][size],
            k=part["head_size"], calls=part["calls"], precision="W16A16", batch=part["batch"],
        )
        for part in content["attention"]
    ]  # fmt: skip
    return ModelInventory(
        name=name,
        title=content["title"],
        source=content["source"],
        resolution=resolution,
        guidance_batch=content["guidance_batch"],
        entries=(*layers, *products),
    )


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
