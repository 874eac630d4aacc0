"""Decide once how a weight runs on an array, so that a call packs A and computes, and no more.

A call of a millisecond finds caches that other data has passed through: every line of Python on
its way costs several times what it costs in a loop.
"""

import ctypes
import os
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.bounds import Bounds
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.packed_weight import (
    Norms,
    Order,
    PackedWeight,
    Panels,
    address_of,
    aligned_empty,
    scratch,
)
from loraq_sim.emulator.tile_job import ACCUMULATORS, Choice, Plan, TileJob, kernels_of
from loraq_sim.emulator.tile_route import choose_ruled
from loraq_sim.emulator.tile_run import (
    WORTH_THREADS,
    block_panels,
    plain_arguments,
    run_together,
)
from loraq_sim.kernels.processor import LOOPS, PATH_VARIABLE, TileArguments, choose_path

__all__ = ["run_ready", "run_small"]

_NO_SAMPLE = (-1, -1, -1)
# Of what a call does not use: to ask for room takes longer than a small product.
_NO_ROOM = {lane: np.zeros((1, 0), lane) for lane in (np.int8, np.int32)}
_ANY_CODE = 128
# Rows of the lowest tile with room to spare: more never are one panel.
_FEW_ROWS = 16
# Arrays and outputs that one weight is kept ready for.
_KEPT = 256
_START, _START_ROW, _START_PANEL = (
    TileArguments._fields.index(name) for name in ("start", "start_row", "start_panel")
)
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
    is_asking: bool
    merge: tuple[np.int32, np.int32]
    route: str

    def allows(self, a: NDArray[np.integer], unsigned: bool) -> bool:
        """Whether codes (M, K) are within the limits."""
        from loraq_sim.kernels.run_blocks import allowed

        return bool(allowed(_writable(a), _MASKS[unsigned], self.height, self.limits))


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
    if ready.is_asking and not ready.allows(job.a, job.unsigned):
        return None
    call = _Call(job, ready)
    if call.threads == 1:
        call.run()
    else:
        run_together(call.threads, call.run, partial(call.run, waits=True), lambda: call.done)
    return call.out[: job.a.shape[0]], ready.route


class Small(NamedTuple):
    """Every address of a product of a few rows, for the thread that made it ready.

    `forced` is the path that the environment asked for, `asking` whether it takes codes within
    limits; `held` keeps alive what addresses point to.
    """

    forced: str | None
    asking: Callable[[], bool] | None
    rows: NDArray[np.integer]
    out: NDArray[np.int32]
    pack: Callable[[int], None]
    packing: int
    compute: Callable[[int], None]
    computing: int
    held: tuple[Any, ...]


def run_small(
    a: ArrayLike, weight: PackedWeight, mac: MacArray | TwoLevelArray
) -> NDArray[np.int32] | None:
    """The accumulators of a few rows without initial values, or None if that takes a longer way.

    A product of a microsecond is made ready once for each shape and thread: checks are those of the
    first call, and Python has two calls to make.
    """
    if type(a) is not np.ndarray or a.dtype.char not in "bB" or not isinstance(mac, MacArray):
        return None
    key = mac, a.shape, a.dtype.char, get_ident()
    kept = weight.small.get(key)
    if kept is None or kept.forced != os.environ.get(PATH_VARIABLE):
        kept = _small(a, weight, mac)
        if kept is None:
            return None
        if len(weight.small) >= _KEPT:
            weight.small.clear()
        weight.small[key] = kept
    kept.rows[:] = a
    if kept.asking is not None and not kept.asking():
        return None
    kept.pack(kept.packing)
    kept.compute(kept.computing)
    return kept.out.copy()


def _small(a: NDArray[np.integer], weight: PackedWeight, mac: MacArray) -> Small | None:
    if a.ndim != 2 or not 0 < len(a) <= _FEW_ROWS or a.shape[1] != weight.shape[1]:
        return None
    if mac.acc_bits > 32 or choose_path() == LOOPS:
        return None
    # Known from the last call of its kind, which came the longer way.
    key = mac, a.dtype == np.uint8, choose_path(), ACCUMULATORS, None
    ready = weight.ready.get(key)
    if ready is None or len(ready.segments) > 1 or ready.order.size:
        return None
    height = ready.height
    if len(a) > height:
        return None
    from loraq_sim.kernels.pack_panels import PackArguments

    columns = len(ready.panels.w) * ready.width
    rows = np.zeros((height, ready.row_bytes), a.dtype)
    packed = aligned_empty((1, ready.plan.dwords), np.int32)
    out = aligned_empty((height, columns), np.int32)
    function, mask, shift, blocks = ready.packing
    asked = PackArguments(
        source=address_of(rows),
        source_row=rows.strides[0],
        target=address_of(packed),
        target_panel=packed.strides[0],
        panels=1,
        blocks=blocks,
        mask=mask,
        shift=shift,
    )
    given = TileArguments(*ready.arguments.tolist())
    given = given._replace(
        a=given.a + address_of(packed),
        row_panels=1,
        column_panels=len(ready.panels.w),
        out=address_of(out),
        out_row=out.strides[0],
    )
    packing, computing = np.array(asked, np.int64), np.array(given, np.int64)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_int64)
    return Small(
        forced=os.environ.get(PATH_VARIABLE),
        asking=partial(ready.allows, rows, a.dtype == np.uint8) if ready.is_asking else None,
        rows=rows[: len(a), : a.shape[1]],
        out=out[: len(a), : weight.shape[0]],
        pack=kind(function),
        packing=address_of(packing),
        compute=kind(ready.function),
        computing=address_of(computing),
        held=(rows, packed, out, packing, computing, ready),
    )


class _Call:
    """One GEMM, run by any number of threads at once."""

    def __init__(self, job: TileJob[MacArray], ready: Ready) -> None:
        self.ready = ready
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
        self.codes = _writable(job.a)
        self.arguments = ready.arguments
        if job.init is not None:
            self.arguments, self._starts = self._with_starts(job, row_panels)
        self.out = aligned_empty((row_panels * ready.height, n), job.output.dtype)
        blocks = -(-row_panels // self.block)
        self.queue = np.zeros(2 + blocks, np.int64)
        self.total = blocks * columns

    def _with_starts(
        self, job: TileJob[MacArray], row_panels: int
    ) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """The arguments with initial values, and these as the lanes hold them, in whole tiles."""
        ready, given = self.ready, job.init_rows
        rows = 1 if len(given) == 1 else row_panels * ready.height
        starts = np.zeros((rows, len(ready.panels.w) * ready.width), ready.plan.lane)
        starts[: len(given), : given.shape[1]] = given << ready.plan.start_shift
        arguments = ready.arguments.copy()
        arguments[_START] = address_of(starts)
        arguments[_START_ROW] = 0 if rows == 1 else starts.strides[0]
        arguments[_START_PANEL] = ready.width * starts.itemsize
        return arguments, starts

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
            (self.block, self.unit, ready.height),
            ready.segments,
            ready.merge,
            int(ready.arguments[_START]),
            self.arguments,
            ready.function,
            self._rooms(),
            self.out.view(np.int8),
            self.queue,
            waits,
        )

    def _rooms(self) -> tuple[NDArray, ...]:
        ready, rows = self.ready, self.block * self.ready.height
        columns = len(ready.panels.w) * ready.width
        spare = self.unit * ready.width * rows if len(ready.segments) > 1 else 0
        ragged = self.out.shape[1] < columns
        edge = rows, ready.width * self.out.itemsize
        return (
            scratch("packed", (self.block, ready.plan.dwords), np.int32),
            scratch("ordered", (rows, ready.row_bytes), np.int8),
            scratch("spare", (1, spare), np.int32)[0] if spare else _NO_ROOM[np.int32][0],
            scratch("edge", edge, np.int8) if ragged else _NO_ROOM[np.int8],
        )


def _writable(a: NDArray) -> NDArray[np.int8]:
    """The bytes of a matrix, C-contiguous; read-only ones copied: they would compile once more."""
    codes = np.ascontiguousarray(a).view(np.int8)
    return codes if codes.flags.writeable else codes.copy()


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
        is_asking=limits[0] >= 0 or limits[3] < _ANY_CODE,
        merge=(np.int32(max(mac.lo, -(2**31))), np.int32(min(mac.hi, 2**31 - 1))),
        route=route,
    )


def _limits(w: Norms, width: int, room: int) -> tuple[int, int, int] | None:
    """Norms that rows of A must exceed for no bound of any tile to stay within `room`."""
    top, l1, l2 = w.calmest_panel(width)
    if top == 0:  # a panel of zeros is safe under any activations
        return None
    return room // l1, room // top, room * room // l2
