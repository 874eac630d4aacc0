"""One door to every quantizer: check the input, choose by format.

Quantize what enters a GEMM with one of the ten rounding modes of shift-round-saturate hardware.

The scale is that of `loraq_sim.quantizers.quantize`; the code is x / scale, rounded as the mode
says. Rounding to nearest even is what `quantize` does by itself.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, Rounding, parse_format, parse_rounding
from loraq_sim.layers import as_array, is_floating
from loraq_sim.quantizers.integer import (
    BLOCK_RULES,
    INTEGER_RULES,
    default_block_rule,
    quantize_block,
    quantize_integer,
)
from loraq_sim.quantizers.tensor import QuantizedTensor, float_dtype

__all__ = [
    "SCALE_RULES",
    "quantize",
    "quantize_rounded",
    "round_values",
]


SCALE_RULES = tuple(dict.fromkeys((*INTEGER_RULES, *BLOCK_RULES)))


def quantize(x: np.ndarray, fmt: "str | Format", rule: str | None = None) -> QuantizedTensor:
    """Quantize `x` to `fmt`, groups along the last axis.

    Parameters
    ----------
    x : ndarray or torch tensor of shape (..., K), floating
        Finite values. Not modified; computed in float32.
    fmt : str or Format
        For example ``"int4/g64"`` or ``"mxfp4"``; see `loraq_sim.formats`.
    rule : str, optional
        Scale rule: ``absmax`` (default), ``mse`` or ``signed_mse`` for integers; ``ocp`` (default),
        ``amd``, ``absmax`` or ``mse`` for block formats. Without effect on plain floats, which
        round to nearest, ties to even, and saturate at the largest finite value.

    Raises
    ------
    InputError
        If `x` is not a finite floating array, or the format or rule does not fit.
    """
    fmt = parse_format(fmt)
    if rule is not None and rule not in SCALE_RULES:
        raise InputError(unknown_name("scale rule", rule, SCALE_RULES))
    values = _checked(x)
    if fmt.element.is_plain_float:
        return _cast(values, fmt)
    is_block = fmt.element.block is not None
    rules = BLOCK_RULES if is_block else INTEGER_RULES
    if rule is None:
        rule = default_block_rule(fmt) if is_block else "absmax"
    elif rule not in rules:
        raise InputError(f"{fmt}: the scale rule must be one of {', '.join(rules)}, got {rule!r}")
    return (quantize_block if is_block else quantize_integer)(values, fmt, rule)


def _checked(x: np.ndarray) -> np.ndarray:
    try:
        values = as_array(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"quantize needs an array of floats, got {type(x).__name__}: {error}"
        ) from None
    if values.ndim == 0 or values.size == 0 or not is_floating(values.dtype):
        raise InputError(
            "quantize needs a non-empty floating array of at least one axis, got "
            f"{values.dtype} of shape {values.shape}"
        )
    values = np.ascontiguousarray(values, dtype=np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        where = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise InputError(
            f"cannot quantize {values.size - int(finite.sum())} non-finite values; "
            f"the first is {values[where]} at {where}"
        )
    return values


def _cast(values: np.ndarray, fmt: Format) -> QuantizedTensor:
    dtype = float_dtype(fmt)
    if fmt.element.bits == 16:
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(dtype).max)
        values = np.clip(values, -largest, largest)
    return QuantizedTensor(codes=values.astype(dtype), scales=None, format=fmt)


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
        One of `loraq_sim.formats.Rounding`.
    """
    mode, fmt = parse_rounding(rounding), parse_format(fmt)
    stored = quantize(x, fmt)
    if mode is Rounding.CONV_EVEN or not fmt.element.is_integer or fmt.element.has_zero_point:
        return stored
    k = x.shape[-1]
    per_element = np.repeat(stored.group_scales, fmt.group_width(k), axis=-1)[..., :k]
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


_ROUND: dict[Rounding, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
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
