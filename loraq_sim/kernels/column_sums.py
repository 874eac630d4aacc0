"""What `scaled_tile` takes of weights beside their codes, as LLVM code.

That is, of each column and each group of K: the sum of its codes, which corrects activations that
are raised by an offset; the same after each chunk, where sums are measured; and the sums of its
positive codes, of its negative ones and of its squares, which bound what any activations give. All
are found on the packed operand, in one pass.
"""

from typing import NamedTuple

from llvmlite import ir

from loraq_sim.kernels.scaled_tile import ScaledShape
from loraq_sim.kernels.vector_ir import (
    I16,
    I32,
    I64,
    Instructions,
    Loop,
    Vectors,
    broadcast,
    load,
    store,
)

__all__ = ["ColumnArguments", "ColumnCode"]


class ColumnArguments(NamedTuple):
    """What `ColumnCode` reads, in this order, as 64-bit integers.

    Attributes
    ----------
    w, w_stride : packed operand and the bytes of a panel
    start : int32 (panels, groups, width), written: -offset times the sum of each group
    offsets : int32 (panels, groups, chunks, width), written: `start` plus offset times the sum
        after each chunk
    norms : int32 (panels, groups, 3, width), written: sums of positive codes, of negative ones, and
        squared L2 norms
    offset : what every code of A is raised by
    panels, groups, chunks, inner : as of `ScaledArguments`
    """

    w: int
    w_stride: int
    start: int
    offsets: int
    norms: int
    offset: int
    panels: int
    groups: int
    chunks: int
    inner: int


class ColumnCode:
    """Emits the code for the panels of one shape, given the i64 address of its arguments."""

    def __init__(self, builder: ir.IRBuilder, shape: ScaledShape, arguments: ir.Value) -> None:
        self.builder, self.shape = builder, shape
        self.words = Instructions(shape.instructions.path, "words")
        count = len(ColumnArguments._fields)
        self.given = ColumnArguments(*(load(builder, I64, arguments, 8 * i) for i in range(count)))

    def emit(self) -> None:
        """Emit the loops over panels, groups, chunks and steps."""
        builder, given = self.builder, self.given
        width, vectors, lanes = self.shape.width, self.shape.vectors, self.words.lanes
        kind = self.words.accumulator
        at = [4 * lanes * v for v in range(vectors)]
        nothing = [ir.Constant(kind, None)] * (3 * vectors)
        offset = broadcast(builder, builder.trunc(given.offset, I32), lanes)
        panels = Loop(builder, given.panels, [given.start, given.offsets, given.norms])
        start, offsets, norms = panels.values
        w = builder.add(given.w, builder.mul(panels.counter, given.w_stride))
        groups = Loop(builder, given.groups, [w, start, offsets, norms])
        w, start, offsets, norms = groups.values
        chunks = Loop(builder, given.chunks, [w, offsets, *nothing])
        w, offsets, *sums = chunks.values
        steps = Loop(builder, given.inner, [w, *sums])
        w, *sums = steps.values
        for v, x in enumerate(at):
            dwords = load(builder, kind, w, x)
            sums[v::vectors] = self._added(sums[v::vectors], dwords)
        w, *sums = steps.end([builder.add(w, I64(4 * width)), *sums])
        moved = [builder.mul(x, offset) for x in self._whole(sums)]
        for value, x in zip(moved, at, strict=True):
            store(builder, value, offsets, x)
        w, offsets, *sums = chunks.end([w, builder.add(offsets, I64(4 * width)), *sums])
        starts = [builder.neg(builder.mul(x, offset)) for x in self._whole(sums)]
        for value, x in zip(starts, at, strict=True):
            store(builder, value, start, x)
        written = Loop(builder, given.chunks, [groups.values[2]])
        (place,) = written.values
        for value, x in zip(starts, at, strict=True):
            store(builder, builder.add(load(builder, kind, place, x), value), place, x)
        written.end([builder.add(place, I64(4 * width))])
        for n, value in enumerate(sums):
            store(builder, value, norms, 4 * width * (n // vectors) + at[n % vectors])
        start = builder.add(start, I64(4 * width))
        norms = builder.add(norms, I64(12 * width))
        _, start, offsets, norms = groups.end([w, start, offsets, norms])
        panels.end([start, offsets, norms])

    def _whole(self, sums: Vectors) -> Vectors:
        vectors = self.shape.vectors
        pairs = zip(sums[:vectors], sums[vectors : 2 * vectors], strict=True)
        return [self.builder.add(x, y) for x, y in pairs]

    def _added(self, sums: Vectors, dwords: ir.Value) -> Vectors:
        """What `norms` holds of each lane, with the codes in `dwords` added."""
        builder, kind = self.builder, self.words.operand
        codes = builder.bitcast(dwords, kind)
        parts = [codes]
        if self.shape.instructions.dot == "bytes":
            byte = broadcast(builder, I16(8), kind.count)
            parts = [builder.ashr(x, byte) for x in (builder.shl(codes, byte), codes)]
        ones, zero = broadcast(builder, I16(1), kind.count), ir.Constant(kind, None)
        above, below, square = sums
        for part in parts:
            positive = self.words.largest(builder, part, zero)
            negative = self.words.smallest(builder, part, zero)
            above = self.words.multiply_add(builder, above, ones, positive)
            below = self.words.multiply_add(builder, below, ones, negative)
            square = self.words.multiply_add(builder, square, part, part)
        return [above, below, square]
