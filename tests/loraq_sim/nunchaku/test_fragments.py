"""The byte order, against index arithmetic that follows one element to its place."""

import numpy as np
import pytest

from loraq_sim.nunchaku.layer_tensors import (
    pack_codes,
    pack_low_rank,
    pack_micro_scales,
    pack_scales,
    padded,
    unpack_codes,
    unpack_low_rank,
    unpack_micro_scales,
    unpack_scales,
)


def nibble_place(row: int, column: int, k: int) -> int:
    """Position, counted in nibbles from the first byte, of the code (row, column)."""
    tile = (row // 128) * (k // 64) + column // 64
    fragment = row % 128 // 16
    lane = row % 8 * 4 + column % 32 // 8
    half = row % 16 // 8 * 2 + column % 64 // 32
    return ((tile * 8 + fragment) * 32 + lane) * 32 + half * 8 + column % 8


def scale_place(row: int, group: int, groups: int) -> int:
    block = (row // 128) * groups + group
    run, within = row % 128 // 16, row % 16
    return block * 128 + run * 16 + within % 8 // 2 * 4 + within // 8 * 2 + within % 2


def micro_place(row: int, group: int, groups: int) -> int:
    """Lanes 0, 4, 8, ... hold rows 0, 1, 2, ..., lanes 0 to 3 rows 8 apart, one rows 32 apart."""
    block = (row // 128) * (groups // 4) + group // 4
    lane = row % 8 * 4 + row % 32 // 8
    return (block * 32 + lane) * 16 + row % 128 // 32 * 4 + group % 4


def factor_place(row: int, column: int, tiles_inside: int, *, is_down: bool) -> int:
    outer, inner = (column, row) if is_down else (row, column)
    tile = outer // 16 * tiles_inside + inner // 16
    lane = row % 8 * 4 + column % 8 // 2
    half = row % 16 // 8 * 2 + column % 16 // 8
    return tile * 256 + lane * 8 + half * 2 + column % 2


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 128), (128, 384)])
def test_every_code_lies_where_the_kernel_looks_for_it(n, k):
    codes = np.random.default_rng(n + k).integers(-8, 8, (n, k)).astype(np.int8)
    packed = pack_codes(codes)
    assert packed.shape == (n, k // 2)
    assert packed.dtype == np.int8
    stored = packed.reshape(-1).view(np.uint8)
    places = np.array([[nibble_place(i, j, k) for j in range(k)] for i in range(n)])
    nibbles = stored[places // 2] >> (4 * (places % 2)) & 0xF
    np.testing.assert_array_equal(nibbles, codes & 0xF)
    np.testing.assert_array_equal(unpack_codes(packed), codes)


@pytest.mark.parametrize(("n", "groups"), [(128, 2), (256, 6), (128, 1)])
def test_every_scale_lies_where_the_kernel_looks_for_it(n, groups):
    scales = np.arange(n * groups, dtype=np.float16).reshape(n, groups)
    packed = pack_scales(scales)
    places = np.array([[scale_place(i, g, groups) for g in range(groups)] for i in range(n)])
    np.testing.assert_array_equal(packed.reshape(-1)[places], scales)
    np.testing.assert_array_equal(unpack_scales(packed), scales)


@pytest.mark.parametrize(("n", "groups"), [(128, 8), (256, 16), (384, 4)])
def test_every_scale_of_nvfp4_lies_where_the_kernel_looks_for_it(n, groups):
    scales = np.arange(n * groups, dtype=np.uint16).reshape(n, groups)
    packed = pack_micro_scales(scales)
    assert packed.shape == (groups, n)
    places = np.array([[micro_place(i, g, groups) for g in range(groups)] for i in range(n)])
    np.testing.assert_array_equal(packed.reshape(-1)[places], scales)
    np.testing.assert_array_equal(unpack_micro_scales(packed), scales)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (32, 256), (48, 16)])
@pytest.mark.parametrize("is_down", [True, False])
def test_every_factor_element_lies_where_the_kernel_looks_for_it(rows, columns, is_down):
    factor = np.arange(rows * columns, dtype=np.float16).reshape(rows, columns)
    packed = pack_low_rank(factor, is_down=is_down)
    assert packed.shape == ((columns, rows) if is_down else (rows, columns))
    inside = (rows if is_down else columns) // 16
    places = [[factor_place(i, j, inside, is_down=is_down) for j in range(columns)]
              for i in range(rows)]  # fmt: skip
    np.testing.assert_array_equal(packed.reshape(-1)[np.array(places)], factor)
    np.testing.assert_array_equal(unpack_low_rank(packed, is_down=is_down), factor)


def test_padding_goes_behind():
    filled = padded(np.ones((3, 5), np.float16), (4, 4), fill=7)
    assert filled.shape == (4, 8)
    np.testing.assert_array_equal(filled[:3, :5], 1)
    np.testing.assert_array_equal(filled[3], 7)
    np.testing.assert_array_equal(filled[:, 5:], 7)
