"""Quantize what enters a GEMM with one of the ten rounding modes of shift-round-saturate hardware.

The scale is that of `loraq_sim.quantizers.quantize`; the code is x / scale, rounded as the mode
says. Rounding to nearest even is what `quantize` does by itself.
"""

from collections.abc import Callable

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
    return _ROUND[parse_rounding(mode)](np.asarray(values, np.float64))


def _away(x: NDArray[np.float64], round_size: Callable) -> NDArray[np.float64]:
    """`round_size` of the magnitudes, with the signs of `x`."""
    return np.copysign(round_size(np.abs(x)), x)


def _ties_to_odd(x: NDArray[np.float64]) -> NDArray[np.float64]:
    down = np.floor(x)
    return np.where(x - down == 0.5, down + (down % 2 == 0), np.rint(x))


_ROUND = {
    Rounding.FLOOR: np.floor,
    Rounding.CEIL: np.ceil,
    Rounding.SYMMETRIC_FLOOR: np.trunc,
    Rounding.SYMMETRIC_CEIL: lambda x: _away(x, np.ceil),
    Rounding.NEGATIVE_INF: lambda x: np.ceil(x - 0.5),
    Rounding.POSITIVE_INF: lambda x: np.floor(x + 0.5),
    Rounding.SYMMETRIC_ZERO: lambda x: _away(x, lambda size: np.ceil(size - 0.5)),
    Rounding.SYMMETRIC_INF: lambda x: _away(x, lambda size: np.floor(size + 0.5)),
    Rounding.CONV_EVEN: np.rint,
    Rounding.CONV_ODD: _ties_to_odd,
}
