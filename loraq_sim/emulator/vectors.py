"""Test vectors of a tile of a GEMM: operand codes, accumulators and SRS outputs, bit exact.

A tile takes the first M rows, N columns and K products. Group scales cut K into passes: the MAC
array runs each stretch of constant scales from zero, so there are accumulators and outputs of every
pass. (The data path multiplies each pass by its scales and adds them up; that is not part of the
vectors.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.output_integer import checked_int
from loraq_sim.emulator.requantize import SHIFT_RANGE, srs_report
from loraq_sim.errors import InputError
from loraq_sim.quantizers import QuantizedTensor

__all__ = ["GemmVectors", "SrsSetting", "make_vectors"]


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
    a, w : ndarray of shape (M, K) and (N, K), int8
        Codes, two's complement in `a_bits` and `w_bits`.
    pass_k : int
        Products of a pass; the last pass may be short.
    acc : ndarray of shape (passes, M, N), int32 or int64
        Accumulators of `mac`, started from zero in every pass.
    out : ndarray of shape (passes, M, N), signed
        SRS outputs of `srs`, whose shift is set.
    shift_reason : str
        Why that shift.
    overflow_count, safe_acc_bits : int
        Accumulator overflows, and the narrowest width without any, over all passes.
    out_of_range_count : int
        Outputs that SRS clamped or cut.
    """

    a: NDArray[np.int8]
    w: NDArray[np.int8]
    a_bits: int
    w_bits: int
    pass_k: int
    mac: MacArray
    acc: NDArray[np.int32] | NDArray[np.int64]
    srs: SrsSetting
    out: NDArray[np.integer]
    shift_reason: str
    overflow_count: int
    safe_acc_bits: int
    out_of_range_count: int


def make_vectors(
    x: QuantizedTensor,
    w: QuantizedTensor,
    tile: tuple[int, int, int],
    mac: MacArray,
    srs: SrsSetting,
) -> GemmVectors:
    """Emulate a tile of ``x @ w.T`` and keep everything a testbench compares.

    Parameters
    ----------
    x, w : QuantizedTensor of shape (rows, K) and (columns, K)
        Signed integer elements, equal groups along K.
    tile : (int, int, int)
        M, K and N, each from 1 to the size of the GEMM.
    mac : MacArray
    srs : SrsSetting
        Without a shift, the smallest from 0 on at which no output of the tile is out of range.

    Raises
    ------
    InputError
        If an operand has no signed integer codes, groups differ, or the tile does not fit.
    """
    for name, operand in (("activations", x), ("weights", w)):
        element = operand.format.element
        if not (element.is_integer and element.is_signed):
            raise InputError(
                f"the {name} of this GEMM are stored as {operand.format}, which has no signed "
                "integer codes; choose integer formats (a branch such as W8A8, P as 'branch')"
            )
    sizes = (x.shape[0], x.shape[1], w.shape[0])
    m, k, n = (
        checked_int(f"tile {name}", size, 1, limit)
        for name, size, limit in zip("MKN", tile, sizes, strict=True)
    )
    pass_k = _common_group(x, w, k)
    a_codes, w_codes = (np.ascontiguousarray(t.codes[:rows, :k]) for t, rows in ((x, m), (w, n)))
    bits = x.format.element.bits
    reports = [
        emulate_gemm_report(
            a_codes[:, s : s + pass_k], w_codes[:, s : s + pass_k], mac, a_bits=bits
        )
        for s in range(0, k, pass_k)
    ]
    acc = np.stack([report.acc for report in reports])
    setting, reason = _with_shift(acc, srs)
    options = {"rounding": setting.rounding, "saturation": setting.saturation}
    narrowed = srs_report(acc, setting.shift, out_bits=setting.out_bits, **options)
    return GemmVectors(
        a=a_codes,
        w=w_codes,
        a_bits=bits,
        w_bits=w.format.element.bits,
        pass_k=pass_k,
        mac=mac,
        acc=acc,
        srs=setting,
        out=narrowed.out,
        shift_reason=reason,
        overflow_count=sum(report.overflow_count for report in reports),
        safe_acc_bits=max(report.safe_acc_bits for report in reports),
        out_of_range_count=narrowed.out_of_range_count,
    )


def _common_group(x: QuantizedTensor, w: QuantizedTensor, k: int) -> int:
    """Products over which both scales are constant, at most `k`."""
    sizes = {t.format.group_size if t.format.granularity == "group" else t.shape[1] for t in (x, w)}
    if len(sizes) > 1 and min(sizes) < k:
        raise InputError(
            f"activations are stored as {x.format} and weights as {w.format}: vectors need equal "
            "groups along K, so that every pass has the same length"
        )
    return min(*sizes, k)


def _with_shift(acc: NDArray[np.integer], srs: SrsSetting) -> tuple[SrsSetting, str]:
    options = {
        "out_bits": srs.out_bits,
        "rounding": srs.rounding,
        "saturation": srs.saturation,
    }
    if srs.shift is not None:
        return SrsSetting(shift=checked_int("shift", srs.shift, *SHIFT_RANGE), **options), "given"
    # Sums of 8-bit products stay far below 2**59, so the last shift of the hardware always fits.
    shift = next(
        s
        for s in range(SHIFT_RANGE[1] + 1)
        if s == SHIFT_RANGE[1] or srs_report(acc, s, **options).out_of_range_count == 0
    )
    reason = (
        f"smallest from 0 at which no output of this tile leaves {srs.out_bits} bits; "
        f"the largest accumulator magnitude is {max(int(acc.max()), -int(acc.min()))}"
    )
    return SrsSetting(shift=shift, **options), reason
