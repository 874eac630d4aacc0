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

Compilers do not find transpositions in loops.
"""

from typing import NamedTuple

from llvmlite import ir

from loraq_sim.kernels.vector_ir import I8, I16, I32, I64, Loop, Vectors, broadcast, load, store

__all__ = ["PackArguments", "PackCode", "PackShape"]

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
