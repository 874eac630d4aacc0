"""What an accelerator file may say: one frozen model per block, a unit in every key name.

Every block carries `source` (document, measurement or reasoning) and `confidence`; unknown keys
are refused. The numbers themselves live in `accelerators/*.yaml`.
"""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, model_validator

from hwmodels.compute_blocks import Block, Kernel, Mode, SideUnit, Strict, Units, Vector
from hwmodels.quantities import (
    BytesPerCycle,
    BytesPerSecond,
    Capacity,
    Count,
    L1Capacity,
    Name,
    Nanometers,
    Picojoules,
    Seconds,
    Text,
    Watts,
)

__all__ = [
    "Accelerator",
    "BaseModel",
    "Block",
    "Datapath",
    "Dispatch",
    "Dram",
    "Energy",
    "FloatOverflow",
    "Kernel",
    "L1",
    "L2",
    "Memories",
    "Mode",
    "SideUnit",
    "Units",
    "Variant",
    "Vector",
]


class L1(Block):
    """The memory of one compute unit."""

    capacity_bytes: L1Capacity
    reserved_bytes: Annotated[int, Field(ge=0)]
    input_buffers: Literal[1, 2, 3, 4]
    output_buffers: Literal[1, 2]
    fill_channels: Literal["separate", "shared"]
    fill_bytes_per_cycle: BytesPerCycle
    drain_bytes_per_cycle: BytesPerCycle

    @model_validator(mode="after")
    def _reserve_fits(self) -> Self:
        if self.reserved_bytes >= self.capacity_bytes:
            raise ValueError("reserved_bytes must be below capacity_bytes")
        return self


class L2(Block):
    """The on-chip memory all units share; `panel_fraction` of it may hold one operand's panel."""

    capacity_bytes: Capacity
    panel_fraction: Annotated[float, Field(ge=0, le=1)]
    bandwidth_bytes_per_cycle: BytesPerCycle


class Dram(Block):
    """Off-chip memory as the units see it."""

    bandwidth_bytes_per_s: BytesPerSecond
    sustained_fraction: Annotated[float, Field(gt=0, le=1)]
    latency_s: Seconds

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bandwidth a streaming kernel reaches."""
        return self.bandwidth_bytes_per_s * self.sustained_fraction


class Memories(Strict):
    """The three levels of the hierarchy."""

    l1: L1
    l2: L2
    dram: Dram


class Dispatch(Block):
    """What one kernel start costs."""

    launch_s: Seconds


FloatRule = Literal["infinity", "saturate"]


class FloatOverflow(Block):
    """What becomes of values beyond each float format: infinity, or its largest value.

    A matter of format and kernel, not of the chip alone: a case may override it. fp8_e4m3 has no
    infinity, so the rule `infinity` gives NaN there.
    """

    fp32: FloatRule = "infinity"
    bf16: FloatRule = "infinity"
    fp16: FloatRule = "infinity"
    fp8_e4m3: FloatRule = "saturate"
    fp8_e5m2: FloatRule = "saturate"

    @property
    def rules(self) -> dict[str, str]:
        """The rule of each format by its name."""
        about = set(Block.model_fields)
        return {name: getattr(self, name) for name in type(self).model_fields if name not in about}


_ASSUMED_OVERFLOW = FloatOverflow(
    source="not stated in the file: conversions as IEEE 754 and OCP have them by default",
    confidence="estimate",
)


class Datapath(Block):
    """How the machine does arithmetic; the emulator reads this, the cost model `combine`.

    The accumulator rules are those of one MAC instruction; rounding and saturation are those of
    the requantization step; `combine` is the precision in which group partial sums are added;
    `p_format` and `out_format` are what kernels write P and the output in today.
    """

    acc_bits: Annotated[int, Field(ge=8, le=64)]
    overflow: Literal["wrap", "saturate", "saturate_symmetric"]
    products_per_add: Count
    accumulators: Count
    tree_bits: Annotated[int, Field(ge=8, le=64)] | None = None
    combine: Literal["fp32", "bf16", "fp16"]
    rounding: Literal[
        "floor", "ceil", "symmetric_floor", "symmetric_ceil", "negative_inf",
        "positive_inf", "symmetric_zero", "symmetric_inf", "conv_even", "conv_odd",
    ]  # fmt: skip
    saturation: Literal["none", "saturate", "symmetric"]
    p_format: Literal["branch", "fp16", "bf16"]
    out_format: Literal["bf16", "fp16", "fp32"]
    float_overflow: FloatOverflow = _ASSUMED_OVERFLOW

    @property
    def p_bits(self) -> int | None:
        """Width of P between the two factors; None: the branch's activation width."""
        return None if self.p_format == "branch" else 16

    @property
    def combine_bits(self) -> int:
        """Width of a partial sum outside the accumulator."""
        return 32 if self.combine == "fp32" else 16


class Energy(Block):
    """Energy per byte, per element and per second at one process node."""

    node_nm: Nanometers
    l1_pj_per_byte: Picojoules
    l2_pj_per_byte: Picojoules
    dram_pj_per_byte: Picojoules
    combine_pj_per_element: Picojoules
    quantize_pj_per_element: Picojoules
    unpack_pj_per_element: Picojoules
    static_w: Watts


class Variant(Block):
    """Another reading of the machine where sources conflict, or another product of its family.

    `set` maps key paths (`modes.int8xint4.macs_per_cycle`) to values; `products` are product names
    by which a measured row says that it was taken on this variant.
    """

    name: Name
    products: tuple[Text, ...] = ()
    set: Annotated[dict[str, int | float | str], Field(min_length=1)]


class Accelerator(Strict):
    """One machine: what `load_accelerator` returns and `estimate_cost` reads."""

    name: Name
    title: Text
    aliases: tuple[Name, ...] = ()
    units: Units
    modes: Annotated[tuple[Mode, ...], Field(min_length=1)]
    kernel: Kernel
    vector: Vector
    memories: Memories
    dispatch: Dispatch
    datapath: Datapath
    energy: Energy
    side_unit: SideUnit | None = None
    variants: tuple[Variant, ...] = ()

    # Mode choices and the tile grid depend on nothing but this description.
    _cache: dict = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _modes_are_distinct(self) -> Self:
        for what, items in (("modes", self.modes), ("variants", self.variants)):
            names = [item.name for item in items]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"{what} must have distinct names, {', '.join(twice)} appears twice"
                )
        return self

    @model_validator(mode="after")
    def _only_systolic_arrays_have_lanes_by_column(self) -> Self:
        if self.vector.scope == "column" and self.units.organization != "systolic":
            raise ValueError(
                "vector.scope 'column' is for organization 'systolic'; write scope: unit"
            )
        return self

    def vector_rate(self, work: Literal["combine", "quantize", "unpack"]) -> float:
        """Elements per cycle of one vector unit: all lanes of a systolic array are one unit."""
        rate = getattr(self.vector, f"{work}_elements_per_cycle")
        return rate * self.units.columns if self.vector.scope == "column" else rate

    def __copy__(self) -> Self:
        # `model_copy(update=...)` starts here; what was cached for this machine must not follow.
        copy = super().__copy__()
        copy._cache = {}
        return copy

    def _repr_html_(self) -> str:
        from hwmodels.cards import accelerator_card

        return accelerator_card(self)

    def digest(self) -> str:
        """Hex sha256 of the canonical content: equal for equal descriptions."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()
