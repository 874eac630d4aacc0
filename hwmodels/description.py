"""What an accelerator file may say: one frozen model per block, a unit in every key name.

Units, MAC modes, kernels and vector work; memories and dispatch; the arithmetic of the data path;
energies; and, in `Accelerator`, all of them with the variants of the file. Every block carries
`source` (document, measurement or reasoning) and `confidence`; unknown keys are refused. The
numbers themselves live in `accelerators/*.yaml`.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from hwmodels.blocks import (
    ArraySource,
    Block,
    BytesPerCycle,
    BytesPerSecond,
    Capacity,
    Count,
    Dma,
    ElementsPerCycle,
    Fraction,
    Hertz,
    Kernel,
    KernelFamily,
    L1Capacity,
    MacRate,
    Name,
    Nanometers,
    Picojoules,
    Seconds,
    Side,
    Strict,
    Text,
    Watts,
    with_energies,
)
from hwmodels.errors import html_card
from hwmodels.operands import Operand
from hwmodels.synthesis import LIMITS

__all__ = [
    "Accelerator",
    "ArraySource",
    "Block",
    "Dataflow",
    "Datapath",
    "Dispatch",
    "Dma",
    "Dram",
    "Energy",
    "FloatOverflow",
    "Kernel",
    "KernelFamily",
    "L1",
    "L2",
    "Memories",
    "Mode",
    "SideUnit",
    "Strict",
    "TRANSFORMS",
    "Units",
    "Variant",
    "Vector",
]

# What the emulator and the RTL take; a file that says more is refused where it is read.
Products = Annotated[int, Field(ge=1, le=LIMITS["products_per_add"][1])]
OperandBits = Annotated[int, Field(ge=2, le=16)]
Family = Literal["int", "mxint", "mxfp", "nvfp"]
Dataflow = Literal["weight_stationary", "output_stationary", "input_stationary"]


class Units(Block):
    """The compute units and how operands reach them.

    `array`: a rows x columns mesh of cores, a row shares activations and a column shares weights.
    `grid`: independent units (streaming multiprocessors) that take output tiles in waves.
    `systolic`: one rows x columns array of multiply-accumulate elements; `dataflow` names the
    operand that stays in the elements. `power_fraction`: of the clock, what the power limit leaves
    when the units of a grid all multiply; a kernel that fills no more than this part runs at all of
    it.
    """

    organization: Literal["array", "grid", "systolic"]
    rows: Side
    columns: Side
    clock_hz: Hertz
    dataflow: Dataflow | None = None
    power_fraction: Fraction = 1.0

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
    `unsigned`: operands that may be unsigned: activations, weights or both; an unsigned code of
    fewer bits than the mode is a signed one of it in any case.
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
    unsigned: tuple[Literal["activations", "weights"], ...] = ()
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

    def holds(self, operand: Operand, which: Literal["activations", "weights"]) -> bool:
        """Whether codes of `operand` are codes of the mode: width, kind and sign fit.

        Integers of 16 bits are none of a float mode, which holds 11 of them.
        """
        if operand.is_float or operand.letter == "i":
            wanted = "float" if operand.is_float else "int"
            if self.kind != wanted:
                return False
        offered = self.activation_bits if which == "activations" else self.weight_bits
        spare = operand.is_unsigned and which not in self.unsigned and self.kind == "int"
        return operand.bits + spare <= offered

    def takes(self, family: str) -> bool:
        """Whether the mode multiplies elements of `family`."""
        if self.families is not None:
            return family in self.families
        return self.is_wide_float or (self.kind == "int" and family in ("int", "mxint"))


class Vector(Block):
    """Elementwise work: group scales, transforms, quantization, unpacking.

    `scope`: whose rates these are. `unit`: of one compute unit, or of the whole of a systolic
    array; `column`: of the lane below each column of a systolic array, so that they grow with it.
    `add_elements_per_cycle`: adding P L^T to a y that was written before, after the MACs; None
    where the MAC kernel does it in passing. `transform_elements_per_cycle`: smoothing, shifting,
    and a stage of a Hadamard rotation, an operation per element each; None: as fast as combining.
    """

    scope: Literal["unit", "column"] = "unit"
    combine_elements_per_cycle: ElementsPerCycle
    combine_overlaps_mac: bool
    quantize_elements_per_cycle: ElementsPerCycle
    unpack_elements_per_cycle: ElementsPerCycle
    load_widens_bits: tuple[OperandBits, ...] = ()
    add_elements_per_cycle: ElementsPerCycle | None = None
    transform_elements_per_cycle: ElementsPerCycle | None = None


class SideUnit(Block):
    """Multipliers beside the MAC array that can form P = X_b R^T while the array works."""

    macs_per_cycle: MacRate
    energy_pj_per_mac: Picojoules


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
    """Off-chip memory as the units see it.

    `stream_bytes_per_s`: what one DMA stream between DRAM and an array carries. X comes in over as
    many streams as the array has units along the rows of y, W over as many as along its
    columns, and y leaves over one of each column of the array.
    """

    bandwidth_bytes_per_s: BytesPerSecond
    sustained_fraction: Annotated[float, Field(gt=0, le=1)]
    latency_s: Seconds
    stream_bytes_per_s: BytesPerSecond | None = None

    @property
    def sustained_bytes_per_s(self) -> float:
        """Bandwidth a streaming kernel reaches."""
        return self.bandwidth_bytes_per_s * self.sustained_fraction


class Memories(Strict):
    """The three levels of the hierarchy; `dma`: what descriptors between them can say, if known."""

    l1: L1
    l2: L2
    dram: Dram
    dma: Dma | None = None


class Dispatch(Block):
    """What one kernel start costs; `graph_launch_s`: inside a recorded graph or chain of layers."""

    launch_s: Seconds
    graph_launch_s: Seconds | None = None


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
    `p_format` and `out_format` are what kernels write P and the output in today; `zero_point` says
    where the correction of zero points enters: as the initial value of the accumulator, or after.
    `tensor_core` names the published rule by which float instructions of this machine add; the
    emulator follows it where its combine step is that name. `block_rounding` is the mode in which
    values become mantissas of block formats, where that is not `rounding`.
    """

    acc_bits: Annotated[int, Field(ge=LIMITS["acc_bits"][0], le=LIMITS["acc_bits"][1])]
    overflow: Literal["wrap", "saturate", "saturate_symmetric"]
    products_per_add: Products
    accumulators: Products
    tree_bits: Annotated[int, Field(ge=LIMITS["tree_bits"][0], le=64)] | None = None
    combine: Literal["fp32", "bf16", "fp16"]
    tensor_core: Literal["turing", "ampere", "ada", "hopper", "blackwell", "cdna3"] | None = None
    rounding: Literal[
        "floor", "ceil", "symmetric_floor", "symmetric_ceil", "negative_inf",
        "positive_inf", "symmetric_zero", "symmetric_inf", "conv_even", "conv_odd",
    ]  # fmt: skip
    block_rounding: Literal[
        "floor", "ceil", "symmetric_floor", "symmetric_ceil", "negative_inf",
        "positive_inf", "symmetric_zero", "symmetric_inf", "conv_even", "conv_odd",
    ] | None = None  # fmt: skip
    saturation: Literal["none", "saturate", "symmetric"]
    p_format: Literal["branch", "fp16", "bf16"]
    out_format: Literal["bf16", "fp16", "fp32"]
    zero_point: Literal["initial", "after"] = "initial"
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
    """Energy per byte, per element and per second at one process node.

    `tdp_w`: what the board may take for long; no GEMM of a shipped machine implies more.
    """

    node_nm: Nanometers
    l1_pj_per_byte: Picojoules
    l2_pj_per_byte: Picojoules
    dram_pj_per_byte: Picojoules
    combine_pj_per_element: Picojoules
    quantize_pj_per_element: Picojoules
    unpack_pj_per_element: Picojoules
    static_w: Watts
    tdp_w: Watts | None = None
    transform_pj_per_element: Picojoules | None = None

    @property
    def transform_pj(self) -> float:
        """Of an operation on an element of X: that of combining where the file does not say."""
        given = self.transform_pj_per_element
        return self.combine_pj_per_element if given is None else given


class Variant(Block):
    """Another reading of the machine where sources conflict, or another product of its family.

    `set` maps key paths (`modes.int8xint4.macs_per_cycle`) to values; `products` are product names
    by which a measured row says that it was taken on this variant.
    """

    name: Name
    products: tuple[Text, ...] = ()
    set: Annotated[dict[str, int | float | str], Field(min_length=1)]


Transform = Literal["hadamard", "smooth", "residual"]
TRANSFORMS: tuple[Transform, ...] = ("hadamard", "smooth", "residual")
"""What a kernel may do to X: rotate it, divide its channels, form D of a residual input."""


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
    array: ArraySource | None = None
    kernels: tuple[KernelFamily, ...] = ()
    variants: tuple[Variant, ...] = ()
    # What its kernels can do to the inputs of a layer; `hwmodels.check_transforms` holds to it.
    transforms: tuple[Transform, ...] = TRANSFORMS
    # Keys, or the blocks they are in, whose values nobody has said: `hwmodels.assumed_keys`.
    assumed: tuple[Text, ...] = ()

    # Mode choices and the tile grid depend on nothing but this description.
    _cache: dict[Any, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _energies_may_come_from_gates(cls, content: Any) -> Any:
        if isinstance(content, dict) and isinstance(content.get("array"), dict):
            return with_energies(content)
        return content

    @model_validator(mode="after")
    def _modes_are_distinct(self) -> Self:
        lists = (("modes", self.modes), ("kernels", self.kernels), ("variants", self.variants))
        for what, items in lists:
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

    def vector_rate(self, work: Literal["combine", "quantize", "unpack", "transform"]) -> float:
        """Elements per cycle of one vector unit: all lanes of a systolic array are one unit."""
        rate = getattr(self.vector, f"{work}_elements_per_cycle")
        rate = self.vector.combine_elements_per_cycle if rate is None else rate
        return rate * self.units.columns if self.vector.scope == "column" else rate

    def __copy__(self) -> Self:
        # `model_copy(update=...)` starts here; what was cached for this machine must not follow.
        copy = super().__copy__()
        copy._cache = {}
        return copy

    def __repr__(self) -> str:
        modes = ", ".join(mode.name for mode in self.modes)
        dram = self.memories.dram.bandwidth_bytes_per_s
        return (
            f"Accelerator({self.name!r}: {self.title})\n"
            f"{self.units.count} units at {self.units.clock_hz / 1e9:.3g} GHz, DRAM "
            f"{dram / 1e9:.4g} GB/s; modes {modes}"
        )

    def _repr_html_(self) -> str:
        return _card(self)

    def digest(self) -> str:
        """Hex sha256 of the canonical content: equal for equal descriptions.

        What a variant or a kernel family sets may be 2 or 2.0, which say the same.
        """
        content = self.model_dump(mode="json")
        for part in (*content["variants"], *content["kernels"]):
            part["set"] = {
                key: int(value) if isinstance(value, float) and value.is_integer() else value
                for key, value in part["set"].items()
            }
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _card(hw: Accelerator) -> str:
    """Size, clock, memories and MAC modes of a machine, each with the confidence in it."""
    units, memories = hw.units, hw.memories
    facts = {
        "compute": f"{units.organization} of {units.rows} x {units.columns} units "
        f"at {units.clock_hz / 1e9:g} GHz ({units.confidence})",
        "memory of a unit": f"{memories.l1.capacity_bytes / 1024:,.0f} KiB "
        f"({memories.l1.confidence})",
        "shared memory": f"{memories.l2.capacity_bytes / 1024:,.0f} KiB ({memories.l2.confidence})",
        "DRAM": f"{memories.dram.sustained_bytes_per_s / 1e9:,.4g} GB/s sustained "
        f"({memories.dram.confidence})",
        "dispatch": f"{hw.dispatch.launch_s * 1e6:g} us ({hw.dispatch.confidence})",
        "accumulator": f"{hw.datapath.acc_bits} bits, {hw.datapath.overflow}",
        "variants": ", ".join(variant.name for variant in hw.variants) or "none",
    }
    per_cycle_s = units.count * units.clock_hz
    modes = [
        {
            "mode": mode.name,
            "activations": f"{mode.activation_bits} bit",
            "weights": f"{mode.weight_bits} bit",
            "MAC/cycle/unit": f"{mode.macs_per_cycle:,}",
            "peak TOPS": f"{2 * mode.macs_per_cycle * per_cycle_s / 1e12:,.4g}",
            "pJ/MAC": f"{mode.energy_pj_per_mac:g}",
            "confidence": mode.confidence,
        }
        for mode in hw.modes
    ]
    return html_card(f"{hw.name}: {hw.title}", facts, modes)
