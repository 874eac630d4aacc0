"""Register tiles as compiled functions, and a disk cache that knows the code that emits them."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from loraq_sim.kernels.tile import TileCode, TileShape

__all__ = ["TileKernel", "call_tile", "make_tile"]

_SOURCES = ("tile.py", "tile_kernel.py", "vector_ir.py")


def make_tile(shape: TileShape):
    """Return the intrinsic of a tile: ``tile(arguments)``, the i64 address of its arguments.

    See `kernels.tile.TileCode`.
    """

    @intrinsic
    def tile(typingctx, arguments):
        return types.void(types.int64), emit

    def emit(context, builder, signature, args):
        TileCode(builder, shape, args[0]).emit()
        return context.get_dummy_value()

    return tile


@intrinsic
def call_tile(typingctx, address, arguments):
    """Call the tile at an address (`TileKernel.address`) with the address of its arguments."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


class TileKernel:
    """A tile and the function that runs it, compiled when its address is first asked for.

    Cached on disk until its file or any file that emits code changes: Numba compares the file of
    the function alone, so a changed tile would go unseen. Numba also keeps the processor's name
    and features in the key: another processor compiles anew.
    """

    def __init__(self, shape: TileShape, function: Callable) -> None:
        self.shape, self._function = shape, function

    @cached_property
    def compiled(self) -> CFunc:
        """The compiled function; its ``cache_hits`` tell whether the disk cache had it."""
        kernel = CFunc(self._function, ((types.int64,), types.void), {}, {"nopython": True})
        kernel.enable_caching()
        files = getattr(kernel._cache, "_cache_file", None)
        if files is not None:
            files._source_stamp = (files._source_stamp, _fingerprint())
        kernel.compile()
        return kernel

    @cached_property
    def address(self) -> int:
        """Address of the compiled tile."""
        return self.compiled.address


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
