"""Test vectors of a tile of a GEMM: operand codes, accumulators and SRS outputs, bit exact.

`gemm_operands` takes the stored operands of one GEMM of a layer from its data path:

main   X_a Q^T     activations and weight of the main branch
down   X_b R^T     activations of the branch and its right factor
up     P^ L^T      P = X_b R^T as the data path stores it, and the left factor
feedback_down, feedback_back, feedback_up    X_f V^T, P_f V and P_f L_f^T of a residual input

`make_vectors` emulates its first M rows, N columns and K products. Group scales cut K into passes:
the MAC array runs each stretch of constant scales from zero, so there are accumulators and outputs
of every pass. (The data path multiplies each pass by its scales and adds them up; that is not part
of the vectors.)

Where an array preset requantizes in another way than SRS, no layer gives the numbers in its
requantizer: each column gets the scale at which its largest accumulator becomes the largest code,
held as that requantizer holds scales.

`loraq_sim.emulator.vector_files` writes them.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.accumulation import measured
from loraq_sim.emulator.bounds import output_limits
from loraq_sim.emulator.datapath import Datapath, StoredLayer
from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray, ZeroPoints, checked_int
from loraq_sim.emulator.presets import ArrayPreset
from loraq_sim.emulator.requantize import SHIFT_RANGE, SrsReport, quantize_multiplier, srs_report
from loraq_sim.emulator.requantizers import (
    FIXED_POINT_RULES,
    FixedPoint,
    FloatSteps,
    NvdlaStages,
    Requantizer,
    XmosTransform,
)
from loraq_sim.emulator.runtimes import runtime_requantizer
from loraq_sim.emulator.scaled_gemm import zero_points_at
from loraq_sim.emulator.walk import walk_steps
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.split import PrecisionSplit

__all__ = [
    *("PARTS", "GemmVectors", "SrsSetting", "filling_requantizer", "gemm_operands"),
    "make_vectors",
]

PARTS = ("main", "down", "up", "feedback_down", "feedback_back", "feedback_up")
# int16 multipliers: their largest, and the bits it has.
_FACTOR, _FACTOR_BITS = 2**15 - 1, 15


@dataclass(frozen=True, kw_only=True)
class SrsSetting:
    """Shift-round-saturate of the vectors; ``shift=None`` chooses one (see `make_vectors`)."""

    out_bits: int = 8
    shift: int | None = None
    rounding: str = "conv_even"
    saturation: str = "saturate"


@dataclass(frozen=True, kw_only=True, eq=False)
class GemmVectors:
    """Operands and expected results of one tile.

    Attributes
    ----------
    a, w : ndarray of shape (M, K) and (N, K), int8, uint8 or int16
        Codes in `a_bits` and `w_bits`, two's complement or, of an unsigned dtype, unsigned.
    a_zero, w_zero : ndarray of shape (passes, M) and (passes, N), int64
        Zero points, 0 where an operand has none.
    init : ndarray of shape (passes, M, N), int64
        What they take off each output, exactly (`loraq_sim.emulator.mac_array`).
    zero_point : {"initial", "after"}
        Whether accumulators start there or have it added behind them.
    pass_k : int
        Products of a pass; the last pass may be short.
    acc : ndarray of shape (passes, M, N), int32 or int64
        Accumulators of `mac`, started from `init` in every pass, or from zero and corrected after.
    out : ndarray of shape (passes, M, N), signed
        SRS outputs of `srs`, whose shift is set.
    shift_reason : str
        Why that shift.
    overflow_count, safe_acc_bits : int
        Accumulator overflows, and the narrowest width without any, over all passes.
    out_of_range_count : int
        Outputs that SRS clamped or cut; of another requantizer, those at an end of the output.
    requantizer : Requantizer or None
        What made `out` where an array preset requantizes in another way than SRS; the reference
        device cannot, so that there is no testbench.
    """

    a: NDArray[np.integer]
    w: NDArray[np.integer]
    a_bits: int
    w_bits: int
    a_zero: NDArray[np.int64]
    w_zero: NDArray[np.int64]
    init: NDArray[np.int64]
    zero_point: str
    pass_k: int
    mac: MacArray
    acc: NDArray[np.int32] | NDArray[np.int64]
    srs: SrsSetting
    out: NDArray[np.integer]
    shift_reason: str
    overflow_count: int
    safe_acc_bits: int
    out_of_range_count: int
    requantizer: Requantizer | None = None


def gemm_operands(
    part: str,
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Return what one GEMM multiplies: (M, K) activations and (N, K) weights, both stored.

    K is the layer's for ``main`` and ``down``, where N is the rank; the rank for ``up``.

    Parameters
    ----------
    part : str
        One of `PARTS`.
    activations : ndarray of shape (M, K), float32
        Full-precision input rows.
    stored, split, datapath
        As for `loraq_sim.emulator.walk.run_layer`.

    Raises
    ------
    InputError
        If `part` is unknown, or names a branch that the layer does not have.
    """
    if part not in PARTS:
        raise InputError(unknown_name("part", part, PARTS))
    for done in walk_steps(activations, stored, split, datapath):
        if done.step.name == part:
            return done.inputs[0], done.weight
    lacks, such_as = ("low-rank branch", "W4A4+W8A8r8")
    if part.startswith("feedback"):
        lacks, such_as = ("residual input in this layer", "W4A4~W8A8r8f4")
    raise InputError(
        f"split {split} has no {lacks}, so there is no part {part!r}; use part 'main' or a split "
        f"such as {such_as}"
    )


def make_vectors(
    x: QuantizedTensor,
    w: QuantizedTensor,
    tile: tuple[int, int, int],
    mac: MacArray,
    srs: SrsSetting,
    *,
    zero_point: str = "initial",
    preset: ArrayPreset | None = None,
) -> GemmVectors:
    """Emulate a tile of ``x @ w.T`` and keep everything a testbench compares.

    Parameters
    ----------
    x, w : QuantizedTensor of shape (rows, K) and (columns, K)
        Integer elements, with or without zero points; equal groups along K.
    tile : (int, int, int)
        M, N and K, each from 1 to the size of the GEMM.
    mac : MacArray
    srs : SrsSetting
        Without a shift, the smallest from 0 on at which no output of the tile is out of range.
    zero_point : {"initial", "after"}
        Where the correction of zero points enters, as in `loraq_sim.emulate_gemm`.
    preset : ArrayPreset, optional
        Whose requantizer makes the outputs (`filling_requantizer`).

    Raises
    ------
    InputError
        If an operand has no integer codes, groups differ, or the tile does not fit.
    """
    for name, operand in (("activations", x), ("weights", w)):
        if not operand.format.element.is_integer:
            raise InputError(
                f"the {name} of this GEMM are stored as {operand.format}, which has no integer "
                "codes; choose integer formats (a branch such as W8A8, P as 'branch')"
            )
    sizes = (x.shape[0], w.shape[0], x.shape[1])
    m, n, k = (
        checked_int(f"tile {name}", size, 1, limit)
        for name, size, limit in zip("MNK", tile, sizes, strict=True)
    )
    pass_k = _common_group(x, w, k)
    a_codes, w_codes = (np.ascontiguousarray(t.codes[:rows, :k]) for t, rows in ((x, m), (w, n)))
    bits, starts = x.format.element.bits, range(0, k, pass_k)
    a_zero = np.stack([_zeros_of(x, start)[:m] for start in starts])
    w_zero = np.stack([_zeros_of(w, start)[:n] for start in starts])
    init, reports = [], []
    for start, a_zeros, w_zeros in zip(starts, a_zero, w_zero, strict=True):
        codes = a_codes[:, start : start + pass_k], w_codes[:, start : start + pass_k]
        zeros = ZeroPoints(a=a_zeros, w=w_zeros, after=zero_point == "after")
        init.append(zeros.correction(*codes))
        report = emulate_gemm_report(
            *codes, mac, a_zero=a_zeros, w_zero=w_zeros, zero_point=zero_point, a_bits=bits
        )
        reports.append(report)
    acc: NDArray[Any] = np.stack([report.acc for report in reports])
    shift, reason = _shift_of(acc, srs)
    narrowed = _narrowed(acc, shift, srs)
    requantizer = None if preset is None else filling_requantizer(preset, acc, srs.out_bits)
    if requantizer is not None:
        out = requantizer(acc)
        narrowed = SrsReport(out=out, out_of_range_count=_outputs_at_an_end(out, requantizer))
    return GemmVectors(
        a=a_codes,
        w=w_codes,
        a_bits=bits,
        w_bits=w.format.element.bits,
        a_zero=a_zero,
        w_zero=w_zero,
        init=np.stack(init),
        zero_point=zero_point,
        pass_k=pass_k,
        mac=mac,
        acc=acc,
        srs=replace(srs, shift=shift),
        out=narrowed.out,
        shift_reason=reason,
        overflow_count=sum(measured(report.overflow_count) for report in reports),
        safe_acc_bits=max(measured(report.safe_acc_bits) for report in reports),
        out_of_range_count=narrowed.out_of_range_count,
        requantizer=requantizer,
    )


def _zeros_of(tensor: QuantizedTensor, start: int) -> NDArray[np.int64]:
    """Zero points of all rows from `start` of K on, (rows,); 0 where the format has none."""
    zeros = zero_points_at(tensor, start)
    return np.zeros(len(tensor.codes), np.int64) if zeros is None else zeros.astype(np.int64)


def _common_group(x: QuantizedTensor, w: QuantizedTensor, k: int) -> int:
    """Products over which both scales are constant, at most `k`."""
    sizes = {t.format.group_size or t.shape[1] for t in (x, w)}
    if len(sizes) > 1 and min(sizes) < k:
        raise InputError(
            f"activations are stored as {x.format} and weights as {w.format}: vectors need equal "
            "groups along K, so that every pass has the same length"
        )
    return min(*sizes, k)


def _shift_of(acc: NDArray[np.integer], srs: SrsSetting) -> tuple[int, str]:
    """The shift of the vectors and why that one."""
    if srs.shift is not None:
        return checked_int("shift", srs.shift, *SHIFT_RANGE), "given"
    # Sums of products stay far below 2**59, so the last shift of the hardware always fits.
    last = SHIFT_RANGE[1]
    shift = next(
        s for s in range(last + 1) if s == last or _narrowed(acc, s, srs).out_of_range_count == 0
    )
    reason = (
        f"smallest from 0 at which no output of this tile leaves {srs.out_bits} bits; "
        f"the largest accumulator magnitude is {max(int(acc.max()), -int(acc.min()))}"
    )
    return shift, reason


def _narrowed(acc: NDArray[np.integer], shift: int, srs: SrsSetting) -> SrsReport:
    return srs_report(
        acc, shift, out_bits=srs.out_bits, rounding=srs.rounding, saturation=srs.saturation
    )


def filling_requantizer(
    preset: ArrayPreset, acc: NDArray[np.integer], out_bits: int
) -> Requantizer | None:
    """The preset's requantizer for accumulators (..., N); None where that is SRS.

    Raises
    ------
    InputError
        If the requantizer has no output of `out_bits`.
    """
    if preset.requantize == "srs":
        return None
    columns = np.abs(acc.astype(np.float64)).reshape(-1, acc.shape[-1])
    largest = np.maximum(columns.max(axis=0, initial=0), 1)
    # OpenVINO's is known for unsigned outputs, which negative sums do not fill.
    signed = preset.runtime != "openvino"
    scale = output_limits(out_bits, signed=signed)[1] / largest
    if preset.runtime is not None:
        return runtime_requantizer(
            preset.runtime,
            a_scale=1.0,
            w_scale=scale.astype(np.float32),
            out_scale=1.0,
            out_bits=out_bits,
            signed=signed,
        )
    if preset.requantize in FIXED_POINT_RULES:
        multiplier, exponent = quantize_multiplier(scale)
        shift = 31 - exponent.astype(np.int64)
        return FixedPoint(
            by=preset.requantize, multiplier=multiplier, shift=shift, out_bits=out_bits
        )
    if preset.requantize == "nvdla":
        return _nvdla(preset, scale, out_bits)
    if preset.requantize == "xmos":
        return _xmos(preset, largest, out_bits)
    return FloatSteps(steps=(("multiply", scale),), out_bits=out_bits)


def _nvdla(preset: ArrayPreset, scale: NDArray[np.float64], out_bits: int) -> NvdlaStages:
    # A factor of 15 bits in each channel; scales are at least 2**-34, so shifts stay below 50.
    shift = np.minimum(_FACTOR_BITS - np.frexp(scale)[1].astype(np.int64), 62)
    shift = np.maximum(shift, 0)
    factor = np.minimum(np.rint(np.ldexp(scale, shift)), _FACTOR).astype(np.int64)
    bits = getattr(preset.array, "acc_bits", 34)
    return NvdlaStages(multiplier=factor, shift=shift, accumulator_bits=bits, out_bits=out_bits)


def _xmos(preset: ArrayPreset, largest: NDArray[np.float64], out_bits: int) -> XmosTransform:
    if out_bits != 8:
        raise InputError(
            f"array {preset.name} gives outputs of 8 bits, got out_bits={out_bits}; leave it at 8"
        )
    # The largest accumulator moves to 15 bits; its output code is then in the upper byte.
    shift = np.frexp(largest)[1].astype(np.int64) - _FACTOR_BITS
    wanted = output_limits(8)[1] * 2.0 ** (8 + 14)
    factor = np.rint(wanted / np.ldexp(largest, -shift)).astype(np.int64)
    return XmosTransform(initial_shift=shift, multiplier=factor)


def _outputs_at_an_end(out: NDArray[np.integer], requantizer: Requantizer) -> int:
    """Outputs at the lowest or highest code: what a clamp may have made."""
    lo, hi = output_limits(requantizer.out_bits, signed=requantizer.signed)
    return int(((out == lo) | (out == hi)).sum())
