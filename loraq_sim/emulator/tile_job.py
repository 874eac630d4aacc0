"""What a tile kernel needs to know of a GEMM before it sees any code: layout, limits, shifts.

The operands of one GEMM as the tile routes pass them on, with what is derived from them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, Norms, Sample
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import Order, PackedWeight
from loraq_sim.kernels.processor import LOOPS, KernelUnavailable, refuse_path

__all__ = [
    "ACCUMULATORS",
    "Choice",
    "Output",
    "Plan",
    "TileJob",
    "kernels_of",
    "on_a_path_that_compiles",
    "plan_of",
]


class Choice(NamedTuple):
    """A kernel by name and how it wants its operands."""

    name: str
    order: Order
    a_shift: int = 0
    w_shift: int = 0


class Plan(NamedTuple):
    """How a kernel runs, whatever the codes are."""

    packing: tuple[int, int, int]
    dwords: int
    segments: list[tuple[int, int, int, int]]
    inner: int
    limits: tuple[int, int]
    shifts: tuple[int, int]
    mode: str
    statistics: int
    chunk: int
    lane: type
    nested: tuple[int, int, int, int]

    @property
    def start_shift(self) -> int:
        """Left shift of initial values: an aligned accumulator starts aligned.

        A wrapping one has its low bits where they are.
        """
        return 0 if self.shifts[0] else self.shifts[1]


@dataclass(frozen=True, eq=False)
class Output:
    """What a tile stores: its dtype, and the arguments of `kernels.tile_arguments` that say so."""

    dtype: np.dtype
    arguments: Mapping[str, int]


_ROUNDING = ("shift", "dropped", "add", "negative", "odd", "lo", "hi")
ACCUMULATORS = Output(
    np.dtype(np.int32), {"out_bytes": 0, **{f"srs_{name}": 0 for name in _ROUNDING}}
)


@lru_cache(maxsize=1024)
def plan_of(choice: Choice, shape, k: int, mac: MacArray | TwoLevelArray, unsigned: bool) -> Plan:
    """Return how a kernel of `shape` runs over K = `k`."""
    order = choice.order
    group = 1 if shape.single else order.group
    return Plan(
        packing=_packing(choice, shape, unsigned),
        dwords=int(order.ends(k)[-1]) // group * shape.rows,
        segments=_segments(order, shape, k),
        inner=1 if order.chunk <= 1 else order.padded_chunk // order.group,
        limits=_lane_limits(mac, choice),
        shifts=_result_shifts(mac, choice),
        mode="count" if shape.rule.startswith("count") else shape.rule,
        statistics=shape.statistics_vectors * shape.width // shape.vectors,
        chunk=max(order.turn, 1),
        lane=np.int16 if order.codes == "halves" else np.int32,
        nested=_inner_rule(mac, order) if shape.nested else (0, 0, 0, 0),
    )


def _packing(choice: Choice, shape, unsigned: bool) -> tuple[int, int, int]:
    """(kind, flip or mask, shift) for `kernels.pack_panels.pack_rows`."""
    from loraq_sim.kernels.pack_panels import BYTES, DOUBLED, WORDS, WORDS_SINGLE

    mask = 255 if unsigned else -1
    if choice.order.codes == "bytes":
        return BYTES, 0 if unsigned else -0x7F7F7F80, 0
    if choice.order.codes == "halves":
        return DOUBLED, mask, 0
    return WORDS_SINGLE if shape.single else WORDS, mask, choice.a_shift


def _inner_rule(mac: MacArray | TwoLevelArray, order: Order) -> tuple[int, int, int, int]:
    """(chunks of a column, high bits that its sum drops, lowest, highest sum) in 32-bit lanes."""
    if isinstance(mac, TwoLevelArray):
        bits, overflow = min(mac.column.acc_bits, 32), mac.column.overflow
    else:
        bits, overflow = min(mac.tree_bits, 32), mac.tree_rule
    drop = 32 - bits if overflow == "wrap" else 0
    limits = overflow_limits(32 if drop else bits, overflow)
    return order.padded_turn // order.padded_chunk, drop, *limits


def _lane_limits(mac: MacArray | TwoLevelArray, choice: Choice) -> tuple[int, int]:
    if choice.name.startswith("nested") and mac.overflow == "wrap":
        return overflow_limits(32, "wrap")
    if choice.name == "exact":
        return 0, 0
    if choice.name.startswith("symmetric"):
        return mac.lo << (choice.a_shift + choice.w_shift), 0
    return overflow_limits(min(mac.acc_bits, 32), mac.overflow)


def _result_shifts(mac: MacArray | TwoLevelArray, choice: Choice) -> tuple[int, int]:
    """(up, down) of ``(acc << up) >> down``: wrap to the width, or take off the alignment."""
    if choice.name.startswith(("exact", "count_wrap", "nested")):
        spare = max(32 - mac.acc_bits, 0) if mac.overflow == "wrap" else 0
        return spare, spare
    return 0, choice.a_shift + choice.w_shift


def _segments(order: Order, shape, k: int) -> list[tuple[int, int, int, int]]:
    """For each accumulator, bytes into panels of A, W and offsets, and turns of the chunk loop."""
    ends = order.ends(k).tolist()
    lane_bytes = {"bytes": 1, "words": 2, "halves": 2}[order.codes]
    dword_bytes = 8 if shape.single else 4
    by_dot = order.chunk == 0 or shape.single or shape.rule in ("none", "raise")
    turn = order.group if by_dot else order.padded_turn
    return [
        (
            start // order.group * dword_bytes * shape.rows,
            start * lane_bytes * shape.width,
            start // order.padded_chunk * 4 * shape.width,
            (end - start) // turn,
        )
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


Run = TypeVar("Run", bound=Callable)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """The operands of one GEMM; codes of `a` are int8 or uint8. Norms and bounds come on demand."""

    a: NDArray[np.int8] | NDArray[np.uint8]
    weight: PackedWeight
    mac: MacArray | TwoLevelArray
    init: NDArray[np.int64] | None
    path: str
    threads: int = 1
    output: Output = ACCUMULATORS

    @cached_property
    def a_norms(self) -> Norms:
        """Range and norms of the activations."""
        return Norms(self.a)

    @cached_property
    def bounds(self) -> Bounds:
        """What is proved of the sums, as far as it matters for this array."""
        init = None if self.init is None else self.init_ends
        anything = Bounds.of_codes(255 if self.unsigned else 128, self.weight.norms, init)
        if self._enough(anything):
            return anything
        # Some rows refute a proof sooner than all of them: their norms are at most the largest.
        refuted = not self.sample.bounds(self.weight.norms, anything).accumulator_fits(self.mac)
        if refuted and anything.reach < 2**31 and self.mac.tree_bits is None:
            return anything
        quick = Bounds.of_codes(self.a_norms.top, self.weight.norms, init)
        if self._enough(quick):
            return quick
        return Bounds.of_norms(self.a_norms, self.weight.norms, init)

    def _enough(self, bounds: Bounds) -> bool:
        fits = bounds.accumulator_fits(self.mac) and bounds.reach < 2**31
        return fits and self.mac.tree_bits is None

    @cached_property
    def init_rows(self) -> NDArray[np.int64]:
        """Initial values (1 or M, N): one row where all rows start alike."""
        alike = self.init.strides[0] == 0
        return np.ascontiguousarray(self.init[:1] if alike else self.init)

    @cached_property
    def init_ends(self) -> NDArray[np.int64]:
        """Lowest and highest initial value, (2,), or (0,) where there are none."""
        rows = self.init_rows
        return np.array([rows.min(), rows.max()] if rows.size else [], np.int64)

    @cached_property
    def sample(self) -> Sample:
        """Norms of some rows, at least one in each panel of a plain kernel."""
        has_tiles = self.path != LOOPS
        return Sample.of(self.a, kernels_of(self)["exact"].shape.rows if has_tiles else 16)

    @property
    def unsigned(self) -> bool:
        """Whether the bytes of `a` are unsigned."""
        return self.a.dtype == np.uint8

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.a.shape[0] * self.weight.codes.size

    @property
    def chunk(self) -> int:
        """Products per add into an accumulator, as far as K goes."""
        two_level = isinstance(self.mac, TwoLevelArray)
        products = self.mac.column_k if two_level else self.mac.products_per_add
        return min(products, max(self.a.shape[1], 1))


def on_a_path_that_compiles(run: Run) -> Run:
    """Run again on the next path where the tiles of one do not compile."""

    @wraps(run)
    def call(*args, **options):
        while True:
            try:
                return run(*args, **options)
            except KernelUnavailable as error:
                refuse_path(error)

    return call


def kernels_of(job: TileJob) -> Mapping:
    """Return the tile kernels of the job's path by name."""
    from loraq_sim.kernels.processor import tile_kernels

    return tile_kernels(job.path)
