"""The order in which nunchaku's W4A4 kernels store the elements of a matrix.

A warp multiplies with ``mma.m16n8k64`` (4-bit) and ``mma.m16n8k16`` (16-bit); every lane finds what
it multiplies in consecutive bytes. Lane l of 32 is (row l // 4, column l % 4) of a fragment:

- **weights**, tiles of 128 rows by 64 columns, row tiles outermost. In a tile: fragments of 16
  rows, then lanes, then the two halves of 8 rows, then the two halves of 32 columns, then 8 codes
  in one 32-bit word, the first in its lowest bits;
- **scales** (also bias and smoothing, as one column), blocks of 128 rows; in a block group by
  group: 8 runs of 16 rows, where lane column c takes rows 2c, 2c + 1, 8 + 2c and 9 + 2c;
- **low-rank factors** (16 bit), tiles of 16 by 16: lanes, then halves of 8 rows, then halves of 8
  columns, then two elements. The down projection (r, K) is tiled along K first, the up projection
  (N, r) along N first.

The tests follow every element to its place by index arithmetic of their own.
"""

import numpy as np

__all__ = [
    "COLUMN_TILE",
    "RANK_TILE",
    "ROW_TILE",
    "pack_codes",
    "pack_low_rank",
    "pack_scales",
    "padded",
    "unpack_codes",
    "unpack_low_rank",
    "unpack_scales",
]

ROW_TILE = 128
COLUMN_TILE = 128
RANK_TILE = 16

_WEIGHT_AXES = (0, 4, 1, 3, 6, 2, 5, 7)
_SCALE_AXES = (0, 5, 1, 3, 2, 4)
_FACTOR_AXES = (0, 1, 3, 5, 2, 4, 6)
_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)


def padded(values: np.ndarray, multiples: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """`values` with each axis filled up to a multiple, behind what is there."""
    pads = [(0, -size % multiple) for size, multiple in zip(values.shape, multiples, strict=True)]
    return np.pad(values, pads, constant_values=fill)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes of -8 to 7, (N, K) int8 with N and K multiples of 128 -> (N, K / 2) int8."""
    n, k = codes.shape
    parts = codes.reshape(n // 128, 8, 2, 8, k // 64, 2, 4, 8).transpose(_WEIGHT_AXES)
    nibbles = (parts & 0xF).astype(np.uint32) << _NIBBLES
    words = np.bitwise_or.reduce(nibbles, axis=-1)
    return words.astype("<u4").reshape(-1).view(np.int8).reshape(n, k // 2)


def unpack_codes(packed: np.ndarray) -> np.ndarray:
    """What `pack_codes` was given: (N, K / 2) int8 -> (N, K) int8."""
    n, half = packed.shape
    k = 2 * half
    words = np.ascontiguousarray(packed).view("<u4").reshape(n // 128, k // 64, 8, 8, 4, 2, 2, 1)
    nibbles = (words >> _NIBBLES & np.uint32(0xF)).astype(np.int8)
    codes = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    return codes.transpose(np.argsort(_WEIGHT_AXES)).reshape(n, k)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """Scales (N, groups) of any 16-bit dtype, N a multiple of 128 -> (groups, N)."""
    n, groups = scales.shape
    parts = scales.reshape(n // 128, 8, 2, 4, 2, groups).transpose(_SCALE_AXES)
    return np.ascontiguousarray(parts).reshape(groups, n)


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """What `pack_scales` was given: (groups, N) -> (N, groups)."""
    groups, n = packed.shape
    parts = np.ascontiguousarray(packed).reshape(n // 128, groups, 8, 4, 2, 2)
    return np.ascontiguousarray(parts.transpose(np.argsort(_SCALE_AXES))).reshape(n, groups)


def pack_low_rank(factor: np.ndarray, *, is_down: bool) -> np.ndarray:
    """A 16-bit factor with sides of multiples of 16: down (r, K) -> (K, r), up (N, r) -> (N, r)."""
    rows, columns = factor.shape
    tiles = factor.reshape(rows // 16, 16, columns // 16, 16)
    tiles = tiles.transpose((2, 0, 1, 3) if is_down else (0, 2, 1, 3))
    outer, inner = tiles.shape[:2]
    lanes = tiles.reshape(outer, inner, 2, 8, 2, 4, 2).transpose(_FACTOR_AXES)
    return np.ascontiguousarray(lanes).reshape((columns, rows) if is_down else (rows, columns))


def unpack_low_rank(packed: np.ndarray, *, is_down: bool) -> np.ndarray:
    """What `pack_low_rank` was given."""
    outer, inner = packed.shape[0] // 16, packed.shape[1] // 16
    lanes = np.ascontiguousarray(packed).reshape(outer, inner, 8, 4, 2, 2, 2)
    tiles = lanes.transpose(np.argsort(_FACTOR_AXES)).reshape(outer, inner, 16, 16)
    tiles = tiles.transpose((1, 2, 0, 3) if is_down else (0, 2, 1, 3))
    shape = packed.shape[::-1] if is_down else packed.shape
    return np.ascontiguousarray(tiles).reshape(shape)
