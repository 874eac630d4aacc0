"""Shift-round-saturate as the last step of a tile, where its arithmetic fits 32-bit lanes."""

from functools import lru_cache

from loraq_sim.emulator.output_integer import checked_int, output_dtype, output_limits
from loraq_sim.emulator.requantize import SHIFT_RANGE
from loraq_sim.emulator.tile_plan import Output
from loraq_sim.rounding import Saturation, parse_rounding, parse_saturation

__all__ = ["srs_output"]


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
    from loraq_sim.kernels.tile_output import MAX_SHIFT

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
