"""Pack a matrix into the panels that tiles read, as LLVM code: blocks transposed in registers.

A panel holds `rows` rows of the operand (rows of A, or columns of the result for W), step by step:
``panel[step][row]``. What a step takes of a row, and the element it becomes, is the kind:

==========  ======  ======================================================================
bytes       4 int8  a dword, every byte ``^ flip``: 0x80 turns signed codes into a + 128
words       2 int8  a dword of two int16, ``(code & mask) << shift``
single      2 int8  two dwords one after the other, (a, 0) and (0, a') of the same
doubled     1 int8  a dword with ``code & mask`` in both halves
halves      1 int8  an int16, ``code & mask``
doubles     1 f64   the float64
==========  ======  ======================================================================

Compilers do not find transpositions in loops. What is asked of codes around their packing (order,
offsets, ranges and norms) they do find: those are loops.
"""

from typing import NamedTuple

import numpy as np
from llvmlite import ir

from loraq_sim.kernels.jit import larger, njit, smaller
from loraq_sim.kernels.vector_ir import I8, I16, I32, I64, Loop, Vectors, broadcast, load, store

__all__ = [
    *("PackArguments", "PackCode", "PackShape"),
    *("chunk_offsets", "code_range", "gather_codes", "row_norms", "sampled_norms"),
]

# Codes that one step takes of a row, and the element that they become.
_KINDS = {
    "bytes": (4, I32),
    "words": (2, I32),
    "single": (2, I32),
    "doubled": (1, I32),
    "halves": (1, I16),
    "doubles": (8, I64),
}


class PackShape(NamedTuple):
    """A kind of panel and its rows."""

    kind: str
    rows: int

    @property
    def block(self) -> int:
        """Rows and steps of the square that is transposed at once."""
        return 1 << (min(self.rows, 8 if self.kind == "doubles" else 16).bit_length() - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of a row that a block takes: rows must be as long as some blocks."""
        return self.block * _KINDS[self.kind][0]

    @property
    def step_bytes(self) -> int:
        """Bytes of a step of the panel."""
        return self.rows * _KINDS[self.kind][1].width // 8 * (2 if self.kind == "single" else 1)


class PackArguments(NamedTuple):
    """What the code reads, in this order, as 64-bit integers.

    Attributes
    ----------
    source, source_row : first row of the matrix, and bytes from row to row
    target, target_panel : first panel, and bytes from panel to panel. The last panel may be written
        past its end, by less than a block of steps
    panels, blocks : panels, each of `rows` rows that exist, and blocks of steps
    mask : flip or mask
    shift : left shift of words
    """

    source: int
    source_row: int
    target: int
    target_panel: int
    panels: int
    blocks: int
    mask: int
    shift: int


class PackCode:
    """Emits the code for one shape, given the i64 address of its `PackArguments`."""

    def __init__(self, builder: ir.IRBuilder, shape: PackShape, arguments: ir.Value) -> None:
        self.builder, self.shape = builder, shape
        count = len(PackArguments._fields)
        self.given = PackArguments(*(load(builder, I64, arguments, 8 * i) for i in range(count)))

    def emit(self) -> None:
        """Emit the loops over panels, strips of rows and blocks of steps."""
        builder, shape, given = self.builder, self.shape, self.given
        n, rows = shape.block, shape.rows
        element_bytes = _KINDS[shape.kind][1].width // 8
        panels = Loop(builder, given.panels, [])
        strips = Loop(builder, I64(-(-rows // n)), [])
        # The last strip may overlap the one before.
        first, last = builder.mul(strips.counter, I64(n)), I64(rows - n)
        first = builder.select(builder.icmp_signed("<", first, last), first, last)
        row = builder.add(builder.mul(panels.counter, I64(rows)), first)
        source = builder.add(given.source, builder.mul(row, given.source_row))
        target = builder.add(given.target, builder.mul(panels.counter, given.target_panel))
        target = builder.add(target, builder.mul(first, I64(element_bytes)))
        blocks = Loop(builder, given.blocks, [source, target])
        source, target = blocks.values
        loaded = []
        for _ in range(n):
            loaded.append(self._row(source))
            source = builder.add(source, given.source_row)
        for step, value in enumerate(self._transposed(loaded)):
            at = step * shape.step_bytes
            if shape.kind == "single":
                low, high = (self._spread(I32(x), value.type) for x in (0xFFFF, -0x10000))
                store(builder, builder.and_(value, low), target, at)
                store(builder, builder.and_(value, high), target, at + rows * element_bytes)
            else:
                store(builder, value, target, at)
        source = builder.add(blocks.values[0], I64(shape.block_bytes))
        blocks.end([source, builder.add(target, I64(n * shape.step_bytes))])
        strips.end([])
        panels.end([])

    def _row(self, address: ir.Value) -> ir.Value:
        """A block of one row: a vector of the elements it becomes."""
        builder, given, n = self.builder, self.given, self.shape.block
        kind = self.shape.kind
        codes, element = _KINDS[kind]
        whole = ir.VectorType(element, n)
        if kind == "doubles":
            return load(builder, whole, address, 0)
        if kind == "bytes":
            return builder.xor(load(builder, whole, address, 0), self._spread(given.mask, whole))
        loaded = load(builder, ir.VectorType(I8, n * codes), address, 0)
        wide = ir.VectorType(I16 if kind != "doubled" else I32, n * codes)
        value = builder.and_(builder.sext(loaded, wide), self._spread(given.mask, wide))
        if kind == "halves":
            return value
        if kind == "doubled":
            low = builder.and_(value, self._spread(I32(0xFFFF), wide))
            return builder.or_(low, builder.shl(value, self._spread(I32(16), wide)))
        return builder.bitcast(builder.shl(value, self._spread(given.shift, wide)), whole)

    def _spread(self, scalar: ir.Value, kind: ir.VectorType) -> ir.Value:
        if scalar.type.width > kind.element.width:
            scalar = self.builder.trunc(scalar, kind.element)
        return broadcast(self.builder, scalar, kind.count)

    def _transposed(self, rows: Vectors) -> Vectors:
        """Zip the upper half with the lower one until every row is a column."""
        n = len(rows)
        half, turns = n // 2, n.bit_length() - 1
        mask = ir.VectorType(I32, n)
        for _ in range(turns):
            zipped = []
            for x, y in zip(rows[:half], rows[half:], strict=True):
                for start in (0, half):
                    picks = [p for i in range(half) for p in (start + i, n + start + i)]
                    picked = self.builder.shuffle_vector(x, y, ir.Constant(mask, picks))
                    zipped.append(picked)
            rows = zipped
        return rows


@njit(cache=True, nogil=True)
def gather_codes(codes, order, out):
    """out[r, i] = codes[r, order[i]], or 0 where order[i] is -1; zeros fill what is left.

    codes (R, K), out (R or more, packed K or more) int8; order (packed K,), or (0,) to keep it.
    """
    for r in range(out.shape[0]):
        target = out[r]
        for i in range(target.size):
            target[i] = 0
        if r >= codes.shape[0]:
            continue
        row = codes[r]
        if order.size == 0:
            for i in range(row.size):
                target[i] = row[i]
        for i in range(order.size):
            if order[i] >= 0:
                target[i] = row[order[i]]


@njit(cache=True, nogil=True)
def chunk_offsets(codes, ends, chunk, amount, width, offsets, last):
    """Prefix sums of amount * codes after each chunk, restarting with each segment.

    codes (N, K) int8, packed order; ends (P,) int64 of the segments in K, multiples of `chunk`;
    amount int32; offsets (panels, chunks * width) int32, or (panels, 0) for none wanted;
    last (P, panels * width) int32, zeros: the sum of each segment.
    """
    # Which panel a row is in, and where: counted, as a division is a function to compile.
    panel, place = 0, 0
    for n in range(codes.shape[0]):
        row, start, at = codes[n], 0, place
        for p in range(ends.size):
            total = np.int32(0)
            if offsets.shape[1] == 0:
                # One sum of each segment: a loop that compilers vectorize.
                part = row[start : ends[p]]
                for i in range(part.size):
                    total = np.int32(total + np.int32(part[i]))
                total = np.int32(total * amount)
            else:
                for begin in range(start, ends[p], chunk):
                    for i in range(begin, begin + chunk):
                        total = np.int32(total + np.int32(amount * np.int32(row[i])))
                    offsets[panel, at] = total
                    at += width
            last[p, n] = total
            start = ends[p]
        place += 1
        if place == width:
            panel, place = panel + 1, 0


@njit(cache=True, nogil=True)
def code_range(codes):
    """Return (lowest, highest) code of (R, K) int8 or uint8, both with 0."""
    low, high = codes.dtype.type(0), codes.dtype.type(0)
    for r in range(codes.shape[0]):
        row = codes[r]
        for i in range(row.size):
            low, high = smaller(low, row[i]), larger(high, row[i])
    return low, high


@njit(cache=True, nogil=True)
def sampled_norms(codes, mask, step):
    """Highest, then lowest (largest magnitude, L1 norm, squared L2 norm) of every `step`-th row.

    codes (R, K) int8, R >= 1; mask as for `row_norms`. int64 each.
    """
    high_top, high_l1, high_l2 = np.int64(0), np.int64(0), np.int64(0)
    low_top = low_l1 = low_l2 = np.int64(2**62)
    norms = np.empty((5, 1), np.int64)
    for r in range(0, codes.shape[0], step):
        row_norms(codes[r : r + 1], mask, norms)
        top, l1, l2 = larger(norms[1, 0], -norms[0, 0]), norms[3, 0], norms[4, 0]
        high_top, high_l1, high_l2 = larger(high_top, top), larger(high_l1, l1), larger(high_l2, l2)
        low_top, low_l1, low_l2 = smaller(low_top, top), smaller(low_l1, l1), smaller(low_l2, l2)
    return high_top, high_l1, high_l2, low_top, low_l1, low_l2


@njit(cache=True, nogil=True)
def row_norms(codes, mask, norms):
    """Lowest code, highest, sum, L1 norm and squared L2 norm of each row; norms (5, R) int64.

    codes (R, K) int8; mask int16, 255 where the bytes are unsigned, else -1. The lowest and
    highest include 0.
    """
    for r in range(codes.shape[0]):
        row = codes[r]
        low, high = np.int16(0), np.int16(0)
        total, l1, l2 = np.int64(0), np.int64(0), np.int64(0)
        # 4096 squares of codes below 2**8 stay below 2**31: 32-bit lanes hold a stretch.
        for begin in range(0, row.size, 4096):
            part = row[begin : begin + 4096]
            sum0, sum1, sum2 = np.int32(0), np.int32(0), np.int32(0)
            for i in range(part.size):
                code = np.int32(np.int16(part[i]) & mask)
                low, high = smaller(low, np.int16(code)), larger(high, np.int16(code))
                sum0 = np.int32(sum0 + code)
                sum1 = np.int32(sum1 + np.int32(abs(code)))
                sum2 = np.int32(sum2 + np.int32(code * code))
            total += sum0
            l1 += sum1
            l2 += sum2
        norms[0, r], norms[1, r], norms[2, r], norms[3, r], norms[4, r] = low, high, total, l1, l2
