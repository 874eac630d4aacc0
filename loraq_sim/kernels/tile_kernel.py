"""Blocks of register tiles as compiled functions, and a disk cache that knows what emits them."""

import hashlib
from array import array
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from loraq_sim.kernels.jit import keep_compiled
from loraq_sim.kernels.processor import KernelUnavailable
from loraq_sim.kernels.tile import TileCode, TileShape
from loraq_sim.kernels.tile_arguments import TileArguments
from loraq_sim.kernels.tile_nested import NestedCode

__all__ = ["TileKernel", "make_tile"]

_SOURCES = (
    *("jit.py", "processor.py", "tile.py", "tile_arguments.py", "tile_kernel.py"),
    *("tile_nested.py", "tile_output.py", "vector_ir.py"),
)


def make_tile(shape: TileShape):
    """Return the intrinsic ``tile(arguments)`` of the i64 address of `TileArguments`."""

    @intrinsic
    def tile(typingctx, arguments):
        return types.void(types.int64), emit

    def emit(context, builder, signature, args):
        code = NestedCode if shape.nested else TileCode
        code(builder, shape, args[0]).emit()
        return context.get_dummy_value()

    return tile


class TileKernel:
    """The code of a block of tiles of one shape, compiled when it first runs.

    Cached on disk until its file or any file that emits code changes: Numba compares the file of
    the function alone, so a changed tile would go unseen. Numba also keeps the processor's name
    and features in the key: another processor compiles anew.
    """

    def __init__(self, shape: TileShape, function: Callable) -> None:
        self.shape, self._function = shape, function

    @cached_property
    def compiled(self) -> CFunc:
        """The compiled function; its ``cache_hits`` tell whether the disk cache had it.

        Raises `KernelUnavailable` if it does not compile here.
        """
        kernel = CFunc(self._function, ((types.int64,), types.void), {}, {"nopython": True})
        keep_compiled(kernel, self._function)
        files = getattr(kernel._cache, "_cache_file", None)
        if files is not None:
            files._source_stamp = (files._source_stamp, _fingerprint())
        try:
            kernel.compile()
        # An LLVM that does not know an instruction, or whose declaration of it is another.
        except Exception as error:
            raise KernelUnavailable(self.shape.instructions.path, error) from error
        return kernel

    @cached_property
    def _call(self) -> Callable:
        return self.compiled.ctypes

    @property
    def address(self) -> int:
        """Where the compiled function starts."""
        return self.compiled.address

    def run(self, arguments: TileArguments) -> None:
        """Compute the tiles of a block, without the GIL; trusts every address."""
        values = array("q", arguments)
        self._call(values.buffer_info()[0])


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()
