"""A block of a GEMM as LLVM code: loops over register tiles, dot products, the overflow rule.

Rules after each chunk of products:

- ``none``: nothing. The sum is exact modulo 2**32, or the dot itself saturates at int32.
- ``raise``: lift to `lo`. With a saturating dot, which clamps above, a symmetric limit.
- ``clamp``: to [lo, hi].
- ``measure``: nothing is changed; the extreme sums of each column are kept.
- ``count_clamp``, ``count_wrap``: clamp, or keep the low bits, and count the sums this changed.
- ``nested``, ``nested_report``: two rules, one inside the other::

      for each column:                      (a tile of K in a systolic array; a chunk under a tree)
          inner = 0
          for each chunk of it: inner = fit(inner + dot of the chunk)
          acc = fit(acc + inner)

  ``nested`` keeps the accumulators alone. ``nested_report`` also counts what both rules change and
  keeps the extremes of the sums that no rule limits: of the inner ones, each column from zero, and
  of the outer ones, over the inner sums as their rule leaves them. Its `changed` has bit 0 where
  the outer rule changed anything, bit 1 where the inner one did.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from llvmlite import ir

from loraq_sim.kernels.processor import TileArguments
from loraq_sim.kernels.vector_ir import (
    I8,
    I32,
    I64,
    Loop,
    TileShape,
    Vectors,
    broadcast,
    choose,
    load,
    prefetch,
    store,
    store_results,
)

__all__ = ["NestedCode", "TileCode"]


class TileCode:
    """Emits the code of one block, given the i64 address of its `TileArguments`."""

    def __init__(self, builder: ir.IRBuilder, shape: TileShape, arguments: ir.Value) -> None:
        self.builder, self.shape, self.ops = builder, shape, shape.instructions
        count = len(TileArguments._fields)
        self.given = TileArguments(*(load(builder, I64, arguments, 8 * i) for i in range(count)))
        self.bytes = self.ops.operand.count * self.ops.operand.element.width // 8
        element = self.ops.accumulator.element
        lo, hi, up, down = (builder.trunc(x, I32) for x in self.given[-4:])
        if element.width < 32:
            limits = [builder.trunc(x, element) for x in (lo, hi, up)]
        else:
            limits = [lo, hi, up]
        self.low, self.high, self.low_bits = (broadcast(builder, x, self.ops.lanes) for x in limits)
        self.up, self.down = (broadcast(builder, x, self.ops.lanes) for x in (up, down))
        if self._is_flexible:
            # A vector from memory: of a scalar, compilers flip the dword before they spread it.
            self.flip = load(builder, self.ops.operand, self.given.a_flip, 0)
            self.rows = [builder.mul(self.given.a_row, I64(row)) for row in range(shape.rows)]

    def emit(self) -> None:
        """Emit the loops: all row panels under one column panel, or the other way around."""
        builder, given = self.builder, self.given
        by_rows = builder.icmp_signed("!=", given.by_rows, I64(0))
        counts = given.row_panels, given.column_panels
        outer = Loop(builder, builder.select(by_rows, *counts), [])
        inner = Loop(builder, builder.select(by_rows, *reversed(counts)), [])
        row = builder.select(by_rows, outer.counter, inner.counter)
        column = builder.select(by_rows, inner.counter, outer.counter)
        column = builder.add(column, given.first_panel)
        some, following = builder.append_basic_block(), builder.append_basic_block()
        check = builder.append_basic_block()
        everything = builder.icmp_signed("==", given.todo, I64(0))
        builder.cbranch(everything, some, check)
        builder.position_at_end(check)
        at = builder.add(builder.mul(row, given.todo_stride), column)
        mark = load(builder, I8, builder.add(given.todo, at), 0)
        asked = builder.icmp_signed("==", mark, builder.trunc(given.wanted, I8))
        builder.cbranch(asked, some, following)
        builder.position_at_end(some)
        self._tile(row, column)
        builder.branch(following)
        builder.position_at_end(following)
        inner.end([])
        outer.end([])

    def _tile(self, i: ir.Value, j: ir.Value) -> None:
        """Emit one tile: loads of the start, the loop over chunks and the stores."""
        builder, shape, given = self.builder, self.shape, self.given
        lane_bytes = self.ops.accumulator.element.width // 8
        a = self._at(given.a, (i, given.a_stride))
        w = self._at(given.w, (j, given.w_stride))
        offsets = self._at(given.offsets, (j, given.offsets_stride))
        row = builder.mul(i, I64(shape.rows))
        start = self._at(given.start, (row, given.start_row), (j, given.start_panel))
        width = I64(4 * shape.width)
        last = self._at(given.last, (j, width))
        if self._is_modular:
            acc = self._begun(start, last)
        else:
            acc = self._matrix(self.ops.accumulator, start, given.start_row, lane_bytes)
        changed = self._at(given.changed, (row, given.out_row), (j, width))
        flags = (
            self._matrix(self.ops.accumulator, changed, given.out_row, 4) if shape.counts else []
        )
        out = self._at(given.out, (row, given.out_row), (j, given.out_panel))
        self._expect(out)
        at = [i * self.bytes for i in range(shape.statistics_vectors)]
        kept = [load(builder, self.ops.accumulator, given.statistics, x) for x in at]
        more = self._more(acc)
        held, noted = len(acc), len(flags)
        loop = Loop(builder, given.chunks, [a, w, offsets, *acc, *flags, *more, *kept])
        a, w, offsets, *state = loop.values
        a, w, acc, statistics = self._chunk(loop, a, w, offsets, state[:held], state[held:])
        if shape.moving:
            offsets = builder.add(offsets, I64(shape.vectors * self.bytes))
        _, _, _, *state = loop.end([a, w, offsets, *acc, *statistics])
        for value, x in zip(state[held + noted + len(more) :], at, strict=True):
            store(builder, value, given.statistics, x)
        self._store_matrix(state[held : held + noted], changed)
        results = self._results(state[:held], last)
        if shape.statistics_vectors:
            self._store_matrix(results, out)
        else:
            size = shape.vectors
            rows = [results[x : x + size] for x in range(0, len(results), size)]
            store_results(builder, rows, given, out)

    def _more(self, acc: Vectors) -> Vectors:
        """What a rule carries from chunk to chunk besides accumulators, marks and statistics."""
        del acc
        return []

    def _at(self, address: ir.Value, *moves: tuple[ir.Value, ir.Value]) -> ir.Value:
        for count, stride in moves:
            address = self.builder.add(address, self.builder.mul(count, stride))
        return address

    def _expect(self, out: ir.Value) -> None:
        """Ask for the lines that the tile will write: they come while it multiplies."""
        builder, lines = self.builder, 4 * self.shape.width // 64
        part = builder.sdiv(self.given.out_panel, I64(lines))
        for _ in range(self.shape.rows):
            at = out
            for _ in range(lines):
                prefetch(builder, at, 0, to_write=True)
                at = builder.add(at, part)
            out = builder.add(out, self.given.out_row)

    def _matrix(self, kind: ir.Type, address: ir.Value, stride: ir.Value, size: int) -> Vectors:
        values = []
        for _ in range(self.shape.rows):
            at = [v * self.ops.lanes * size for v in range(self.shape.vectors)]
            values += [load(self.builder, kind, address, x) for x in at]
            address = self.builder.add(address, stride)
        return values

    def _store_matrix(self, values: Vectors, address: ir.Value) -> None:
        vectors = self.shape.vectors
        for first in range(0, len(values), vectors):
            for v, value in enumerate(values[first : first + vectors]):
                store(self.builder, value, address, 4 * self.ops.lanes * v)
            address = self.builder.add(address, self.given.out_row)

    @property
    def _is_modular(self) -> bool:
        """Whether sums are exact modulo 2**32: what is taken off may be so at the start."""
        return self.shape.rule == "none" and not self.ops.dot.endswith("saturating")

    def _begun(self, start: ir.Value, last: ir.Value) -> Vectors:
        """Initial values of a tile without what is to be taken off; often one row serves all."""
        builder, given, kind = self.builder, self.given, self.ops.accumulator
        at = [4 * self.ops.lanes * v for v in range(self.shape.vectors)]
        lasts = [load(builder, kind, last, x) for x in at]
        row = [
            builder.sub(load(builder, kind, start, x), y) for x, y in zip(at, lasts, strict=True)
        ]
        alike = builder.icmp_signed("==", given.start_row, I64(0))

        def each() -> Vectors:
            rows = self._matrix(kind, start, given.start_row, 4)
            return [builder.sub(x, y) for x, y in zip(rows, lasts * self.shape.rows, strict=True)]

        return choose(builder, alike, row * self.shape.rows, each)

    def _results(self, acc: Vectors, last: ir.Value) -> Vectors:
        """((acc - last) << up) >> down, as int32."""
        builder, wide = self.builder, ir.VectorType(I32, self.ops.lanes)
        if self.ops.accumulator.element.width < 32:
            acc = [builder.sext(value, wide) for value in acc]
        if not self._is_modular:
            at = [4 * self.ops.lanes * v for v in range(self.shape.vectors)]
            lasts = [load(builder, wide, last, x) for x in at] * self.shape.rows
            acc = [builder.sub(x, y) for x, y in zip(acc, lasts, strict=True)]
        shifts = builder.or_(self.given.up, self.given.down)
        return choose(
            builder,
            builder.icmp_signed("==", shifts, I64(0)),
            acc,
            lambda: [builder.ashr(builder.shl(x, self.up), self.down) for x in acc],
        )

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
            steps = Loop(builder, self.given.inner, [a, w, *acc])
            a, w, *summed = steps.values
            summed = self._step(summed, a, self._weights(w), 0)
            a, w, *summed = steps.end([*self._advanced(a, w, 1), *summed])
        return a, w, *self._rule(summed, statistics, number)

    @property
    def _is_flexible(self) -> bool:
        """Whether the arguments say where the rows of A are, packed or as they lie."""
        return self.ops.dot == "bytes"

    def _weights(self, w: ir.Value) -> Vectors:
        at = [v * self.bytes for v in range(self.shape.vectors)]
        # The next panel comes from an outer cache: ask for it while this one is in use.
        following = self.builder.add(w, self.given.w_stride)
        for x in range(0, self.shape.vectors * self.bytes, 64):
            prefetch(self.builder, following, x)
        return [load(self.builder, self.ops.operand, w, x) for x in at]

    def _advanced(self, a: ir.Value, w: ir.Value, steps: int) -> tuple[ir.Value, ir.Value]:
        moved = self.given.a_step if self._is_flexible else I64(4 * self.shape.rows * steps)
        a = self.builder.add(a, moved)
        return a, self.builder.add(w, I64(self.shape.vectors * self.bytes))

    def _step(self, acc: Vectors, a: ir.Value, weights: Vectors, step: int) -> Vectors:
        summed = []
        for row in range(self.shape.rows):
            if self._is_flexible:
                dword = load(self.builder, I32, self.builder.add(a, self.rows[row]), 0)
                spread = self.builder.xor(self.ops.spread(self.builder, dword), self.flip)
            else:
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


class _Limits(NamedTuple):
    """A rule: keep all but the `drop` highest bits, then clamp; one of the two does nothing."""

    drop: ir.Value
    low: ir.Value
    high: ir.Value


class NestedCode(TileCode):
    """Emits the code of one block of nested tiles."""

    def __init__(self, builder: ir.IRBuilder, shape: TileShape, arguments: ir.Value) -> None:
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
