"""One door to every quantizer: check the input, choose by format."""

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.layers import as_array, is_floating
from loraq_sim.quantizers.integer import INTEGER_RULES, quantize_integer
from loraq_sim.quantizers.microscaling import BLOCK_RULES, default_block_rule, quantize_block
from loraq_sim.quantizers.tensor import QuantizedTensor, float_dtype

__all__ = ["SCALE_RULES", "quantize"]

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
