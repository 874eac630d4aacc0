"""What an accelerator file may say: one frozen model per block, a unit in every key name.

Every block carries `source` (document, measurement or reasoning) and `confidence`; unknown keys
are refused. The numbers themselves live in `accelerators/*.yaml`.
"""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, StringConstraints, model_validator

__all__ = [
    "Accelerator",
    "Block",
    "Datapath",
    "Dispatch",
    "Dram",
    "Energy",
    "Kernel",
    "L1",
    "L2",
    "Memories",
    "Mode",
    "Units",
    "Vector",
]

Count = Annotated[int, Field(ge=1, le=2**40)]
Positive = Annotated[float, Field(gt=0, le=1e15)]
NonNegative = Annotated[float, Field(ge=0, le=1e15)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3)]
OperandBits = Annotated[int, Field(ge=2, le=16)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Block(_Strict):
    """What every block says about where its numbers come from."""

    source: Text
    confidence: Literal["vendor", "measured", "inferred", "estimate"]
    uncertainty_percent: NonNegative | None = None


class Units(Block):
    """The compute units and how operands reach them.

    `array`: a rows x columns mesh, a row shares activations and a column shares weights.
    `grid`: independent units (streaming multiprocessors) that take output tiles in waves.
    """

    organization: Literal["array", "grid"]
    rows: Count
    columns: Count
    clock_hz: Positive

    @property
    def count(self) -> int:
        """Compute units in use."""
        return self.rows * self.columns


class Mode(Block):
    """One native multiply-accumulate mode of a compute unit."""

    name: Name
    kind: Literal["int", "float"]
    activation_bits: OperandBits
    weight_bits: OperandBits
    accumulator_bits: Count
    macs_per_cycle: Count
    instruction_m: Count
    instruction_k: Count
    instruction_n: Count
    energy_pj_per_mac: NonNegative


class Kernel(Block):
    """The inner kernel: register blocks, their overheads, and the tiles the search may use."""

    register_block_m: Count
    register_block_n: Count
    load_bytes_per_cycle: Positive
    block_overhead_cycles: NonNegative
    partial_cycles_per_64_bytes: NonNegative
    tile_overhead_cycles: NonNegative
    partials: Literal["l1", "registers"]
    accumulator_capacity_bytes: Count | None = None
    tile_m_max_rows: Count
    tile_n_max_columns: Count
    tile_k_step: Count
    tile_k_max: Count

    @model_validator(mode="after")
    def _registers_need_a_capacity(self) -> Self:
        if self.partials == "registers" and self.accumulator_capacity_bytes is None:
            raise ValueError("partials 'registers' needs accumulator_capacity_bytes")
        if self.tile_m_max_rows < self.register_block_m:
            raise ValueError("tile_m_max_rows must be at least register_block_m")
        if self.tile_n_max_columns < self.register_block_n:
            raise ValueError("tile_n_max_columns must be at least register_block_n")
        if self.tile_k_max < self.tile_k_step:
            raise ValueError("tile_k_max must be at least tile_k_step")
        return self


class Vector(Block):
    """Elementwise work per compute unit: group scales, quantization, unpacking."""

    combine_elements_per_cycle: Positive
    combine_overlaps_mac: bool
    quantize_elements_per_cycle: Positive
    unpack_elements_per_cycle: Positive
    load_widens_bits: tuple[OperandBits, ...] = ()


class L1(Block):
    """The memory of one compute unit."""

    capacity_bytes: Count
    reserved_bytes: Annotated[int, Field(ge=0)]
    input_buffers: Literal[1, 2, 3, 4]
    output_buffers: Literal[1, 2]
    fill_channels: Literal["separate", "shared"]
    fill_bytes_per_cycle: Positive
    drain_bytes_per_cycle: Positive

    @model_validator(mode="after")
    def _reserve_fits(self) -> Self:
        if self.reserved_bytes >= self.capacity_bytes:
            raise ValueError("reserved_bytes must be below capacity_bytes")
        return self


class L2(Block):
    """The on-chip memory all units share."""

    capacity_bytes: Count
    panel_fraction: Annotated[float, Field(gt=0, le=1)]
    bandwidth_bytes_per_cycle: Positive


class Dram(Block):
    """Off-chip memory as the units see it."""

    bandwidth_bytes_per_s: Positive
    sustained_fraction: Annotated[float, Field(gt=0, le=1)]
    latency_s: NonNegative

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bandwidth a streaming kernel reaches."""
        return self.bandwidth_bytes_per_s * self.sustained_fraction


class Memories(_Strict):
    """The three levels of the hierarchy."""

    l1: L1
    l2: L2
    dram: Dram


class Dispatch(Block):
    """What one kernel start costs."""

    launch_s: NonNegative


class Datapath(Block):
    """How the machine does integer arithmetic; the emulator reads this, the cost model `combine`.

    The accumulator rules are those of one MAC instruction; rounding and saturation are those of
    the requantization step; `combine` is the precision in which group partial sums are added.
    """

    acc_bits: Annotated[int, Field(ge=8, le=64)]
    overflow: Literal["wrap", "saturate", "saturate_symmetric"]
    products_per_add: Count
    accumulators: Count
    tree_bits: Annotated[int, Field(ge=8, le=64)] | None = None
    combine: Literal["fp32", "bf16"]
    rounding: Literal[
        "floor", "ceil", "symmetric_floor", "symmetric_ceil", "negative_inf",
        "positive_inf", "symmetric_zero", "symmetric_inf", "conv_even", "conv_odd",
    ]  # fmt: skip
    saturation: Literal["none", "saturate", "symmetric"]
    p_format: Literal["branch", "fp16"]
    out_format: Literal["bf16", "fp16", "fp32"]

    @property
    def combine_bits(self) -> int:
        """Width of a partial sum outside the accumulator."""
        return 32 if self.combine == "fp32" else 16


class Energy(Block):
    """Energy per byte, per element and per second at one process node."""

    node_nm: Positive
    l1_pj_per_byte: NonNegative
    l2_pj_per_byte: NonNegative
    dram_pj_per_byte: NonNegative
    combine_pj_per_element: NonNegative
    quantize_pj_per_element: NonNegative
    unpack_pj_per_element: NonNegative
    static_w: NonNegative


class Accelerator(_Strict):
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

    # Mode choices and the tile grid depend on nothing but this description.
    _cache: dict = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _modes_are_distinct(self) -> Self:
        names = [mode.name for mode in self.modes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"modes must have distinct names, {', '.join(twice)} appears twice")
        return self

    def __copy__(self) -> Self:
        # `model_copy(update=...)` starts here; what was cached for this machine must not follow.
        copy = super().__copy__()
        copy._cache = {}
        return copy

    def digest(self) -> str:
        """Hex sha256 of the canonical content: equal for equal descriptions."""
        content = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()
