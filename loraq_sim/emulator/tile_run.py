"""Run one tile kernel over a whole GEMM: pack A, say where everything lies, collect the totals."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, Norms
from loraq_sim.emulator.mac_array import MacArray, overflow_limits
from loraq_sim.emulator.packed_weight import Layout, Order, PackedWeight, aligned_empty

__all__ = ["Choice", "TileJob", "Totals", "kernels_of", "run_kernel"]

_NEVER = 2**31 - 1
# Multiply-adds below which starting threads costs more than it gains.
_WORTH_THREADS = 2**24


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """The operands of one GEMM and what is known of them; codes of `a` are int8 or uint8."""

    a: NDArray[np.int8] | NDArray[np.uint8]
    weight: PackedWeight
    a_norms: Norms
    bounds: Bounds
    mac: MacArray
    init: NDArray[np.int64] | None
    path: str
    threads: int = 1

    @property
    def unsigned(self) -> bool:
        """Whether the bytes of `a` are unsigned."""
        return self.a.dtype == np.uint8

    @property
    def chunk(self) -> int:
        """Products per add, as far as K goes."""
        return min(self.mac.products_per_add, max(self.a.shape[1], 1))


class Choice(NamedTuple):
    """A kernel by name and how it wants its operands."""

    name: str
    order: Order
    a_shift: int = 0
    w_shift: int = 0


class Totals(NamedTuple):
    """Overflows, outputs with any, first K index (or None), lowest and highest prefix."""

    overflows: int
    affected: int
    first_k: int | None
    low: int
    high: int


def kernels_of(job: TileJob) -> Mapping:
    """Return the tile kernels of the job's path by name."""
    from loraq_sim.kernels.processor import tile_kernels

    return tile_kernels(job.path)


def run_kernel(
    job: TileJob,
    choice: Choice,
    out: NDArray[np.int32],
    only: tuple[NDArray[np.bool_], int] | None = None,
) -> Totals:
    """Run one kernel, in bands of rows where there are threads; writes `out`."""
    kernel = kernels_of(job)[choice.name]
    shape = kernel.shape
    rows = out.shape[0]
    panels = -(-rows // shape.rows)
    threads = min(job.threads, panels)
    if threads <= 1 or job.a.size * out.shape[1] < _WORTH_THREADS:
        return _run_band(job, choice, kernel, out, slice(0, rows), only)
    cuts = [i * panels // threads * shape.rows for i in range(threads)] + [rows]
    job.weight.panels(_layout(job, choice, shape))  # once, before the threads ask for it
    with ThreadPoolExecutor(threads) as pool:
        bands = [slice(start, stop) for start, stop in zip(cuts[:-1], cuts[1:], strict=True)]
        parts = list(pool.map(lambda band: _run_band(job, choice, kernel, out, band, only), bands))
    firsts = [part.first_k for part in parts if part.first_k is not None]
    return Totals(
        overflows=sum(part.overflows for part in parts),
        affected=sum(part.affected for part in parts),
        first_k=min(firsts, default=None),
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
    )


def _layout(job: TileJob, choice: Choice, shape) -> Layout:
    offset = 128 if choice.order.codes == "bytes" and not job.unsigned else 0
    return Layout(choice.order, shape.width, choice.w_shift, offset, shape.moving)


_NO_INIT = np.zeros((0, 0), np.int32)
_ALL = np.zeros((0, 0), np.uint8)


def _run_band(job: TileJob, choice: Choice, kernel, out, band: slice, only) -> Totals:
    """Run one kernel on a band of rows, which starts with a panel."""
    from loraq_sim.kernels.tile_loops import run_tiles

    shape = kernel.shape
    mac, order = job.mac, choice.order
    panels = job.weight.panels(_layout(job, choice, shape))
    a = _pack_a(job, choice, shape, job.a[band])
    segments = _segments(order, shape, job.a.shape[1])
    lo, hi = (0, 0) if choice.name == "exact" else _lane_limits(mac, choice)
    mode = 1 if shape.rule == "measure" else 2 if shape.rule.startswith("count") else 0
    up, down = _result_shifts(mac, choice)
    # Exact sums merge without a limit.
    merge = (-(2**62), 2**62) if mode == 1 else (mac.lo, mac.hi)
    statistics = np.zeros(shape.statistics_vectors * shape.width // shape.vectors, np.int32)
    if mode == 2:
        statistics[-shape.width :] = _NEVER
    lane = np.int16 if order.codes == "halves" else np.int32
    todo, wanted = _ALL, 0
    if only is not None:
        todo, wanted = only
        todo = todo[band.start // shape.rows :].view(np.uint8)
    totals = np.array([0, 0, _NEVER, 0, 0], np.int64)
    run_tiles(
        *(
            kernel.address,
            shape.rows,
            shape.width,
            a,
            panels.w,
            panels.offsets,
            panels.last,
            segments,
        ),
        _inner_steps(order),
        np.array([lo, hi, up, down], np.int64),
        (merge[0], merge[1]),
        mac.overflow == "wrap" and mode == 2,
        _NO_INIT if job.init is None else np.ascontiguousarray(job.init[band], np.int32),
        *(todo, wanted, mode, job.a.shape[1], max(order.chunk, 1), totals),
        *(np.zeros((2, shape.rows, shape.width), lane), statistics, out[band]),
    )
    overflows, affected, first, low, high = totals.tolist()
    return Totals(overflows, affected, None if first == _NEVER else first, low, high)


def _lane_limits(mac: MacArray, choice: Choice) -> tuple[int, int]:
    if choice.name.startswith("symmetric"):
        return mac.lo << (choice.a_shift + choice.w_shift), 0
    return overflow_limits(min(mac.acc_bits, 32), mac.overflow)


def _result_shifts(mac: MacArray, choice: Choice) -> tuple[int, int]:
    """(up, down) of ``(acc << up) >> down``: wrap to the width, or take off the alignment."""
    if choice.name == "exact" or choice.name.startswith("count_wrap"):
        spare = max(32 - mac.acc_bits, 0) if mac.overflow == "wrap" else 0
        return spare, spare
    return 0, choice.a_shift + choice.w_shift


def _inner_steps(order: Order) -> int:
    return 1 if order.chunk <= 1 else order.padded_chunk // order.group


def _segments(order: Order, shape, k: int) -> NDArray[np.int64]:
    """Byte offsets into the panels and turns of the chunk loop of each accumulator, (P, 4)."""
    ends = order.ends(k)
    starts = np.concatenate([[0], ends[:-1]])
    lane_bytes = {"bytes": 1, "words": 2, "halves": 2}[order.codes]
    dwords = 2 if shape.single else 1
    by_dot = order.chunk == 0 or shape.single or shape.rule in ("none", "raise")
    turn = order.group if by_dot else order.padded_chunk
    return np.stack(
        [
            starts // order.group * 4 * dwords * shape.rows,
            starts * lane_bytes * shape.width,
            starts // order.padded_chunk * 4 * shape.width,
            (ends - starts) // turn,
        ],
        axis=1,
    )


def _pack_a(job: TileJob, choice: Choice, shape, codes: NDArray) -> NDArray[np.int32]:
    from loraq_sim.kernels.pack_panels import pack_bytes, pack_doubled, pack_words

    ordered = choice.order.apply(codes).view(np.int8)
    k, panels = ordered.shape[1], -(-codes.shape[0] // shape.rows)
    mask = np.int16(255 if job.unsigned else -1)
    group = 1 if shape.single else choice.order.group
    a = aligned_empty((panels, k // group * shape.rows), np.int32)
    if choice.order.codes == "bytes":
        flip = np.int32(0 if job.unsigned else -0x7F7F7F80)
        pack_bytes(ordered.view(np.int32), flip, shape.rows, a)
    elif choice.order.codes == "words":
        pack_words(ordered, mask, np.int16(choice.a_shift), shape.single, shape.rows, a)
    else:
        pack_doubled(ordered, mask, shape.rows, a)
    return a
