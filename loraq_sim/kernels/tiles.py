"""The tiles of each path, compiled on first use, and a disk cache that knows what emits them.

A tile has rows x vectors accumulators in registers. With AVX-512 24 of them hide the latency of a
dot and leave room for operands in 32 registers. With AVX2 there are 16 registers and no four-way
dot that is exact (vpmaddubsw saturates at 16 bits), so all tiles but the 16-bit lanes multiply
words. The portable ones are plain LLVM vectors, which LLVM splits into the registers there are.
Extremes and counts take registers from the accumulators.
"""

from array import array
from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from types import FunctionType
from typing import Any, Generic, NamedTuple, TypeVar, cast

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc

from loraq_sim.kernels.jit import intrinsic, keep_compiled, taking_turns
from loraq_sim.kernels.pack_panels import PackCode, PackShape
from loraq_sim.kernels.processor import KernelUnavailable
from loraq_sim.kernels.scaled_tile import ScaledCode, ScaledShape
from loraq_sim.kernels.tile import NestedCode, TileCode
from loraq_sim.kernels.vector_ir import (
    I16,
    I32,
    I64,
    Instructions,
    Loop,
    TileShape,
    Vectors,
    broadcast,
    load,
    store,
)

__all__ = [
    "ColumnArguments",
    "ColumnCode",
    "Kernel",
    "TileKernel",
    "column_kernel",
    "pack_kernel",
    "scaled_kernel",
    "tile_kernels",
]


class ColumnArguments(NamedTuple):
    """What `ColumnCode` reads, in this order, as 64-bit integers.

    Attributes
    ----------
    w, w_stride : packed operand and the bytes of a panel
    start : int32 (panels, groups, width), written: -offset times the sum of each group
    offsets : int32 (panels, groups, chunks, width), written: `start` plus offset times the sum
        after each chunk
    norms : int32 (panels, groups, 3, width), written: sums of positive codes, of negative ones, and
        squared L2 norms
    offset : what every code of A is raised by
    panels, groups, chunks, inner : as of `ScaledArguments`
    """

    w: int
    w_stride: int
    start: int
    offsets: int
    norms: int
    offset: int
    panels: int
    groups: int
    chunks: int
    inner: int


class ColumnCode:
    """Emits the code for the panels of one shape, given the i64 address of its arguments."""

    def __init__(self, builder: ir.IRBuilder, shape: ScaledShape, arguments: ir.Value) -> None:
        self.builder, self.shape = builder, shape
        self.words = Instructions(shape.instructions.path, "words")
        count = len(ColumnArguments._fields)
        self.given = ColumnArguments(*(load(builder, I64, arguments, 8 * i) for i in range(count)))

    def emit(self) -> None:
        """Emit the loops over panels, groups, chunks and steps."""
        builder, given = self.builder, self.given
        width, vectors, lanes = self.shape.width, self.shape.vectors, self.words.lanes
        kind = self.words.accumulator
        at = [4 * lanes * v for v in range(vectors)]
        nothing = [ir.Constant(kind, None)] * (3 * vectors)
        offset = broadcast(builder, builder.trunc(given.offset, I32), lanes)
        panels = Loop(builder, given.panels, [given.start, given.offsets, given.norms])
        start, offsets, norms = panels.values
        w = builder.add(given.w, builder.mul(panels.counter, given.w_stride))
        groups = Loop(builder, given.groups, [w, start, offsets, norms])
        w, start, offsets, norms = groups.values
        chunks = Loop(builder, given.chunks, [w, offsets, *nothing])
        w, offsets, *sums = chunks.values
        steps = Loop(builder, given.inner, [w, *sums])
        w, *sums = steps.values
        for v, x in enumerate(at):
            dwords = load(builder, kind, w, x)
            sums[v::vectors] = self._added(sums[v::vectors], dwords)
        w, *sums = steps.end([builder.add(w, I64(4 * width)), *sums])
        moved = [builder.mul(x, offset) for x in self._whole(sums)]
        for value, x in zip(moved, at, strict=True):
            store(builder, value, offsets, x)
        w, offsets, *sums = chunks.end([w, builder.add(offsets, I64(4 * width)), *sums])
        starts = [builder.neg(builder.mul(x, offset)) for x in self._whole(sums)]
        for value, x in zip(starts, at, strict=True):
            store(builder, value, start, x)
        written = Loop(builder, given.chunks, [groups.values[2]])
        (place,) = written.values
        for value, x in zip(starts, at, strict=True):
            store(builder, builder.add(load(builder, kind, place, x), value), place, x)
        written.end([builder.add(place, I64(4 * width))])
        for n, value in enumerate(sums):
            store(builder, value, norms, 4 * width * (n // vectors) + at[n % vectors])
        start = builder.add(start, I64(4 * width))
        norms = builder.add(norms, I64(12 * width))
        _, start, offsets, norms = groups.end([w, start, offsets, norms])
        panels.end([start, offsets, norms])

    def _whole(self, sums: Vectors) -> Vectors:
        vectors = self.shape.vectors
        pairs = zip(sums[:vectors], sums[vectors : 2 * vectors], strict=True)
        return [self.builder.add(x, y) for x, y in pairs]

    def _added(self, sums: Vectors, dwords: ir.Value) -> Vectors:
        """What `norms` holds of each lane, with the codes in `dwords` added."""
        builder, kind = self.builder, self.words.operand
        codes = builder.bitcast(dwords, kind)
        parts = [codes]
        if self.shape.instructions.dot == "bytes":
            byte = broadcast(builder, I16(8), kind.count)
            parts = [builder.ashr(x, byte) for x in (builder.shl(codes, byte), codes)]
        ones, zero = broadcast(builder, I16(1), kind.count), ir.Constant(kind, None)
        above, below, square = sums
        for part in parts:
            positive = self.words.largest(builder, part, zero)
            negative = self.words.smallest(builder, part, zero)
            above = self.words.multiply_add(builder, above, ones, positive)
            below = self.words.multiply_add(builder, below, ones, negative)
            square = self.words.multiply_add(builder, square, part, part)
        return [above, below, square]


Shape = TypeVar("Shape")

# What the emulator asks for by name: the rule after a chunk, and the dot; ``exact`` has no rule, so
# the fastest dot of the path serves it.
_RULES = {
    "exact": ("none", ""),
    "saturate_pair": ("none", "words_saturating"),
    "saturate_single": ("none", "words_saturating"),
    "symmetric_pair": ("raise", "words_saturating"),
    "symmetric_single": ("raise", "words_saturating"),
    "clamp_bytes": ("clamp", "bytes"),
    "clamp_words": ("clamp", "words"),
    "clamp_single": ("clamp", "words"),
    "clamp_halves": ("clamp", "halves"),
    "measure_bytes": ("measure", "bytes"),
    "measure_words": ("measure", "words"),
    "measure_single": ("measure", "words"),
    "count_clamp_words": ("count_clamp", "words"),
    "count_clamp_single": ("count_clamp", "words"),
    "count_wrap_words": ("count_wrap", "words"),
    "count_wrap_single": ("count_wrap", "words"),
    "nested": ("nested", "words"),
    "nested_report": ("nested_report", "words"),
}
# Rows of a tile by rule; of ``clamp`` in 16-bit lanes where they differ.
_ROWS = {
    "avx512": {"none": 12, "raise": 12, "clamp": 12, "measure": 8, "count": 6, "nested": 6,
               "nested_report": 4},
    "avx2": {"none": 5, "clamp": 5, "halves": 6, "measure": 4, "count": 3, "nested": 3,
             "nested_report": 2},
    "portable": {"none": 4, "clamp": 4, "measure": 4, "count": 3, "nested": 2, "nested_report": 2},
}  # fmt: skip
# Only VNNI has these dots.
_VNNI = ("bytes", "words_saturating")
# Sums of a group and of the groups so far are both in registers.
_SCALED_ROWS = {"avx512": 4, "avx2": 4, "portable": 2}


@cache
def tile_kernels(path: str) -> Mapping[str, "TileKernel"]:
    """Return the kernels of a path by name."""
    return {
        name: TileKernel(path, name, NestedCode if shape.nested else TileCode, shape)
        for name in _RULES
        if (shape := _shape(path, name)) is not None
    }


@cache
def scaled_kernel(path: str, dot: str, *, measure: bool) -> "Kernel[ScaledShape]":
    """Return the scaled kernel of a path, by dot.

    ``codes`` is the fastest one there, ``zeros`` that for rows with zero points, or ``doubles``.
    """
    zeros = dot == "zeros"
    if dot != "doubles":
        dot = "bytes" if path == "avx512" else "words"
    rows = _SCALED_ROWS[path]
    shape = ScaledShape(Instructions(path, dot), measure, rows=rows, vectors=2, zeros=zeros)
    name = f"scaled_{dot}{'_measured' if measure else ''}{'_zeros' if zeros else ''}"
    return Kernel(path, name, ScaledCode, shape)


@cache
def column_kernel(path: str) -> "Kernel[ScaledShape]":
    """Return the kernel that sums the columns of what `scaled_kernel` reads."""
    shape = scaled_kernel(path, "codes", measure=True).shape
    return Kernel(path, "scaled_columns", ColumnCode, shape)


@cache
def pack_kernel(path: str, kind: str, rows: int) -> "Kernel[PackShape]":
    """Return the kernel that packs panels of `rows` rows (see `loraq_sim.kernels.pack_panels`)."""
    return Kernel(path, f"pack_{kind}_{rows}", PackCode, PackShape(kind, rows))


def _shape(path: str, name: str) -> TileShape | None:
    rule, dot = _RULES[name]
    if path != "avx512" and dot in _VNNI:
        return None
    dot = dot or ("bytes" if path == "avx512" else "words")
    rows = _ROWS[path]
    return TileShape(
        Instructions(path, dot),
        rule,
        moving=dot == "bytes" and rule != "none",
        single=name.endswith("_single"),
        rows=rows.get(dot) or rows[rule.removesuffix("_clamp").removesuffix("_wrap")],
        vectors=1 if rule == "nested_report" else 2,
    )


class Kernel(Generic[Shape]):
    """Code of one shape that runs over a block of tiles or panels, compiled when it first runs.

    Cached on disk until a file that emits code changes. Numba keeps the processor's name and
    features in the key: another processor compiles anew.

    `emitter` makes of a builder, the shape and the i64 address of its arguments what emits it.
    """

    def __init__(self, path: str, name: str, emitter: Callable[..., Any], shape: Shape) -> None:
        self.path, self.shape = path, shape
        self._function = _function(f"{path}_{name}", emitter, shape)

    @cached_property
    def compiled(self) -> CFunc:
        """The compiled function; its ``cache_hits`` tell whether the disk cache had it.

        Raises `KernelUnavailable` if it does not compile here.
        """
        kernel = CFunc(self._function, ((types.int64,), types.void), {}, {"nopython": True})
        keep_compiled(kernel, self._function)
        try:
            with taking_turns():
                kernel.compile()
        # An LLVM that does not know an instruction, or whose declaration of it is another.
        except Exception as error:
            raise KernelUnavailable(self.path, error) from error
        return kernel

    @cached_property
    def _call(self) -> Callable:
        return self.compiled.ctypes

    @property
    def address(self) -> int:
        """Where the compiled function starts."""
        return cast(int, self.compiled.address)  # compiled by now

    def run(self, arguments: Sequence[int]) -> None:
        """Compute a block, without the GIL; trusts every address."""
        values = array("q", arguments)
        self._call(values.buffer_info()[0])


class TileKernel(Kernel[TileShape]):
    """A tile of `loraq_sim.kernels.tile`, which reads `TileArguments`."""


def _function(name: str, emitter: Callable[..., Any], shape: Any) -> Callable[[int], None]:
    """A function of its own for Numba to compile, which keeps code on disk by name.

    The tile is one of its globals: a variable of a closure would be part of the key, and an
    intrinsic is another one in every process.
    """
    named = {"_tile": _make_tile(emitter, shape), "__name__": __name__}
    function = FunctionType(_run_tile.__code__, named, name)
    function.__qualname__ = name
    return function


def _run_tile(arguments: int) -> None:
    _tile(arguments)


def _tile(arguments: int) -> None:
    """Stands for the tile of each function."""


def _make_tile(emitter: Callable[..., Any], shape: Any) -> Callable[[int], None]:
    """Return the intrinsic ``tile(arguments)`` of the i64 address of its arguments."""

    @intrinsic
    def tile(typingctx, arguments):
        return types.void(types.int64), emit

    def emit(context, builder, signature, args):
        emitter(builder, shape, args[0]).emit()
        return context.get_dummy_value()

    return tile
