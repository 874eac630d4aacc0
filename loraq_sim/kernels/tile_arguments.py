"""The arguments of a compiled block of tiles."""

from typing import NamedTuple

__all__ = ["NEVER", "TileArguments"]

# First chunk or K index where nothing overflowed.
NEVER = 2**31 - 1


class TileArguments(NamedTuple):
    """What the code of a block reads, in this order, as 64-bit integers.

    Addresses are of the first tile; strides are in bytes, from one panel of rows or of columns to
    the next unless said otherwise. Matrices are padded to whole tiles.

    Attributes
    ----------
    a, a_stride, w, w_stride : packed operands
    offsets, offsets_stride : chunk offsets of each column panel, (chunks, width)
    start, start_row, start_panel : accumulators to start from, lanes of the accumulator; the
        strides from row to row and from column panel to column panel (both 0 for one row of zeros)
    statistics : (2, width), read and written: extremes, or counts and first changed chunks. Of
        nested rules (8, width): overflows of the inner rule, lowest and highest inner sums, columns
        with overflows, lowest and highest outer sums, overflows, first changed columns
    changed : int32 matrix like `out`, read and written: bits that the rule changed, ever
    last : int32, what to take off each column's sums at the end
    out, out_row, out_panel : result matrix and the strides from row to row and from column panel to
        column panel
    row_panels, column_panels : tiles
    first_panel : column panel to start at, of `column_panels` from there
    todo, todo_stride, wanted : address of one byte a tile, from one row panel to the next, and the
        byte of the tiles to compute; address 0 for all
    chunks, inner : turns of the chunk loop (pairs of products for single products), dot steps each
    inner_chunks, inner_drop, inner_lo, inner_hi : of nested rules, chunks of a column, high bits
        that its sum drops, and limits
    lo, hi : limits
    up, down : the result is ``((acc - last) << up) >> down``; ``count_wrap`` also shifts by `up`,
        both ways, after each chunk
    out_bytes : bytes of a stored result after shift-round-saturate; 0 stores the int32 as it is.
        Tiles that measure or count take 0 only
    srs_shift, srs_dropped, srs_add, srs_negative, srs_odd, srs_lo, srs_hi : s, 2**s - 1, the three
        constants of the rounding mode and the limits (see `kernels.tile_output`)
    """

    a: int
    a_stride: int
    w: int
    w_stride: int
    offsets: int
    offsets_stride: int
    start: int
    start_row: int
    start_panel: int
    statistics: int
    changed: int
    last: int
    out: int
    out_row: int
    out_panel: int
    out_bytes: int
    srs_shift: int
    srs_dropped: int
    srs_add: int
    srs_negative: int
    srs_odd: int
    srs_lo: int
    srs_hi: int
    row_panels: int
    column_panels: int
    first_panel: int
    todo: int
    todo_stride: int
    wanted: int
    chunks: int
    inner: int
    inner_chunks: int = 0
    inner_drop: int = 0
    inner_lo: int = 0
    inner_hi: int = 0
    lo: int = 0
    hi: int = 0
    up: int = 0
    down: int = 0
