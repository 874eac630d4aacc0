"""Integer GEMM on an emulated MAC array: the front door to arrays of one level and of two.

Operands are checked once (`loraq_sim.emulator.tile_job.checked_job`); then `accumulation` or
`two_level` computes, on the fastest route that gives the same bits as adding one product after the
other.
"""

import threading
from dataclasses import replace
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.accumulation import GemmReport, accumulate, report_of
from loraq_sim.emulator.mac_array import GivenZeros, MacArray, TwoLevelArray
from loraq_sim.emulator.packed_weight import PackedWeight
from loraq_sim.emulator.requantize import srs
from loraq_sim.emulator.requantizers import Requantizer, Srs
from loraq_sim.emulator.tile_job import (
    ACCUMULATORS,
    TileJob,
    activation_range,
    as_accumulators,
    checked_job,
)
from loraq_sim.emulator.tile_ready import run_kept, run_ready
from loraq_sim.emulator.tile_route import nested_fits, run_nested, run_plain, srs_output, tiles_fit
from loraq_sim.emulator.two_level import TwoLevelReport, two_level_report, two_level_sums
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import on_a_path_that_compiles

__all__ = [
    *("GemmReport", "emulate_gemm", "emulate_gemm_report", "emulate_gemm_requantize"),
    "emulate_gemm_srs",
]


# Weights that a thread keeps room for, and the most codes of each.
_FEW_SHAPES, _FEW_CODES = 8, 2**21
_THREAD = threading.local()


@on_a_path_that_compiles
def emulate_gemm(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    init: ArrayLike | None = None,
    threads: int = 1,
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return the accumulators of ``(a - a_zero) @ (w - w_zero).T`` on a MAC array, bit for bit.

    The array multiplies codes; what zero points take off is one integer for each output
    (`loraq_sim.emulator.mac_array`).

    Parameters
    ----------
    a : array of shape (M, K), any integer dtype
        Activation codes, all within int8 (-128..127) or all within uint8 (0..255); or int16.
    w : array of shape (N, K), any integer dtype, or PackedWeight
        Weight codes, within int8; or within uint8, if that is their dtype or `w_zero` is given.
        `pack_weight` spares packing them again in the next call.
    mac : MacArray or TwoLevelArray
        A `TwoLevelArray` runs as `loraq_sim.emulator.two_level.emulate_two_level` does.
    a_zero : integer or array of shape (M,), or None
        Zero point of all activations, or of each row; a code of `a`.
    w_zero : integer or array of shape (N,), or None
        Zero point of all weights, or of each row; a code of `w`.
    zero_point : {"initial", "after"}
        Whether the correction is part of the initial value, under the overflow rule, or is added
        behind the accumulators, exactly and in int64.
    init : array broadcastable to (M, N), any integer dtype, or None
        Initial value of accumulator 0 (a bias or partial sums); must fit the accumulator. Of two
        levels the wide one starts there.
        With K = 0 the result is `init`, or zeros.
    threads : int
        Bands of rows to run at the same time, 1 or more. The result does not depend on it.

    Returns
    -------
    acc : ndarray of shape (M, N)
        int32 for accumulators of up to 32 bits, int64 above and with zero points corrected after.

    Raises
    ------
    InputError
        If an operand is not a matrix of integers, codes, zero points or `init` leave their range,
        or shapes do not match.
    """
    is_plain = a_zero is None and w_zero is None and init is None and zero_point == "initial"
    if is_plain and type(threads) is int and threads >= 1:
        if isinstance(w, PackedWeight):
            kept = run_kept(a, w, mac, threads=threads)
        else:
            kept = _of_arrays(a, w, mac, threads)
        if kept is not None:
            return as_accumulators(kept, mac)
    zeros = GivenZeros(a_zero, w_zero, zero_point)
    if isinstance(mac, TwoLevelArray):
        nested = checked_job(a, w, mac, init, threads, zeros=zeros)
        return nested.corrected(two_level_sums(nested))
    return _sums(checked_job(a, w, mac, init, threads, zeros=zeros))


def _of_arrays(
    a: ArrayLike, w: ArrayLike, mac: MacArray | TwoLevelArray, threads: int
) -> NDArray[np.integer] | None:
    """As `run_kept`, of an array, packed where this thread packed the last of its shape.

    What was decided of the first ones must hold for any: None where it need not, or where
    packing takes longer than to find room for it.
    """
    if type(a) is not np.ndarray or type(w) is not np.ndarray or not isinstance(mac, MacArray):
        return None
    is_small = a.ndim == w.ndim == 2 and a.shape[1] == w.shape[1] and 0 < w.size <= _FEW_CODES
    if not is_small or w.dtype.char != "b" or a.dtype.char not in "bB":
        return None
    reach = w.shape[1] * (255 if a.dtype.char == "B" else 128) * 128
    wraps = mac.overflow == "wrap" and mac.acc_bits <= 32
    if mac.tree_bits is not None or not (wraps or reach <= min(mac.hi, 2**31 - 1)):
        return None
    weights: dict[Any, PackedWeight] = _THREAD.__dict__
    if w.shape not in weights:
        if len(weights) >= _FEW_SHAPES:
            weights.clear()
        weights[w.shape] = PackedWeight(w)
    weight = weights[w.shape]
    weight.refill(w)
    found = run_kept(a, weight, mac, threads=threads)
    if found is None:
        ready = run_ready(checked_job(a, weight, mac, None, threads))
        found = None if ready is None else ready[0]
    weight.forget()
    return found


def _sums(job: TileJob[MacArray]) -> NDArray[np.int32] | NDArray[np.int64]:
    """The accumulators of a job, corrected where that comes after them."""
    acc = accumulate(job, statistics=False).acc
    return job.corrected(as_accumulators(acc, job.mac))


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
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    init: ArrayLike | None = None,
    threads: int = 1,
) -> NDArray[np.integer]:
    """Return ``srs(emulate_gemm(a, w, mac), shift, ...)`` in one step, bit for bit.

    Faster than the two calls: sums are rounded while they are in registers, so that the
    accumulators are neither written nor read again.

    Parameters
    ----------
    a, w, mac, a_zero, w_zero, zero_point, init, threads
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
    narrow = partial(
        srs, shift=shift, out_bits=out_bits, signed=signed, rounding=rounding, saturation=saturation
    )
    output = srs_output(
        shift, out_bits=out_bits, signed=signed, rounding=rounding, saturation=saturation
    )
    is_plain = a_zero is None and w_zero is None and init is None and zero_point == "initial"
    if (
        is_plain
        and type(threads) is int
        and threads == 1
        and isinstance(w, PackedWeight)
        and output
    ):
        kept = run_kept(a, w, mac, output)
        if kept is not None:
            return kept
    zeros = GivenZeros(a_zero, w_zero, zero_point)
    if isinstance(mac, TwoLevelArray):
        nested = checked_job(a, w, mac, init, threads, zeros=zeros)
        return narrow(nested.corrected(two_level_sums(nested)))
    job = checked_job(a, w, mac, init, threads, output or ACCUMULATORS, zeros)
    if job.is_corrected_after:
        return narrow(_sums(replace(job, output=ACCUMULATORS)))
    if output is not None and (ready := run_ready(job)) is not None:
        return ready[0]
    # Merging accumulators comes between their sums and the rounding.
    whole = mac.accumulators == 1 or mac.overflow == "wrap"
    if output is not None and whole and tiles_fit(job, statistics=False):
        return run_plain(job)[0]
    has_tree = output is not None and whole and mac.tree_bits is not None
    if has_tree and nested_fits(job, job.bounds, statistics=False):
        return run_nested(job, job.bounds, statistics=False)[0]
    return narrow(accumulate(replace(job, output=ACCUMULATORS), statistics=False).acc)


@on_a_path_that_compiles
def emulate_gemm_requantize(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    requantizer: Requantizer,
    *,
    bias: ArrayLike | None = None,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    threads: int = 1,
) -> NDArray[np.integer]:
    """Return the output codes of a quantized layer: accumulate, add the bias, requantize.

    Bit for bit what `requantizer` makes of ``emulate_gemm(a, w, mac, init=bias, ...)``.

    Parameters
    ----------
    a, w, mac, a_zero, w_zero, zero_point, threads
        As for `emulate_gemm`: zero points of the operands. That of the output is the requantizer's.
    requantizer : loraq_sim.emulator.requantizers.Requantizer
        Scales, zero point and clamp of the output; one of a named runtime comes from
        `loraq_sim.emulator.runtimes.runtime_requantizer`.
    bias : int or array of shape (N,), optional
        Integers in units of the accumulators, which start from them and may overflow.

    Returns
    -------
    out : ndarray of shape (M, N)
        The smallest of int8, int16, int32 (or unsigned) that holds the output's width.

    Raises
    ------
    InputError
        As either step; also if the bias leaves the accumulator.
    """
    if not isinstance(requantizer, Requantizer):
        raise InputError(
            f"requantizer must be a Requantizer, got {requantizer!r}; make one with "
            "runtime_requantizer('onnxruntime', a_scale=..., w_scale=..., out_scale=...)"
        )
    if isinstance(requantizer, Srs):
        return emulate_gemm_srs(
            a,
            w,
            mac,
            requantizer.shift,
            out_bits=requantizer.out_bits,
            signed=requantizer.signed,
            rounding=requantizer.rounding,
            saturation=requantizer.saturation,
            a_zero=a_zero,
            w_zero=w_zero,
            zero_point=zero_point,
            init=bias,
            threads=threads,
        )
    acc = emulate_gemm(
        a,
        w,
        mac,
        a_zero=a_zero,
        w_zero=w_zero,
        zero_point=zero_point,
        init=bias,
        threads=threads,
    )
    return requantizer(acc)


@overload
def emulate_gemm_report(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    init: ArrayLike | None = None,
    a_bits: int = 8,
    statistics: bool = True,
    threads: int = 1,
) -> GemmReport: ...


@overload
def emulate_gemm_report(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: TwoLevelArray,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    init: ArrayLike | None = None,
    a_bits: int = 8,
    statistics: bool = True,
    threads: int = 1,
) -> TwoLevelReport: ...


@on_a_path_that_compiles
def emulate_gemm_report(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: MacArray | TwoLevelArray,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
    init: ArrayLike | None = None,
    a_bits: int = 8,
    statistics: bool = True,
    threads: int = 1,
) -> GemmReport | TwoLevelReport:
    """Return the accumulators of `emulate_gemm` with overflow counts and safe accumulator widths.

    A `TwoLevelArray` gives a `loraq_sim.emulator.two_level.TwoLevelReport`, always measured. Counts
    and widths are those of the accumulators: of what is corrected after them, without it.

    Parameters
    ----------
    a, w, mac, a_zero, w_zero, zero_point, init, threads
        As for `emulate_gemm`.
    a_bits : int
        Width of the activation codes, 2 to 8, of int16 arrays to 16: the range that
        `guaranteed_acc_bits` covers. Unsigned where the dtype of `a` is unsigned or a code exceeds
        127, signed otherwise.
    statistics : bool
        False takes the fastest route and leaves unmeasured fields None.

    Raises
    ------
    InputError
        As `emulate_gemm`; also if a code or a zero point of `a` does not fit `a_bits`.
    """
    zeros = GivenZeros(a_zero, w_zero, zero_point)
    report: GemmReport | TwoLevelReport
    if isinstance(mac, TwoLevelArray):
        nested = checked_job(a, w, mac, init, threads, zeros=zeros)
        a_range = activation_range(np.asarray(a).dtype, nested, a_bits)
        report = two_level_report(nested, a_range)
        return replace(report, acc=nested.corrected(report.acc))
    job = checked_job(a, w, mac, init, threads, zeros=zeros)
    a_range = activation_range(np.asarray(a).dtype, job, a_bits)
    report = report_of(job, a_range, statistics=statistics)
    return replace(report, acc=job.corrected(report.acc))
