"""What an accelerator file says of its kernels: how they are built, and the families of libraries.

`Strict` and `Block` are what all blocks of a file are made of.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hwmodels.quantities import BytesPerCycle, Count, Fraction, Name, NonNegative, Seconds, Text

__all__ = ["AttentionTiles", "Block", "Kernel", "KernelFamily", "Strict"]


class Strict(BaseModel):
    """Frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Block(Strict):
    """What every block says about where its numbers come from."""

    source: Text
    confidence: Literal["vendor", "measured", "inferred", "estimate"]
    uncertainty_percent: NonNegative | None = None


class Kernel(Block):
    """The inner kernel: register blocks, their overheads, and the tiles the search may use.

    `fused_rate_fraction`: MAC rate of a kernel that carries a branch, over that of a plain one
    (the branch takes registers and staging buffers from the main loop).
    `start_s`: what a kernel takes once before its first and after its last MAC (prologue, drain of
    the last tile), beside the launch.
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
        return self

    @property
    def sums_capacity_bytes(self) -> int | None:
        """Bytes the sums of a tile may take in registers; None where they stay in L1."""
        return self.accumulator_capacity_bytes if self.partials == "registers" else None


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


class KernelFamily(Block):
    """Kernels of one library and kind on this machine: what was fitted on their measured times.

    `serves`: plain GEMMs, GEMMs with a branch inside, or attention. `modes`: MAC modes it has
    kernels for (default: all). `m_max`: most rows it takes, for GEMV kernels. `matches`: words by
    which a measured row says that it is of this family. `set`: key paths of the machine and the
    values that hold under these kernels. `rows` (`branch_rows` of them with a branch), the ranges
    of their sizes, their modes and their errors describe the measured rows behind the values; none:
    assumed. `attention`: for families that serve it; of their ranges, M is queries, N keys and K
    the size of a head.
    """

    name: Name
    title: Text
    serves: Annotated[tuple[Literal["plain", "branch", "attention"], ...], Field(min_length=1)] = (
        "plain",
    )
    modes: tuple[Name, ...] = ()
    m_max: Count | None = None
    matches: tuple[Text, ...] = ()
    set: dict[str, int | float | str] = {}
    attention: AttentionTiles | None = None
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
        return self
