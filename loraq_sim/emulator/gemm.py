"""Integer GEMM on an emulated MAC array: checks, the choice of route, and the report.

Routes, all giving the same bits: ``exact`` (proved free of overflow, or wrapping, which commutes
with sums), ``tiles`` (vector kernels), ``exact+tiles`` (some tiles proved, the others not),
``lanes`` (32-bit loops, reports of trees that may overflow in front of several accumulators) and
``wide`` (64-bit loops, any width).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.accumulation import (
    Accumulation,
    run_exact,
    run_lanes,
    run_tiled,
    run_tree,
    run_wide,
)
from loraq_sim.emulator.bounds import guaranteed_bits, signed_width
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import PackedWeight, checked_codes
from loraq_sim.emulator.requantize import srs
from loraq_sim.emulator.tile_job import ACCUMULATORS, Output, TileJob, on_a_path_that_compiles
from loraq_sim.emulator.tile_ready import run_ready
from loraq_sim.emulator.tile_route import nested_fits, run_nested, run_plain, srs_output, tiles_fit
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import choose_path

__all__ = [
    *("GemmReport", "activation_range", "checked_job"),
    *("emulate_gemm", "emulate_gemm_report", "emulate_gemm_srs"),
]


@dataclass(frozen=True, kw_only=True)
class GemmReport:
    """Accumulators of one GEMM and what happened on the way.

    Attributes
    ----------
    acc : ndarray of shape (M, N), int32 (acc_bits <= 32) or int64
    overflow_count : int or None
        Adds into an accumulator, merges included, whose exact result left its range.
    tree_overflow_count : int or None
        Chunk sums that left the tree's range.
    outputs_affected : int or None
        Outputs with at least one of either.
    first_overflow_k : int or None
        Lowest K index of a chunk whose add overflowed an accumulator; K if only merges did.
        None if nothing overflowed (or where `overflow_count` is None).
    safe_acc_bits : int or None
        Narrowest two's complement accumulator that holds every exact prefix of these operands in
        this order (the chunk sums taken as the tree delivers them). Measured; may be below 8.
    guaranteed_acc_bits : int
        Narrowest one that holds every prefix for any activations of the given range.
    route : str
        ``exact``, ``tiles``, ``exact+tiles``, ``lanes`` or ``wide``.

    The counts are None only with ``statistics=False``, where not known without measuring: None says
    unknown, 0 that there is provably none.
    """

    acc: NDArray[np.int32] | NDArray[np.int64]
    overflow_count: int | None
    tree_overflow_count: int | None
    outputs_affected: int | None
    first_overflow_k: int | None
    safe_acc_bits: int | None
    guaranteed_acc_bits: int
    route: str

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import gemm_card

        return gemm_card(self)


@on_a_path_that_compiles
def emulate_gemm(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    *,
    init: ArrayLike | None = None,
    threads: int = 1,
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return the accumulators of ``a @ w.T`` on a MAC array, bit for bit.

    Parameters
    ----------
    a : array of shape (M, K), any integer dtype
        Activation codes, all within int8 (-128..127) or all within uint8 (0..255).
    w : array of shape (N, K), any integer dtype, or PackedWeight
        Weight codes, within int8. `pack_weight` spares packing them again in the next call.
    mac : MacArray or TwoLevelArray
        A `TwoLevelArray` runs as `loraq_sim.emulator.two_level.emulate_two_level` does.
    init : array broadcastable to (M, N), any integer dtype, or None
        Initial value of accumulator 0 (a bias or partial sums); must fit the accumulator. Of two
        levels the wide one starts there.
        With K = 0 the result is `init`, or zeros.
    threads : int
        Bands of rows to run at the same time, 1 or more. The result does not depend on it.

    Returns
    -------
    acc : ndarray of shape (M, N)
        int32 for accumulators of up to 32 bits, int64 above.

    Raises
    ------
    InputError
        If an operand is not a matrix of integers, codes or `init` leave their range, or shapes
        do not match.
    """
    if isinstance(mac, TwoLevelArray):
        from loraq_sim.emulator.two_level import emulate_two_level

        return emulate_two_level(a, w, mac, init=init, threads=threads)
    acc = _run(checked_job(a, w, mac, init, threads), statistics=False).acc
    return acc.astype(_result_dtype(mac), copy=False)


@on_a_path_that_compiles
def emulate_gemm_srs(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    shift: int,
    *,
    out_bits: int = 8,
    signed: bool = True,
    rounding: str = "conv_even",
    saturation: str = "saturate",
    init: ArrayLike | None = None,
    threads: int = 1,
) -> NDArray[np.integer]:
    """Return ``srs(emulate_gemm(a, w, mac), shift, ...)`` in one step, bit for bit.

    Faster than the two calls: sums are rounded while they are in registers, so that the
    accumulators are neither written nor read again.

    Parameters
    ----------
    a, w, mac, init, threads
        As for `emulate_gemm`.
    shift, out_bits, signed, rounding, saturation
        As for `loraq_sim.emulator.requantize.srs`.

    Returns
    -------
    out : ndarray of shape (M, N)
        The smallest of int8, int16, int32 (or unsigned) that holds `out_bits`.

    Raises
    ------
    InputError
        As either of the two.
    """
    options = {
        "out_bits": out_bits, "signed": signed, "rounding": rounding, "saturation": saturation
    }  # fmt: skip
    output = srs_output(shift, **options)
    if isinstance(mac, TwoLevelArray):
        return srs(emulate_gemm(a, w, mac, init=init, threads=threads), shift, **options)
    job = checked_job(a, w, mac, init, threads, output or ACCUMULATORS)
    if output is not None and (ready := run_ready(job)) is not None:
        return ready[0]
    # Merging accumulators comes between their sums and the rounding.
    whole = mac.accumulators == 1 or mac.overflow == "wrap"
    if output is not None and whole and tiles_fit(job, statistics=False):
        return run_plain(job)[0]
    nested = output is not None and whole and mac.tree_bits is not None
    if nested and nested_fits(job, job.bounds, statistics=False):
        return run_nested(job, job.bounds, statistics=False)[0]
    acc = _run(replace(job, output=ACCUMULATORS), statistics=False).acc
    return srs(acc, shift, **options)


@on_a_path_that_compiles
def emulate_gemm_report(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    *,
    init: ArrayLike | None = None,
    a_bits: int = 8,
    statistics: bool = True,
    threads: int = 1,
) -> "GemmReport | TwoLevelReport":  # noqa: F821 (imported where it is made)
    """Return the accumulators of ``a @ w.T`` with overflow counts and safe accumulator widths.

    A `TwoLevelArray` gives a `loraq_sim.emulator.two_level.TwoLevelReport`, always measured.

    Parameters
    ----------
    a, w, mac, init, threads
        As for `emulate_gemm`.
    a_bits : int
        Width of the activation codes, 2 to 8: the range `guaranteed_acc_bits` covers. Unsigned
        where the dtype of `a` is unsigned or a code exceeds 127, signed otherwise.
    statistics : bool
        False takes the fastest route and leaves unmeasured fields None.

    Raises
    ------
    InputError
        As `emulate_gemm`; also if a code of `a` does not fit `a_bits`.
    """
    if isinstance(mac, TwoLevelArray):
        from loraq_sim.emulator.two_level import emulate_two_level_report

        return emulate_two_level_report(a, w, mac, init=init, a_bits=a_bits, threads=threads)
    job = checked_job(a, w, mac, init, threads)
    a_range = activation_range(np.asarray(a).dtype, job, a_bits)
    result = _run(job, statistics)
    # Without statistics a kernel counts nothing, but a proof says that there is nothing to count.
    proved = not statistics and job.bounds.accumulator_fits(mac)
    overflows = 0 if proved else result.overflow_count
    affected = result.outputs_affected
    if affected is None and overflows == 0 and result.tree_overflow_count == 0:
        affected = 0
    return GemmReport(
        acc=result.acc.astype(_result_dtype(mac), copy=False),
        overflow_count=overflows,
        tree_overflow_count=result.tree_overflow_count,
        outputs_affected=affected,
        first_overflow_k=result.first_overflow_k,
        safe_acc_bits=None if result.extremes is None else signed_width(*result.extremes),
        guaranteed_acc_bits=guaranteed_bits(job.weight, a_range, job.init, mac),
        route=result.route,
    )


def _result_dtype(mac: MacArray) -> type:
    return np.int32 if mac.acc_bits <= 32 else np.int64


def checked_job(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    init: ArrayLike | None,
    threads: int,
    output: Output = ACCUMULATORS,
) -> TileJob:
    """Return the operands of a GEMM, checked; errors as of `emulate_gemm`."""
    if not isinstance(mac, MacArray | TwoLevelArray):
        raise InputError(
            f"mac must be a MacArray or a TwoLevelArray, got {mac!r}; describe one, such as "
            "MacArray(acc_bits=20, overflow='saturate'), or take array_preset('aie2').array"
        )
    codes = checked_codes("a", a, 255)
    weight = w if isinstance(w, PackedWeight) else PackedWeight(checked_codes("w", w, 127))
    if codes.shape[1] != weight.shape[1]:
        raise InputError(
            f"a has shape {codes.shape} and w has shape {weight.shape}: both must be "
            f"(rows, K) with the same K, got K={codes.shape[1]} and K={weight.shape[1]}"
        )
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
        raise InputError(f"threads must be an integer of 1 or more, got {threads!r}")
    start = _checked_init(init, (codes.shape[0], weight.shape[0]), mac)
    return TileJob(
        a=codes,
        weight=weight,
        mac=mac,
        init=start,
        path=choose_path(),
        threads=int(threads),
        output=output,
    )


def _run(job: TileJob, statistics: bool) -> Accumulation:
    """Run the fastest route that is proved exact for these operands."""
    if not statistics and (ready := run_ready(job)) is not None:
        return Accumulation(acc=ready[0], route=ready[1], tree_overflow_count=0)
    if tiles_fit(job, statistics=statistics):
        return run_tiled(job, statistics)
    mac, bounds = job.mac, job.bounds
    if mac.tree_bits is not None and nested_fits(job, bounds, statistics=statistics):
        return run_tree(job, statistics)
    exact = bounds.tree_fits(mac) and (mac.overflow == "wrap" or bounds.accumulator_fits(mac))
    operands = (job.a, job.weight.codes, mac, job.init, bounds, statistics)
    if exact and not statistics:
        return run_exact(*operands)
    return run_lanes(*operands) if bounds.lanes_fit(mac) else run_wide(*operands)


def activation_range(dtype: np.dtype, job: TileJob, a_bits: int) -> tuple[int, int]:
    """Return the ends of the range of `a_bits`-bit activations; InputError if a code leaves it."""
    if isinstance(a_bits, bool) or not isinstance(a_bits, int | np.integer) or not 2 <= a_bits <= 8:
        raise InputError(f"a_bits must be an integer from 2 to 8, got {a_bits!r}")
    unsigned = dtype.kind == "u" or job.unsigned
    allowed = (0, 2**a_bits - 1) if unsigned else overflow_limits(int(a_bits), "wrap")
    if a_bits == 8:  # as the checks of the codes have shown
        return allowed
    low, high = job.a_norms.low, job.a_norms.high
    if low < allowed[0] or high > allowed[1]:
        raise InputError(
            f"a holds codes from {low} to {high}, outside a_bits={a_bits} "
            f"({allowed[0]}..{allowed[1]})"
        )
    return allowed


def _checked_init(
    init: ArrayLike | None, shape: tuple[int, int], mac: MacArray | TwoLevelArray
) -> NDArray[np.int64] | None:
    if init is None:
        return None
    values = np.asarray(init)
    if values.dtype.kind not in "iu":
        raise InputError(f"init must hold integers, got dtype {values.dtype}")
    if values.size:
        low, high = int(values.min()), int(values.max())
        if low < mac.lo or high > mac.hi:
            raise InputError(
                f"init holds values from {low} to {high}, outside the {mac.acc_bits}-bit "
                f"accumulator ({mac.lo}..{mac.hi}); widen acc_bits or add the bias later"
            )
    try:
        return np.broadcast_to(values.astype(np.int64), shape)
    except ValueError:
        raise InputError(
            f"init has shape {values.shape}, which does not broadcast to (M, N) = {shape}"
        ) from None
