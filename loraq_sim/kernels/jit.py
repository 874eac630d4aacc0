"""Numba's njit, with compiled code kept on disk where that is possible and done without elsewhere.

Numba itself refuses to define a function whose code it cannot keep (an installation and a home
folder that cannot be written), and lets a full disk end the first call.

The arguments of a compiled block of tiles.
"""

import logging
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
from numba.core.caching import FunctionCache
from numba.core.registry import CPUDispatcher

__all__ = [
    "NEVER",
    "TileArguments",
    "keep_compiled",
    "kept_in",
    "njit",
    "why_not_kept",
]

logger = logging.getLogger(__name__)


# One folder, or the first reason, for all functions of the process.
_state: dict[str, str] = {}


def njit(function: Callable | None = None, *, cache: bool = False, **options: Any) -> Callable:
    """As `numba.njit`; with `cache`, compiled code is kept on disk if the disk lets us.

    Under ``NUMBA_DISABLE_JIT`` the function comes back as it is.
    """
    if function is None:
        return lambda function: njit(function, cache=cache, **options)
    compiled = numba.njit(**options)(function)
    if cache and isinstance(compiled, CPUDispatcher):
        keep_compiled(compiled, function)
    return compiled


def keep_compiled(compiled: Any, function: Callable) -> None:
    """Let a dispatcher or callback of Numba keep the code of `function` on disk, if possible."""
    try:
        compiled._cache = _ForgivingCache(function)
    # No folder of Numba's choice can be written, or the source cannot be read.
    except (RuntimeError, OSError) as error:
        _tell(error)
    else:
        _state.setdefault("folder", compiled._cache.cache_path)


def kept_in() -> Path | None:
    """Folder of the code that was compiled so far; None if none is kept."""
    return Path(_state["folder"]) if "folder" in _state and "problem" not in _state else None


def why_not_kept() -> str | None:
    """Why compiled code could not be kept, or None."""
    return _state.get("problem")


class _ForgivingCache(FunctionCache):
    """A cache whose files may be unreadable, and whose disk may be full: then it is not used."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        # Whatever is wrong with a kept file, compiling gives the right code.
        except Exception as error:
            _tell(error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _tell(error)


def _tell(error: Exception) -> None:
    """Say once that code is not kept; workers are silent, their parent has said it."""
    if "problem" in _state:
        return
    # Numba names the function; what holds for one holds for all.
    reason = getattr(error, "strerror", None) or "no folder for it can be written"
    _state["problem"] = reason
    level = logging.WARNING if multiprocessing.parent_process() is None else logging.DEBUG
    logger.log(
        level,
        "compiled code cannot be kept (%s): every start compiles again, which takes some seconds; "
        "set NUMBA_CACHE_DIR to a folder with room that can be written",
        reason,
    )


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
