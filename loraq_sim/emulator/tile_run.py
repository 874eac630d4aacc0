"""Run one tile kernel over a whole GEMM: pack A, say where everything lies, collect the totals.

Blocks of rows are work that threads take from one queue. The threads stand by and help a caller
(`run_together`): to start one takes longer than a small GEMM.
"""

import math
import os
import threading
from collections.abc import Callable
from functools import lru_cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.packed_weight import (
    Layout,
    Panels,
    address_of,
    aligned_empty,
    pack_panels,
    scratch,
)
from loraq_sim.emulator.tile_job import AnyJob, Choice, Plan, kernels_of, plan_of
from loraq_sim.kernels.processor import NEVER, TileArguments

if TYPE_CHECKING:
    from loraq_sim.kernels.tiles import TileKernel
    from loraq_sim.kernels.vector_ir import TileShape

__all__ = [
    "FLIP_NOTHING",
    "FLIP_SIGNS",
    "Totals",
    "WORTH_THREADS",
    "block_panels",
    "plain_arguments",
    "run_kernel",
    "run_together",
]


# Multiply-adds below which waking a thread costs more than it gains.
WORTH_THREADS = 2**24


def run_together(
    threads: int,
    run: Callable[[], None],
    run_here: Callable[[], None] | None = None,
    done: Callable[[], bool] = lambda: False,
) -> None:
    """Call `run` here and on up to ``threads - 1`` standing threads; return when all are done.

    `run_here` takes the place of `run` here. When `done` says afterwards that no work is left, not
    even begun, nobody is waited for: to be woken would take longer than what is left to do.

    Each call of `run` must take work from a queue of its own until nothing is left, so that it does
    not matter how many calls there are: a thread that has not started when the caller is through is
    not waited for.

    Raises
    ------
    Exception
        The first that a call of `run` raised.
    """
    helps = [_Help(run) for _ in range(threads - 1)]
    if helps:
        crew = _crew(os.getpid())
        crew.grow(len(helps))
        for one in helps:
            crew.waiting.put(one)
    (run_here or run)()
    finished = done()
    for one in helps:
        if not one.recall() and not finished:
            one.wait()


class _Help:
    """One call of `run`, made by a standing thread or by nobody."""

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._claim, self._done = threading.Lock(), threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None

    def give(self) -> None:
        if not self.recall():
            return
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001 (raised again where the caller waits)
            self._error = error
        finally:
            self._done.release()

    def recall(self) -> bool:
        """Whether no thread has begun, and now none will."""
        return self._claim.acquire(blocking=False)

    def wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error


class _Crew:
    """Threads of one process that wait for help to give, as many as were ever asked for."""

    def __init__(self) -> None:
        self.waiting: SimpleQueue[_Help] = SimpleQueue()
        self._size, self._growing = 0, threading.Lock()

    def grow(self, size: int) -> None:
        while self._size < size:
            with self._growing:
                if self._size < size:
                    name = f"loraq-sim-tiles-{self._size}"
                    threading.Thread(target=self._serve, name=name, daemon=True).start()
                    self._size += 1

    def _serve(self) -> None:
        while True:
            self.waiting.get().give()


@lru_cache(maxsize=1)
def _crew(process: int) -> _Crew:
    """The crew of this process: a forked one has none of its parent's threads."""
    del process
    return _Crew()


# Packed rows of A that stay in the second-level cache while they meet all of W.
_BLOCK_BYTES = 2**19
# A row of zeros for a tile of any width.
_ZEROS = np.zeros(256, np.int32)
# What tiles flip in the codes of A: nothing, or the sign.
_FLIPS = np.array([[0], [0x80]], np.uint8).repeat(64, axis=1)
FLIP_NOTHING, FLIP_SIGNS = address_of(_FLIPS), address_of(_FLIPS[1:])


class Totals(NamedTuple):
    """Overflows, outputs with any, first K index (or None), lowest and highest prefix.

    Of nested rules these are the outer rule's. `inner`: overflows of the inner one, lowest and
    highest inner sum, columns with overflows; `either`: outputs that either rule changed.
    """

    overflows: int
    affected: int
    first_k: int | None
    low: int
    high: int
    inner: tuple[int, int, int, int] = (0, 0, 0, 0)
    either: int = 0


def run_kernel(
    job: AnyJob,
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
    panels = job.weight.panels(_layout(job, choice, shape), job.path)
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
    parts: list[NDArray[np.int64]] = []

    def run() -> None:
        packed = scratch("packed", (block, plan.dwords), np.int32)
        totals = np.array([0, 0, NEVER, 0, 0, 0, 0, 0, 0, 0], np.int64)
        for first in starts:
            call.run(plan, first, min(first + block, row_panels), packed, totals)
        parts.append(totals)

    run_together(threads, run)
    found = np.stack(parts)
    sums, lows = found.sum(axis=0).tolist(), found.min(axis=0).tolist()
    highs = found.max(axis=0).tolist()
    return out, Totals(
        overflows=sums[0],
        affected=sums[1],
        first_k=None if lows[2] == NEVER else lows[2],
        low=lows[3],
        high=highs[4],
        inner=(sums[5], lows[6], highs[7], sums[8]),
        either=sums[9],
    )


def _layout(job: AnyJob, choice: Choice, shape: "TileShape") -> Layout:
    offset = 128 if choice.order.codes == "bytes" and not job.unsigned else 0
    return Layout(choice.order, shape.width, choice.w_shift, offset, shape.moving)


def block_panels(row_panels: int, dwords: int, threads: int) -> int:
    """Return how many row panels make a block: even blocks, as many for each thread.

    Each block streams all of W.
    """
    most = max(1, _BLOCK_BYTES // (4 * dwords + 1))
    rounds = math.ceil(row_panels / most / threads)
    blocks = min(rounds * threads, row_panels)
    return -(-row_panels // blocks)


def plain_arguments(
    job: AnyJob, choice: Choice
) -> tuple["TileKernel", Plan, Panels, TileArguments]:
    """Return a plain kernel, its plan, its W and its arguments, with addresses of A and out 0."""
    kernel = kernels_of(job)[choice.name]
    shape, nothing = kernel.shape, np.zeros(0, np.int32)
    panels = job.weight.panels(_layout(job, choice, shape), job.path)
    plan = plan_of(choice, shape, job.a.shape[1], job.mac, job.unsigned)
    packed = np.zeros((1, plan.dwords), np.int32)
    out = np.zeros((1, len(panels.w) * shape.width), job.output.dtype)
    call = _Blocks(job, choice, kernel, panels, out, None)
    given = call.arguments(plan, 0, 0, packed, _ZEROS, nothing, nothing, out)
    return kernel, plan, panels, given._replace(a=0, out=0)


class _Blocks(NamedTuple):
    """One kernel over blocks of row panels: a block of packed A stays in cache."""

    job: AnyJob
    choice: Choice
    kernel: "TileKernel"
    panels: Panels
    out: NDArray[np.integer]
    only: tuple[NDArray[np.bool_], int] | None

    def run(
        self,
        plan: Plan,
        first: int,
        stop: int,
        packed: NDArray[np.int32],
        totals: NDArray[np.int64],
    ) -> None:
        """Compute row panels first..stop of `out`."""
        from loraq_sim.kernels.run_blocks import merge_exact, merge_limited

        job, shape, mac = self.job, self.kernel.shape, self.job.mac
        rows = slice(first * shape.rows, stop * shape.rows)
        packed = packed[: stop - first]
        kind, mask, shift = plan.packing
        order = self.choice.order
        pack_panels(job.path, job.a[rows], order, kind, shape.rows, packed, mask=mask, shift=shift)
        out = self.out[rows]
        counts = plan.mode in ("count", "nested_report")
        changed = np.zeros(out.shape if counts else (0, 0), np.int32)
        for p in range(len(plan.segments)):
            part = out if p == 0 else np.empty_like(out)
            statistics = np.zeros(plan.statistics, np.int32)
            if counts:
                statistics[-shape.width :] = NEVER
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
            if plan.mode == "nested_report":
                _add_nested(statistics.reshape(8, -1), totals)
            if counts:
                count = statistics[-2 * shape.width : -shape.width]
                totals[0] += count.sum(dtype=np.int64)
                chunk = int(statistics[-shape.width :].min())
                if chunk != NEVER:
                    k = (chunk * mac.accumulators + p) * plan.chunk
                    totals[2] = min(totals[2], k)
            if p > 0:
                wraps = counts and mac.overflow == "wrap"
                limits = np.int64(mac.lo), np.int64(mac.hi)
                merge_limited(out, part, wraps, *limits, job.a.shape[1], changed, totals)
        if plan.mode == "nested_report":
            totals[1] += np.count_nonzero(changed & 1)
            totals[9] += np.count_nonzero(changed)
        elif counts:
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
        self,
        plan: Plan,
        p: int,
        first: int,
        packed: NDArray[np.int32],
        start: NDArray[np.integer],
        statistics: NDArray[np.int32],
        changed: NDArray[np.int32],
        part: NDArray[np.integer],
    ) -> TileArguments:
        """Where accumulator `p` of the block that begins at row panel `first` finds everything."""
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
            a_row=4,
            a_step=4 * shape.rows,
            a_flip=FLIP_NOTHING,
            inner_chunks=plan.nested[0],
            inner_drop=plan.nested[1],
            inner_lo=plan.nested[2],
            inner_hi=plan.nested[3],
            lo=plan.limits[0],
            hi=plan.limits[1],
            up=plan.shifts[0],
            down=plan.shifts[1],
            **job.output.arguments,
        )


def _add_nested(statistics: NDArray[np.int32], totals: NDArray[np.int64]) -> None:
    """Add what a kernel of nested rules found, (8, width), to the totals of its thread."""
    totals[3] = min(totals[3], statistics[4].min())
    totals[4] = max(totals[4], statistics[5].max())
    totals[5] += statistics[0].sum(dtype=np.int64)
    totals[6] = min(totals[6], statistics[1].min())
    totals[7] = max(totals[7], statistics[2].max())
    totals[8] += statistics[3].sum(dtype=np.int64)
