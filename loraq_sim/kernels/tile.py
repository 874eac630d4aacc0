"""One register tile of a GEMM as LLVM code: dot products, the overflow rule, the result.

Rules after each chunk of products:

- ``none``: nothing. The sum is exact modulo 2**32, or the dot itself saturates at int32.
- ``raise``: lift to `lo`. With a saturating dot, which clamps above, a symmetric limit.
- ``clamp``: to [lo, hi].
- ``measure``: nothing is changed; the extreme sums of each column are kept.
- ``count_clamp``, ``count_wrap``: clamp, or keep the low bits, and count the sums this changed.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from llvmlite import ir

from loraq_sim.kernels.vector_ir import I32, I64, Instructions, Loop, broadcast, load, store

__all__ = ["ARGUMENTS", "TileCode", "TileShape"]

ARGUMENTS = 14

Vectors = list[ir.Value]


class TileShape(NamedTuple):
    """What one tile computes and how large it is.

    Attributes
    ----------
    instructions : Instructions
    rule : str
        See the module.
    moving : bool
        Whether each chunk has an offset per column, added to the limits and taken off extremes.
    single : bool
        One product per chunk: A holds (a, 0) and (0, a') for each pair of products.
    rows, vectors : int
        Accumulator registers of the tile.
    """

    instructions: Instructions
    rule: str
    moving: bool
    single: bool
    rows: int
    vectors: int

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.vectors * self.instructions.lanes

    @property
    def layout(self) -> str:
        """Name of the operand layout."""
        return self.instructions.layout

    @property
    def statistics_vectors(self) -> int:
        """Vectors of column extremes, or of changed bits, counts and first chunks."""
        if self.rule == "measure":
            return 2 * self.vectors
        return (self.rows + 2) * self.vectors if self.rule.startswith("count") else 0


class TileCode:
    """Emits one tile, whose arguments lie in memory as `ARGUMENTS` numbers of 64 bits.

    Addresses: of the packed operands `a` and `w`; of the chunk offsets (chunks, width); of the
    accumulators to `start` from (rows, width); of the `statistics`, read and written (see
    `TileShape.statistics_vectors`); of what to take off the accumulators at the end, `last`
    (width) int32; of the result `out`, int32, with its row `stride` in bytes. Then turns of the
    chunk loop (`chunks`; pairs of products for single products), dot steps per chunk (`inner`),
    limits `lo` and `hi`, and the shifts of the result ``((acc - last) << up) >> down``;
    ``count_wrap`` also shifts by `up`, both ways, after each chunk. Unused addresses may be 0.
    """

    def __init__(self, builder: ir.IRBuilder, shape: TileShape, arguments: ir.Value) -> None:
        self.builder, self.shape, self.ops = builder, shape, shape.instructions
        numbers = [load(builder, I64, arguments, 8 * i) for i in range(ARGUMENTS)]
        self.a, self.w, self.offsets, self.start, self.statistics = numbers[:5]
        self.last, self.out, self.stride, self.chunks, self.inner = numbers[5:10]
        self.lo, self.hi, self.up, self.down = (builder.trunc(x, I32) for x in numbers[10:])
        self.bytes = self.ops.operand.count * self.ops.operand.element.width // 8

    def emit(self) -> None:
        """Emit loads of the start, the loop over chunks and the stores of the result."""
        builder, shape, kind = self.builder, self.shape, self.ops.accumulator
        held = shape.rows * shape.vectors
        limits = [builder.trunc(x, kind.element) for x in (self.lo, self.hi, self.up)]
        self.low, self.high, self.low_bits = (broadcast(builder, x, self.ops.lanes) for x in limits)
        acc = [load(builder, kind, self.start, i * self.bytes) for i in range(held)]
        kept = shape.statistics_vectors
        statistics = [load(builder, kind, self.statistics, i * self.bytes) for i in range(kept)]
        loop = Loop(builder, self.chunks, [self.a, self.w, self.offsets, *acc, *statistics])
        a, w, offsets, *state = loop.values
        a, w, acc, statistics = self._chunk(loop, a, w, offsets, state[:held], state[held:])
        if shape.moving:
            offsets = builder.add(offsets, I64(shape.vectors * self.bytes))
        _, _, _, *state = loop.end([a, w, offsets, *acc, *statistics])
        for i, value in enumerate(state[held:]):
            store(builder, value, self.statistics, i * self.bytes)
        self._store_result(state[:held])

    def _chunk(self, loop, a, w, offsets, acc, statistics):
        """One turn of the chunk loop: a chunk, or the two chunks of a pair of single products."""
        shape, builder = self.shape, self.builder
        self.moved = [None] * shape.vectors
        if shape.moving:
            at = [v * self.bytes for v in range(shape.vectors)]
            self.moved = [load(builder, self.ops.accumulator, offsets, x) for x in at]
        number = builder.trunc(loop.counter, self.ops.accumulator.element)
        if shape.single:
            weights = self._weights(w)
            number = builder.add(number, number)
            for half in range(2):
                summed = self._step(acc, a, weights, half)
                chunk = builder.add(number, number.type(half))
                acc, statistics = self._rule(summed, statistics, chunk)
            return *self._advanced(a, w, 2), acc, statistics
        if shape.rule in ("none", "raise"):
            summed = self._step(acc, a, self._weights(w), 0)
            a, w = self._advanced(a, w, 1)
        else:
            steps = Loop(builder, self.inner, [a, w, *acc])
            a, w, *summed = steps.values
            summed = self._step(summed, a, self._weights(w), 0)
            a, w, *summed = steps.end([*self._advanced(a, w, 1), *summed])
        return a, w, *self._rule(summed, statistics, number)

    def _weights(self, w: ir.Value) -> Vectors:
        at = [v * self.bytes for v in range(self.shape.vectors)]
        return [load(self.builder, self.ops.operand, w, x) for x in at]

    def _advanced(self, a: ir.Value, w: ir.Value, steps: int) -> tuple[ir.Value, ir.Value]:
        a = self.builder.add(a, I64(4 * self.shape.rows * steps))
        return a, self.builder.add(w, I64(self.shape.vectors * self.bytes))

    def _step(self, acc: Vectors, a: ir.Value, weights: Vectors, step: int) -> Vectors:
        summed = []
        for row in range(self.shape.rows):
            dword = load(self.builder, I32, a, 4 * (step * self.shape.rows + row))
            spread = self.ops.spread(self.builder, dword)
            for v, vector in enumerate(weights):
                before = acc[row * self.shape.vectors + v]
                summed.append(self.ops.multiply_add(self.builder, before, spread, vector))
        return summed

    def _rule(self, acc: Vectors, statistics: Vectors, number: ir.Value) -> tuple[Vectors, Vectors]:
        rule = self.shape.rule
        if rule == "none":
            return acc, statistics
        if rule == "measure":
            return acc, self._measured(acc, statistics)
        fitted = self._wrapped(acc) if rule == "count_wrap" else self._clamped(acc)
        if rule.startswith("count"):
            return fitted, self._counted(acc, fitted, statistics, number)
        return fitted, statistics

    def _clamped(self, acc: Vectors) -> Vectors:
        fitted = self._each(self.ops.largest, acc, self._limits(self.low))
        if self.shape.rule == "raise":
            return fitted
        return self._each(self.ops.smallest, fitted, self._limits(self.high))

    def _limits(self, limit: ir.Value) -> Vectors:
        return [limit if m is None else self.builder.add(limit, m) for m in self.moved]

    def _each(self, pick: Callable, acc: Vectors, by_vector: Vectors) -> Vectors:
        pairs = zip(acc, by_vector * self.shape.rows, strict=True)
        return [pick(self.builder, x, y) for x, y in pairs]

    def _wrapped(self, acc: Vectors) -> Vectors:
        # The first vectors move together so that the shifts of one do not wait for the other.
        raised = [self.builder.shl(x, self.low_bits) for x in acc]
        return [self.builder.ashr(x, self.low_bits) for x in raised]

    def _measured(self, acc: Vectors, extremes: Vectors) -> Vectors:
        """Extremes of each column; all rows share the offset, so it is taken off once."""
        vectors = self.shape.vectors
        kept = []
        for which, pick in enumerate((self.ops.smallest, self.ops.largest)):
            for v in range(vectors):
                best = self._reduced(pick, acc[v::vectors])
                if self.moved[v] is not None:
                    best = self.builder.sub(best, self.moved[v])
                kept.append(pick(self.builder, extremes[which * vectors + v], best))
        return kept

    def _reduced(self, pick: Callable, values: Vectors) -> ir.Value:
        return reduce(lambda x, y: pick(self.builder, x, y), values)

    def _counted(
        self, summed: Vectors, fitted: Vectors, statistics: Vectors, number: ir.Value
    ) -> Vectors:
        """Changed bits per output; changes and first changed chunk per column."""
        builder, vectors = self.builder, self.shape.vectors
        held = len(summed)
        changes = [builder.xor(x, y) for x, y in zip(summed, fitted, strict=True)]
        changed = [builder.or_(x, y) for x, y in zip(statistics[:held], changes, strict=True)]
        zero = ir.Constant(self.ops.accumulator, None)
        flags = [builder.icmp_signed("!=", x, zero) for x in changes]
        here = broadcast(builder, number, self.ops.lanes)
        counts, firsts = list(statistics[held : held + vectors]), []
        for v, first in enumerate(statistics[held + vectors :]):
            column = flags[v::vectors]
            for flag in column:
                ones = builder.sext(flag, self.ops.accumulator)
                counts[v] = builder.sub(counts[v], ones)
            some = reduce(builder.or_, column)
            earlier = self.ops.smallest(builder, first, here)
            firsts.append(builder.select(some, earlier, first))
        return [*changed, *counts, *firsts]

    def _store_result(self, acc: Vectors) -> None:
        """Store ((acc - last) << up) >> down as int32, row by row."""
        builder, vectors = self.builder, self.shape.vectors
        wide = ir.VectorType(I32, self.ops.lanes)
        up, down = (broadcast(builder, x, self.ops.lanes) for x in (self.up, self.down))
        at = [4 * self.ops.lanes * v for v in range(vectors)]
        lasts = [load(builder, wide, self.last, x) for x in at]
        out = self.out
        for row in range(self.shape.rows):
            for v in range(vectors):
                value = acc[row * vectors + v]
                if value.type.element.width < 32:
                    value = builder.sext(value, wide)
                value = builder.shl(builder.sub(value, lasts[v]), up)
                store(builder, builder.ashr(value, down), out, at[v])
            out = builder.add(out, self.stride)
