"""The fast route of the emulated GEMM: choose a tile kernel, pack the operands, run it.

The tiles take every MAC array but those whose tree may overflow, as long as the values stay within
32-bit lanes. Which kernel runs never changes the result, only its speed:

- No overflow possible, or wrapping: the plain dot product, exact modulo 2**32.
- Saturating, one or two products an add: the accumulator is left-aligned in its lane, so that the
  saturation of the dot instruction at int32 is the accumulator's own. What saturation leaves in the
  low bits never matters: the state is x * 2**s + r with r either 0 or 2**s - 1, and for both
  the next add leaves the lane exactly where x + p leaves the accumulator.
- Otherwise: the dot of a chunk, then a clamp. Unsigned bytes hold a + 128, so the lanes carry an
  offset of 128 * (prefix sum of w) that the limits follow.
- A tree that may overflow, or a two-level array: one rule inside the other (`run_nested`).

Shift-round-saturate may be the last step of a tile, where its arithmetic fits 32-bit lanes
(`srs_output`).
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, proved_tiles
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, checked_int
from loraq_sim.emulator.packed_weight import Norms, Order
from loraq_sim.emulator.requantize import SHIFT_RANGE, output_dtype, output_limits
from loraq_sim.emulator.tile_job import AnyJob, Choice, Output, TileJob, kernels_of
from loraq_sim.emulator.tile_run import Totals, run_kernel
from loraq_sim.formats import Saturation, parse_rounding, parse_saturation
from loraq_sim.kernels.processor import LOOPS

__all__ = [
    "choose_ruled",
    "count_overflows",
    "measure",
    "nested_fits",
    "run_nested",
    "run_plain",
    "srs_output",
    "tiles_fit",
]


# A tile route of two kernels packs A twice; below this share of proved tiles it does not pay.
_ENOUGH_PROVED = 0.25


def tiles_fit(job: TileJob[MacArray], *, statistics: bool) -> bool:
    """Whether every value of this GEMM fits the lanes of the tiles."""
    mac = job.mac
    if job.path == LOOPS or job.a.size == 0 or job.weight.codes.size == 0 or not job.is_plain:
        return False
    if mac.tree_bits is not None and not job.bounds.tree_fits(mac):
        return False
    if not statistics and mac.overflow == "wrap" and mac.acc_bits <= 32:
        return True
    bounds = job.bounds
    # The exact sum of accumulator and chunk fits a lane up to 31 bits: 2**30 + 2**21 < 2**31.
    limited = bounds.accumulator_fits(mac) or mac.acc_bits <= 31
    if statistics:
        return bounds.reach < 2**31 and limited
    if bounds.accumulator_fits(mac):
        return bounds.reach < 2**31
    return limited or _aligned(job) is not None


def nested_fits(job: AnyJob, bounds: Bounds, *, statistics: bool) -> bool:
    """Whether the tile of nested rules takes this tree or two-level array, whatever overflows.

    An inner rule never returns more than the sum of the magnitudes it was given, which `bounds`
    hold for all of K: they hold for the outer sums too. Inner sums stay within the lanes: a limit
    of 31 bits and 4096 products are at most 2**30 + 2**27.
    """
    mac = job.mac
    if job.path == LOOPS or job.a.size == 0 or job.weight.codes.size == 0 or not job.is_plain:
        return False
    if isinstance(mac, TwoLevelArray):
        # Columns that wrap give the same sums however many accumulators they have.
        ordered = statistics or mac.column.overflow != "wrap"
        if mac.column.tree_bits is not None or (ordered and mac.column.accumulators > 1):
            return False
    limited = mac.acc_bits <= 31
    if statistics:
        free = bounds.reach < 2**31
        return mac.accumulators == 1 and free and (limited or bounds.accumulator_fits(mac))
    if mac.overflow == "wrap" and mac.acc_bits <= 32:
        return True
    return limited or (bounds.reach < 2**31 and bounds.accumulator_fits(mac))


def run_nested(
    job: AnyJob, bounds: Bounds, *, statistics: bool
) -> tuple[NDArray[np.integer], Totals]:
    """Return the job's output under both rules, and with `statistics` what they did."""
    mac, chunk = job.mac, job.chunk
    column, accumulators = chunk, 1 if mac.overflow == "wrap" else mac.accumulators
    if isinstance(mac, TwoLevelArray):
        column = min(mac.column_k, job.a.shape[1])
        # The sum of a column that wraps does not depend on its chunks.
        ordered = statistics or mac.column.overflow != "wrap"
        chunk = min(mac.column.products_per_add, column) if ordered else column
    order = Order("words", chunk, accumulators, column)
    out, totals = run_kernel(job, Choice("nested_report" if statistics else "nested", order))
    low, high = min(totals.low, bounds.init_low), max(totals.high, bounds.init_high)
    return _cropped(job, out), totals._replace(low=low, high=high)


def run_plain(job: TileJob[MacArray]) -> tuple[NDArray[np.integer], str]:
    """Return the job's output and the route, without statistics: the fastest kernels."""
    exact = Choice("exact", Order(_exact_codes(job), 0, 1))
    if job.mac.overflow == "wrap" or job.bounds.accumulator_fits(job.mac):
        return _cropped(job, run_kernel(job, exact)[0]), "exact"
    ruled = _aligned(job) or _clamping(job, job.a_norms.top)
    shape, plain = kernels_of(job)[ruled.name].shape, kernels_of(job)["exact"].shape
    known = (job.weight.norms, shape.width, job.bounds, job.mac)
    same = (shape.rows, shape.width) == (plain.rows, plain.width)
    if same and not job.sample.refutes_tiles(*known):
        proved = proved_tiles(job.a_norms, shape.rows, *known)
        if proved.mean() >= _ENOUGH_PROVED:
            # In this order: merges of accumulators also touch the tiles that `ruled` leaves out.
            out, _ = run_kernel(job, ruled, (proved, 0))
            run_kernel(job, exact, (proved, 1), out)
            return _cropped(job, out), "exact+tiles"
    return _cropped(job, run_kernel(job, ruled)[0]), "tiles"


def choose_ruled(job: TileJob[MacArray]) -> tuple[Choice, int]:
    """Return a saturating kernel and the codes it takes, -x..x - 1, as many as this job needs."""
    anything = 128
    if job.chunk > 2:
        return _clamping(job, anything), anything
    if (aligned := _aligned(job)) is None:
        return _clamping(job, 255 if job.unsigned else anything), anything
    if aligned.a_shift <= (7 if job.unsigned else 8):
        return aligned, anything
    # W takes all it can, which leaves A the most codes.
    a_shift = aligned.a_shift + aligned.w_shift - _headroom(job.weight.norms)
    choice = aligned._replace(a_shift=a_shift, w_shift=_headroom(job.weight.norms))
    return choice, 2 ** (15 - a_shift)


def measure(job: TileJob[MacArray]) -> tuple[NDArray[np.integer], Totals]:
    """Return the exact sums, unlimited, and the extremes of all their prefixes."""
    offset = 0 if job.unsigned else 128 * job.weight.norms.longest
    if job.chunk == 1:
        choice = Choice("measure_single", _order(job, "words"))
    elif "measure_bytes" in kernels_of(job) and job.chunk > 2 and job.bounds.reach + offset < 2**31:
        choice = Choice("measure_bytes", _order(job, "bytes"))
    else:
        choice = Choice("measure_words", _order(job, "words"))
    out, totals = run_kernel(job, choice)
    # Initial values count where they are, before the first add.
    low, high = min(totals.low, job.bounds.init_low), max(totals.high, job.bounds.init_high)
    return _cropped(job, out), totals._replace(low=low, high=high)


def count_overflows(job: TileJob[MacArray]) -> tuple[NDArray[np.integer], Totals]:
    """Return the accumulators under the overflow rule and what overflowed."""
    rule = "wrap" if job.mac.overflow == "wrap" else "clamp"
    name = f"count_{rule}_{'single' if job.chunk == 1 else 'words'}"
    out, totals = run_kernel(job, Choice(name, _order(job, "words")))
    return _cropped(job, out), totals


def _cropped(job: AnyJob, out: NDArray[np.integer]) -> NDArray[np.integer]:
    return np.ascontiguousarray(out[: job.a.shape[0], : job.weight.shape[0]])


def _order(job: TileJob[MacArray], codes: str) -> Order:
    return Order(codes, job.chunk, job.mac.accumulators)


def _exact_codes(job: TileJob[MacArray]) -> str:
    return kernels_of(job)["exact"].shape.layout


def _aligned(job: TileJob[MacArray]) -> Choice | None:
    """The kernel whose dot saturates by itself, if the operands leave it enough headroom."""
    mac = job.mac
    single = job.chunk == 1
    name = "saturate" if mac.overflow == "saturate" else "symmetric"
    name += "_single" if single else "_pair"
    if mac.overflow == "wrap" or job.chunk > 2 or mac.acc_bits > 32 or name not in kernels_of(job):
        return None
    shift = 32 - mac.acc_bits
    spare_w = _headroom(job.weight.norms)
    # A takes the shift first, as far as any codes of its kind would allow, so that one layout of W
    # serves all activations; beyond that, as far as these codes allow.
    a_shift = min(shift, 7 if job.unsigned else 8)
    if shift - a_shift > spare_w:
        a_shift = min(shift, _headroom(job.a_norms))
    if shift - a_shift > spare_w:
        return None
    return Choice(name, _order(job, "words"), a_shift, shift - a_shift)


def _headroom(norms: Norms) -> int:
    """Left shifts that keep every code within int16."""
    return 15 - max(norms.high.bit_length(), (-norms.low - 1).bit_length() if norms.low else 0)


def _clamping(job: TileJob[MacArray], top: int) -> Choice:
    """The kernel that clamps, for activations of magnitudes up to `top`."""
    kernels, mac = kernels_of(job), job.mac
    if job.chunk == 1:
        reach = max(mac.hi, -mac.lo - 1) + top * job.weight.norms.top
        # Sums of 16-bit lanes: hi + product and lo - product must fit them.
        if reach < 2**15:
            return Choice("clamp_halves", _order(job, "halves"))
        return Choice("clamp_single", _order(job, "words"))
    offset = 0 if job.unsigned else 128 * job.weight.norms.longest
    if "clamp_bytes" in kernels and job.chunk > 2 and offset + mac.hi + 2**22 < 2**31:
        return Choice("clamp_bytes", _order(job, "bytes"))
    return Choice("clamp_words", _order(job, "words"))


def srs_output(
    shift: int, *, out_bits: int, signed: bool, rounding: str, saturation: str
) -> Output | None:
    """Return what makes a tile store `srs` of its sums, or None where tiles cannot.

    Tiles take right shifts of 0 to 30 bits, and keep low bits only of whole bytes.

    Raises
    ------
    InputError
        As `loraq_sim.emulator.requantize.srs`.
    """
    mode = parse_rounding(rounding).value
    lo, hi = output_limits(out_bits, signed=signed, saturation=saturation)
    shift = checked_int("shift", shift, *SHIFT_RANGE)
    clamps = parse_saturation(saturation) is not Saturation.NONE
    return _output(shift, int(out_bits), bool(signed), mode, (lo, hi) if clamps else None)


@lru_cache(maxsize=1024)
def _output(
    shift: int, out_bits: int, signed: bool, rounding: str, limits: tuple[int, int] | None
) -> Output | None:
    from loraq_sim.kernels.shift_round import rounding_constants
    from loraq_sim.kernels.vector_ir import MAX_SHIFT

    dtype = output_dtype(out_bits, signed)
    if not 0 <= shift <= MAX_SHIFT or (limits is None and out_bits != 8 * dtype.itemsize):
        return None
    # A rounded int32 never leaves int32: its limits are those of no clamp.
    lowest, highest = -(2**31), 2**31 - 1
    lo, hi = limits or (lowest, highest)
    add, negative, odd = rounding_constants(rounding, shift)
    return Output(
        dtype,
        {
            "out_bytes": dtype.itemsize,
            "srs_shift": shift,
            "srs_dropped": 2**shift - 1,
            "srs_add": add,
            "srs_negative": negative,
            "srs_odd": odd,
            "srs_lo": max(lo, lowest),
            "srs_hi": min(hi, highest),
        },
    )
