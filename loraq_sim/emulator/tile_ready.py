"""Decide once how a weight runs on an array, so that a call packs A and computes, and no more.

A call of a millisecond finds caches that other data has passed through: every line of Python on
its way costs several times what it costs in a loop.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.packed_weight import Norms, Order, Panels, aligned_empty, scratch
from loraq_sim.emulator.tile_job import ACCUMULATORS, Choice, Plan, TileJob, kernels_of
from loraq_sim.emulator.tile_route import choose_ruled
from loraq_sim.emulator.tile_run import (
    WORTH_THREADS,
    block_panels,
    plain_arguments,
    run_together,
)
from loraq_sim.kernels.processor import LOOPS

__all__ = ["run_ready"]

_NO_SAMPLE = (-1, -1, -1)
_NO_STARTS = np.zeros((0, 0), np.int64)
# Of what a call does not use: to ask for room takes longer than a small product.
_NO_ROOM = {lane: np.zeros((1, 0), lane) for lane in (np.int8, np.int16, np.int32)}
_ANY_CODE = 128
# Arrays and outputs that one weight is kept ready for.
_KEPT = 256
_MASKS = {False: np.int16(-1), True: np.int16(255)}
# Multiply-adds that a thread takes at once: some 5 to 50 microseconds.
_UNIT = 2**21
# Sums of a second accumulator that stay in the first cache but one until they are merged.
_SPARE_BYTES = 2**18


class Ready(NamedTuple):
    """A kernel with its packed weight and every argument that no call changes.

    `limits`: what the norms of a sample of rows must exceed for the overflow rule to be needed
    (other calls may prove tiles safe and take the longer way), and the codes that the alignment
    leaves room for.
    """

    order: NDArray[np.int64]
    packed_k: int
    packing: tuple[int, int, int, int]
    row_bytes: int
    plan: Plan
    panels: Panels
    height: int
    width: int
    arguments: NDArray[np.int64]
    segments: NDArray[np.int64]
    function: int
    limits: tuple[int, int, int, int]
    merge: tuple[np.int32, np.int32]
    route: str


def run_ready(job: TileJob[MacArray]) -> tuple[NDArray[np.integer], str] | None:
    """Return the job's output and the route, or None where the choice depends on this call."""
    if job.path == LOOPS or job.a.size == 0 or job.weight.codes.size == 0 or not job.is_plain:
        return None
    known = job.weight.ready
    # Initial values take room from the sums: whether enough is left depends on them.
    start = None if job.init is None else _safe(job)
    key = (job.mac, job.unsigned, job.path, job.output, start)
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = _prepare(job)
    ready = known[key]
    if ready is None:
        return None
    call = _Call(job, ready)
    if call.threads == 1:
        call.run()
    else:
        run_together(call.threads, call.run, partial(call.run, waits=True), lambda: call.done)
    return None if call.refused else (call.out[: job.a.shape[0]], ready.route)


class _Call:
    """One GEMM, run by any number of threads at once."""

    def __init__(self, job: TileJob[MacArray], ready: Ready) -> None:
        self.ready = ready
        self.mask = _MASKS[job.unsigned]
        m, n = job.a.shape[0], job.weight.shape[0]
        row_panels, columns = -(-m // ready.height), len(ready.panels.w)
        worth = job.work >= WORTH_THREADS
        self.threads = min(job.threads, row_panels * columns) if worth else 1
        self.block = block_panels(row_panels, ready.plan.dwords, self.threads)
        self.unit = columns
        if self.threads > 1:
            share = self.block * ready.height * ready.width * ready.packed_k
            self.unit = min(columns, max(1, _UNIT // share))
        if len(ready.segments) > 1:
            tall = 4 * self.block * ready.height * ready.width
            self.unit = min(self.unit, max(1, _SPARE_BYTES // tall))
        self.codes = np.ascontiguousarray(job.a).view(np.int8)
        self.init = _NO_STARTS if job.init is None else job.init_rows
        self.out = aligned_empty((row_panels * ready.height, n), job.output.dtype)
        blocks = -(-row_panels // self.block)
        self.queue = np.zeros(3 + blocks, np.int64)
        self.total = blocks * columns

    @property
    def refused(self) -> bool:
        """Whether the activations did not let the kernel run."""
        from loraq_sim.kernels.run_blocks import REFUSED

        return bool(self.queue[REFUSED])

    @property
    def done(self) -> bool:
        """Whether all of the output is there."""
        from loraq_sim.kernels.run_blocks import DONE

        return bool(self.queue[DONE] == self.total)

    def run(self, *, waits: bool = False) -> None:
        """Take part until nothing is left to take, or to the end if it comes soon."""
        from loraq_sim.kernels.run_blocks import run_blocks

        ready = self.ready
        run_blocks(
            self.codes,
            ready.order,
            ready.packing,
            self.mask,
            (self.block, self.unit, ready.height, ready.width, ready.plan.start_shift),
            ready.limits,
            self.init,
            ready.segments,
            ready.merge,
            ready.arguments,
            ready.function,
            self._rooms(),
            self.out.view(np.int8),
            self.queue,
            waits,
        )

    def _rooms(self) -> tuple[NDArray, ...]:
        ready, rows = self.ready, self.block * self.ready.height
        columns = len(ready.panels.w) * ready.width
        tall = 0 if not self.init.size else 1 if len(self.init) == 1 else rows
        spare = self.unit * ready.width * rows if len(ready.segments) > 1 else 0
        ragged, lane = self.out.shape[1] < columns, ready.plan.lane
        edge = rows, ready.width * self.out.itemsize
        return (
            scratch("packed", (self.block, ready.plan.dwords), np.int32),
            scratch("ordered", (rows, ready.row_bytes), np.int8),
            scratch("starts", (tall, columns), lane) if tall else _NO_ROOM[lane],
            scratch("spare", (1, spare), np.int32)[0] if spare else _NO_ROOM[np.int32][0],
            scratch("edge", edge, np.int8) if ragged else _NO_ROOM[np.int8],
        )


def _safe(job: TileJob[MacArray]) -> bool:
    """Whether any activations of this dtype leave the accumulator and the lanes alone."""
    bounds = Bounds.of_codes(255 if job.unsigned else 128, job.weight.norms, job.init_ends)
    return bounds.accumulator_fits(job.mac) and bounds.reach < 2**31


def _prepare(job: TileJob[MacArray]) -> Ready | None:
    """Decide for any activations of this dtype, or return None."""
    mac, norms = job.mac, job.weight.norms
    plain = kernels_of(job)["exact"].shape
    exact = Choice("exact", Order(plain.layout, 0, 1))
    if mac.tree_bits is not None:
        return None
    if (mac.overflow == "wrap" and mac.acc_bits <= 32) or _safe(job):
        return _ready(job, exact, "exact", (*_NO_SAMPLE, _ANY_CODE))
    # Merges come before the rounding, and sums of two accumulators must fit the lanes.
    rounds = mac.accumulators > 1 and job.output is not ACCUMULATORS
    anything = Bounds.of_codes(255 if job.unsigned else 128, norms, None)
    if mac.overflow == "wrap" or mac.acc_bits > 31 or rounds or anything.reach >= 2**31:
        return None
    choice, most = choose_ruled(job)
    limits = _limits(norms, plain.width, mac.hi)
    return None if limits is None else _ready(job, choice, "tiles", (*limits, most))


def _ready(
    job: TileJob[MacArray], choice: Choice, route: str, limits: tuple[int, int, int, int]
) -> Ready:
    from loraq_sim.kernels.tiles import pack_kernel

    k, mac = job.a.shape[1], job.mac
    kernel, plan, panels, arguments = plain_arguments(job, choice)
    packed_k, order = choice.order.index(k)
    kind, mask, shift = plan.packing
    packer = pack_kernel(job.path, kind, kernel.shape.rows)
    blocks = -(-packed_k // packer.shape.block_bytes)
    segments = np.zeros((len(plan.segments), 5), np.int64)
    for p, (a, w, offsets, chunks) in enumerate(plan.segments):
        segments[p] = a, w, offsets, p * panels.last.strides[0], chunks
    return Ready(
        order=order,
        packed_k=packed_k,
        packing=(packer.address, mask, shift, blocks),
        row_bytes=blocks * packer.shape.block_bytes,
        plan=plan,
        panels=panels,
        height=kernel.shape.rows,
        width=kernel.shape.width,
        arguments=np.array(arguments, np.int64),
        segments=segments,
        function=kernel.address,
        limits=limits,
        merge=(np.int32(max(mac.lo, -(2**31))), np.int32(min(mac.hi, 2**31 - 1))),
        route=route,
    )


def _limits(w: Norms, width: int, room: int) -> tuple[int, int, int] | None:
    """Norms that rows of A must exceed for no bound of any tile to stay within `room`."""
    top, l1, l2 = w.calmest_panel(width)
    if top == 0:  # a panel of zeros is safe under any activations
        return None
    return room // l1, room // top, room * room // l2
