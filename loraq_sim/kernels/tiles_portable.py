"""The tiles of any processor, compiled on first use.

Plain LLVM vectors, which LLVM splits into the registers that are there.
"""

from loraq_sim.kernels.tile import TileShape
from loraq_sim.kernels.tile_kernel import TileKernel, make_tile
from loraq_sim.kernels.vector_ir import Instructions

__all__ = ["KERNELS"]

_WORDS = Instructions("portable", "words")
_HALVES = Instructions("portable", "halves")

_EXACT = TileShape(_WORDS, "none", moving=False, single=False, rows=4, vectors=2)
_CLAMP_WORDS = TileShape(_WORDS, "clamp", moving=False, single=False, rows=4, vectors=2)
_CLAMP_SINGLE = TileShape(_WORDS, "clamp", moving=False, single=True, rows=4, vectors=2)
_CLAMP_HALVES = TileShape(_HALVES, "clamp", moving=False, single=False, rows=4, vectors=2)
_MEASURE_WORDS = TileShape(_WORDS, "measure", moving=False, single=False, rows=4, vectors=2)
_MEASURE_SINGLE = TileShape(_WORDS, "measure", moving=False, single=True, rows=4, vectors=2)
_COUNT_CLAMP_WORDS = TileShape(_WORDS, "count_clamp", moving=False, single=False, rows=3, vectors=2)
_COUNT_CLAMP_SINGLE = TileShape(_WORDS, "count_clamp", moving=False, single=True, rows=3, vectors=2)
_COUNT_WRAP_WORDS = TileShape(_WORDS, "count_wrap", moving=False, single=False, rows=3, vectors=2)
_COUNT_WRAP_SINGLE = TileShape(_WORDS, "count_wrap", moving=False, single=True, rows=3, vectors=2)
_NESTED = TileShape(_WORDS, "nested", moving=False, single=False, rows=2, vectors=2)
_NESTED_REPORT = TileShape(_WORDS, "nested_report", moving=False, single=False, rows=2, vectors=1)

_EXACT_TILE = make_tile(_EXACT)
_CLAMP_WORDS_TILE = make_tile(_CLAMP_WORDS)
_CLAMP_SINGLE_TILE = make_tile(_CLAMP_SINGLE)
_CLAMP_HALVES_TILE = make_tile(_CLAMP_HALVES)
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


def _clamp_words(arguments):
    _CLAMP_WORDS_TILE(arguments)


def _clamp_single(arguments):
    _CLAMP_SINGLE_TILE(arguments)


def _clamp_halves(arguments):
    _CLAMP_HALVES_TILE(arguments)


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
    "clamp_words": TileKernel(_CLAMP_WORDS, _clamp_words),
    "clamp_single": TileKernel(_CLAMP_SINGLE, _clamp_single),
    "clamp_halves": TileKernel(_CLAMP_HALVES, _clamp_halves),
    "measure_words": TileKernel(_MEASURE_WORDS, _measure_words),
    "measure_single": TileKernel(_MEASURE_SINGLE, _measure_single),
    "count_clamp_words": TileKernel(_COUNT_CLAMP_WORDS, _count_clamp_words),
    "count_clamp_single": TileKernel(_COUNT_CLAMP_SINGLE, _count_clamp_single),
    "count_wrap_words": TileKernel(_COUNT_WRAP_WORDS, _count_wrap_words),
    "count_wrap_single": TileKernel(_COUNT_WRAP_SINGLE, _count_wrap_single),
    "nested": TileKernel(_NESTED, _nested),
    "nested_report": TileKernel(_NESTED_REPORT, _nested_report),
}
