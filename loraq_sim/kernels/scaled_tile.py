"""A block of a scaled GEMM as LLVM code: dots of one scale group, then scaled and added in float32.

For each output, in order of K::

    y = 0
    for each group of K with constant scales:
        acc = start of the column; for each chunk: acc += dot of the chunk
        y = fl32(y + fl32(fl32(acc) * fl32(x_scale * w_scale)))

The sums of a group never leave registers. ``measure`` also keeps the extreme sums after each chunk,
unless a limit is proved to hold them. By Cauchy and Schwarz no sum exceeds the product of the norms
n of all codes of the group. A sum p after some chunks and the rest s - p, s being the whole sum,
have |p| + |s - p| <= n as well, and so |p| <= (n + |s|) / 2. Only where both exceed the limit a
group runs again, chunk by chunk. Other tiles are for small floats, as integers: acc counts in units
of a power of two.

`ColumnCode` says of the weights what that takes: sums of each group, its chunks and its squares.
"""

from collections.abc import Callable
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

__all__ = ["ColumnArguments", "ColumnCode", "ScaledArguments", "ScaledCode", "ScaledShape"]


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
        return self.vectors * self.instructions.lanes


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
    spare : rows x width float32 for the tile at work
    unit : bits of the float32 that a sum of 1 is worth; tiles that measure do not read it
    x_norm, x_norm_stride, w_norm, w_norm_stride : float32 (groups,) of each panel, no smaller than
        the L2 norm of its codes; only tiles that measure read them
    limit : bits of a float32: sums of no greater magnitude need not be measured
    sure : bits of a float32: groups whose norms reach beyond are measured in the first place
    statistics : int32 (3, lanes), read and written: lowest and highest sums, and the largest bits
        of a result without their sign
    out, out_row : float32 result and the bytes of a row; whole tiles
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
    spare: int
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
        at = [i * self.lane_bytes for i in range(3)]
        found = [load(builder, self.ints, given.statistics, x) for x in at]
        blocks = Loop(builder, given.row_blocks, found)
        first = builder.mul(blocks.counter, given.block_panels)
        left = builder.sub(given.row_panels, first)
        is_last = builder.icmp_signed("<", left, given.block_panels)
        columns = Loop(builder, given.column_panels, blocks.values)
        rows = Loop(builder, builder.select(is_last, left, given.block_panels), columns.values)
        row = builder.add(first, rows.counter)
        found = rows.end(self._tile(row, columns.counter, rows.values))
        for value, x in zip(blocks.end(columns.end(found)), at, strict=True):
            store(builder, value, given.statistics, x)

    def _tile(self, i: ir.Value, j: ir.Value, found: Vectors) -> Vectors:
        builder, shape, given = self.builder, self.shape, self.given
        places = self._places(given.spare, I64(shape.width * 4))
        for address, x in places:
            store(builder, ir.Constant(self.floats, None), address, x)
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
        groups = Loop(builder, given.groups, [*at, *found])
        a, w, offsets, x_scale, w_scale, start, *found = groups.values
        steps = builder.mul(given.chunks, given.inner)
        acc = self._starts(start, builder.sub(x_scale, given.x_scale))
        if shape.measure:
            acc, found = self._measured_group(groups.counter, (a, w, offsets), acc, found)
            a = builder.add(a, builder.mul(steps, I64(4 * shape.rows)))
            w = builder.add(w, builder.mul(steps, I64(shape.vectors * self.bytes)))
            row = builder.mul(given.chunks, I64(4 * shape.width))
            offsets = builder.add(offsets, row)
        else:
            a, w, acc = self._dots(a, w, steps, acc)
        self._add_scaled(acc, x_scale, w_scale, places)
        x_scale = builder.add(x_scale, I64(4 * shape.rows))
        w_scale, start = (builder.add(x, I64(4 * shape.width)) for x in (w_scale, start))
        *_, low, high, size = groups.end([a, w, offsets, x_scale, w_scale, start, *found])
        out = builder.add(
            self._at(given.out, builder.mul(i, I64(shape.rows)), given.out_row),
            builder.mul(j, I64(4 * shape.width)),
        )
        for (source, x), (target, y) in zip(places, self._places(out, given.out_row), strict=True):
            value = load(builder, self.floats, source, x)
            store(builder, value, target, y)
            bits = builder.bitcast(value, self.ints)
            bits = builder.and_(bits, broadcast(builder, I32(2**31 - 1), self.ops.lanes))
            size = self.ops.largest(builder, size, bits)
        return [low, high, size]

    def _measured_group(self, number, at, starts, found):
        """Sums of one group, `at` its A, W and offsets, and the extremes; see the module.

        Loops of one turn or none stand for questions.
        """
        builder, given = self.builder, self.given
        *extremes, size = found
        here = builder.mul(number, I64(4))
        x_norm, w_norm = (load(builder, F32, builder.add(x, here), 0) for x in self.norms)
        reach = builder.fmul(x_norm, w_norm)
        at_once = builder.fcmp_unordered(">", reach, self.sure)
        steps = builder.mul(given.chunks, given.inner)
        a, w, _ = at
        _, _, sums = self._dots(a, w, builder.select(at_once, I64(0), steps), starts)
        chunks = builder.select(at_once, given.chunks, I64(0))
        sums, extremes = self._chunks(at, chunks, sums, extremes)
        later = builder.and_(builder.fcmp_unordered(">", reach, self.limit), builder.not_(at_once))
        asked = Loop(builder, builder.zext(later, I64), extremes)
        least, most = (self._best(pick, sums) for pick in self._picks())
        extremes = [
            pick(builder, x, y)
            for pick, x, y in zip(self._picks(), asked.values, (least, most), strict=True)
        ]
        largest = builder.sitofp(self.ops.largest(builder, most, builder.neg(least)), self.floats)
        room = builder.fsub(builder.fadd(self.limit, self.limit), reach)
        beyond = builder.fcmp_unordered(">", largest, broadcast(builder, room, self.ops.lanes))
        lanes = ir.IntType(self.ops.lanes)
        some = builder.icmp_signed("!=", builder.bitcast(beyond, lanes), lanes(0))
        chunks = builder.select(some, given.chunks, I64(0))
        _, extremes = self._chunks(at, chunks, starts, extremes)
        return sums, [*asked.end(extremes), size]

    def _chunks(self, at, count, acc, extremes):
        """Sums after `count` chunks of a group, and the extremes after each."""
        builder, held = self.builder, len(acc)
        if self.shape.zeros:
            # Only these sums start elsewhere than at 0. Of tiles that are not measured they count
            # as well: whoever has zero points measures all.
            extremes = self._measured(acc, None, extremes)
        loop = Loop(builder, count, [*at[:3], *acc, *extremes])
        a, w, offsets, *state = loop.values
        a, w, acc = self._dots(a, w, self.given.inner, state[:held])
        extremes = self._measured(acc, offsets, state[held:])
        offsets = builder.add(offsets, I64(4 * self.shape.width))
        _, _, _, *state = loop.end([a, w, offsets, *acc, *extremes])
        return state[:held], state[held:]

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

    def _add_scaled(self, acc, x_scale, w_scale, places) -> None:
        builder, vectors = self.builder, self.shape.vectors
        weights = [load(builder, self.floats, w_scale, x) for x in self._columns()]
        for row in range(self.shape.rows):
            scale = broadcast(builder, load(builder, F32, x_scale, 4 * row), self.ops.lanes)
            for v, weight in enumerate(weights):
                n = row * vectors + v
                address, x = places[n]
                if self.step == F64:
                    partial = builder.fptrunc(acc[n], self.floats)
                else:
                    partial = builder.sitofp(acc[n], self.floats)
                if not self.shape.measure:
                    partial = builder.fmul(partial, self.unit)
                partial = builder.fmul(partial, builder.fmul(scale, weight))
                total = builder.fadd(load(builder, self.floats, address, x), partial)
                store(builder, total, address, x)

    def _columns(self) -> list[int]:
        return [v * self.lane_bytes for v in range(self.shape.vectors)]

    def _places(self, address: ir.Value, stride: ir.Value) -> list[tuple[ir.Value, int]]:
        """Address and offset of each vector of a tile of 32-bit lanes."""
        places = []
        for _ in range(self.shape.rows):
            places += [(address, x) for x in self._columns()]
            address = self.builder.add(address, stride)
        return places

    def _at(self, address: ir.Value, count: ir.Value, stride: ir.Value) -> ir.Value:
        return self.builder.add(address, self.builder.mul(count, stride))


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
