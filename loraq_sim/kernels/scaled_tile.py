"""A block of a scaled GEMM as LLVM code: dots of one scale group, then scaled and added in float32.

For each output, in order of K::

    y = 0
    for each group of K with constant scales:
        acc = start of the column; for each chunk: acc += dot of the chunk
        y = fl32(y + fl32(fl32(acc) * fl32(x_scale * w_scale)))

No sum leaves registers before y is whole. ``measure`` also keeps the extreme sums after each chunk,
unless a limit is proved to hold them. By Cauchy and Schwarz no sum exceeds the product of the norms
n of all codes of the group. A sum p after some chunks and the rest s - p, s being the whole sum,
have |p| + |s - p| <= n as well, and so |p| <= (n + |s|) / 2. Only where that exceeds the limit a
group runs again, chunk by chunk. Other tiles are for small floats, as integers: acc counts in units
of a power of two.

The last product of a layer ends as the layer does: other sums and a bias are added to y, each sum
rounded, and the result becomes a 16-bit float.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from llvmlite import ir

from loraq_sim.kernels.vector_ir import (
    F32,
    F64,
    I16,
    I32,
    I64,
    Instructions,
    Loop,
    Vectors,
    broadcast,
    load,
    prefetch,
    size_of,
    store,
)

__all__ = [
    *("BF16", "FP16", "FP32"),
    *("ScaledArguments", "ScaledCode", "ScaledShape"),
]

# What a result may be: `ScaledArguments.finish`. FP16 takes AVX-512.
FP32, BF16, FP16 = 0, 1, 2


class ScaledShape(NamedTuple):
    """What a scaled tile computes and how large it is.

    Attributes
    ----------
    instructions : Instructions
    measure : bool
        Whether to keep the extreme sums; each chunk then has an offset per column, to be taken off.
    rows, vectors : int
        Accumulator registers of the tile.
    zeros : bool
        Whether rows have zero points: their sums start at zero point times `start`.
    """

    instructions: Instructions
    measure: bool
    rows: int
    vectors: int
    zeros: bool = False

    @property
    def width(self) -> int:
        """Columns of the tile."""
        return self.vectors * self.lanes

    @property
    def lanes(self) -> int:
        """Accumulators in one vector."""
        return _lanes(self.instructions)


@cache
def _lanes(instructions: Instructions) -> int:
    return instructions.lanes


class ScaledArguments(NamedTuple):
    """What the code of a block reads, in this order, as 64-bit integers.

    Addresses are of the first tile; strides are in bytes, from one panel of rows or of columns to
    the next.

    Attributes
    ----------
    a, a_stride, w, w_stride : packed operands, the groups one after the other
    x_scale, x_zero, x_stride : float32 and int32 (groups, rows) of each row panel
    w_scale, start, column_stride : float32 and int32 (groups, width) of each column panel
    offsets, offsets_stride : int32 (groups * chunks, width) of each column panel
    unit : bits of the float32 that a sum of 1 is worth; tiles that measure do not read it
    x_norm, x_norm_stride, w_norm, w_norm_stride : float32 (groups,) of each panel, no smaller than
        the L2 norm of its codes; only tiles that measure read them
    limit : bits of a float32: sums of no greater magnitude need not be measured
    sure : bits of a float32: groups whose norms reach beyond are measured in the first place
    statistics : int32 (3, lanes), read and written: lowest and highest sums, and the largest bits
        of a float32 result without their sign
    out, out_row : result and the bytes of a row; whole tiles
    finish : `FP32`, or `BF16` or `FP16` after `other` and `bias` have been added
    other, other_row, last_row : float32 (last_row + 1, columns) of whole tiles and the bytes of a
        row, 0 where all rows are one
    bias : float32 (columns,)
    row_panels, column_panels : tiles
    row_blocks, block_panels : blocks of row panels that meet all columns together, and their size
    groups, chunks, inner : groups of K, chunks of a group, dot steps of a chunk
    """

    a: int
    a_stride: int
    w: int
    w_stride: int
    x_scale: int
    x_zero: int
    x_stride: int
    w_scale: int
    start: int
    column_stride: int
    offsets: int
    offsets_stride: int
    unit: int
    x_norm: int
    x_norm_stride: int
    w_norm: int
    w_norm_stride: int
    limit: int
    sure: int
    statistics: int
    out: int
    out_row: int
    finish: int
    other: int
    other_row: int
    last_row: int
    bias: int
    row_panels: int
    column_panels: int
    row_blocks: int
    block_panels: int
    groups: int
    chunks: int
    inner: int


class ScaledCode:
    """Emits the code of one block, given the i64 address of its `ScaledArguments`."""

    def __init__(self, builder: ir.IRBuilder, shape: ScaledShape, arguments: ir.Value) -> None:
        self.builder, self.shape, self.ops = builder, shape, shape.instructions
        count = len(ScaledArguments._fields)
        self.given = ScaledArguments(*(load(builder, I64, arguments, 8 * i) for i in range(count)))
        self.bytes = self.ops.operand.count * size_of(self.ops.operand.element)
        self.lane_bytes = 4 * self.ops.lanes
        self.floats = ir.VectorType(F32, self.ops.lanes)
        self.ints = ir.VectorType(I32, self.ops.lanes)
        self.step = F64 if self.ops.dot == "doubles" else I32
        unit, self.limit, self.sure = (
            builder.bitcast(builder.trunc(bits, I32), F32)
            for bits in (self.given.unit, self.given.limit, self.given.sure)
        )
        self.unit = broadcast(builder, unit, self.ops.lanes)

    def emit(self) -> None:
        """Emit the loops: row panels of a block under one column panel after the other."""
        builder, given = self.builder, self.given
        blocks = Loop(builder, given.row_blocks, [])
        first = builder.mul(blocks.counter, given.block_panels)
        left = builder.sub(given.row_panels, first)
        is_last = builder.icmp_signed("<", left, given.block_panels)
        columns = Loop(builder, given.column_panels, [])
        rows = Loop(builder, builder.select(is_last, left, given.block_panels), [])
        self._tile(builder.add(first, rows.counter), columns.counter)
        rows.end([])
        columns.end([])
        blocks.end([])

    def _tile(self, i: ir.Value, j: ir.Value) -> None:
        builder, shape, given = self.builder, self.shape, self.given
        at = [
            self._at(given.a, i, given.a_stride),
            self._at(given.w, j, given.w_stride),
            self._at(given.offsets, j, given.offsets_stride),
            self._at(given.x_scale, i, given.x_stride),
            self._at(given.w_scale, j, given.column_stride),
            self._at(given.start, j, given.column_stride),
        ]
        self.norms = (
            self._at(given.x_norm, i, given.x_norm_stride),
            self._at(given.w_norm, j, given.w_norm_stride),
        )
        nothing = [ir.Constant(self.floats, None)] * (shape.rows * shape.vectors)
        groups = Loop(builder, given.groups, [*at, *nothing])
        a, w, offsets, x_scale, w_scale, start, *totals = groups.values
        steps = builder.mul(given.chunks, given.inner)
        moved = builder.sub(x_scale, given.x_scale)
        if shape.measure:
            partials = self._measured_group(groups.counter, (a, w, offsets), (start, moved))
            a = builder.add(a, builder.mul(steps, I64(4 * shape.rows)))
            w = builder.add(w, builder.mul(steps, I64(shape.vectors * self.bytes)))
            row = builder.mul(given.chunks, I64(4 * shape.width))
            offsets = builder.add(offsets, row)
        else:
            a, w, acc = self._dots(a, w, steps, self._starts(start, moved))
            partials = [builder.fmul(x, self.unit) for x in self._as_floats(acc)]
        totals = self._add_scaled(totals, partials, x_scale, w_scale)
        x_scale = builder.add(x_scale, I64(4 * shape.rows))
        w_scale, start = (builder.add(x, I64(4 * shape.width)) for x in (w_scale, start))
        totals = groups.end([a, w, offsets, x_scale, w_scale, start, *totals])[6:]
        self._finish(totals, builder.mul(i, I64(shape.rows)), j)

    def _finish(self, totals: Vectors, row: ir.Value, j: ir.Value) -> None:
        """Store a tile whose first row is `row` in the format asked for."""
        builder, given, shape = self.builder, self.given, self.shape
        column = builder.mul(j, I64(4 * shape.width))
        blocks = [builder.append_basic_block() for _ in range(4)]
        plain, summed, bf16, after = blocks
        fp16 = builder.append_basic_block() if self.ops.path == "avx512" else bf16
        choice = builder.icmp_signed("==", given.finish, I64(FP32))
        builder.cbranch(choice, plain, summed)
        builder.position_at_end(plain)
        self._store(totals, row, column)
        self._note_sizes(totals)
        builder.branch(after)
        builder.position_at_end(summed)
        bias = [
            load(builder, self.floats, builder.add(given.bias, column), x) for x in self._columns()
        ]
        ended: Vectors = []
        for r in range(shape.rows):
            # Rows beyond the last are those of no one.
            here = builder.add(row, I64(r))
            inside = builder.icmp_signed("<", here, given.last_row)
            here = builder.select(inside, here, given.last_row)
            other = builder.add(self._at(given.other, here, given.other_row), column)
            for v, x in enumerate(self._columns()):
                value = builder.fadd(load(builder, self.floats, other, x), totals[len(ended)])
                ended.append(builder.fadd(value, bias[v]))
        self._note_sizes(ended)
        half = builder.lshr(column, I64(1))
        builder.cbranch(builder.icmp_signed("==", given.finish, I64(BF16)), bf16, fp16)
        builder.position_at_end(bf16)
        self._store([self._to_bf16(x) for x in ended], row, half)
        builder.branch(after)
        if fp16 is not bf16:
            builder.position_at_end(fp16)
            halves = ir.VectorType(ir.HalfType(), self.ops.lanes)
            words = ir.VectorType(I16, self.ops.lanes)
            narrowed = [builder.bitcast(builder.fptrunc(x, halves), words) for x in ended]
            self._store(narrowed, row, half)
            builder.branch(after)
        builder.position_at_end(after)

    def _to_bf16(self, value: ir.Value) -> ir.Value:
        """Bits of finite float32 rounded to bfloat16, half to even."""
        builder = self.builder
        below_half, one, word = (self._spread(I32(x)) for x in (0x7FFF, 1, 16))
        bits = builder.bitcast(value, self.ints)
        odd = builder.and_(builder.lshr(bits, word), one)
        nearest = builder.lshr(builder.add(builder.add(bits, below_half), odd), word)
        return builder.trunc(nearest, ir.VectorType(I16, self.ops.lanes))

    def _store(self, values: Vectors, row: ir.Value, column: ir.Value) -> None:
        """Store a tile from byte `column` of row `row` of the result on."""
        builder, vectors = self.builder, self.shape.vectors
        address = builder.add(self._at(self.given.out, row, self.given.out_row), column)
        size = values[0].type.count * size_of(values[0].type.element)
        for n, value in enumerate(values):
            store(builder, value, address, size * (n % vectors))
            if n % vectors == vectors - 1:
                address = builder.add(address, self.given.out_row)

    def _note_sizes(self, values: Vectors) -> None:
        """Keep the largest bits of float32 values without their sign."""
        builder, size = self.builder, self._spread(I32(2**31 - 1))
        bits = [builder.and_(builder.bitcast(x, self.ints), size) for x in values]
        at = 2 * self.lane_bytes
        before = load(builder, self.ints, self.given.statistics, at)
        largest = self._best(self.ops.largest, [before, *bits])
        store(builder, largest, self.given.statistics, at)

    def _measured_group(self, number, at, starts) -> Vectors:
        """Sums of one group as floats, `at` its A, W and offsets; see the module for the extremes.

        Loops of one turn or none stand for questions.
        """
        builder, given = self.builder, self.given
        here = builder.mul(number, I64(4))
        x_norm, w_norm = (load(builder, F32, builder.add(x, here), 0) for x in self.norms)
        reach = builder.fmul(x_norm, w_norm)
        at_once = builder.fcmp_unordered(">", reach, self.sure)
        steps = builder.mul(given.chunks, given.inner)
        a, w, _ = at
        count = builder.select(at_once, I64(0), steps)
        _, _, sums = self._dots(a, w, count, self._starts(*starts))
        asked = Loop(builder, builder.zext(at_once, I64), sums)
        partials = self._as_floats(asked.end(self._chunks(at, asked.values)))
        # Where the norms are below the limit, so is every sum.
        sizes = [self._size(x) for x in partials]
        largest = self._best(self._larger, sizes)
        room = builder.fsub(builder.fadd(self.limit, self.limit), reach)
        beyond = builder.fcmp_unordered(">", largest, self._spread(room))
        lanes = ir.IntType(self.ops.lanes)
        some = builder.icmp_signed("!=", builder.bitcast(beyond, lanes), lanes(0))
        again = Loop(builder, builder.zext(builder.and_(some, builder.not_(at_once)), I64), [])
        self._chunks(at, self._starts(*starts))
        again.end([])
        return partials

    def _size(self, value: ir.Value) -> ir.Value:
        """Magnitudes of float32 values."""
        builder = self.builder
        bits = builder.and_(builder.bitcast(value, self.ints), self._spread(I32(2**31 - 1)))
        return builder.bitcast(bits, self.floats)

    def _larger(self, builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    def _spread(self, scalar: ir.Value) -> ir.Value:
        return broadcast(self.builder, scalar, self.ops.lanes)

    def _chunks(self, at, acc: Vectors) -> Vectors:
        """Sums of a group chunk by chunk, the extremes after each kept."""
        builder, held, statistics = self.builder, len(acc), self.given.statistics
        places = (0, self.lane_bytes)
        extremes = [load(builder, self.ints, statistics, x) for x in places]
        if self.shape.zeros:
            # Only these sums start elsewhere than at 0. Of tiles that are not measured they count
            # as well: whoever has zero points measures all.
            extremes = self._measured(acc, None, extremes)
        loop = Loop(builder, self.given.chunks, [*at, *acc, *extremes])
        a, w, offsets, *state = loop.values
        a, w, acc = self._dots(a, w, self.given.inner, state[:held])
        extremes = self._measured(acc, offsets, state[held:])
        offsets = builder.add(offsets, I64(4 * self.shape.width))
        _, _, _, *state = loop.end([a, w, offsets, *acc, *extremes])
        for value, x in zip(state[held:], places, strict=True):
            store(builder, value, statistics, x)
        return state[:held]

    def _best(self, pick: Callable, values: Vectors) -> ir.Value:
        """Pick one of all, pair by pair: a chain would wait for each of its steps."""
        while len(values) > 1:
            pairs = zip(values[::2], values[1::2], strict=False)
            values = [pick(self.builder, x, y) for x, y in pairs] + values[len(values) & ~1 :]
        return values[0]

    def _picks(self) -> tuple[Callable, Callable]:
        return self.ops.smallest, self.ops.largest

    def _starts(self, start: ir.Value, moved: ir.Value) -> Vectors:
        """Accumulators of a group before its first product; `moved` is where its rows begin."""
        builder, shape = self.builder, self.shape
        if self.step == F64:
            return [ir.Constant(self.ops.accumulator, None)] * shape.vectors * shape.rows
        columns = [load(builder, self.ints, start, x) for x in self._columns()]
        if not shape.zeros:
            return columns * shape.rows
        zeros = builder.add(self.given.x_zero, moved)
        starts = []
        for row in range(shape.rows):
            zero = broadcast(builder, load(builder, I32, zeros, 4 * row), self.ops.lanes)
            starts += [builder.mul(zero, column) for column in columns]
        return starts

    def _dots(self, a, w, count, acc):
        builder, shape = self.builder, self.shape
        steps = Loop(builder, count, [a, w, *acc])
        a, w, *acc = steps.values
        weights = [load(builder, self.ops.operand, w, v * self.bytes) for v in range(shape.vectors)]
        following = builder.add(w, self.given.w_stride)
        for x in range(0, shape.vectors * self.bytes, 64):
            prefetch(builder, following, x)
        summed, size = [], size_of(self.step)
        for row in range(shape.rows):
            spread = self.ops.spread(builder, load(builder, self.step, a, size * row))
            for v, vector in enumerate(weights):
                before = acc[row * shape.vectors + v]
                summed.append(self.ops.multiply_add(builder, before, spread, vector))
        a = builder.add(a, I64(size * shape.rows))
        w = builder.add(w, I64(shape.vectors * self.bytes))
        a, w, *acc = steps.end([a, w, *summed])
        return a, w, acc

    def _measured(self, acc: Vectors, offsets: ir.Value | None, found: Vectors) -> Vectors:
        """Extreme sums of all columns; all rows share the offset of a column, if there is any."""
        builder, vectors = self.builder, self.shape.vectors
        if self.shape.zeros or offsets is None:
            every = zip(self._picks(), found, strict=True)
            return [pick(builder, best, self._best(pick, acc)) for pick, best in every]
        moved = [load(builder, self.ints, offsets, x) for x in self._columns()]
        kept = []
        for pick, best in zip(self._picks(), found, strict=True):
            for v in range(vectors):
                column = self._best(pick, acc[v::vectors])
                best = pick(builder, best, builder.sub(column, moved[v]))
            kept.append(best)
        return kept

    def _as_floats(self, acc: Vectors) -> Vectors:
        """Sums rounded to float32."""
        convert = self.builder.fptrunc if self.step == F64 else self.builder.sitofp
        return [convert(x, self.floats) for x in acc]

    def _add_scaled(self, totals: Vectors, partials: Vectors, x_scale, w_scale) -> Vectors:
        builder, vectors = self.builder, self.shape.vectors
        weights = [load(builder, self.floats, w_scale, x) for x in self._columns()]
        added = []
        for n, (total, partial) in enumerate(zip(totals, partials, strict=True)):
            row, v = divmod(n, vectors)
            if v == 0:
                scale = self._spread(load(builder, F32, x_scale, 4 * row))
            partial = builder.fmul(partial, builder.fmul(scale, weights[v]))
            added.append(builder.fadd(total, partial))
        return added

    def _columns(self) -> list[int]:
        return [v * self.lane_bytes for v in range(self.shape.vectors)]

    def _at(self, address: ir.Value, count: ir.Value, stride: ir.Value) -> ir.Value:
        return self.builder.add(address, self.builder.mul(count, stride))
