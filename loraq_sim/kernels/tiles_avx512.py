"""The tiles of processors with AVX-512 and VNNI, compiled on first use.

24 accumulators hide the latency of a dot and leave room for operands in 32 registers. Extremes
and counts take registers from them.
"""

from loraq_sim.kernels.tile import TileShape
from loraq_sim.kernels.tile_kernel import TileKernel, make_tile
from loraq_sim.kernels.vector_ir import Instructions

__all__ = ["KERNELS"]

_BYTES = Instructions("avx512", "bytes")
_WORDS = Instructions("avx512", "words")
_SATURATING = Instructions("avx512", "words_saturating")
_HALVES = Instructions("avx512", "halves")

_EXACT = TileShape(_BYTES, "none", moving=False, single=False, rows=12, vectors=2)
_SATURATE_PAIR = TileShape(_SATURATING, "none", moving=False, single=False, rows=12, vectors=2)
_SATURATE_SINGLE = TileShape(_SATURATING, "none", moving=False, single=True, rows=12, vectors=2)
_SYMMETRIC_PAIR = TileShape(_SATURATING, "raise", moving=False, single=False, rows=12, vectors=2)
_SYMMETRIC_SINGLE = TileShape(_SATURATING, "raise", moving=False, single=True, rows=12, vectors=2)
_CLAMP_BYTES = TileShape(_BYTES, "clamp", moving=True, single=False, rows=12, vectors=2)
_CLAMP_WORDS = TileShape(_WORDS, "clamp", moving=False, single=False, rows=12, vectors=2)
_CLAMP_SINGLE = TileShape(_WORDS, "clamp", moving=False, single=True, rows=12, vectors=2)
_CLAMP_HALVES = TileShape(_HALVES, "clamp", moving=False, single=False, rows=12, vectors=2)
_MEASURE_BYTES = TileShape(_BYTES, "measure", moving=True, single=False, rows=8, vectors=2)
_MEASURE_WORDS = TileShape(_WORDS, "measure", moving=False, single=False, rows=8, vectors=2)
_MEASURE_SINGLE = TileShape(_WORDS, "measure", moving=False, single=True, rows=8, vectors=2)
_COUNT_CLAMP_WORDS = TileShape(_WORDS, "count_clamp", moving=False, single=False, rows=6, vectors=2)
_COUNT_CLAMP_SINGLE = TileShape(_WORDS, "count_clamp", moving=False, single=True, rows=6, vectors=2)
_COUNT_WRAP_WORDS = TileShape(_WORDS, "count_wrap", moving=False, single=False, rows=6, vectors=2)
_COUNT_WRAP_SINGLE = TileShape(_WORDS, "count_wrap", moving=False, single=True, rows=6, vectors=2)
_NESTED = TileShape(_WORDS, "nested", moving=False, single=False, rows=6, vectors=2)
_NESTED_REPORT = TileShape(_WORDS, "nested_report", moving=False, single=False, rows=4, vectors=1)

_EXACT_TILE = make_tile(_EXACT)
_SATURATE_PAIR_TILE = make_tile(_SATURATE_PAIR)
_SATURATE_SINGLE_TILE = make_tile(_SATURATE_SINGLE)
_SYMMETRIC_PAIR_TILE = make_tile(_SYMMETRIC_PAIR)
_SYMMETRIC_SINGLE_TILE = make_tile(_SYMMETRIC_SINGLE)
_CLAMP_BYTES_TILE = make_tile(_CLAMP_BYTES)
_CLAMP_WORDS_TILE = make_tile(_CLAMP_WORDS)
_CLAMP_SINGLE_TILE = make_tile(_CLAMP_SINGLE)
_CLAMP_HALVES_TILE = make_tile(_CLAMP_HALVES)
_MEASURE_BYTES_TILE = make_tile(_MEASURE_BYTES)
_MEASURE_WORDS_TILE = make_tile(_MEASURE_WORDS)
_MEASURE_SINGLE_TILE = make_tile(_MEASURE_SINGLE)
_COUNT_CLAMP_WORDS_TILE = make_tile(_COUNT_CLAMP_WORDS)
_COUNT_CLAMP_SINGLE_TILE = make_tile(_COUNT_CLAMP_SINGLE)
_COUNT_WRAP_WORDS_TILE = make_tile(_COUNT_WRAP_WORDS)
_COUNT_WRAP_SINGLE_TILE = make_tile(_COUNT_WRAP_SINGLE)
_NESTED_TILE = make_tile(_NESTED)
_NESTED_REPORT_TILE = make_tile(_NESTED_REPORT)


def _exact(arguments):
    _EXACT_TILE(arguments)


def _saturate_pair(arguments):
    _SATURATE_PAIR_TILE(arguments)


def _saturate_single(arguments):
    _SATURATE_SINGLE_TILE(arguments)


def _symmetric_pair(arguments):
    _SYMMETRIC_PAIR_TILE(arguments)


def _symmetric_single(arguments):
    _SYMMETRIC_SINGLE_TILE(arguments)


def _clamp_bytes(arguments):
    _CLAMP_BYTES_TILE(arguments)


def _clamp_words(arguments):
    _CLAMP_WORDS_TILE(arguments)


def _clamp_single(arguments):
    _CLAMP_SINGLE_TILE(arguments)


def _clamp_halves(arguments):
    _CLAMP_HALVES_TILE(arguments)


def _measure_bytes(arguments):
    _MEASURE_BYTES_TILE(arguments)


def _measure_words(arguments):
    _MEASURE_WORDS_TILE(arguments)


def _measure_single(arguments):
    _MEASURE_SINGLE_TILE(arguments)


def _count_clamp_words(arguments):
    _COUNT_CLAMP_WORDS_TILE(arguments)


def _count_clamp_single(arguments):
    _COUNT_CLAMP_SINGLE_TILE(arguments)


def _count_wrap_words(arguments):
    _COUNT_WRAP_WORDS_TILE(arguments)


def _count_wrap_single(arguments):
    _COUNT_WRAP_SINGLE_TILE(arguments)


def _nested(arguments):
    _NESTED_TILE(arguments)


def _nested_report(arguments):
    _NESTED_REPORT_TILE(arguments)


KERNELS = {
    "exact": TileKernel(_EXACT, _exact),
    "saturate_pair": TileKernel(_SATURATE_PAIR, _saturate_pair),
    "saturate_single": TileKernel(_SATURATE_SINGLE, _saturate_single),
    "symmetric_pair": TileKernel(_SYMMETRIC_PAIR, _symmetric_pair),
    "symmetric_single": TileKernel(_SYMMETRIC_SINGLE, _symmetric_single),
    "clamp_bytes": TileKernel(_CLAMP_BYTES, _clamp_bytes),
    "clamp_words": TileKernel(_CLAMP_WORDS, _clamp_words),
    "clamp_single": TileKernel(_CLAMP_SINGLE, _clamp_single),
    "clamp_halves": TileKernel(_CLAMP_HALVES, _clamp_halves),
    "measure_bytes": TileKernel(_MEASURE_BYTES, _measure_bytes),
    "measure_words": TileKernel(_MEASURE_WORDS, _measure_words),
    "measure_single": TileKernel(_MEASURE_SINGLE, _measure_single),
    "count_clamp_words": TileKernel(_COUNT_CLAMP_WORDS, _count_clamp_words),
    "count_clamp_single": TileKernel(_COUNT_CLAMP_SINGLE, _count_clamp_single),
    "count_wrap_words": TileKernel(_COUNT_WRAP_WORDS, _count_wrap_words),
    "count_wrap_single": TileKernel(_COUNT_WRAP_SINGLE, _count_wrap_single),
    "nested": TileKernel(_NESTED, _nested),
    "nested_report": TileKernel(_NESTED_REPORT, _nested_report),
}
