"""Core tiles: which exist, which fit, and how many times each is run.

The candidate tiles depend on the accelerator only, never on the layer. So every cost below is, for
each tile, a sum of terms that cannot fall when the layer grows; and the least over a fixed set
(which can only shrink as operands widen) cannot fall either. Rounding keeps this exact, since
floating-point +, *, / and max are monotone and nothing is subtracted.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwmodels.branch import GemmKernel
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError

__all__ = [
    "Tiles",
    "candidate_tiles",
    "ceil_div",
    "legal_tiles",
    "passes",
    "requested_tile",
    "single_tile",
]

# Depths as multiples of the step: fine where it matters, 14 in all to keep the search short.
_DEPTHS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Candidate tiles of one compute unit: float64 arrays of equal length, in elements."""

    m: NDArray[np.float64]
    n: NDArray[np.float64]
    k: NDArray[np.float64]

    def at(self, index: int) -> tuple[int, int, int]:
        """Tile `index` as (m, k, n)."""
        return int(self.m[index]), int(self.k[index]), int(self.n[index])


def ceil_div(a: NDArray | float, b: NDArray | float) -> NDArray | float:
    """Ceiling of a / b for positive whole floats below 2**53."""
    return np.ceil(a / b)


def candidate_tiles(hw: Accelerator) -> Tiles:
    """All tiles the accelerator's kernel can be built for, fitting or not."""
    if "tiles" not in hw._cache:
        kernel = hw.kernel
        m = np.arange(kernel.register_block_m, kernel.tile_m_max_rows + 1, kernel.register_block_m)
        n = np.arange(
            kernel.register_block_n, kernel.tile_n_max_columns + 1, kernel.register_block_n
        )
        depths = np.array(_DEPTHS, dtype=np.int64) * kernel.tile_k_step
        k = depths[depths <= kernel.tile_k_max]
        grid = [axis.ravel().astype(np.float64) for axis in np.meshgrid(m, n, k, indexing="ij")]
        hw._cache["tiles"] = Tiles(m=grid[0], n=grid[1], k=grid[2])
    return hw._cache["tiles"]


def single_tile(m: int, k: int, n: int) -> Tiles:
    """One tile of (m, k, n)."""
    return Tiles(m=np.array([float(m)]), n=np.array([float(n)]), k=np.array([float(k)]))


def requested_tile(hw: Accelerator, kernel: GemmKernel, tile_mkn: Sequence[int]) -> Tiles:
    """The tile a user asked for in place of the search.

    Raises
    ------
    AcceleratorError
        If `tile_mkn` is not three positive whole numbers, each a multiple of what the instructions
        of the kernel's modes take; or the machine has no tiles.
    """
    shown = f"tile_mkn={tile_mkn!r:.80}"
    if hw.units.organization == "systolic":
        raise AcceleratorError(
            f"{shown}: {hw.name} is a systolic array, whose tile is the array; leave tile_mkn out"
        )
    try:
        sizes = tuple(None if isinstance(s, bool) else operator.index(s) for s in tile_mkn)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or not all(size is not None and 1 <= size < 2**31 for size in sizes):
        raise AcceleratorError(
            f"{shown} must be three whole numbers (m, k, n) of at least 1, such as "
            f"({hw.kernel.register_block_m}, {hw.kernel.tile_k_step}, {hw.kernel.register_block_n})"
        )
    for axis, size in zip("mkn", sizes, strict=True):
        for mode in kernel.modes:
            step = getattr(mode, f"instruction_{axis}")
            if size % step:
                below, above = size // step * step, (size // step + 1) * step
                raise AcceleratorError(
                    f"{shown}: {axis}={size} is no multiple of {step}, instruction_{axis} of mode "
                    f"{mode.name} of {hw.name}; use {f'{below} or ' if below else ''}{above}"
                )
    return single_tile(*sizes)


def legal_tiles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles | None = None) -> Tiles:
    """Tiles whose buffers fit in L1 (and whose outputs fit in the accumulators).

    Inputs are double-buffered (`input_buffers`). A fused branch streams slices of P and L through
    the same buffers, which are as wide as the wider of the two.

    Raises
    ------
    AcceleratorError
        If no tile fits.
    """
    if hw.units.organization == "systolic":
        return single_tile(1, 1, 1)  # The array is the tile; operands pass through its elements.
    chosen = candidate_tiles(hw) if tiles is None else tiles
    fits = _l1_bytes(hw, kernel, chosen) <= hw.memories.l1.capacity_bytes
    if hw.kernel.partials == "registers":
        fits &= chosen.m * chosen.n * 4 <= hw.kernel.accumulator_capacity_bytes
    if not fits.any():
        raise AcceleratorError(_why_nothing_fits(hw, kernel, chosen))
    return Tiles(m=chosen.m[fits], n=chosen.n[fits], k=chosen.k[fits])


def _why_nothing_fits(hw: Accelerator, kernel: GemmKernel, chosen: Tiles) -> str:
    l1 = hw.memories.l1
    if len(chosen.m) == 1:
        m, k, n = chosen.at(0)
        sums = m * n * 4
        if hw.kernel.partials == "registers" and sums > hw.kernel.accumulator_capacity_bytes:
            return (
                f"{hw.name}: the {sums} bytes of sums of tile {m}x{k}x{n} do not fit in "
                f"kernel.accumulator_capacity_bytes={hw.kernel.accumulator_capacity_bytes}"
            )
        return (
            f"{hw.name}: tile {m}x{k}x{n} needs {_l1_bytes(hw, kernel, chosen)[0]:.0f} bytes, more "
            f"than memories.l1.capacity_bytes={l1.capacity_bytes} ({l1.reserved_bytes} reserved)"
        )
    return (
        f"{hw.name}: no tile of a {kernel.m}x{kernel.n}x{kernel.k} GEMM fits in "
        f"memories.l1.capacity_bytes={l1.capacity_bytes} less {l1.reserved_bytes} reserved"
    )


def passes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> NDArray[np.float64]:
    """Output tiles each compute unit works through, one after the other."""
    if hw.units.organization == "systolic":
        return np.ones_like(tiles.m)
    if hw.units.organization == "array":
        rows = ceil_div(kernel.m, hw.units.rows * tiles.m)
        return rows * ceil_div(kernel.n, hw.units.columns * tiles.n)
    blocks = ceil_div(kernel.m, tiles.m) * ceil_div(kernel.n, tiles.n)
    return ceil_div(blocks, hw.units.count)


def _l1_bytes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> NDArray[np.float64]:
    l1 = hw.memories.l1
    a_line = kernel.line_bits(kernel.a_bits, tiles.k)
    w_line = kernel.line_bits(kernel.w_bits, tiles.k)
    if kernel.branch is not None:
        depth = np.minimum(tiles.k, kernel.branch.rank)
        a_line = np.maximum(a_line, kernel.line_bits(kernel.branch.p_bits, depth))
        w_line = np.maximum(w_line, kernel.line_bits(kernel.branch.factor_bits, depth))
    total = l1.reserved_bytes + l1.input_buffers * (tiles.m * a_line + tiles.n * w_line) / 8
    if hw.kernel.partials == "l1":
        total = total + l1.output_buffers * tiles.m * tiles.n * kernel.partial_bits / 8
    return total
