"""Run one tile kernel over a whole GEMM: pack A, say where everything lies, collect the totals."""

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, Norms, Sample
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import Layout, PackedWeight, Panels, address_of, aligned_empty
from loraq_sim.emulator.tile_plan import ACCUMULATORS, Choice, Output, Plan, plan_of
from loraq_sim.emulator.tile_threads import WORTH_THREADS, run_together
from loraq_sim.kernels.tile_arguments import NEVER, TileArguments

__all__ = [
    *("TileJob", "Totals"),
    *("block_panels", "kernels_of", "plain_arguments", "run_kernel", "scratch"),
]

# Packed rows of A that stay in the second-level cache while they meet all of W.
_BLOCK_BYTES = 2**19
# A row of zeros for a tile of any width.
_ZEROS = np.zeros(256, np.int32)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """The operands of one GEMM; codes of `a` are int8 or uint8. Norms and bounds come on demand."""

    a: NDArray[np.int8] | NDArray[np.uint8]
    weight: PackedWeight
    mac: MacArray
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
        return Sample.of(self.a, kernels_of(self)["exact"].shape.rows)

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
        """Products per add, as far as K goes."""
        return min(self.mac.products_per_add, max(self.a.shape[1], 1))


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
    only: tuple[NDArray[np.bool_], int] | None = None,
    out: NDArray[np.integer] | None = None,
) -> tuple[NDArray[np.integer], Totals]:
    """Run one kernel, block of rows by block, on as many threads as the job asks for.

    `only` picks tiles by their mark. Returns a matrix padded to whole tiles (`out` if given) of
    what the job wants out, and the totals.
    """
    kernel = kernels_of(job)[choice.name]
    shape = kernel.shape
    panels = job.weight.panels(_layout(job, choice, shape))
    row_panels = -(-job.a.shape[0] // shape.rows)
    if out is None:
        out = aligned_empty(
            (row_panels * shape.rows, len(panels.w) * shape.width), job.output.dtype
        )
    plan = plan_of(choice, shape, job.a.shape[1], job.mac, job.unsigned)
    threads = min(job.threads, row_panels) if job.work >= WORTH_THREADS else 1
    block = block_panels(row_panels, plan.dwords, threads)
    call = _Blocks(job, choice, kernel, panels, out, only)
    starts = iter(range(0, row_panels, block))  # shared by the threads: each takes the next one
    parts: list[Totals] = []

    def run() -> None:
        packed = scratch("packed", (block, plan.dwords), np.int32)
        totals = np.array([0, 0, NEVER, 0, 0], np.int64)
        for first in starts:
            call.run(plan, first, min(first + block, row_panels), packed, totals)
        parts.append(Totals(*totals.tolist()))

    run_together(threads, run)
    first_k = min(part.first_k for part in parts)
    return out, Totals(
        overflows=sum(part.overflows for part in parts),
        affected=sum(part.affected for part in parts),
        first_k=None if first_k == NEVER else first_k,
        low=min(part.low for part in parts),
        high=max(part.high for part in parts),
    )


def _layout(job: TileJob, choice: Choice, shape) -> Layout:
    offset = 128 if choice.order.codes == "bytes" and not job.unsigned else 0
    return Layout(choice.order, shape.width, choice.w_shift, offset, shape.moving)


_THREAD = threading.local()


def scratch(name: str, shape: tuple[int, int], dtype: type) -> NDArray:
    """Return room for an array, which this thread overwrites when it asks for the same name.

    Fresh pages would cost more than packing.
    """
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    kept = _THREAD.__dict__.get(name)
    if kept is None or kept.size < size:
        kept = _THREAD.__dict__[name] = aligned_empty((1, size), np.int8)[0]
    return kept[:size].view(dtype).reshape(shape)


def block_panels(row_panels: int, dwords: int, threads: int) -> int:
    """Return how many row panels make a block: even blocks, as many for each thread.

    Each block streams all of W.
    """
    most = max(1, _BLOCK_BYTES // (4 * dwords + 1))
    rounds = math.ceil(row_panels / most / threads)
    blocks = min(rounds * threads, row_panels)
    return -(-row_panels // blocks)


def plain_arguments(job: TileJob, choice: Choice) -> tuple["TileKernel", Plan, Panels, list[int]]:  # noqa: F821
    """Return a plain kernel, its plan, its W and its arguments, with addresses of A and out 0."""
    kernel = kernels_of(job)[choice.name]
    shape, nothing = kernel.shape, np.zeros(0, np.int32)
    panels = job.weight.panels(_layout(job, choice, shape))
    plan = plan_of(choice, shape, job.a.shape[1], job.mac, job.unsigned)
    packed = np.zeros((1, plan.dwords), np.int32)
    out = np.zeros((1, len(panels.w) * shape.width), job.output.dtype)
    call = _Blocks(job, choice, kernel, panels, out, None)
    given = call.arguments(plan, 0, 0, packed, _ZEROS, nothing, nothing, out)
    return kernel, plan, panels, list(given._replace(a=0, out=0))


class _Blocks(NamedTuple):
    """One kernel over blocks of row panels: a block of packed A stays in cache."""

    job: TileJob
    choice: Choice
    kernel: "TileKernel"  # noqa: F821 (imported where it is made)
    panels: Panels
    out: NDArray[np.integer]
    only: tuple[NDArray[np.bool_], int] | None

    def run(self, plan: Plan, first: int, stop: int, packed, totals) -> None:
        """Compute row panels first..stop of `out`."""
        from loraq_sim.kernels.merge import merge_exact, merge_limited
        from loraq_sim.kernels.pack_panels import pack_rows

        job, shape, mac = self.job, self.kernel.shape, self.job.mac
        rows = slice(first * shape.rows, stop * shape.rows)
        packed = packed[: stop - first]
        codes = self.choice.order.apply(job.a[rows]).view(np.int8)
        pack_rows(codes, plan.packing, shape.rows, packed)
        out = self.out[rows]
        counts = plan.mode == "count"
        changed = np.zeros(out.shape if counts else (0, 0), np.int32)
        for p in range(len(plan.segments)):
            part = out if p == 0 else np.empty_like(out)
            statistics = np.zeros(plan.statistics, np.int32)
            if counts:
                statistics[shape.width :] = NEVER
            start = self._start(plan, rows) if p == 0 else _ZEROS
            self.kernel.run(
                self.arguments(plan, p, first, packed, start, statistics, changed, part)
            )
            if plan.mode == "measure":
                totals[3] = min(totals[3], int(statistics[: shape.width].min()))
                totals[4] = max(totals[4], int(statistics[shape.width :].max()))
                if p > 0:
                    merge_exact(out, part, totals)
                continue
            if counts:
                totals[0] += statistics[: shape.width].sum(dtype=np.int64)
                chunk = int(statistics[shape.width :].min())
                if chunk != NEVER:
                    k = (chunk * mac.accumulators + p) * plan.chunk
                    totals[2] = min(totals[2], k)
            if p > 0:
                wraps = counts and mac.overflow == "wrap"
                limits = np.int64(mac.lo), np.int64(mac.hi)
                merge_limited(out, part, wraps, *limits, job.a.shape[1], changed, totals)
        if counts:
            totals[1] += np.count_nonzero(changed)

    def _start(self, plan: Plan, rows: slice) -> NDArray:
        """Initial values of a block as the lanes hold them, padded; one row of zeros for none."""
        job = self.job
        if job.init is None:
            return _ZEROS
        values = np.zeros((rows.stop - rows.start, self.out.shape[1]), plan.lane)
        some = job.init[rows]
        values[: len(some), : some.shape[1]] = some << plan.start_shift
        return values

    def arguments(
        self, plan: Plan, p: int, first: int, packed, start, statistics, changed, part
    ) -> TileArguments:
        job, shape, panels = self.job, self.kernel.shape, self.panels
        a, w, offsets, chunks = plan.segments[p]
        w_address, offsets_address, last_address = panels.addresses
        todo = todo_stride = wanted = 0
        if self.only is not None:
            marks, wanted = self.only
            todo, todo_stride = address_of(marks[first:]), marks.strides[0]
        given = start is not _ZEROS
        return TileArguments(
            a=address_of(packed) + a,
            a_stride=packed.strides[0],
            w=w_address + w,
            w_stride=panels.w.strides[0],
            offsets=offsets_address + offsets,
            offsets_stride=panels.offsets.strides[0],
            start=address_of(start),
            start_row=start.strides[0] if given else 0,
            start_panel=shape.width * start.itemsize if given else 0,
            statistics=address_of(statistics),
            changed=address_of(changed),
            last=last_address + p * panels.last.strides[0],
            out=address_of(part),
            out_row=part.strides[0],
            out_panel=shape.width * part.itemsize,
            row_panels=len(packed),
            column_panels=len(panels.w),
            first_panel=0,
            todo=todo,
            todo_stride=todo_stride,
            wanted=wanted,
            chunks=chunks,
            inner=plan.inner,
            lo=plan.limits[0],
            hi=plan.limits[1],
            up=plan.shifts[0],
            down=plan.shifts[1],
            **job.output.arguments,
        )
