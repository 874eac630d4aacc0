"""Decide once how a weight runs on an array, so that a call packs A and computes, and no more.

A call of a millisecond finds caches that other data has passed through: every line of Python on
its way costs several times what it costs in a loop.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from functools import partial
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
from loraq_sim.emulator.tile_job import (
    ACCUMULATORS,
    Choice,
    Output,
    Plan,
    TileJob,
    kernels_of,
)
from loraq_sim.emulator.tile_route import choose_ruled
from loraq_sim.emulator.tile_run import (
    FLIP_NOTHING,
    FLIP_SIGNS,
    WORTH_THREADS,
    block_panels,
    plain_arguments,
    run_together,
)
from loraq_sim.kernels.processor import LOOPS, PATH_VARIABLE, TileArguments, choose_path

__all__ = ["run_kept", "run_ready"]

_NO_SAMPLE = (-1, -1, -1)
# Of what a call does not use: to ask for room takes longer than a small product.
_NO_ROOM = {lane: np.zeros((1, 0), lane) for lane in (np.int8, np.int32)}
_ANY_CODE = 128
# Arrays and outputs that one weight is kept ready for.
_KEPT = 256
_INDEX = {name: i for i, name in enumerate(TileArguments._fields)}
_START, _START_ROW, _START_PANEL = (_INDEX[name] for name in ("start", "start_row", "start_panel"))
_A, _OUT, _ROW_PANELS, _COLUMN_PANELS = (
    _INDEX[name] for name in ("a", "out", "row_panels", "column_panels")
)
_MASKS = {False: np.int16(-1), True: np.int16(255)}
# Multiply-adds that a thread takes at once: some 5 to 50 microseconds.
_UNIT = 2**21
# Sums of a second accumulator that stay in the first cache but one until they are merged.
_SPARE_BYTES = 2**18
# Packed weights that stay in the second cache while each panel of rows meets all of them.
_NEAR_BYTES = 2**18
# Bytes from one line of the first cache to the next that takes its place.
_SAME_SET = 2**12


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

    @property
    def reads_rows(self) -> bool:
        """Whether the tiles read A as it lies."""
        return self.packing[0] == 0

    def reads_rows_of(self, k: int) -> bool:
        """Whether they do so for rows of `k` codes without a copy."""
        return self.reads_rows and self.row_bytes == k

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
    starts, n = None if job.init is None else job.init_rows, job.weight.shape[0]
    sizes = _Sizes.of(ready, job.a.shape, n, job.threads)
    call = _Call(ready, job.a, n, job.output.dtype, sizes, starts)
    return call.result(), ready.route


class Kept(NamedTuple):
    """Everything of a product but its activations, for the thread that made it ready.

    `forced` is the path that the environment asked for. `few` are rows that the tiles read: a last
    panel with zeros below, of few rows the only one, which `pack` packs first unless that is None.
    `blocks` are the panels before it, each the first and their number. `out` is the result of few
    rows, or None: of many each call makes its own. `held` keeps alive what addresses point to.
    """

    forced: str | None
    ready: Ready
    few: NDArray[np.integer]
    few_address: int
    pack: Callable[[], None] | None
    blocks: tuple[tuple[int, int], ...]
    out: NDArray[np.integer] | None
    arguments: NDArray[np.int64]
    compute: Callable[[], None]
    held: tuple[Any, ...]

    def of_few(self, a: NDArray[np.integer], out: NDArray[np.integer]) -> NDArray[np.integer]:
        """The product of no more rows than a tile has."""
        self.few[:] = a
        if self.pack is not None:
            self.pack()
        self.compute()
        return out.copy()

    def of_many(self, a: NDArray[np.integer], dtype: np.dtype) -> NDArray[np.integer]:
        """The product of more rows than that, which are in C order."""
        (m, k), height, given, compute = a.shape, self.ready.height, self.arguments, self.compute
        n = given[_COLUMN_PANELS] * self.ready.width
        out = aligned_empty((-(-m // height) * height, n), dtype)
        source, target, row = address_of(a), address_of(out), out.strides[0]
        for first, count in self.blocks:
            given[_A], given[_OUT] = source + first * height * k, target + first * height * row
            given[_ROW_PANELS] = count
            compute()
        if len(self.few):
            begin = m - len(self.few)
            self.few[:] = a[begin:]
            given[_A], given[_OUT], given[_ROW_PANELS] = self.few_address, target + begin * row, 1
            compute()
        return out[:m]


def run_kept(
    a: ArrayLike,
    weight: PackedWeight,
    mac: MacArray | TwoLevelArray,
    output: Output = ACCUMULATORS,
    threads: int = 1,
) -> NDArray[np.integer] | None:
    """What the tiles store without initial values, or None if that takes a longer way.

    A product of a microsecond is made ready once for each shape and thread: checks are those of the
    first call, and Python has two calls to make. Threads share one that is worth them.
    """
    if type(a) is not np.ndarray or a.dtype.char not in "bB" or not isinstance(mac, MacArray):
        return None
    if threads > 1 and a.size * weight.shape[0] >= WORTH_THREADS:
        return _share(a, weight, mac, output, threads)
    key = mac, a.shape, a.dtype.char, threading.get_ident(), output
    kept = weight.kept.get(key)
    if kept is None or kept.forced != os.environ.get(PATH_VARIABLE):
        kept = _keep(a, weight, mac, output)
        if kept is None:
            return None
        if len(weight.kept) >= _KEPT:
            weight.kept.clear()
        weight.kept[key] = kept
    ready = kept.ready
    if ready.is_asking and not ready.allows(a, a.dtype.char == "B"):
        return None
    if kept.out is not None:
        return kept.of_few(a, kept.out)
    return kept.of_many(a, output.dtype) if a.flags.c_contiguous else None


def _found(
    a: NDArray[np.integer], weight: PackedWeight, mac: MacArray, output: Output
) -> Ready | None:
    """What the last call of this kind made ready, which came the longer way."""
    if a.ndim != 2 or not len(a) or a.shape[1] != weight.shape[1]:
        return None
    return weight.ready.get((mac, a.dtype.char == "B", choose_path(), output, None))


def _share(
    a: NDArray[np.integer], weight: PackedWeight, mac: MacArray, output: Output, threads: int
) -> NDArray[np.integer] | None:
    key, forced = (mac, a.shape, a.dtype.char, output, threads), os.environ.get(PATH_VARIABLE)
    known = weight.kept.get(key)
    if known is None or known[0] != forced:
        if (ready := _found(a, weight, mac, output)) is None:
            return None
        known = forced, ready, _Sizes.of(ready, a.shape, weight.shape[0], threads)
        if len(weight.kept) >= _KEPT:
            weight.kept.clear()
        weight.kept[key] = known
    _, ready, sizes = known
    if ready.is_asking and not ready.allows(a, a.dtype.char == "B"):
        return None
    return _Call(ready, a, weight.shape[0], output.dtype, sizes, None).result()


def _keep(
    a: NDArray[np.integer], weight: PackedWeight, mac: MacArray, output: Output
) -> Kept | None:
    ready = _found(a, weight, mac, output)
    if ready is None or len(ready.segments) > 1 or ready.order.size:
        return None
    panels, height = len(ready.panels.w), ready.height
    is_small, columns = len(a) <= height, panels * ready.width
    if not (is_small or ready.reads_rows_of(a.shape[1]) and columns == weight.shape[0]):
        return None
    rows = np.zeros((height, ready.row_bytes), a.dtype)
    packed = aligned_empty((1, 0 if ready.reads_rows else ready.plan.dwords), np.int32)
    out = aligned_empty((height, columns if is_small else 0), output.dtype)
    given = TileArguments(*ready.arguments.tolist())._replace(row_panels=1, column_panels=panels)
    given = given._replace(out=address_of(out), out_row=output.dtype.itemsize * columns)
    pack, held = None, None
    if ready.reads_rows:
        row = ready.row_bytes
        given = given._replace(a=address_of(rows), a_stride=height * row, a_row=row, a_step=4)
    else:
        pack, held = _packing(ready, rows, packed)
        given = given._replace(a=given.a + address_of(packed))
    arguments = np.array(given, np.int64)
    whole = 0 if is_small else len(a) // height
    block = block_panels(max(whole, 1), ready.plan.dwords, 1)
    blocks = tuple((x, min(block, whole - x)) for x in range(0, whole, block))
    last = len(a) if is_small else len(a) % height
    return Kept(
        forced=os.environ.get(PATH_VARIABLE),
        ready=ready,
        few=rows[:last, : a.shape[1]],
        few_address=address_of(rows),
        pack=pack,
        blocks=blocks,
        out=out[: len(a), : weight.shape[0]] if is_small else None,
        arguments=arguments,
        compute=_bound(ready.function, arguments),
        held=(rows, packed, out, held),
    )


def _packing(
    ready: Ready, rows: NDArray[np.integer], packed: NDArray[np.int32]
) -> tuple[Callable[[], None], NDArray[np.int64]]:
    """A call that packs one panel of rows, and its arguments, which must live as long."""
    from loraq_sim.kernels.pack_panels import PackArguments

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
    arguments = np.array(asked, np.int64)
    return _bound(function, arguments), arguments


def _bound(function: int, arguments: NDArray[np.int64]) -> Callable[[], None]:
    """A compiled kernel with the address of its arguments, which must live as long."""
    return partial(ctypes.CFUNCTYPE(None, ctypes.c_int64)(function), address_of(arguments))


class _Sizes(NamedTuple):
    """How a GEMM is cut: threads, row panels of a block and of all, column panels of a unit."""

    threads: int
    block: int
    panels: int
    unit: int

    @classmethod
    def of(cls, ready: Ready, shape: tuple[int, ...], n: int, threads: int) -> "_Sizes":
        """For A of a shape (M, K), W of `n` rows and the threads asked for."""
        m, k = shape
        panels, columns = -(-m // ready.height), len(ready.panels.w)
        threads = min(threads, panels * columns) if m * k * n >= WORTH_THREADS else 1
        block = block_panels(panels, ready.plan.dwords, threads)
        unit, rows = columns, block * ready.height
        if threads > 1:
            unit = min(columns, max(1, _UNIT // (rows * ready.width * ready.packed_k)))
        if len(ready.segments) > 1:
            unit = min(unit, max(1, _SPARE_BYTES // (4 * rows * ready.width)))
        return cls(threads, block, panels, unit)


class _Call:
    """One GEMM, run by any number of threads at once."""

    def __init__(
        self,
        ready: Ready,
        a: NDArray[np.integer],
        n: int,
        dtype: np.dtype[np.integer],
        sizes: _Sizes,
        starts: NDArray[np.int64] | None,
    ) -> None:
        """`a` (M, K) and W of `n` rows into `dtype`, from initial values (1 or M, N) if given."""
        self.ready, self.sizes, self.rows = ready, sizes, a.shape[0]
        self.codes, self.arguments = _writable(a), ready.arguments
        if starts is not None:
            self.arguments, self._starts = self._with_starts(starts, sizes.panels)
        self.out = aligned_empty((sizes.panels * ready.height, n), dtype)
        blocks = -(-sizes.panels // sizes.block)
        self.queue = np.zeros(2 + blocks, np.int64)
        self.total = blocks * len(ready.panels.w)

    def result(self) -> NDArray[np.integer]:
        """Compute (M, N), on this thread and others."""
        if self.sizes.threads == 1:
            self.run()
        else:
            run_together(
                self.sizes.threads, self.run, partial(self.run, waits=True), lambda: self.done
            )
        return self.out[: self.rows]

    def _with_starts(
        self, given: NDArray[np.int64], row_panels: int
    ) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """The arguments with initial values, and these as the lanes hold them, in whole tiles."""
        ready = self.ready
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
            (self.sizes.block, self.sizes.unit, ready.height),
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
        ready, rows = self.ready, self.sizes.block * self.ready.height
        columns = len(ready.panels.w) * ready.width
        spare = self.sizes.unit * ready.width * rows if len(ready.segments) > 1 else 0
        ragged = self.out.shape[1] < columns
        edge = rows, ready.width * self.out.itemsize
        return (
            scratch("packed", (self.sizes.block, ready.plan.dwords), np.int32),
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
    segments = np.zeros((len(plan.segments), 5), np.int64)
    for p, (a, w, offsets, chunks) in enumerate(plan.segments):
        segments[p] = a, w, offsets, p * panels.last.strides[0], chunks
    # Rows that all start in one set of the first cache would push each other out of it.
    if kind == "bytes" and packed_k % _SAME_SET:
        packing, row_bytes = (0, mask, shift, 0), packed_k
        arguments = arguments._replace(a_flip=FLIP_SIGNS if mask else FLIP_NOTHING)
        segments[:, 0] //= kernel.shape.rows
    else:
        packer = pack_kernel(job.path, kind, kernel.shape.rows)
        blocks = -(-packed_k // packer.shape.block_bytes)
        packing, row_bytes = (
            (packer.address, mask, shift, blocks),
            blocks * packer.shape.block_bytes,
        )
    # Whole rows of results are written one after the other, if W can stay close meanwhile.
    by_rows = int(panels.w.nbytes <= _NEAR_BYTES)
    return Ready(
        order=order,
        packed_k=packed_k,
        packing=packing,
        row_bytes=row_bytes,
        plan=plan,
        panels=panels,
        height=kernel.shape.rows,
        width=kernel.shape.width,
        arguments=np.array(arguments._replace(by_rows=by_rows), np.int64),
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
