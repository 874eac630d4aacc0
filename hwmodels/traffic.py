"""Core tiles, and the bytes each makes a kernel move: into L1, out of L2, to and from DRAM.

The candidate tiles depend on the accelerator only, never on the layer. So every cost of a kernel
is, for each tile, a sum of terms that cannot fall when the layer grows; and the least over a fixed
set (which can only shrink as operands widen) cannot fall either. Rounding keeps this exact, since
floating-point +, *, / and max are monotone and nothing is subtracted.

Partial sums never leave the unit: y is written once per kernel. DRAM is read in the loop order with
the fewest bytes of three:

    outputs stationary      X is read once per column of array-wide tiles, W once per row of them
    activations or weights resident    a panel of X or W rows stays in L2, the other streams by

Panels need `panel_fraction` of L2 and do not depend on the core tile. An unfused up-projection
finds y there if it fits as a whole.

Where main and branch use two activation formats, the first pass reads the wider one and derives
main's on chip; later passes read whichever moves fewer bytes, counting the write of a copy.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from hwmodels.blocks import Dma
from hwmodels.branch import FusedBranch, GemmKernel
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError
from hwmodels.operands import Operand

__all__ = [
    "DramTraffic",
    "Floats",
    "Tiles",
    "blocks_of",
    "ceil_div",
    "depth_share",
    "dram_traffic",
    "l1_fill_bytes",
    "l1_fill_cycles",
    "l2_read_bytes",
    "legal_tiles",
    "passes",
    "right_elements",
    "single_tile",
]

Floats = NDArray[np.float64]
Passes = TypeVar("Passes", int, Floats)

# Depths as multiples of the step: fine where it matters, 14 in all to keep the search short.
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
_DEPTHS = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """Candidate tiles of one compute unit: float64 arrays of equal length, in elements.

    `units_m`, `units_n`: units of an array along the rows and columns of y; `splits`: parts the
    depth of a tile is cut into, each for a unit of a grid.
    """

    m: Floats
    n: Floats
    k: Floats
    units_m: Floats
    units_n: Floats
    splits: Floats

    def at(self, index: int) -> tuple[int, int, int]:
        """Tile `index` as (m, k, n)."""
        return int(self.m[index]), int(self.k[index]), int(self.n[index])


@overload
def ceil_div(a: float, b: float) -> float: ...
@overload
def ceil_div(a: Floats | float, b: Floats) -> Floats: ...
@overload
def ceil_div(a: Floats, b: float) -> Floats: ...
def ceil_div(a: Floats | float, b: Floats | float) -> Floats | float:
    """Ceiling of a / b for positive whole floats below 2**53."""
    return np.ceil(a / b)


def single_tile(m: int, k: int, n: int, hw: Accelerator | None = None) -> Tiles:
    """One tile of (m, k, n), with all the ways the kernels of `hw` lay it on the units."""
    sizes = [np.array([float(size)]) for size in (m, n, k)]
    return _laid_out(hw, *sizes)


def _laid_out(hw: Accelerator | None, m: Floats, n: Floats, k: Floats) -> Tiles:
    """Tiles in every mapping to the axes of an array, or every split of the depth."""
    rows, columns = (1, 1) if hw is None else (hw.units.rows, hw.units.columns)
    ways = [(rows, columns, 1)]
    if hw is not None and hw.units.organization == "array":
        turned = [(columns, rows, 1)]
        by_axis = {"columns": turned, "either": ways + turned}
        ways = by_axis.get(hw.kernel.m_axis or "rows", ways)
    elif hw is not None and hw.units.organization == "grid" and hw.kernel.balance != "stream_k":
        ways = [(rows, columns, s) for s in _SPLITS if s <= hw.kernel.split_k_max]
    count = len(m)
    columns_of = np.repeat(np.array(ways, dtype=np.float64), count, axis=0).T
    m, n, k = (np.tile(axis, len(ways)) for axis in (m, n, k))
    return Tiles(m=m, n=n, k=k, units_m=columns_of[0], units_n=columns_of[1], splits=columns_of[2])


def legal_tiles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles | None = None) -> Tiles:
    """Tiles whose buffers fit in L1 (and whose outputs fit in the accumulators).

    Inputs are double-buffered (`input_buffers`). A fused branch streams slices of P and L through
    the same buffers, which are as wide as the wider of the two. Where the file says what DMA
    descriptors can say, one of them has to bring each operand's tile.

    Raises
    ------
    AcceleratorError
        If no tile fits.
    """
    if hw.units.organization == "systolic":
        # The array is the tile; operands pass through its elements.
        return single_tile(1, 1, 1, hw)
    chosen = _candidate_tiles(hw) if tiles is None else tiles
    fits = _l1_bytes(hw, kernel, chosen) <= hw.memories.l1.capacity_bytes
    room = hw.kernel.sums_capacity_bytes
    if room is not None:
        fits &= chosen.m * chosen.n * 4 <= room
    if kernel.branch is not None:
        fits &= chosen.splits == 1  # P and L are added where the sums are whole.
    if hw.memories.dma is not None:
        fits &= _carried(hw, kernel, tiles, hw.memories.dma)
    if not fits.any():
        raise AcceleratorError(_why_nothing_fits(hw, kernel, chosen))
    return Tiles(**{field.name: getattr(chosen, field.name)[fits] for field in fields(Tiles)})


def _carried(
    hw: Accelerator, kernel: GemmKernel, given: Tiles | None, dma: Dma
) -> NDArray[np.bool_]:
    """Whether one DMA descriptor moves each operand's part of the tiles given, or of all."""
    key = ("carried", kernel.a.bits, kernel.w.bits)
    known: NDArray[np.bool_] | None = hw._cache.get(key) if given is None else None
    if known is not None:
        return known  # Of all tiles it hangs on widths alone.
    tiles = _candidate_tiles(hw) if given is None else given
    fits = np.ones(tiles.m.shape, dtype=np.bool_)
    for lines, bits in ((tiles.m, kernel.a.bits), (tiles.n, kernel.w.bits)):
        words = np.ceil(tiles.k * bits / (8 * dma.word_bytes))
        fits &= np.maximum(words, lines) <= dma.wrap_max_words
        fits &= words * lines <= dma.length_max_words
    if given is None:
        hw._cache[key] = fits
    return fits


def _candidate_tiles(hw: Accelerator) -> Tiles:
    """All tiles the accelerator's kernel can be built for, fitting or not."""
    cache = hw._cache
    if "tiles" not in cache:
        kernel = hw.kernel
        m = _sizes(kernel.register_block_m, kernel.tile_m_max_rows, kernel.tile_m_min_rows)
        n = _sizes(kernel.register_block_n, kernel.tile_n_max_columns, kernel.tile_n_min_columns)
        depths = np.array(_DEPTHS, dtype=np.int64) * kernel.tile_k_step
        k = depths[depths <= kernel.tile_k_max]
        if not (kernel.block_overhead_cycles or kernel.partial_cycles_per_64_bytes):
            k = k[:1]  # Slices of K cost nothing: no other depth is better.
        grid = [axis.ravel().astype(np.float64) for axis in np.meshgrid(m, n, k, indexing="ij")]
        cache["tiles"] = _laid_out(hw, grid[0], grid[1], grid[2])
    tiles: Tiles = cache["tiles"]
    return tiles


def _sizes(step: int, most: int, least: int | None) -> NDArray[np.int64]:
    """Multiples of `step` up to `most`, from `least` on; below `step`, its halves."""
    sizes = np.arange(step, most + 1, step)
    if least is None or least == step:
        return sizes
    below = [step >> i for i in range(1, 8) if step >> i >= least]
    return np.array([*below[::-1], *sizes[sizes >= min(least, sizes[-1])]], dtype=np.int64)


def blocks_of(hw: Accelerator, tiles: Tiles) -> Floats:
    """Register blocks of each tile; a tile below the block takes its part of one."""
    m, n = hw.kernel.register_block_m, hw.kernel.register_block_n
    along_m = np.where(tiles.m < m, tiles.m / m, ceil_div(tiles.m, m))
    return along_m * np.where(tiles.n < n, tiles.n / n, ceil_div(tiles.n, n))


def _why_nothing_fits(hw: Accelerator, kernel: GemmKernel, chosen: Tiles) -> str:
    l1 = hw.memories.l1
    if len(set(zip(chosen.m, chosen.k, chosen.n, strict=True))) == 1:
        m, k, n = chosen.at(0)
        sums, room = m * n * 4, hw.kernel.sums_capacity_bytes
        if room is not None and sums > room:
            what = f"the {sums} bytes of sums of tile {m}x{k}x{n} do not fit in"
            return f"{hw.name}: {what} kernel.accumulator_capacity_bytes={room}"
        return (
            f"{hw.name}: tile {m}x{k}x{n} needs {_l1_bytes(hw, kernel, chosen)[0]:.0f} bytes, more "
            f"than memories.l1.capacity_bytes={l1.capacity_bytes} ({l1.reserved_bytes} reserved)"
        )
    return (
        f"{hw.name}: no tile of a {kernel.m}x{kernel.n}x{kernel.k} GEMM fits in "
        f"memories.l1.capacity_bytes={l1.capacity_bytes} less {l1.reserved_bytes} reserved"
    )


def passes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Output tiles each compute unit works through, one after the other."""
    if hw.units.organization == "systolic":
        return np.ones_like(tiles.m)
    if hw.units.organization == "array":
        rows = ceil_div(kernel.m, tiles.units_m * tiles.m)
        return rows * ceil_div(kernel.n, tiles.units_n * tiles.n)
    blocks = ceil_div(kernel.m, tiles.m) * ceil_div(kernel.n, tiles.n)
    return ceil_div(blocks * tiles.splits, hw.units.count)


def depth_share(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Part of the depth of a tile that one unit works on in one of its `passes`.

    Split-K cuts it into equal parts; stream-K deals all depth out evenly, to `split_k_max` at most.
    """
    if hw.units.organization != "grid":
        return np.ones_like(tiles.m)
    if hw.kernel.balance != "stream_k" or kernel.branch is not None:
        return 1 / tiles.splits
    blocks = ceil_div(kernel.m, tiles.m) * ceil_div(kernel.n, tiles.n)
    even = np.maximum(blocks / hw.units.count, 1 / hw.kernel.split_k_max)
    return even / passes(hw, kernel, tiles)


def _l1_bytes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    l1 = hw.memories.l1
    a_line = kernel.a_line_bits(tiles.k)
    w_line = kernel.w_line_bits(tiles.k)
    if kernel.branch is not None:
        depth = np.minimum(tiles.k, kernel.branch.rank)
        a_line = np.maximum(a_line, kernel.line_bits(kernel.branch.p_bits, depth))
        w_line = np.maximum(w_line, kernel.line_bits(kernel.branch.factor_bits, depth))
    dma = hw.memories.dma
    if dma is not None:  # Lines start at words.
        word = 8 * dma.word_bytes
        a_line, w_line = np.ceil(a_line / word) * word, np.ceil(w_line / word) * word
    total = l1.reserved_bytes + l1.input_buffers * (tiles.m * a_line + tiles.n * w_line) / 8
    if hw.kernel.partials == "l1":
        total = total + l1.output_buffers * tiles.m * tiles.n * kernel.partial_bits / 8
    return total


@dataclass(frozen=True, kw_only=True)
class DramTraffic:
    """DRAM bytes of one kernel and the loop order they belong to."""

    policy: str
    x_reads: int
    w_reads: int
    activations: int
    weights: int
    factors: int
    output: int
    partial_input: int
    p: int = 0
    smooth: int = 0

    @property
    def total(self) -> int:
        """All bytes read and written."""
        moved = self.activations + self.weights + self.factors + self.output
        return moved + self.partial_input + self.p + self.smooth

    def shared(self, by: int) -> "DramTraffic":
        """An even part of the bytes, rounded up, for one of `by` layers."""
        names = ("activations", "weights", "factors", "output", "partial_input", "p", "smooth")
        return replace(self, **{name: -(-getattr(self, name) // by) for name in names})


def dram_traffic(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, *, use_panels: bool = True
) -> tuple[DramTraffic, Floats]:
    """Fewest DRAM bytes of `kernel` over tiles and loop orders, and the fewest for each tile.

    `use_panels` False: outputs stationary only. The first is what a layer has to move and cannot
    fall when the layer grows; the second paces the kernel, tile by tile, and counts what DRAM could
    have moved while the streams of one operand lag behind.
    """
    x_reads, w_reads = _stationary_reads(hw, kernel, tiles)
    stationary = _input_bytes(kernel, x_reads, w_reads)
    best = int(np.argmin(stationary))
    options = [("outputs stationary", int(x_reads[best]), int(w_reads[best]))]
    if use_panels:
        options += _panels(hw, kernel)
    least = min(options, key=lambda option: _input_bytes(kernel, *option[1:]))
    policy, x_times, w_times = least
    traffic = DramTraffic(
        policy=policy,
        x_reads=x_times,
        w_reads=w_times,
        activations=int(_activations(kernel, x_times)),
        weights=w_times * kernel.w_bytes,
        factors=w_times * kernel.factor_bytes,
        output=kernel.out_bytes,
        partial_input=_reread_bytes(hw, kernel),
        p=x_times * (0 if kernel.branch is None else kernel.branch.p_bytes),
        smooth=kernel.smooth_bytes,
    )
    others = traffic.output + traffic.partial_input + traffic.smooth
    paced = np.maximum(stationary + others, _streamed_bytes(hw, kernel, tiles, x_reads, w_reads))
    for _, x, w in options[1:]:
        x_times_all, w_times_all = np.full_like(x_reads, x), np.full_like(x_reads, w)
        streamed = _streamed_bytes(hw, kernel, tiles, x_times_all, w_times_all)
        paced = np.minimum(paced, np.maximum(_input_bytes(kernel, x, w) + others, streamed))
    return traffic, paced


def _streamed_bytes(
    hw: Accelerator, kernel: GemmKernel, tiles: Tiles, x_times: Floats, w_times: Floats
) -> Floats | float:
    """Bytes that DRAM could move while the busiest of the streams of X, W and y moves its own."""
    dram = hw.memories.dram
    if dram.stream_bytes_per_s is None or hw.units.organization != "array":
        return 0.0
    x_bytes = _input_bytes(kernel, x_times, 0 * w_times)
    w_bytes = w_times * (kernel.w_bytes + kernel.factor_bytes)
    busiest = np.maximum(x_bytes / tiles.units_m, w_bytes / tiles.units_n)
    busiest = np.maximum(busiest, kernel.out_bytes / hw.units.columns)
    return busiest * (dram.sustained_bytes_per_s / dram.stream_bytes_per_s)


def _reread_bytes(hw: Accelerator, kernel: GemmKernel) -> int:
    """DRAM bytes of reading y back: none where all of it may still be in L2."""
    room = hw.memories.l2.capacity_bytes * hw.memories.l2.panel_fraction
    return kernel.reread_bytes if kernel.reread_bytes > room else 0


def _input_bytes(kernel: GemmKernel, x_times: Passes, w_times: Passes) -> Passes:
    """Bytes of some passes over X (and P, where it comes from DRAM) and over W and the factors."""
    p_bytes = 0 if kernel.branch is None else kernel.branch.p_bytes
    weights = kernel.w_bytes + kernel.factor_bytes
    return _activations(kernel, x_times) + x_times * p_bytes + w_times * weights


def _stationary_reads(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> tuple[Floats, Floats]:
    """Passes over X and over W, per candidate tile, without a resident panel."""
    dataflow = hw.units.dataflow
    x_reads = ceil_div(kernel.n, tiles.units_n * tiles.n)
    w_reads = ceil_div(kernel.m, tiles.units_m * tiles.m)
    if dataflow == "weight_stationary":
        w_reads = np.ones_like(w_reads)
    elif dataflow == "input_stationary":
        x_reads = np.ones_like(x_reads)
        w_reads = np.full_like(x_reads, ceil_div(kernel.m, hw.units.columns))
    return x_reads, w_reads


def _activations(kernel: GemmKernel, times: Passes) -> Passes:
    """Bytes of `times` passes over X; a second format is written once, then read."""
    first = kernel.first_x_bytes
    if first == kernel.x_bytes:
        return times * first
    return np.minimum(times * first, first + np.where(times > 1, times, 0) * kernel.x_bytes)


def _panels(hw: Accelerator, kernel: GemmKernel) -> list[tuple[str, int, int]]:
    room = hw.memories.l2.capacity_bytes * hw.memories.l2.panel_fraction
    x_row = kernel.x_bytes / kernel.m
    w_row = kernel.w_bytes / kernel.n
    w_room = room
    if kernel.branch is not None:
        p_row = kernel.line_bits(kernel.branch.p_bits, kernel.branch.rank) / 8
        x_row += p_row
        w_row += kernel.branch.left_bytes / kernel.n
        w_room -= kernel.m * p_row  # P of every row must outlive the first weight panel.
    options = []
    block_m, block_n = hw.kernel.register_block_m, hw.kernel.register_block_n
    x_rows = math.floor(room / x_row / block_m) * block_m
    if x_rows:
        options.append(("activations resident", 1, math.ceil(kernel.m / x_rows)))
    w_rows = math.floor(max(0.0, w_room) / w_row / block_n) * block_n
    if w_rows:
        options.append(("weights resident", math.ceil(kernel.n / w_rows), 1))
    return options


def l1_fill_cycles(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Cycles the input streams of one unit are busy, per candidate tile.

    The edges of a systolic array take one element a lane and cycle, which its closed form counts.
    """
    if hw.units.organization == "systolic":
        return np.zeros_like(tiles.m)
    a_bytes, w_bytes = l1_fill_bytes(hw, kernel, tiles)
    l1 = hw.memories.l1
    if l1.fill_channels == "separate":
        return np.maximum(a_bytes, w_bytes) / l1.fill_bytes_per_cycle
    return (a_bytes + w_bytes) / l1.fill_bytes_per_cycle


def l1_fill_bytes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> tuple[Floats, Floats]:
    """Activation and weight bytes that enter the L1 of one unit, per candidate tile.

    Where a fused branch reads X in another format or X is rotated, the first pass brings the wider.
    """
    runs = passes(hw, kernel, tiles)
    a_line, w_line = _lines(kernel)
    deep = runs * depth_share(hw, kernel, tiles)
    a_bytes, w_bytes = deep * tiles.m * a_line / 8, deep * tiles.n * w_line / 8
    branch = kernel.branch
    if branch is None and not kernel.reads_wide_x:
        return a_bytes, w_bytes
    is_array = hw.units.organization == "array"
    x_share = hw.units.rows if is_array else hw.units.vector_units
    wider_rows = np.full_like(runs, kernel.m / x_share)
    if branch is not None and branch.down_place == "per_tile":
        wider_rows = runs * tiles.m
    a_bytes = a_bytes + wider_rows * _wider_x_bits(kernel) / 8
    if branch is not None and branch.forms_p:
        elements = right_elements(hw, kernel, branch, tiles)
        w_bytes = w_bytes + elements * _right_bits(kernel, branch) / 8
    return a_bytes, w_bytes


def right_elements(
    hw: Accelerator, kernel: GemmKernel, branch: FusedBranch, tiles: Tiles
) -> Floats:
    """Elements of R that enter one unit: once for every row of tiles it works on, or every tile."""
    elements = kernel.down_share * branch.down_rank * kernel.k
    if branch.down_place == "per_tile":
        return passes(hw, kernel, tiles) * elements
    if hw.units.organization == "array":
        return ceil_div(kernel.m, tiles.units_m * tiles.m) * elements / tiles.units_n
    return ceil_div(kernel.m, tiles.m) * elements / hw.units.vector_units


def l2_read_bytes(hw: Accelerator, kernel: GemmKernel, tiles: Tiles) -> Floats:
    """Bytes read from L2 towards the units; an array reads once and multicasts."""
    if hw.units.organization == "grid":
        x_times, w_times = ceil_div(kernel.n, tiles.n), ceil_div(kernel.m, tiles.m)
    else:
        x_times, w_times = _stationary_reads(hw, kernel, tiles)
    a_line, w_line = _lines(kernel)
    total = x_times * kernel.m * a_line + w_times * kernel.n * w_line + 8 * kernel.reread_bytes
    branch = kernel.branch
    is_per_tile = branch is not None and branch.down_place == "per_tile"
    wider = kernel.m * _wider_x_bits(kernel)
    total = total + (x_times * wider if is_per_tile else wider)
    if branch is not None and branch.down_place != "elsewhere":
        r_times = w_times * x_times if is_per_tile else w_times
        r_elements = kernel.down_share * branch.down_rank * kernel.k
        total = total + r_times * r_elements * _right_bits(kernel, branch)
    return total / 8


def _lines(kernel: GemmKernel) -> tuple[float, float]:
    """Bits of one row of activations and of weights, with P and L where the branch is fused."""
    a_line = kernel.a_line_bits(kernel.k)
    w_line = kernel.w_line_bits(kernel.k)
    branch = kernel.branch
    if branch is not None:
        a_line = a_line + kernel.line_bits(branch.p_bits, branch.rank)
        w_line = w_line + kernel.line_bits(branch.factor_bits, branch.rank)
    return a_line, w_line


def _wider_x_bits(kernel: GemmKernel) -> float:
    """Bits a row of X has more on its first pass than in main's format; 0 when it has not.

    It reads the wider of main's and the branch's, or 16 bits to rotate; a side unit its own.
    """
    branch = kernel.branch
    formats = [kernel.a]
    if branch is not None and branch.down_place not in ("elsewhere", "side"):
        formats.append(branch.x)
    if kernel.reads_wide_x:
        formats.append(Operand(16))
    lines = [kernel.line_bits(bits, kernel.k, letter) for bits, letter in formats]
    more = max(lines) - lines[0]
    if branch is not None and branch.down_place == "side":
        more += kernel.line_bits(branch.x.bits, kernel.k, branch.x.letter)
    return more


def _right_bits(kernel: GemmKernel, branch: FusedBranch) -> float:
    """Mean bits per element of R, scales included."""
    return kernel.line_bits(branch.factor_bits, kernel.k) / kernel.k
