"""Tiles as their callers see them: which of them can run here, and what a block of them reads.

A tile is a block of accumulators in vector registers over all of K (`loraq_sim.kernels.tile`).
There is a set of them for each path: AVX-512 with VNNI, AVX2, and any processor. Nothing here loads
a compiler, so that describing a GEMM does not.
"""

import logging
import multiprocessing
import os
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import NamedTuple, ParamSpec, TypeVar

from loraq_sim.errors import InputError

__all__ = [
    *("LOOPS", "NEVER", "PATHS", "PATH_VARIABLE", "KernelUnavailable", "TileArguments"),
    *(
        "choose_path",
        "forced_path",
        "found_features",
        "is_jit_off",
        "multiplies_bf16",
        "on_a_path_that_compiles",
        "refuse_path",
    ),
    *("refused_paths",),
]

logger = logging.getLogger(__name__)

Given = ParamSpec("Given")
Returned = TypeVar("Returned")

# Fastest first; every one gives the same bits.
PATHS = ("avx512", "avx2", "portable")
# Plain loops instead of tiles, with the same bits again: all that is left without a compiler.
LOOPS = "loops"
# Forces a path, to compare paths or to work around one.
PATH_VARIABLE = "LORAQ_SIM_KERNELS"
# Paths whose tiles do not compile here, and why.
_refused: dict[str, str] = {}
_NEEDED = {"avx512": {"avx512f", "avx512bw", "avx512vl", "avx512vnni"}, "avx2": {"avx2"}}


@cache
def _features() -> frozenset[str]:
    """Features that Numba compiles for: the host's, or those that its environment names."""
    from llvmlite import binding
    from numba import config

    # Numba makes these names from the environment, where no type checker sees them.
    cpu, features = vars(config)["CPU_NAME"], vars(config)["CPU_FEATURES"]
    if cpu or features is not None:
        named = (features or "").split(",")
        extra = {"x86-64-v3": {"avx2"}, "x86-64-v4": {"avx2"}}.get(cpu, set())
        return frozenset({name[1:] for name in named if name[:1] == "+"} | extra)
    try:
        return frozenset(name for name, on in binding.get_host_cpu_features().items() if on)
    except RuntimeError:  # LLVM cannot tell on some processors
        return frozenset()


def found_features() -> tuple[str, ...]:
    """Return what of the features that matter to integer arithmetic this processor has."""
    wanted = {"neon", "avxvnni"}.union(*_NEEDED.values())
    return tuple(sorted(wanted & _features()))


def multiplies_bf16() -> bool:
    """Whether this processor multiplies bfloat16 values natively (AVX512-BF16 or AMX)."""
    return bool({"avx512bf16", "amx-bf16"} & _features())


class KernelUnavailable(RuntimeError):
    """The tiles of a path do not compile here."""

    def __init__(self, path: str, cause: Exception) -> None:
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        self.path, self.reason = path, lines[0][:200]
        super().__init__(f"the {path} kernels do not compile here: {self.reason}")


def choose_path() -> str:
    """Return the path to run: the environment's `LORAQ_SIM_KERNELS`, or the fastest one here.

    Without a compiler (``NUMBA_DISABLE_JIT``) it is `LOOPS` whatever is asked for.

    Raises
    ------
    InputError
        If the environment names none of the paths, or one that does not compile here.
    """
    forced = forced_path()
    if is_jit_off():
        return LOOPS
    if not forced:
        return _fastest_path()
    if forced in _refused:
        raise InputError(
            f"{PATH_VARIABLE}={forced}: these kernels do not compile here ({_refused[forced]}); "
            f"unset it, or install another numba"
        )
    return forced


def forced_path() -> str | None:
    """Return the path that the environment asks for, if any; InputError if it is none."""
    forced = os.environ.get(PATH_VARIABLE) or None
    if forced is not None and forced not in (*PATHS, LOOPS):
        valid = ", ".join((*PATHS, LOOPS))
        raise InputError(f"{PATH_VARIABLE} must be one of {valid}, got {forced!r:.80}")
    return forced


def is_jit_off() -> bool:
    """Whether Numba compiles nothing (``NUMBA_DISABLE_JIT``)."""
    from numba import config

    return bool(vars(config)["DISABLE_JIT"])


def refuse_path(error: KernelUnavailable) -> None:
    """Leave a path out from now on; the next one takes its place, with the same bits."""
    if error.path in _refused:
        return
    _refused[error.path] = error.reason
    _fastest_path.cache_clear()
    if multiprocessing.parent_process() is None:
        logger.warning("%s; %s run instead, slower, with the same bits", error, _fastest_path())


def on_a_path_that_compiles(run: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Run again on the next path where the tiles of one do not compile."""

    @wraps(run)
    def call(*args: Given.args, **options: Given.kwargs) -> Returned:
        while True:
            try:
                return run(*args, **options)
            except KernelUnavailable as error:
                refuse_path(error)

    return call


def refused_paths() -> Mapping[str, str]:
    """Why paths that this processor has were left out, by path."""
    return dict(_refused)


@cache
def _fastest_path() -> str:
    able = (p for p in PATHS if p not in _refused and _NEEDED.get(p, set()) <= _features())
    return next(able, LOOPS)


# First chunk or K index where nothing overflowed.
NEVER = 2**31 - 1


class TileArguments(NamedTuple):
    """What the code of a block reads, in this order, as 64-bit integers.

    Addresses are of the first tile; strides are in bytes, from one panel of rows or of columns to
    the next unless said otherwise. Matrices are padded to whole tiles.

    Attributes
    ----------
    a, a_stride, w, w_stride : operands. W is packed, and so is A, but that tiles of the dot
        ``bytes`` also take its codes as they lie
    a_row, a_step, a_flip : of the dot ``bytes``, bytes from row to row of A and from step to step
        (packed: 4 and 4 * rows), and the address of a vector of bytes that are flipped in all that
        is read: 0x80 turns signed codes into a + 128
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
    by_rows : whether a panel of rows meets all columns before the next does, not the reverse
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
        constants of the rounding mode and the limits (see `kernels.vector_ir`)
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
    by_rows: int = 0
    a_row: int = 0
    a_step: int = 0
    a_flip: int = 0
    inner_chunks: int = 0
    inner_drop: int = 0
    inner_lo: int = 0
    inner_hi: int = 0
    lo: int = 0
    hi: int = 0
    up: int = 0
    down: int = 0
