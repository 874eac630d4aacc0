"""All blocks of a plain GEMM in one compiled call: pack rows of A, run a tile kernel over them.

Python between the blocks would find its own code and data evicted from the caches by each block.
"""

from llvmlite import ir
from numba import njit
from numba.core import types
from numba.extending import intrinsic

from loraq_sim.kernels.pack_panels import pack_rows, sampled_norms
from loraq_sim.kernels.tile_arguments import TileArguments

__all__ = ["run_blocks"]

_A, _OUT, _OUT_ROW, _ROW_PANELS = (
    TileArguments._fields.index(name) for name in ("a", "out", "out_row", "row_panels")
)


@intrinsic
def _call_tile(typingctx, function, arguments):
    """Call a compiled kernel, given its address and that of its arguments, int64 both."""

    def emit(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), [args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@njit(cache=True, nogil=True)
def run_blocks(codes, packing, mask, step, limits, height, packed, arguments, function):
    """Fill the output that `arguments` name; return whether the sample of rows let it run.

    It does not run unless the lowest (magnitude, L1 norm, squared L2 norm) of every `step`-th row
    exceed `limits`; a first limit of -1 asks for no sample. codes (R, K) int8; packing and mask as
    for `pack_rows` and `row_norms`; packed (panels of a block, dwords) int32;
    arguments (fields of `TileArguments`,) int64, changed; function: the kernel's address.
    """
    if limits[0] >= 0:
        _, _, _, top, l1, l2 = sampled_norms(codes, mask, step)
        if top <= limits[0] or l1 <= limits[1] or l2 <= limits[2]:
            return False
    panels = -(-codes.shape[0] // height)
    block = packed.shape[0]
    arguments[_A] += packed.ctypes.data
    for first in range(0, panels, block):
        count = min(block, panels - first)
        rows = codes[first * height : (first + count) * height]
        pack_rows(rows, packing, height, packed[:count])
        arguments[_ROW_PANELS] = count
        _call_tile(function, arguments.ctypes.data)
        arguments[_OUT] += count * height * arguments[_OUT_ROW]
    return True
