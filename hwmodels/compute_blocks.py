"""Blocks of an accelerator file about computing: units, MAC modes, kernels, vector work."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwmodels.quantities import (
    BytesPerCycle,
    Count,
    ElementsPerCycle,
    Fraction,
    Hertz,
    MacRate,
    Name,
    NonNegative,
    Picojoules,
    Side,
    Text,
)

__all__ = ["Block", "Kernel", "Mode", "SideUnit", "Strict", "Units", "Vector"]

OperandBits = Annotated[int, Field(ge=2, le=16)]
Family = Literal["int", "mxint", "mxfp", "nvfp"]


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Block(Strict):
    """What every block says about where its numbers come from."""

    source: Text
    confidence: Literal["vendor", "measured", "inferred", "estimate"]
    uncertainty_percent: NonNegative | None = None


class Units(Block):
    """The compute units and how operands reach them.

    `array`: a rows x columns mesh of cores, a row shares activations and a column shares weights.
    `grid`: independent units (streaming multiprocessors) that take output tiles in waves.
    `systolic`: one rows x columns array of multiply-accumulate elements; `dataflow` names the
    operand that stays in the elements.
    """

    organization: Literal["array", "grid", "systolic"]
    rows: Side
    columns: Side
    clock_hz: Hertz
    dataflow: Literal["weight_stationary", "output_stationary", "input_stationary"] | None = None

    @model_validator(mode="after")
    def _only_systolic_arrays_have_a_dataflow(self) -> Self:
        if (self.organization == "systolic") != (self.dataflow is not None):
            raise ValueError("dataflow is needed for organization 'systolic' and for no other")
        return self

    @property
    def count(self) -> int:
        """Compute units in use."""
        return self.rows * self.columns

    @property
    def vector_units(self) -> int:
        """Units with an elementwise pipe of their own: the whole of a systolic array has one."""
        return 1 if self.organization == "systolic" else self.count


class Mode(Block):
    """One native multiply-accumulate mode of a compute unit.

    `families`: element families it multiplies (default: integers for an int mode, all for a
    16-bit float mode, whose operands are dequantized on the way in; none other).
    `scaled_families`: families whose block scales the mode applies itself.
    `mixes_widths`: operands narrower than the mode need no unpacking (FP8 x FP4 at the FP8 rate).
    `sustained_fraction`: share of the peak rate that compiled kernels keep up.
    """

    name: Name
    kind: Literal["int", "float"]
    activation_bits: OperandBits
    weight_bits: OperandBits
    accumulator_bits: Count
    macs_per_cycle: MacRate
    instruction_m: Count
    instruction_k: Count
    instruction_n: Count
    energy_pj_per_mac: Picojoules
    families: tuple[Family, ...] | None = None
    scaled_families: tuple[Family, ...] = ()
    mixes_widths: bool = False
    sustained_fraction: Fraction = 1.0

    @model_validator(mode="after")
    def _narrow_floats_name_their_families(self) -> Self:
        narrow = max(self.activation_bits, self.weight_bits) < 16
        if self.kind == "float" and narrow and self.families is None:
            raise ValueError("a float mode narrower than 16 bits needs families, such as [mxfp]")
        return self

    @property
    def sustained_macs_per_cycle(self) -> float:
        """Rate that compiled kernels reach."""
        return self.macs_per_cycle * self.sustained_fraction

    @property
    def is_wide_float(self) -> bool:
        """Whether operands are plain 16-bit floats, scales multiplied in on the way."""
        return self.kind == "float" and min(self.activation_bits, self.weight_bits) == 16

    def takes(self, family: str) -> bool:
        """Whether the mode multiplies elements of `family`."""
        if self.families is not None:
            return family in self.families
        return self.is_wide_float or (self.kind == "int" and family in ("int", "mxint"))


class Kernel(Block):
    """The inner kernel: register blocks, their overheads, and the tiles the search may use.

    `fused_rate_fraction`: MAC rate of a kernel that carries a branch, over that of a plain one
    (the branch takes registers and staging buffers from the main loop).
    """

    register_block_m: Count
    register_block_n: Count
    load_bytes_per_cycle: BytesPerCycle
    block_overhead_cycles: NonNegative
    partial_cycles_per_64_bytes: NonNegative
    tile_overhead_cycles: NonNegative
    partials: Literal["l1", "registers"]
    accumulator_capacity_bytes: Count | None = None
    tile_m_max_rows: Count
    tile_n_max_columns: Count
    tile_k_step: Count
    tile_k_max: Count
    fused_rate_fraction: Fraction = 1.0

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
    """Elementwise work: group scales, transforms, quantization, unpacking.

    `scope`: whose rates these are. `unit`: of one compute unit, or of the whole of a systolic
    array; `column`: of the lane below each column of a systolic array, so that they grow with it.
    `add_elements_per_cycle`: adding P L^T to a y that was written before, after the MACs; None
    where the MAC kernel does it in passing.
    """

    scope: Literal["unit", "column"] = "unit"
    combine_elements_per_cycle: ElementsPerCycle
    combine_overlaps_mac: bool
    quantize_elements_per_cycle: ElementsPerCycle
    unpack_elements_per_cycle: ElementsPerCycle
    load_widens_bits: tuple[OperandBits, ...] = ()
    add_elements_per_cycle: ElementsPerCycle | None = None


class SideUnit(Block):
    """Multipliers beside the MAC array that can form P = X_b R^T while the array works."""

    macs_per_cycle: MacRate
    energy_pj_per_mac: Picojoules
