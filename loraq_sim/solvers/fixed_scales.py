"""Codes on a grid that is already there: rounding that moves no scale."""

import dataclasses

import numpy as np

from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.quantizers.tensor import float_dtype

__all__ = ["requantize", "stack_rows"]


def requantize(values: np.ndarray, like: QuantizedTensor) -> QuantizedTensor:
    """`values` rounded to nearest with the scales and zero points of `like`, of the same shape.

    Values that are stored on this grid already keep their codes.
    """
    fmt = like.format
    if like.scales is None:
        return quantize(values, fmt)
    steps = _along_last_axis(like.scales, like)
    # Zero, and the smallest power that a format without zero has, mark a group of zeros.
    is_empty = np.abs(steps) < np.finfo(np.float32).tiny
    scaled = values / np.where(is_empty, np.float32(1), steps)
    if fmt.element.is_integer:
        codes = np.rint(scaled)
        if like.zero_points is not None:
            codes += _along_last_axis(like.zero_points, like)
        codes = np.clip(codes, fmt.element.lo, fmt.element.hi)
    else:
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(float_dtype(fmt)).max)
        codes = np.clip(scaled, -largest, largest)
    return dataclasses.replace(like, codes=codes.astype(like.codes.dtype))


def stack_rows(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of the rows of `parts`, whose scales must not span rows."""
    if len(parts) == 1:
        return parts[0]
    fields = {
        name: None
        if getattr(parts[0], name) is None
        else np.concatenate([getattr(part, name) for part in parts])
        for name in ("codes", "scales", "zero_points")
    }
    return dataclasses.replace(parts[0], **fields)


def _along_last_axis(per_group: np.ndarray, like: QuantizedTensor) -> np.ndarray:
    if like.format.granularity != "group":
        return per_group
    return np.repeat(per_group, like.format.group_size, axis=-1)[..., : like.shape[-1]]
