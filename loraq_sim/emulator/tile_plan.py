"""What a tile kernel needs to know of a GEMM before it sees any code: layout, limits, shifts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import Order

__all__ = ["ACCUMULATORS", "Choice", "Output", "Plan", "plan_of"]


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
