"""Quantize what enters a GEMM with one of the ten rounding modes of shift-round-saturate hardware.

The scale is that of `loraq_sim.quantizers.quantize`; the code is x / scale, rounded as the mode
says. Rounding to nearest even is what `quantize` does by itself.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.rounding import Rounding, parse_rounding

__all__ = ["quantize_rounded", "round_values"]


def quantize_rounded(
    x: NDArray[np.float32], fmt: "str | Format", rounding: str = "conv_even"
) -> QuantizedTensor:
    """Quantize rows with absmax scales; integer codes are rounded in the mode.

    Parameters
    ----------
    x : ndarray of shape (M, K), floating
    fmt : str or Format
        Float elements are rounded to nearest even whatever the mode.
    rounding : str
        One of `loraq_sim.rounding.Rounding`.
    """
    mode, fmt = parse_rounding(rounding), parse_format(fmt)
    stored = quantize(x, fmt)
    if mode is Rounding.CONV_EVEN or not fmt.element.is_integer or fmt.element.has_zero_point:
        return stored
    k = x.shape[-1]
    width = min(fmt.group_size, k) if fmt.granularity == "group" else k
    per_element = np.repeat(stored.scales, width, axis=-1)[..., :k]
    # The quotient is rounded to float32 first, as `quantize` does; a zero scale marks zeros.
    steps = np.asarray(x, np.float32) / np.where(per_element == 0, np.float32(1), per_element)
    codes = np.clip(round_values(steps, mode), fmt.element.lo, fmt.element.hi)
    return QuantizedTensor(
        codes=codes.astype(np.int8),
        scales=stored.scales,
        format=fmt,
        tensor_scale=stored.tensor_scale,
    )


def round_values(values: NDArray[np.floating], mode: "str | Rounding") -> NDArray[np.float64]:
    """Whole numbers of float values of magnitude below 2**30, rounded in one of the ten modes."""
    # Half a step is added in float64, where the sum of a float32 and 0.5 is exact.
    x = np.asarray(values, np.float64)
    size, sign = np.abs(x), np.sign(x)
    down = np.floor(x)
    tie_to_odd = np.where(down % 2 == 1, down, down + 1)
    modes = {
        Rounding.FLOOR: lambda: down,
        Rounding.CEIL: lambda: np.ceil(x),
        Rounding.SYMMETRIC_FLOOR: lambda: np.trunc(x),
        Rounding.SYMMETRIC_CEIL: lambda: sign * np.ceil(size),
        Rounding.NEGATIVE_INF: lambda: np.ceil(x - 0.5),
        Rounding.POSITIVE_INF: lambda: np.floor(x + 0.5),
        Rounding.SYMMETRIC_ZERO: lambda: sign * np.ceil(size - 0.5),
        Rounding.SYMMETRIC_INF: lambda: sign * np.floor(size + 0.5),
        Rounding.CONV_EVEN: lambda: np.rint(x),
        Rounding.CONV_ODD: lambda: np.where(x - down == 0.5, tie_to_odd, np.rint(x)),
    }
    return modes[parse_rounding(mode)]()
