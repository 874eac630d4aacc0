"""A weight matrix checked once: norms of its rows, and codes packed for each kernel that asks."""

import threading
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from loraq_sim.emulator.mac_array import signed_width
from loraq_sim.errors import InputError

__all__ = [
    *("Layout", "Norms", "Order", "PackedWeight", "Panels"),
    *("address_of", "aligned_empty", "checked_codes", "checked_weights"),
    *("pack_panels", "pack_weight", "scratch"),
]

_GROUP = {"bytes": 4, "words": 2, "halves": 1, "doubles": 1}
_ALIGNMENT = 64
# Packing writes less than a block of steps past the end: at most 16 steps of 32 dwords.
_SLACK = 2**12
_THREAD = threading.local()


@dataclass(frozen=True)
class Order:
    """How K is laid out: accumulator by accumulator, chunks padded with zeros to whole dwords.

    ``chunk`` 0 keeps K as it is, for sums that no order can change. ``column`` products are summed
    on their own before they meet an accumulator; each starts with a chunk of its own. 0 for none.
    """

    codes: str
    chunk: int
    accumulators: int
    column: int = 0

    @property
    def group(self) -> int:
        """Codes in a dword."""
        return _GROUP[self.codes]

    @property
    def padded_chunk(self) -> int:
        """Codes of one chunk; single products share dwords, unless they stand in a column."""
        if self.chunk <= 1 and not self.column:
            return 1
        return _up(self.chunk, self.group)

    @property
    def turn(self) -> int:
        """Codes that go to one accumulator at a time: a column, or a chunk."""
        return self.column or self.chunk

    @property
    def padded_turn(self) -> int:
        """The same with every chunk of it padded."""
        return -(-self.turn // self.chunk) * self.padded_chunk

    def ends(self, k: int) -> NDArray[np.int64]:
        """Where each accumulator's share of K ends, (P,)."""
        return _ends(self, k)

    def index(self, k: int) -> tuple[int, NDArray[np.int64]]:
        """Return the packed length of K = `k` and the column at each place, -1 for a zero.

        An empty index says that the columns come as they are, and zeros after them.
        """
        return _index(self, k)

    def _columns(self, k: int) -> tuple[int, NDArray[np.int64]]:
        length = int(self.ends(k)[-1])
        if self.chunk == 0 or (self.accumulators == 1 and self.padded_turn == self.turn):
            return length, np.zeros(0, np.int64)
        turns, chunks = -(-k // self.turn), -(-self.turn // self.chunk)
        found = np.full((turns, chunks * self.chunk), -1, np.int64)
        found[:, : self.turn] = np.arange(turns * self.turn).reshape(turns, self.turn)
        columns = np.full((turns, chunks, self.padded_chunk), -1, np.int64)
        columns[:, :, : self.chunk] = found.reshape(turns, chunks, self.chunk)
        columns[columns >= k] = -1
        index = np.full(length, -1, np.int64)
        start = 0
        for p, end in enumerate(self.ends(k).tolist()):
            own = columns[p :: self.accumulators].reshape(-1)
            index[start : start + own.size] = own
            start = end
        return length, index

    def apply(
        self, codes: NDArray[np.integer], rows: int = 1, columns: int = 1
    ) -> NDArray[np.integer]:
        """Return the columns of a code matrix (rows, K) in order, C-contiguous.

        Zeros fill it to multiples of `rows` and `columns`.
        """
        length, index = self.index(codes.shape[1])
        shape = _up(codes.shape[0], rows), _up(length, columns)
        codes = np.ascontiguousarray(codes)
        if shape == codes.shape and index.size == 0:
            return codes
        ordered = np.zeros(shape, codes.dtype)
        if index.size == 0:
            ordered[: codes.shape[0], : codes.shape[1]] = codes
        else:
            from loraq_sim.kernels.pack_panels import gather_codes

            gather_codes(codes.view(np.int8), index, ordered.view(np.int8))
        return ordered


@lru_cache(maxsize=1024)
def _ends(order: Order, k: int) -> NDArray[np.int64]:
    if order.chunk == 0:
        return np.array([_up(k, order.group)], np.int64)
    turns = -(-k // order.turn)
    shares = [-(-(turns - p) // order.accumulators) for p in range(order.accumulators)]
    sizes = [_up(max(x, 0) * order.padded_turn, order.group) for x in shares]
    return np.cumsum(sizes, dtype=np.int64)


@lru_cache(maxsize=256)
def _index(order: Order, k: int) -> tuple[int, NDArray[np.int64]]:
    return order._columns(k)


class Layout(NamedTuple):
    """What one kernel wants of W: order of K, panel width, left shift and chunk offsets."""

    order: Order
    width: int
    shift: int = 0
    offset: int = 0
    moving: bool = False


class Panels(NamedTuple):
    """W in panels, the offsets after each chunk and of each whole sum, and where they lie."""

    w: NDArray
    offsets: NDArray[np.int32]
    last: NDArray[np.int32]
    addresses: tuple[int, int, int]


class Norms:
    """Range and norms of the rows of a code matrix (R, K), computed when asked for.

    The range costs a fraction of the norms and often proves enough. The codes must not change.
    """

    def __init__(self, codes: NDArray[np.integer]) -> None:
        if codes.dtype not in (np.int8, np.uint8, np.int16):
            unsigned = codes.size > 0 and int(codes.max()) > 127
            codes = codes.astype(np.uint8 if unsigned else np.int8)
        self._codes = np.ascontiguousarray(codes)

    @property
    def k(self) -> int:
        """Codes in a row."""
        return self._codes.shape[1]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Lowest code, highest (both with 0), sum, L1 norm, squared L2 norm of each row, (5, R)."""
        from loraq_sim.kernels.pack_panels import row_norms

        rows = np.empty((5, self._codes.shape[0]), np.int64)
        if self._codes.dtype == np.int16:
            wide = self._codes.astype(np.int64)
            rows[0], rows[1] = wide.min(axis=1, initial=0), wide.max(axis=1, initial=0)
            rows[2], rows[3] = wide.sum(axis=1), np.abs(wide).sum(axis=1)
            rows[4] = np.square(wide).sum(axis=1)
            return rows
        mask = np.int16(255 if self._codes.dtype == np.uint8 else -1)
        row_norms(self._codes.view(np.int8), mask, rows)
        return rows

    @cached_property
    def _range(self) -> tuple[int, int]:
        from loraq_sim.kernels.pack_panels import code_range

        if self._codes.dtype == np.int16:
            return int(self._codes.min(initial=0)), int(self._codes.max(initial=0))
        low, high = code_range(self._codes)
        return int(low), int(high)

    @property
    def low(self) -> int:
        """Lowest code, at most 0."""
        return self._range[0]

    @property
    def high(self) -> int:
        """Highest code, at least 0."""
        return self._range[1]

    @property
    def top(self) -> int:
        """Largest magnitude of a code."""
        return max(self.high, -self.low)

    @cached_property
    def longest(self) -> int:
        """Largest L1 norm of a row."""
        return int(self.rows[3].max(initial=0))

    @cached_property
    def longest_squared(self) -> int:
        """Largest squared L2 norm of a row."""
        return int(self.rows[4].max(initial=0))

    @cached_property
    def _panels(self) -> dict[int, NDArray[np.int64]]:
        return {}

    def sums_within(self, a_range: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Extreme sums over subsets of each row with activations in a range, (R,) each."""
        _, _, sums, norms, _ = self.rows
        positive, negative = (norms + sums) // 2, (sums - norms) // 2
        low = positive * a_range[0] + negative * a_range[1]
        return low, positive * a_range[1] + negative * a_range[0]

    def guaranteed_bits(self, a_range: tuple[int, int]) -> int:
        """Width of a register for any such sum of any row, kept for each range."""
        if a_range not in self._guaranteed:
            low, high = self.sums_within(a_range)
            width = signed_width(int(low.min(initial=0)), int(high.max(initial=0)))
            self._guaranteed[a_range] = width
        return self._guaranteed[a_range]

    @cached_property
    def _guaranteed(self) -> dict[tuple[int, int], int]:
        return {}

    def of_panels(self, height: int) -> NDArray[np.int64]:
        """Largest magnitude, L1 norm and squared L2 norm of every `height` rows, (3, panels)."""
        if height not in self._panels:
            tops = np.maximum(self.rows[1], -self.rows[0])
            starts = np.arange(0, self.rows.shape[1], height)
            stacked = np.stack([tops, *self.rows[3:]])
            self._panels[height] = np.maximum.reduceat(stacked, starts, axis=1)
        return self._panels[height]

    def calmest_panel(self, height: int) -> tuple[int, int, int]:
        """Smallest largest magnitude, L1 norm and squared L2 norm over those panels."""
        if height not in self._calmest:
            top, l1, l2 = self.of_panels(height).min(axis=1).tolist()
            self._calmest[height] = top, l1, l2
        return self._calmest[height]

    @cached_property
    def _calmest(self) -> dict[int, tuple[int, int, int]]:
        return {}


class PackedWeight:
    """Weight codes (N, K) with everything the emulated GEMM derives from them alone.

    Made by `pack_weight`. Panels are packed on first use and kept: a weight used under many
    accumulators is packed once for each layout they need. Holds a copy of the codes.
    """

    def __init__(
        self, codes: NDArray[np.int8] | NDArray[np.uint8], given: np.dtype | None = None
    ) -> None:
        """`given`: the dtype that the codes came in, which says what their zero point can be."""
        self.codes, self.given = codes, given or codes.dtype
        self._panels: dict[Layout, Panels] = {}
        self._longest: dict[int, int] = {}
        # Decisions of `emulator.tile_ready`, by array, activations and output, and by shape too.
        self.ready: dict[Hashable, Any] = {}
        self.kept: dict[Hashable, Any] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape

    def __repr__(self) -> str:
        return f"PackedWeight(N={self.shape[0]}, K={self.shape[1]}, layouts={len(self._panels)})"

    @cached_property
    def norms(self) -> Norms:
        """Range and norms of the rows."""
        return Norms(self.codes)

    def longest_stretch(self, length: int) -> int:
        """Largest L1 norm of any `length` columns that K is cut into, of any row."""
        if length not in self._longest:
            sums = self.stretch_sums(length)
            self._longest[length] = int((sums[0] - sums[1]).max(initial=0))
        return self._longest[length]

    def stretch_sums(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sums of the positive and of the negative codes of each stretch, (N, stretches) each."""
        starts = range(0, self.shape[1], length)
        if self.codes.size == 0:
            nothing = np.zeros((self.shape[0], len(starts)), np.int64)
            return nothing, nothing
        positive, negative = np.maximum(self.codes, 0), np.minimum(self.codes, 0)
        return (
            np.add.reduceat(positive, starts, axis=1, dtype=np.int64),
            np.add.reduceat(negative, starts, axis=1, dtype=np.int64),
        )

    def panels(self, layout: Layout, path: str) -> Panels:
        """Return W packed as a kernel wants it, by the code of a path."""
        if layout not in self._panels:
            if self.codes.dtype != np.int8:
                raise TypeError("tiles take signed weights only; unsigned ones run without")
            panels, self._path = _panels_for(self.shape, layout), path
            _pack(path, self.codes, layout, panels)
            self._panels[layout] = panels
        return self._panels[layout]

    def refill(self, codes: NDArray[np.int8]) -> None:
        """Take other codes of the same shape, not copied, and pack them where the former ones were.

        What was decided of those stays: only where any codes would lead to the same.
        """
        self.forget()
        alike = codes.flags.c_contiguous and codes.flags.writeable
        self.codes = codes if alike else codes.copy(order="C")
        for layout, panels in self._panels.items():
            _pack(self._path, self.codes, layout, panels)

    def forget(self) -> None:
        """Let go of the codes and of what was measured of them, until `refill` brings others."""
        self._longest.clear()
        self.__dict__.pop("norms", None)
        self.codes = np.broadcast_to(np.int8(0), self.shape)


def pack_weight(w: ArrayLike) -> PackedWeight:
    """Return weight codes packed once, to be passed to `emulate_gemm` as `w` many times.

    Parameters
    ----------
    w : array of shape (N, K), any integer dtype
        Weight codes, within int8 (-128..127), or uint8.

    Raises
    ------
    InputError
        If `w` is not a matrix of integers or a code leaves its range.
    """
    return PackedWeight(checked_weights(w).copy(order="C"), np.asarray(w).dtype)


def checked_codes(
    name: str, value: ArrayLike, *, unsigned: bool = True, words: bool = False
) -> NDArray[np.int8] | NDArray[np.uint8] | NDArray[np.int16]:
    """Return a code matrix as int8, as uint8 where a code exceeds 127, or as int16.

    Parameters
    ----------
    name : str
        The operand, for messages.
    value : array
        Codes.
    unsigned : bool
        Whether 0..255 is a range whatever the dtype; else only of uint8.
    words : bool
        Whether a code that needs them may have 16 bits, if the dtype is int16.

    Raises
    ------
    InputError
        If `value` is not a matrix of integers within one of these ranges.
    """
    try:
        codes = np.asarray(value)
    except ValueError:
        raise InputError(f"{name} must be a matrix (rows, K); its rows differ in length") from None
    if codes.ndim != 2:
        raise InputError(f"{name} must be a matrix (rows, K), got shape {codes.shape}")
    if codes.dtype.kind not in "iu":
        raise InputError(f"{name} must hold integer codes, got dtype {codes.dtype}")
    if codes.dtype == np.int8 or codes.size == 0:
        return codes.astype(np.int8, copy=False)
    low, high = int(codes.min()), int(codes.max())
    if low >= -128 and high <= 127:
        return codes.astype(np.int8, copy=False)
    if low >= 0 and high <= 255 and (unsigned or codes.dtype == np.uint8):
        return codes.astype(np.uint8, copy=False)
    if words and codes.dtype == np.int16:
        return codes
    ranges = "-128..127 (signed) or 0..255 (unsigned" + ("" if unsigned else ", as uint8") + ")"
    if words:
        ranges += ", or come as int16"
    raise InputError(f"{name} holds codes from {low} to {high}; they must lie within {ranges}")


def checked_weights(
    w: ArrayLike, *, unsigned: bool = False
) -> NDArray[np.int8] | NDArray[np.uint8]:
    """Return weight codes as int8, or as uint8 where one exceeds 127; errors as `checked_codes`."""
    codes = checked_codes("w", w, unsigned=unsigned)
    if codes.dtype == np.uint8:
        return codes.astype(np.uint8, copy=False)
    return codes.astype(np.int8, copy=False)


def address_of(array: NDArray) -> int:
    """Return where an array starts; `array.ctypes.data` takes several times as long."""
    return array.__array_interface__["data"][0]


def aligned_empty(shape: tuple[int, int], dtype: DTypeLike) -> NDArray:
    """Return an uninitialized matrix that starts on a cache line, with room behind its end."""
    size = np.dtype(dtype).itemsize * shape[0] * shape[1]
    raw = np.empty(size + _ALIGNMENT + _SLACK, np.int8)
    start = -address_of(raw) % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def scratch(name: str, shape: tuple[int, int], dtype: DTypeLike) -> NDArray:
    """Return room for an array, which this thread overwrites when it asks for the same name.

    Fresh pages would cost more than packing.
    """
    size = shape[0] * shape[1] * np.dtype(dtype).itemsize
    kept = _THREAD.__dict__.get(name)
    if kept is None or kept.size < size:
        kept = _THREAD.__dict__[name] = aligned_empty((1, size), np.int8)[0]
    return kept[:size].view(dtype).reshape(shape)


def pack_panels(
    path: str,
    codes: NDArray[np.integer],
    order: Order,
    kind: str,
    rows: int,
    out: NDArray,
    *,
    mask: int = -1,
    shift: int = 0,
) -> NDArray[np.integer]:
    """Pack codes (R, K) into panels (see `loraq_sim.kernels.pack_panels`); returns them ordered.

    `out`, of `aligned_empty`, is written in place.
    """
    from loraq_sim.kernels.pack_panels import PackArguments
    from loraq_sim.kernels.tiles import pack_kernel

    kernel = pack_kernel(path, kind, rows)
    shape = kernel.shape
    ordered = order.apply(codes, rows, shape.block_bytes // codes.itemsize)
    row_bytes = ordered.strides[0]
    arguments = PackArguments(
        source=address_of(ordered),
        source_row=row_bytes,
        target=address_of(out),
        target_panel=out.strides[0],
        panels=len(out),
        blocks=row_bytes // shape.block_bytes,
        mask=mask,
        shift=shift,
    )
    kernel.run(arguments)
    return ordered


def _panels_for(shape: tuple[int, int], layout: Layout) -> Panels:
    """Room for W of a shape (N, K) in a layout."""
    order, width = layout.order, layout.width
    count, ends = -(-shape[0] // width), order.ends(shape[1])
    k = int(ends[-1])
    lane = np.int16 if order.codes == "halves" else np.int32
    w = aligned_empty((count, k // order.group * width), lane)
    chunks = k // order.padded_chunk if layout.moving else 0
    offsets = np.zeros((count, chunks * width), np.int32)
    last = np.zeros((ends.size, count * width), np.int32)
    addresses = address_of(w), address_of(offsets), address_of(last)
    return Panels(w, offsets, last, addresses)


def _pack(path: str, codes: NDArray[np.integer], layout: Layout, panels: Panels) -> None:
    order, width = layout.order, layout.width
    mask = 0 if order.codes == "bytes" else -1
    ordered = pack_panels(
        path, codes, order, order.codes, width, panels.w, mask=mask, shift=layout.shift
    )
    if layout.offset:
        from loraq_sim.kernels.pack_panels import chunk_offsets

        step = order.padded_chunk if order.chunk else order.group
        some, ends = ordered[: codes.shape[0]], order.ends(codes.shape[1])
        amount = np.int32(layout.offset)
        chunk_offsets(some, ends, step, amount, width, panels.offsets, panels.last)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
