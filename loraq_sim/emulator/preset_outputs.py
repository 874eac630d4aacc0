"""The requantizer of an array preset with scales that fit given accumulators, and it as JSON.

Vectors of a preset need numbers in its requantizer where no layer gives any. Each column gets the
scale at which its largest accumulator becomes the largest code, held as that requantizer holds
scales.
"""

from dataclasses import fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.output_range import output_limits
from loraq_sim.emulator.presets import ArrayPreset
from loraq_sim.emulator.requantize import quantize_multiplier
from loraq_sim.emulator.requantizers import (
    FIXED_POINT_RULES,
    FixedPoint,
    FloatSteps,
    NvdlaStages,
    Requantizer,
    XmosTransform,
)
from loraq_sim.emulator.runtimes import runtime_requantizer
from loraq_sim.errors import InputError

__all__ = ["describe_requantizer", "filling_requantizer", "outputs_at_an_end"]

# int16 multipliers: their largest, and the bits it has.
_FACTOR, _FACTOR_BITS = 2**15 - 1, 15


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


def outputs_at_an_end(out: NDArray[np.integer], requantizer: Requantizer) -> int:
    """Outputs at the lowest or highest code: what a clamp may have made."""
    lo, hi = output_limits(requantizer.out_bits, signed=requantizer.signed)
    return int(((out == lo) | (out == hi)).sum())


def describe_requantizer(requantizer: Requantizer) -> dict[str, Any]:
    """Rule and parameters as JSON values; float32 operands exactly, as float64."""
    values: dict[str, Any] = {"rule": requantizer.rule}
    for field in fields(requantizer):
        value = getattr(requantizer, field.name)
        if field.name == "steps":
            value = [[name, np.asarray(operand, np.float64).tolist()] for name, operand in value]
        elif isinstance(value, np.ndarray | np.generic):
            value = value.tolist()
        if field.name != "by":
            values[field.name] = value
    return values
