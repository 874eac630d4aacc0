"""What accelerator files are made of: numbers in units, blocks with a source, and kernel blocks.

Limits of a number are wide enough for any machine one would describe and narrow enough for a slip
of units to fall outside: 1.2 for 1.2 GHz, 17 for 17 GB/s, 130 for 130 us, joules for picojoules. A
number outside is refused with the key, the value, the range, and what it would be in a likely other
unit.

`Strict` and `Block` are what all blocks of a file are made of. Those of kernels are here: how they
are built, the families of libraries, what the descriptors that move their tiles can say; and what
takes the energies of modes from gates.
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from hwmodels.errors import AcceleratorError, quantity, written_units
from hwmodels.synthesis import load_node, synthesized_array

__all__ = [
    "ARRAY_FIELDS", "ArraySource", "AttentionTiles", "Block", "BytesPerCycle", "BytesPerSecond",
    "Capacity", "Count", "Dma",
    "ElementsPerCycle", "ElementwiseRate", "Fraction", "Hertz", "Kernel", "KernelFamily",
    "L1Capacity", "MacRate",
    "Name", "Nanometers", "NonNegative", "Picojoules", "Seconds", "Side", "Strict", "Text",
    "Watts", "with_energies",
]  # fmt: skip


def _between(
    low: float, high: float, unit: str, *slips: tuple[str, float], or_zero: bool = False
) -> Callable[[float], float]:
    """A check that a number lies from `low` to `high` `unit`.

    `slips`: other units people write, and what one of them is in `unit`; the first that brings the
    number into the range is suggested.
    """

    def check(value: float) -> float:
        if low <= value <= high or (or_zero and value == 0):
            return value
        zero = "0 or " if or_zero else ""
        hint = next(
            (
                f"; {value:g} {name} would be {value * factor:.10g}"
                for name, factor in slips
                if low <= value * factor <= high
            ),
            "",
        )
        raise ValueError(
            f"{value:g} {unit} is outside the plausible range, "
            f"{zero}{low:g} to {high:g} {unit}{hint}"
        )

    return check


def _limits(low: float, high: float) -> dict[str, float]:
    return {"minimum": low, "maximum": high}


_JOULES = (("J", 1e12), ("nJ", 1e3), ("fJ", 1e-3))
_BYTE_SIZES = (("KiB", 1024), ("MiB", 2**20), ("GiB", 2**30))

_MOST_TILE_SHAPES = 2**16
Count = Annotated[int, Field(ge=1, le=2**40)]
NonNegative = Annotated[float, Field(ge=0, le=1e15)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3)]

Side = Annotated[int, Field(ge=1, le=2**20)]
"""Rows or columns of units."""

Hertz = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e5, 1e11)),
    AfterValidator(_between(1e5, 1e11, "Hz", ("GHz", 1e9), ("MHz", 1e6))),
]
BytesPerSecond = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e6, 1e16)),
    AfterValidator(_between(1e6, 1e16, "B/s", ("GB/s", 1e9), ("MB/s", 1e6))),
]
Seconds = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 0.1)),
    AfterValidator(_between(0, 0.1, "s", ("us", 1e-6), ("ns", 1e-9))),
]
Capacity = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(1024, 2**40)),
    AfterValidator(_between(1024, 2**40, "B", *reversed(_BYTE_SIZES[:2]))),
]
L1Capacity = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(256, 2**32)),
    AfterValidator(_between(256, 2**32, "B", *_BYTE_SIZES[:2])),
]
BytesPerCycle = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e-2, 1e6)),
    AfterValidator(_between(1e-2, 1e6, "B/cycle", ("B/s at 1 GHz", 1e-9))),
]
ElementsPerCycle = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e-3, 1e6)),
    AfterValidator(_between(1e-3, 1e6, "elements/cycle", ("elements/s at 1 GHz", 1e-9))),
]
MacRate = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(1, 1e8)),
    AfterValidator(_between(1, 1e8, "MAC/cycle", ("MAC/s at 1 GHz", 1e-9))),
]
Picojoules = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 1e5)),
    AfterValidator(_between(1e-5, 1e5, "pJ", *_JOULES, or_zero=True)),
]
Nanometers = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(0.1, 1e4)),
    AfterValidator(_between(0.1, 1e4, "nm", ("m", 1e9), ("um", 1e3))),
]
Watts = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 1e5)),
    AfterValidator(_between(0, 1e5, "W", ("mW", 1e-3))),
]


def _in_units(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with quantities in the units of their keys; key paths of `set` too."""
    read = dict(content)
    for key, value in content.items():
        if isinstance(value, str):
            read[key] = quantity(str(key), value)
        elif key == "set" and isinstance(value, Mapping):
            read[key] = _in_units(value)
    return read


def _with_units_and_meanings(schema: dict[str, Any]) -> None:
    """Add to the schema of a block what its keys mean, and that their units may be written."""
    known = key_meanings()
    meanings = known["Block"] | known.get(schema.get("title", ""), {})
    for key, value in schema.get("properties", {}).items():
        for kind in value.get("anyOf", [value]):
            if written_units(key) and kind.get("type") in ("integer", "number"):
                kind["type"] = [kind["type"], "string"]
        if key in meanings:
            value["description"] = meanings[key]


def key_meanings() -> dict[str, dict[str, str]]:
    """What each key means, by block; ``key_meanings.toml`` has a sentence for every one."""
    path = Path(__file__).parent / "key_meanings.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversions but from units that a value is written in."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False,
        json_schema_extra=_with_units_and_meanings,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _read_units(cls, content: Any) -> Any:
        # What is no quantity stays a text: the check of its field then refuses it, by its name.
        return _in_units(content) if isinstance(content, Mapping) else content


class Block(Strict):
    """What every block says about where its numbers come from."""

    source: Text
    confidence: Literal["vendor", "measured", "inferred", "estimate", "given"]
    uncertainty_percent: NonNegative | None = None


class Kernel(Block):
    """The inner kernel: register blocks, their overheads, and the tiles the search may use.

    `fused_rate_fraction`: MAC rate of a kernel that carries a branch, over that of a plain one
    (the branch takes registers and staging buffers from the main loop).
    `start_s`: what a kernel takes once before its first and after its last MAC (prologue, drain of
    the last tile), beside the dispatch.
    `overlap_fraction`: of the shorter of compute and memory time, the share that hides behind the
    longer (1: the larger counts, as with deep pipelines; 0: both add, as with one stage).
    `split_k_max`: among how many units a grid may split the depth of one output tile.
    `balance`: tiles in whole waves (default), or dealt out evenly with cut tiles (stream-K).
    `m_axis`: whether rows of y lie along the rows of an array (default), its columns, or either.
    `output_cast`: sums become y on the way out (default), or are written as they are (fp32) and
    cast by a pass of their own.
    `tile_m_min_rows`, `tile_n_min_columns`: the smallest tile the kernels are built for (default:
    one register block). Tiles below the block are its halves, quarters and so on.
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
    start_s: Seconds = 0.0
    overlap_fraction: Annotated[float, Field(ge=0, le=1)] = 1.0
    split_k_max: Annotated[int, Field(ge=1, le=64)] = 1
    balance: Literal["waves", "stream_k"] | None = None
    m_axis: Literal["rows", "columns", "either"] | None = None
    output_cast: Literal["inside", "second_pass"] | None = None
    tile_m_min_rows: Count | None = None
    tile_n_min_columns: Count | None = None

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
        if (self.tile_m_min_rows or 1) > self.tile_m_max_rows:
            raise ValueError("tile_m_min_rows must be at most tile_m_max_rows")
        if (self.tile_n_min_columns or 1) > self.tile_n_max_columns:
            raise ValueError("tile_n_min_columns must be at most tile_n_max_columns")
        shapes = (self.tile_m_max_rows // self.register_block_m) * (
            self.tile_n_max_columns // self.register_block_n
        )
        if shapes > _MOST_TILE_SHAPES:
            raise ValueError(
                f"tiles of up to tile_m_max_rows={self.tile_m_max_rows} by tile_n_max_columns="
                f"{self.tile_n_max_columns} in steps of one register block are {shapes:,} shapes, "
                f"of which a search tries at most {_MOST_TILE_SHAPES:,}; raise register_block_m or "
                "_n, or lower the largest tile"
            )
        return self

    @property
    def sums_capacity_bytes(self) -> int | None:
        """Bytes the sums of a tile may take in registers; None where they stay in L1."""
        return self.accumulator_capacity_bytes if self.partials == "registers" else None


class Dma(Block):
    """What one descriptor of the DMA engines that feed the units can move.

    All goes by words of `word_bytes`: a line of a tile (its part of one row of X or of W) and a row
    in DRAM start at a word and are padded to whole ones. Of a tile, a line has at most
    `wrap_max_words` words and there are as many lines at most; from one row to the next it steps
    over `step_max_words` at most; all of an operand's tile is one transfer of `length_max_words`.
    """

    word_bytes: Count
    wrap_max_words: Count
    step_max_words: Count
    length_max_words: Count

    def words(self, elements: int, bits: int) -> int:
        """Words of a line of `elements` codes."""
        return -(-elements * bits // (8 * self.word_bytes))

    def pads(self, elements: int, bits: int) -> bool:
        """Whether a line does not end with a word."""
        return elements * bits % (8 * self.word_bytes) != 0

    def line_step(self, bits: int) -> int:
        """Least number of elements that fill whole words."""
        return 8 * self.word_bytes // math.gcd(bits, 8 * self.word_bytes)


Range = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]


class AttentionTiles(Strict):
    """How attention kernels cut the work: what one pass takes on, and what softmax costs.

    A pass takes `query_rows` queries of `heads` heads and `value_columns` columns of the values;
    queries times keys are formed again for every block of value columns. `pass_s`: seconds a pass
    takes beside its arithmetic. `softmax_ops_per_score`: operations of the vector unit (maximum,
    exponential, sum, rescaling, conversions) for each score.
    """

    query_rows: Count
    heads: Count
    value_columns: Count
    pass_s: Seconds
    softmax_ops_per_score: NonNegative


class ElementwiseRate(Strict):
    """How fast one elementwise kernel runs: elements a cycle of the whole machine, units in use."""

    elements_per_cycle: ElementsPerCycle
    units: Count


Serves = Literal["plain", "branch", "attention", "elementwise"]


class KernelFamily(Block):
    """Kernels of one library and kind on this machine: what was fitted on their measured times.

    `serves`: plain GEMMs, GEMMs with a branch inside, attention, or elementwise work. `modes`: MAC
    modes it has kernels for (default: all). `m_max`: most rows it takes, for GEMV kernels.
    `matches`: words by which a measured row says that it is of this family. `set`: key paths of the
    machine and the values that hold under these kernels. `rows` (`branch_rows` of them with a
    branch), the ranges of their sizes, their modes and their errors describe the measured rows
    behind the values; none: assumed. `attention`: for families that serve it; of their ranges, M
    is queries, N keys and K the size of a head.
    """

    name: Name
    title: Text
    serves: Annotated[tuple[Serves, ...], Field(min_length=1)] = ("plain",)
    modes: tuple[Name, ...] = ()
    m_max: Count | None = None
    matches: tuple[Text, ...] = ()
    set: dict[str, int | float | str] = {}
    attention: AttentionTiles | None = None
    elementwise: dict[Name, ElementwiseRate] | None = None
    rows: Annotated[int, Field(ge=0)] = 0
    branch_rows: Annotated[int, Field(ge=0)] = 0
    measured_modes: tuple[Name, ...] = ()
    measured_m: Range | None = None
    measured_n: Range | None = None
    measured_k: Range | None = None
    mean_error: NonNegative | None = None
    worst_error: NonNegative | None = None

    @model_validator(mode="after")
    def _rows_have_a_range_and_errors(self) -> Self:
        said = (self.measured_m, self.measured_n, self.measured_k, self.mean_error)
        if self.rows and any(item is None for item in (*said, self.worst_error)):
            raise ValueError(
                "a family with rows needs measured_m, measured_n, measured_k, mean_error and "
                "worst_error"
            )
        if ("attention" in self.serves) != (self.attention is not None):
            raise ValueError("a family that serves attention, and no other, has a block attention")
        if ("elementwise" in self.serves) != (self.elementwise is not None):
            raise ValueError(
                "a family that serves elementwise work, and no other, has a block elementwise"
            )
        return self


class ArraySource(Block):
    """Where the energies of integer modes come from, in place of numbers in the file.

    `from: synthesis`: gates of the data path's array in the widths of each mode, on `node_nm`.
    Modes then leave `energy_pj_per_mac` out.
    """

    model_config = ConfigDict(populate_by_name=True)

    origin: Literal["synthesis"] = Field(alias="from")
    node_nm: Count
    source: Text = "gates of the synthesized RTL, and figures of the node (process_nodes.yaml)"
    confidence: Literal["vendor", "measured", "inferred", "estimate"] = "estimate"


ARRAY_FIELDS = ("acc_bits", "overflow", "products_per_add", "accumulators", "tree_bits")


def with_energies(content: dict[str, Any]) -> dict[str, Any]:
    """The file with the energies of its integer modes taken from gates, as far as it is readable.

    What is wrong with its blocks is told by their own rules.
    """
    array, modes = content["array"], content.get("modes")
    node = array.get("node_nm")
    datapath = content.get("datapath")
    try:
        load_node(node)
    except AcceleratorError as error:
        raise ValueError(f"array.node_nm: {error}") from None
    if not isinstance(datapath, Mapping) or not isinstance(modes, list | tuple):
        return content
    known = {name: datapath[name] for name in ARRAY_FIELDS if datapath.get(name) is not None}
    filled = []
    for mode in modes:
        if isinstance(mode, Mapping) and mode.get("kind") == "int":
            try:
                energy = synthesized_array(
                    SimpleNamespace(**known),
                    a_bits=mode.get("activation_bits", 8),
                    w_bits=mode.get("weight_bits", 8),
                    node_nm=node,
                ).energy_pj_per_mac
            except AcceleratorError:
                energy = 0.0  # The rule of the key that is out of range says so, with its line.
            mode = {**mode, "energy_pj_per_mac": energy}
        filled.append(mode)
    return {**content, "modes": tuple(filled)}
