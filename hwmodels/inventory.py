"""Published diffusion transformers as shapes: what one denoising step runs, and products' cost.

`models/*.json` hold every layer of a model: name, kind, GEMM size, rows at 1024 and 512 pixels with
the guidance passes of one call (`cfg_batch`), and whether SVDQuant quantizes it; else it runs at 16
bits or in a fixed precision. Layers of equal kind, size and precision are one entry here.

Attention products, depthwise convolutions and elementwise work (normalizations with their
modulation, activation functions, gated residuals, rotary embeddings) are no layers with weights.

Attention runs as one kernel that keeps the scores on chip (as FlashAttention), in the precisions
asked for: 16 bits, or 8-bit integers or floats for queries times keys and for probabilities times
values. A family of the machine's file that serves attention says how its kernels cut the work:

    passes  = ceil(queries / rows) * ceil(heads / at once) * ceil(head size / value columns)
    MACs    = heads * queries * keys * (head size * blocks of value columns + head size)
    softmax = ops per score * scores (again for each block of value columns), on the vector unit
    latency = dispatch + DRAM latency + passes * seconds of a pass
              + f * max(MACs, softmax) + (1 - f) * (MACs + softmax), or DRAM time if that is longer

with f the `overlap_fraction` of the family. Where no family serves, one pass takes all, a score
takes `_SOFTMAX_OPS` operations of the vector unit, which hides behind the MACs as far as scaling of
group sums does (`vector.combine_overlaps_mac`), and the cost is assumed. Queries, keys, values and
outputs pass DRAM once. Depthwise taps run on the vector unit; linear attention is two products and
one pass of the vector unit. Elementwise work reads its tensors and writes one, in 16 bits, beside
the vector unit: at the rate that a family of the file was measured at, else with the operations of
`WORKS` for each element, and then it is assumed.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from hwmodels.blocks import KernelFamily
from hwmodels.cost import estimate_cost
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError, nearest
from hwmodels.families import ASSUMED_ERROR, GENERIC, Confidence, family_named, machine_under
from hwmodels.modes import ModeChoice, choose_mode
from hwmodels.operands import parse_precision
from hwmodels.workload import GemmWorkload

__all__ = [
    "ATTENTION_FORMATS",
    "BlockPlan",
    "InventoryEntry",
    "ModelInventory",
    "ProductCost",
    "RESOLUTIONS",
    "StepPlan",
    "WORKS",
    "list_models",
    "load_model",
    "product_cost",
]

RESOLUTIONS = (512, 1024)
_COLUMNS = (1024, 512)  # Of the pairs of rows in the files.
_MODELS = Path(__file__).parent / "models"
_BYTES = 2  # 16-bit elements
_PJ = 1e-12
_SOFTMAX_OPS = 8.0
"""Operations per score where no family says: maximum, subtraction, exponential (about four), sum
and conversion."""
ATTENTION_FORMATS = {"bf16": ("W16A16", "int"), "int8": ("W8A8", "int"), "fp8": ("W8A8", "mxfp")}
"""Formats of the products of attention by name: precision and element family."""
WORKS = {
    "layer_norm": (1, 8.0), "rms_norm": (1, 5.0), "gelu": (1, 10.0), "silu": (1, 6.0),
    "silu_mul": (2, 7.0), "add": (2, 1.0), "gate_add": (2, 2.0), "rope": (1, 6.0),
}  # fmt: skip
"""Elementwise work: tensors read, and operations of the vector unit for each element (counted from
the formulas, a transcendental as four)."""


@dataclass(frozen=True, kw_only=True)
class InventoryEntry:
    """Calls of one kind and shape in one denoising step.

    op : ``gemm``: y (m, n) from x (m, k); ``depthwise``: m rows of n channels with k taps each;
        ``attention`` and ``linear_attention``: `batch` heads of m queries, n keys, head size k;
        ``elementwise``: m rows of n channels, the `work` of `WORKS`.
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
    work: str = ""

    def scaled(self, factor: Fraction) -> "InventoryEntry":
        """The same calls with `factor` times the images and guidance passes in each.

        Rows of a layer scale; queries and keys are of one image, so that the heads do.

        Raises
        ------
        AcceleratorError
            If the rows of one call do not divide so.
        """
        has_rows = self.op in ("gemm", "depthwise", "elementwise")
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
            "elementwise": 0,
            "depthwise": self.m * self.n * self.k,
            "attention": 2 * self.batch * self.m * self.n * self.k,
            # Keys times values with a row of ones for the normalizer, then queries times that.
            "linear_attention": 2 * self.batch * self.m * self.k * (self.k + 1),
        }
        return per_call[self.op] * self.calls


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """A block of a step: how often it runs, its stages, and what waits for no stage of it.

    A stage names kinds that need nothing of each other and wait for the stage before: ``self_q``,
    the second entry of that kind as ``self_q#2``, two calls of it as ``self_q*2``. What is early
    says what waits for it: ``cross_k>cross_attention``.
    """

    count: int
    early: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What a step runs after what: stages before the blocks, the blocks, and stages after."""

    first: tuple[tuple[str, ...], ...]
    blocks: tuple[BlockPlan, ...]
    last: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelInventory:
    """One model at one resolution.

    Entries and schedule are of one call with `guidance_batch` passes; a step makes
    `guidance_calls` of them.
    """

    name: str
    title: str
    source: str
    resolution: int
    guidance_batch: int
    entries: tuple[InventoryEntry, ...]
    schedule: "StepPlan"
    guidance_calls: int = 1

    def __repr__(self) -> str:
        macs = sum(entry.macs for entry in self.entries)
        return (
            f"ModelInventory({self.name!r}, {self.resolution} pixels: {len(self.entries)} kinds of "
            f"products, {macs / 1e12:.3g} TMAC a step)"
        )

    @property
    def mac_shares(self) -> dict[str, float]:
        """Shares of the multiply-accumulates: of layers in a split, of attention, of all others."""
        macs = {"linear layers": 0, "attention": 0, "layers kept at 16 bits": 0}
        for entry in self.entries:
            in_split = "linear layers" if entry.precision == "split" else "layers kept at 16 bits"
            macs["attention" if entry.op.endswith("attention") else in_split] += entry.macs
        return {kind: count / sum(macs.values()) for kind, count in macs.items()}

    def latency_parts(self, hw: Accelerator, **split: Any) -> dict[str, float]:
        """Seconds of a step by part of the latency: all calls of the layers that a split is for.

        `split` are ``main``, ``branch``, ``rank`` and other fields of a `GemmWorkload` but its
        sizes. What stays at 16 bits, attention and elementwise work are not in it.
        """
        parts: dict[str, float] = {}
        for entry in self.entries:
            if entry.op != "gemm" or entry.precision != "split":
                continue
            cost = estimate_cost(GemmWorkload(m=entry.m, n=entry.n, k=entry.k, **split), hw)
            for part, seconds in cost.parts["latency_s"].items():
                known = parts.get(part, 0.0)
                parts[part] = known + seconds * entry.calls * self.guidance_calls
        return parts


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
    size = _COLUMNS.index(resolution)
    products = [
        InventoryEntry(
            kind=part["kind"], op=part["op"], m=part["queries"][size], n=part["keys"][size],
            k=part["head_size"], calls=part["calls"], precision="W16A16", batch=part["batch"],
        )
        for part in content["attention"]
    ]  # fmt: skip
    others = [
        InventoryEntry(
            kind=part["kind"], op="elementwise", m=part["rows"][size], n=part["n"], k=1,
            calls=part["calls"], precision="A16", work=part["work"],
        )
        for part in content["elementwise"]
    ]  # fmt: skip
    plan = content["schedule"]
    return ModelInventory(
        name=name,
        title=content["title"],
        source=content["source"],
        resolution=resolution,
        guidance_batch=content["cfg_batch"],
        guidance_calls=content.get("guidance_calls", 1),
        entries=(*_layers(content["sections"], size), *products, *others),
        schedule=StepPlan(
            first=_stages(plan["first"]),
            blocks=tuple(
                BlockPlan(
                    count=block["count"],
                    early=tuple(block["early"]),
                    stages=_stages(block["stages"]),
                )
                for block in plan["blocks"]
            ),
            last=_stages(plan["last"]),
        ),
    )


def _layers(sections: list[dict[str, Any]], size: int) -> list[InventoryEntry]:
    """Layers as entries: equal ones together, in the order of the model."""
    calls: Counter[InventoryEntry] = Counter()
    for section in sections:
        for layer in section["layers"]:
            entry = InventoryEntry(
                kind=layer["kind"],
                op="depthwise" if "depthwise" in layer["op"] else "gemm",
                m=layer["rows"][size],
                n=layer["n"],
                k=layer["k"],
                calls=1,
                precision=layer.get("precision", "split" if layer["quantized"] else "W16A16"),
            )
            # Rows at the other size tell apart what only this one makes equal.
            calls[replace(entry, batch=layer["rows"][1 - size])] += len(
                range(*section.get("blocks", (0, 1)))
            )
    return [replace(entry, batch=1, calls=count) for entry, count in calls.items()]


def _stages(content: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(stage) for stage in content)


@dataclass(frozen=True, kw_only=True)
class ProductCost:
    """Cost of one call; field meanings as in `hwmodels.Cost`."""

    latency_s: float
    energy_j: float
    dram_bytes: int
    weight_bytes: int
    bound: str
    peak_activation_bytes: int
    kernel: str
    confidence: Confidence
    latency_low_s: float
    latency_high_s: float
    parts: dict[str, float]
    busy_s: dict[str, float]
    units_share: float


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What the units do: MACs by product and mode, vector operations, bytes, passes."""

    macs: tuple[tuple[float, ModeChoice], ...]
    vector: float
    moved: int
    weight_bytes: int = 0
    pass_s: float = 0.0
    vector_cycles: float | None = None
    units_share: float = 1.0


def product_cost(
    entry: InventoryEntry,
    hw: Accelerator,
    *,
    qk: str = "W16A16",
    pv: str = "W16A16",
    element: str = "int",
    kernel: str | None = None,
) -> ProductCost:
    """Cost of one call of an attention, depthwise or elementwise entry on `hw`.

    `qk` and `pv` are the formats of queries times keys and of probabilities times values: a name of
    `ATTENTION_FORMATS`, or a precision such as W8A8 with `element` as its element family below 16
    bits (int, or mxfp for fp8).

    Raises
    ------
    AcceleratorError
        If a precision has no mode, or the machine has no such kernel family for attention.
    """
    family = _family(hw, entry, kernel)
    under = machine_under(hw, family)
    formats = tuple(ATTENTION_FORMATS.get(text, (text, element)) for text in (qk, pv))
    work = _work(entry, under, formats, family)
    clock, units = under.units.clock_hz, under.units
    mac_s = sum(
        macs / (choice.mode.sustained_macs_per_cycle * units.count * clock)
        for macs, choice in work.macs
    )
    lanes = under.vector_rate("combine") * units.vector_units
    vector_s = (work.vector / lanes if work.vector_cycles is None else work.vector_cycles) / clock
    dram_s = work.moved / under.memories.dram.sustained_bytes_per_s
    hidden = under.kernel.overlap_fraction if family is not None else _hidden(under)
    paced = max(mac_s, vector_s) + (1 - hidden) * min(mac_s, vector_s)
    busy = {"compute": mac_s, "vector": vector_s, "dram": dram_s}
    overhead = under.dispatch.launch_s + under.memories.dram.latency_s + work.pass_s
    latency = overhead + max(paced, dram_s)
    confidence, spread = _trust(family, entry, tuple(precision for precision, _ in formats))
    energy = under.energy
    picojoules = sum(macs * choice.mode.energy_pj_per_mac for macs, choice in work.macs)
    picojoules += work.vector * energy.combine_pj_per_element
    picojoules += work.moved * (energy.dram_pj_per_byte + energy.l2_pj_per_byte)
    parts = {"dispatch": under.dispatch.launch_s, "fill": under.memories.dram.latency_s}
    parts |= {"passes": work.pass_s, "compute": mac_s}
    vector_part = "softmax" if entry.op.endswith("attention") else "vector"
    parts |= {vector_part: max(0.0, paced - mac_s), "stall": max(0.0, dram_s - paced)}
    bound = max(busy, key=busy.__getitem__)
    return ProductCost(
        latency_s=latency,
        energy_j=picojoules * _PJ + energy.static_w * latency,
        dram_bytes=work.moved,
        weight_bytes=work.weight_bytes,
        bound="dispatch" if overhead > max(busy.values()) else bound,
        peak_activation_bytes=work.moved - work.weight_bytes,
        kernel=GENERIC if family is None else family.name,
        confidence=confidence,
        latency_low_s=max(0.0, latency * (1 - spread)),
        latency_high_s=latency * (1 + spread),
        parts=parts,
        busy_s=busy,
        units_share=work.units_share,
    )


def _family(hw: Accelerator, entry: InventoryEntry, name: str | None) -> KernelFamily | None:
    """The family that runs the entry: only attention and elementwise work have their own."""
    if entry.op not in ("attention", "elementwise"):
        return None
    if name is not None:
        family = family_named(hw, name)
        if entry.op not in family.serves:
            raise AcceleratorError(
                f"kernel family {name!r} of {hw.name} does not serve {entry.op}"
                + (" work" if entry.op == "elementwise" else "")
            )
        return family
    return next((family for family in hw.kernels if entry.op in family.serves), None)


def _work(
    entry: InventoryEntry,
    hw: Accelerator,
    formats: tuple[tuple[str, str], ...],
    family: KernelFamily | None,
) -> _Work:
    if entry.op == "elementwise":
        return _elementwise_work(entry, hw, family)
    macs = entry.macs / entry.calls
    choices = [choose_mode(hw, *parse_precision(text), element) for text, element in formats]
    moved = 2 * entry.batch * (entry.m + entry.n) * entry.k * _BYTES
    if entry.op == "depthwise":
        stored = entry.n * entry.k * _BYTES
        moved = 2 * entry.m * entry.n * _BYTES + stored
        return _Work(macs=(), vector=macs, moved=moved, weight_bytes=stored)
    if entry.op == "linear_attention":
        vector = 2.0 * entry.batch * entry.m * entry.k
        return _Work(macs=((macs, choices[0]),), vector=vector, moved=moved)
    tiles = None if family is None else family.attention
    scores = float(entry.batch * entry.m * entry.n)
    blocks, pass_s, ops = 1, 0.0, _SOFTMAX_OPS
    if tiles is not None:
        blocks = -(-entry.k // tiles.value_columns)
        passes = -(-entry.m // tiles.query_rows) * -(-entry.batch // tiles.heads) * blocks
        pass_s, ops = passes * tiles.pass_s, tiles.softmax_ops_per_score
    return _Work(
        macs=((scores * entry.k * blocks, choices[0]), (scores * entry.k, choices[1])),
        vector=ops * scores * blocks,
        moved=moved,
        pass_s=pass_s,
    )


def _elementwise_work(entry: InventoryEntry, hw: Accelerator, family: KernelFamily | None) -> _Work:
    if entry.work not in WORKS:
        raise AcceleratorError(
            f"{entry.kind}: unknown work {entry.work!r:.40}; {nearest(entry.work, [*WORKS])}"
        )
    read, ops = WORKS[entry.work]
    count = entry.m * entry.n
    moved = (read + 1) * count * _BYTES
    rates = None if family is None else family.elementwise
    if rates is None or entry.work not in rates:
        return _Work(macs=(), vector=ops * count, moved=moved)
    rate = rates[entry.work]
    return _Work(
        macs=(),
        vector=ops * count,
        moved=moved,
        vector_cycles=count / rate.elements_per_cycle,
        units_share=min(1.0, rate.units / hw.units.count),
    )


def _hidden(hw: Accelerator) -> float:
    return 1.0 if hw.vector.combine_overlaps_mac else 0.0


def _trust(
    family: KernelFamily | None, entry: InventoryEntry, precisions: tuple[str, ...]
) -> tuple[Confidence, float]:
    """Confidence and expected error of an entry in a family.

    Head sizes count as K, and elements of elementwise work as M.
    """
    if family is None or not family.rows or family.worst_error is None:
        return "assumed", ASSUMED_ERROR
    if family.elementwise is not None:
        if entry.work not in family.elementwise:
            return "assumed", ASSUMED_ERROR
        ranges = [(entry.m * entry.n, family.measured_m)]
        is_measured = True
    else:
        ranges = [
            (entry.m, family.measured_m),
            (entry.n, family.measured_n),
            (entry.k, family.measured_k),
        ]
        is_measured = {parse_precision(text) for text in precisions} == {(16, 16)}
    if is_measured and all(r is not None and r[0] <= size <= r[1] for size, r in ranges):
        return "measured", family.worst_error
    return "extrapolated", max(2 * family.worst_error, 0.3)
