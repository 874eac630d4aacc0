"""How the results of a tile leave it: as int32, or shifted, rounded and saturated (SRS).

With x = q * 2**s + r and 0 <= r < 2**s, every rounding mode is
``q + ((r + c0 + c1 * [x < 0] + c2 * [q odd]) >> s)``, as in `kernels.shift_round`. Shifts of at
most `MAX_SHIFT` keep the sum within int32, so that a tile rounds while its sums are in registers.
"""

from llvmlite import ir

from loraq_sim.kernels.tile_arguments import TileArguments
from loraq_sim.kernels.vector_ir import I32, I64, broadcast, extreme, store

__all__ = ["MAX_SHIFT", "store_results"]

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
    result = extreme(builder, "smax", result, spread(given.srs_lo))
    result = extreme(builder, "smin", result, spread(given.srs_hi))
    if size == 4:
        return result
    return builder.trunc(result, ir.VectorType(ir.IntType(8 * size), wide.count))
