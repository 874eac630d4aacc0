"""LLVM vector code for one register tile of a GEMM: rows x vectors of accumulators over all of K.

Compilers do not find the dot-product instructions in loops over arrays (a plain Numba loop reaches
3 % of the speed), so the tile is written as LLVM IR. Everything here only emits code, which
`kernels.tile` puts together.

A tile reads A as ``[step][row]`` dwords, each broadcast to all lanes, and W as ``[step][vector]``
registers. One dword holds four bytes (dot ``bytes``: unsigned A x signed W), two 16-bit numbers
(dot ``words``) or one 16-bit number twice (dot ``halves``: 16-bit lanes, no sum).

Results leave a tile as int32, or shifted, rounded and saturated (SRS) while they are in registers.
With x = q * 2**s + r and 0 <= r < 2**s, every rounding mode is
``q + ((r + c0 + c1 * [x < 0] + c2 * [q odd]) >> s)``, as in `kernels.shift_round`; shifts of at
most `MAX_SHIFT` keep the sum within int32.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from llvmlite import binding, ir

from loraq_sim.kernels.processor import TileArguments

__all__ = [
    *("F32", "F64", "I8", "I16", "I32", "I64", "MAX_SHIFT", "Instructions", "Loop"),
    *("TileShape", "Vectors"),
    *("broadcast", "choose", "load", "prefetch", "size_of", "store", "store_results"),
]

Vectors = list[ir.Value]

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()
_CODES = {"bytes": (I8, 4), "words": (I16, 2), "halves": (I16, 1), "doubles": (F64, 1)}
_FLOAT_BYTES = {F32: 4, F64: 8}


def _pointer(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    at = builder.add(address, I64(offset)) if offset else address
    return builder.inttoptr(at, kind.as_pointer())


def load(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, offset: int) -> ir.Value:
    """Load `kind` from byte `offset` after an i64 address; only element alignment is assumed."""
    element = kind.element if isinstance(kind, ir.VectorType) else kind
    align = size_of(element)
    return builder.load(_pointer(builder, address, offset, kind), align=align)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, offset: int) -> None:
    """Store a vector at byte `offset` after an i64 address."""
    where = _pointer(builder, address, offset, value.type)
    builder.store(value, where, align=size_of(value.type.element))


def size_of(element: ir.Type) -> int:
    """Bytes of a number."""
    return _FLOAT_BYTES.get(element) or element.width // 8


def prefetch(
    builder: ir.IRBuilder, address: ir.Value, offset: int, *, to_write: bool = False
) -> None:
    """Ask for the line at byte `offset` after an address; never faults.

    It comes into an outer cache, or where it is `to_write`, into the innermost one.
    """
    pointer = _pointer(builder, address, offset, I8)
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    name = "llvm.prefetch.p0"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(function, [pointer, I32(int(to_write)), I32(3 if to_write else 2), I32(1)])


def broadcast(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """Return a vector with `scalar` in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    undefined = ir.Constant(vector, ir.Undefined)
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def _call(builder: ir.IRBuilder, name: str, returned: ir.Type, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic, declared on first use."""
    kind = ir.FunctionType(returned, [arg.type for arg in args])
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, kind, name)
    return builder.call(function, args)


def _extreme(builder: ir.IRBuilder, which: str, x: ir.Value, y: ir.Value) -> ir.Value:
    """Return the signed minimum (``smin``) or maximum (``smax``) of each lane."""
    name = f"llvm.{which}.v{x.type.count}i{x.type.element.width}"
    return _call(builder, name, x.type, x, y)


@cache
def _takes_codes(name: str) -> bool:
    """Whether this LLVM declares a dot product over vectors of codes; LLVM 15 to 20 do over dwords.

    A newer one turns the old declaration into its own while it reads it.
    """
    old = "(<16 x i32>, <16 x i32>, <16 x i32>)"
    return old not in str(binding.parse_assembly(f"declare <16 x i32> @{name}{old}"))


class Instructions(NamedTuple):
    """The vector instructions of one processor path.

    Attributes
    ----------
    path : str
        ``avx512`` (with VNNI), ``avx2`` or ``portable`` (plain LLVM vectors, any processor).
    dot : str
        ``bytes``, ``words``, ``words_saturating`` (the add into the lane saturates at int32),
        ``halves`` or ``doubles`` (float64 products that are exact, added in order).
    """

    path: str
    dot: str

    @property
    def layout(self) -> str:
        """Name of the operand layout: the dot without its overflow rule."""
        return self.dot.removesuffix("_saturating")

    @property
    def lanes(self) -> int:
        """Accumulators in one vector."""
        dwords = 16 if self.path == "avx512" else 8
        return {"halves": 2 * dwords, "doubles": dwords // 2}.get(self.dot, dwords)

    @property
    def accumulator(self) -> ir.VectorType:
        """Type of one vector of accumulators."""
        element = {"halves": I16, "doubles": F64}.get(self.dot, I32)
        return ir.VectorType(element, self.lanes)

    @property
    def operand(self) -> ir.VectorType:
        """Type of one vector of W, and of A after the broadcast."""
        element, group = _CODES[self.layout]
        return ir.VectorType(element, self.lanes * group)

    def spread(self, builder: ir.IRBuilder, dword: ir.Value) -> ir.Value:
        """Return one dword of A in every dword of an operand, or a float64 in every lane."""
        if self.dot == "doubles":
            return broadcast(builder, dword, self.lanes)
        dwords = self.operand.count * self.operand.element.width // 32
        return builder.bitcast(broadcast(builder, dword, dwords), self.operand)

    def multiply_add(
        self, builder: ir.IRBuilder, acc: ir.Value, a: ir.Value, w: ir.Value
    ) -> ir.Value:
        """Return acc + a . w, lane by lane."""
        if self.dot == "halves":
            return builder.add(acc, builder.mul(a, w))
        if self.dot == "doubles":
            # The product is exact: it makes no difference whether it is fused.
            product = builder.fmul(a, w, flags=("contract",))
            return builder.fadd(acc, product, flags=("contract",))
        if self.path == "avx512":
            name = {
                "bytes": "llvm.x86.avx512.vpdpbusd.512",
                "words": "llvm.x86.avx512.vpdpwssd.512",
                "words_saturating": "llvm.x86.avx512.vpdpwssds.512",
            }[self.dot]
            if not _takes_codes(name):
                a, w = (builder.bitcast(operand, self.accumulator) for operand in (a, w))
            return _call(builder, name, self.accumulator, acc, a, w)
        if self.path == "avx2":
            pairs = _call(builder, "llvm.x86.avx2.pmadd.wd", self.accumulator, a, w)
            return builder.add(acc, pairs)
        total = acc
        for half in range(2):
            picked = [self._every_other(builder, operand, half) for operand in (a, w)]
            total = builder.add(total, builder.mul(*picked))
        return total

    def _every_other(self, builder: ir.IRBuilder, operand: ir.Value, half: int) -> ir.Value:
        picks = ir.Constant(
            ir.VectorType(I32, self.lanes), [2 * lane + half for lane in range(self.lanes)]
        )
        undefined = ir.Constant(operand.type, ir.Undefined)
        words = builder.shuffle_vector(operand, undefined, picks)
        return builder.sext(words, self.accumulator)

    def smallest(self, builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the signed minimum of each lane."""
        return _extreme(builder, "smin", x, y)

    def largest(self, builder: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the signed maximum of each lane."""
        return _extreme(builder, "smax", x, y)


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
        """Vectors of lowest and highest prefixes, or of counts and first chunks."""
        if self.rule == "nested_report":
            return 8 * self.vectors
        return 2 * self.vectors if self.counts or self.rule == "measure" else 0

    @property
    def counts(self) -> bool:
        """Whether the tile counts the sums that its rule changes."""
        return self.rule.startswith("count") or self.rule == "nested_report"

    @property
    def nested(self) -> bool:
        """Whether one rule works inside another."""
        return self.rule.startswith("nested")


def choose(
    builder: ir.IRBuilder, known: ir.Value, values: Vectors, others: Callable[[], Vectors]
) -> Vectors:
    """Return `values` where an i1 holds; else what `others` emits, which runs there alone."""
    before = builder.block
    rare, after = builder.append_basic_block(), builder.append_basic_block()
    builder.cbranch(known, after, rare)
    builder.position_at_end(rare)
    found, end = others(), builder.block
    builder.branch(after)
    builder.position_at_end(after)
    chosen = []
    for value, other in zip(values, found, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, before)
        phi.add_incoming(other, end)
        chosen.append(phi)
    return chosen


class Loop:
    """A loop with a counter and carried values; `count` (i64) may be zero.

    Emit the body from `values`, then call `end` with what the next turn gets.
    """

    def __init__(self, builder: ir.IRBuilder, count: ir.Value, carried: list[ir.Value]) -> None:
        self.builder, self.count, self.start = builder, count, carried
        self.before = builder.block
        self.body = builder.append_basic_block()
        self.after = builder.append_basic_block()
        builder.cbranch(builder.icmp_signed(">", count, I64(0)), self.body, self.after)
        builder.position_at_end(self.body)
        self.counter = self._phi(I64(0))
        self.values = [self._phi(value) for value in carried]

    def _phi(self, first: ir.Value) -> ir.Value:
        phi = self.builder.phi(first.type)
        phi.add_incoming(first, self.before)
        return phi

    def end(self, carried: list[ir.Value]) -> list[ir.Value]:
        """Close the loop and return the values that leave it."""
        builder, last = self.builder, self.builder.block
        following = builder.add(self.counter, I64(1))
        builder.cbranch(builder.icmp_signed("<", following, self.count), self.body, self.after)
        for phi, value in zip([self.counter, *self.values], [following, *carried], strict=True):
            phi.add_incoming(value, last)
        builder.position_at_end(self.after)
        left = [self._phi(first) for first in self.start]
        for phi, value in zip(left, carried, strict=True):
            phi.add_incoming(value, last)
        return left


# r and the constants are below 2**s each: their sum stays below 2**31.
MAX_SHIFT = 30
_OUTPUT_BYTES = (1, 2, 4)


def store_results(
    builder: ir.IRBuilder, rows: list[list[ir.Value]], given: TileArguments, address: ir.Value
) -> None:
    """Store int32 vectors row by row from `address` on, as `given.out_bytes` asks."""
    plain, after = builder.append_basic_block(), builder.append_basic_block()
    choice = builder.switch(given.out_bytes, plain)
    builder.position_at_end(plain)
    _store_rows(builder, rows, given.out_row, address)
    builder.branch(after)
    for size in _OUTPUT_BYTES:
        block = builder.append_basic_block()
        choice.add_case(I64(size), block)
        builder.position_at_end(block)
        rounded = [[_rounded(builder, x, given, size) for x in row] for row in rows]
        _store_rows(builder, rounded, given.out_row, address)
        builder.branch(after)
    builder.position_at_end(after)


def _store_rows(builder, rows, stride, address) -> None:
    for row in rows:
        for v, value in enumerate(row):
            width = value.type.count * value.type.element.width // 8
            store(builder, value, address, width * v)
        address = builder.add(address, stride)


def _rounded(builder, x: ir.Value, given: TileArguments, size: int) -> ir.Value:
    """One vector, shifted, rounded, clamped and cut to `size` bytes."""
    wide, zero = x.type, ir.Constant(x.type, None)

    def spread(scalar):
        return broadcast(builder, builder.trunc(scalar, I32), wide.count)

    shift = spread(given.srs_shift)
    kept = builder.ashr(x, shift)
    rest = builder.and_(x, spread(given.srs_dropped))
    total = builder.add(rest, spread(given.srs_add))
    negative = builder.icmp_signed("<", x, zero)
    total = builder.add(total, builder.select(negative, spread(given.srs_negative), zero))
    odd = builder.trunc(kept, ir.VectorType(ir.IntType(1), wide.count))
    total = builder.add(total, builder.select(odd, spread(given.srs_odd), zero))
    result = builder.add(kept, builder.ashr(total, shift))
    result = _extreme(builder, "smax", result, spread(given.srs_lo))
    result = _extreme(builder, "smin", result, spread(given.srs_hi))
    if size == 4:
        return result
    return builder.trunc(result, ir.VectorType(ir.IntType(8 * size), wide.count))
