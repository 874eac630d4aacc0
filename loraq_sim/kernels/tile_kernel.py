"""The tile of two overflow rules, one inside the other, as LLVM code.

    for each column:                      (a tile of K in a systolic array; a chunk under a tree)
        inner = 0
        for each chunk of it: inner = fit(inner + dot of the chunk)
        acc = fit(acc + inner)

``nested`` keeps the accumulators alone. ``nested_report`` also counts what both rules change and
keeps the extremes of the sums that no rule limits: of the inner ones, each column from zero, and of
the outer ones, over the inner sums as their rule leaves them. Its `changed` has bit 0 where
the outer rule changed anything, bit 1 where the inner one did.

Blocks of register tiles as compiled functions, and a disk cache that knows what emits them.
"""

import hashlib
from array import array
from collections.abc import Callable
from functools import cached_property, reduce
from pathlib import Path
from typing import NamedTuple

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from loraq_sim.kernels.jit import TileArguments, keep_compiled
from loraq_sim.kernels.processor import KernelUnavailable
from loraq_sim.kernels.tile import TileCode, TileShape, Vectors
from loraq_sim.kernels.vector_ir import I32, Loop, broadcast

__all__ = [
    "NestedCode",
    "TileKernel",
    "make_tile",
]


class _Limits(NamedTuple):
    """A rule: keep all but the `drop` highest bits, then clamp; one of the two does nothing."""

    drop: ir.Value
    low: ir.Value
    high: ir.Value


class NestedCode(TileCode):
    """Emits the code of one block of nested tiles."""

    def __init__(self, builder: ir.IRBuilder, shape, arguments: ir.Value) -> None:
        super().__init__(builder, shape, arguments)
        given = (self.given.inner_drop, self.given.inner_lo, self.given.inner_hi)
        self.inner = _Limits(*(self._spread(builder.trunc(x, I32)) for x in given))
        # Without counts a sum that wraps needs no rule of its own: the result is cut at the end.
        self.outer = _Limits(self.up, self.low, self.high)
        self.zero = ir.Constant(self.ops.accumulator, None)

    def _chunk(self, loop, a, w, offsets, acc, statistics):
        """One turn of the loop over columns."""
        del offsets
        if self.shape.counts:
            return self._reported(loop, a, w, acc, statistics)
        columns = Loop(self.builder, self.given.inner_chunks, [a, w, *[self.zero] * len(acc)])
        a, w, *inner = columns.values
        a, w, summed = self._dots(a, w, inner)
        a, w, *inner = columns.end([a, w, *self._fitted(summed, self.inner)])
        added = [self.builder.add(x, y) for x, y in zip(acc, inner, strict=True)]
        return a, w, self._clamped_to(added, self.outer), statistics

    def _reported(self, loop, a, w, acc, statistics):
        """The same with counts; statistics: marks, free outer sums, then eight per vector."""
        builder, held, vectors = self.builder, len(acc), self.shape.vectors
        marks, free = statistics[:held], statistics[held : 2 * held]
        counted = statistics[2 * held :]
        inner_stats = counted[: 3 * vectors]
        nothing = [self.zero] * held
        columns = Loop(
            builder, self.given.inner_chunks, [a, w, *nothing, *nothing, *nothing, *inner_stats]
        )
        a, w, *state = columns.values
        inner, unlimited, touched = (state[i * held : (i + 1) * held] for i in range(3))
        a, w, dots = self._dots(a, w, nothing)
        unlimited = [builder.add(x, y) for x, y in zip(unlimited, dots, strict=True)]
        summed = [builder.add(x, y) for x, y in zip(inner, dots, strict=True)]
        fitted = self._fitted(summed, self.inner)
        changes = [builder.xor(x, y) for x, y in zip(summed, fitted, strict=True)]
        touched = [builder.or_(x, y) for x, y in zip(touched, changes, strict=True)]
        stats = state[3 * held :]
        stats = [
            *self._counts(stats[:vectors], changes),
            *self._extremes(stats[vectors:], unlimited),
        ]
        a, w, *state = columns.end([a, w, *fitted, *unlimited, *touched, *stats])
        inner, _, touched = (state[i * held : (i + 1) * held] for i in range(3))
        inner_stats = state[3 * held :]
        partials = self._counts(counted[3 * vectors : 4 * vectors], touched)
        free = [builder.add(x, y) for x, y in zip(free, inner, strict=True)]
        extremes = self._extremes(counted[4 * vectors : 6 * vectors], free)
        summed = [builder.add(x, y) for x, y in zip(acc, inner, strict=True)]
        acc = self._fitted(summed, self.outer)
        changes = [builder.xor(x, y) for x, y in zip(summed, acc, strict=True)]
        overflows = self._counts(counted[6 * vectors : 7 * vectors], changes)
        firsts = self._firsts(counted[7 * vectors :], changes, loop.counter)
        marks = self._marked(self._marked(marks, changes, 1), touched, 2)
        counted = [*inner_stats, *partials, *extremes, *overflows, *firsts]
        return a, w, acc, [*marks, *free, *counted]

    def _more(self, acc: Vectors) -> Vectors:
        """The outer sums that no rule limits."""
        return list(acc) if self.shape.counts else []

    def _dots(self, a, w, acc: Vectors):
        steps = Loop(self.builder, self.given.inner, [a, w, *acc])
        a, w, *summed = steps.values
        summed = self._step(summed, a, self._weights(w), 0)
        a, w, *summed = steps.end([*self._advanced(a, w, 1), *summed])
        return a, w, summed

    def _fitted(self, summed: Vectors, rule: _Limits) -> Vectors:
        builder = self.builder
        raised = [builder.shl(x, rule.drop) for x in summed]
        return self._clamped_to([builder.ashr(x, rule.drop) for x in raised], rule)

    def _clamped_to(self, summed: Vectors, rule: _Limits) -> Vectors:
        raised = [self.ops.largest(self.builder, x, rule.low) for x in summed]
        return [self.ops.smallest(self.builder, x, rule.high) for x in raised]

    def _different(self, change: ir.Value) -> ir.Value:
        return self.builder.icmp_signed("!=", change, self.zero)

    def _counts(self, counts: Vectors, changes: Vectors) -> Vectors:
        """Add to each vector of counts how many sums of its columns changed."""
        builder, totals = self.builder, []
        for v, total in enumerate(counts):
            for change in changes[v :: self.shape.vectors]:
                ones = builder.sext(self._different(change), self.ops.accumulator)
                total = builder.sub(total, ones)
            totals.append(total)
        return totals

    def _extremes(self, extremes: Vectors, sums: Vectors) -> Vectors:
        """Lowest sums of each vector of columns, then highest."""
        kept, vectors = [], self.shape.vectors
        for i, before in enumerate(extremes):
            pick = self.ops.smallest if i < vectors else self.ops.largest
            kept.append(
                pick(self.builder, before, self._reduced(pick, sums[i % vectors :: vectors]))
            )
        return kept

    def _firsts(self, firsts: Vectors, changes: Vectors, counter: ir.Value) -> Vectors:
        builder, kept = self.builder, []
        here = self._spread(builder.trunc(counter, I32))
        for v, first in enumerate(firsts):
            flags = [self._different(x) for x in changes[v :: self.shape.vectors]]
            earlier = self.ops.smallest(builder, first, here)
            kept.append(builder.select(reduce(builder.or_, flags), earlier, first))
        return kept

    def _marked(self, marks: Vectors, changes: Vectors, bit: int) -> Vectors:
        builder, mark = self.builder, self._spread(I32(bit))
        flags = [builder.select(self._different(x), mark, self.zero) for x in changes]
        return [builder.or_(x, y) for x, y in zip(marks, flags, strict=True)]

    def _spread(self, scalar: ir.Value) -> ir.Value:
        return broadcast(self.builder, scalar, self.ops.lanes)


_SOURCES = ("jit.py", "processor.py", "tile.py", "tile_kernel.py", "vector_ir.py")


def make_tile(shape: TileShape):
    """Return the intrinsic ``tile(arguments)`` of the i64 address of `TileArguments`."""

    @intrinsic
    def tile(typingctx, arguments):
        return types.void(types.int64), emit

    def emit(context, builder, signature, args):
        code = NestedCode if shape.nested else TileCode
        code(builder, shape, args[0]).emit()
        return context.get_dummy_value()

    return tile


class TileKernel:
    """The code of a block of tiles of one shape, compiled when it first runs.

    Cached on disk until its file or any file that emits code changes: Numba compares the file of
    the function alone, so a changed tile would go unseen. Numba also keeps the processor's name
    and features in the key: another processor compiles anew.
    """

    def __init__(self, shape: TileShape, function: Callable) -> None:
        self.shape, self._function = shape, function

    @cached_property
    def compiled(self) -> CFunc:
        """The compiled function; its ``cache_hits`` tell whether the disk cache had it.

        Raises `KernelUnavailable` if it does not compile here.
        """
        kernel = CFunc(self._function, ((types.int64,), types.void), {}, {"nopython": True})
        keep_compiled(kernel, self._function)
        files = getattr(kernel._cache, "_cache_file", None)
        if files is not None:
            files._source_stamp = (files._source_stamp, _fingerprint())
        try:
            kernel.compile()
        # An LLVM that does not know an instruction, or whose declaration of it is another.
        except Exception as error:
            raise KernelUnavailable(self.shape.instructions.path, error) from error
        return kernel

    @cached_property
    def _call(self) -> Callable:
        return self.compiled.ctypes

    @property
    def address(self) -> int:
        """Where the compiled function starts."""
        return self.compiled.address

    def run(self, arguments: TileArguments) -> None:
        """Compute the tiles of a block, without the GIL; trusts every address."""
        values = array("q", arguments)
        self._call(values.buffer_info()[0])


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
