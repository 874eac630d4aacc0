"""Quantization to block formats: MX (OCP), NVFP4 (NVIDIA) and block floating point (AMD AIE2P).

The shared scale of an MX block is a power of two, X = 2**e. With ``amax`` the largest magnitude of
the block and ``emax`` the exponent of the largest power of two of the element:

- ``ocp``: e = floor(log2 amax) - emax (OCP Microscaling Formats v1.0, section 6.3); what then lies
  beyond the element's largest value saturates;
- ``amd``: the same, plus one where amax >= 1.75 * 2**floor(log2 amax), which avoids most of the
  saturation (the rule of the LoRaQ authors' kernels);
- ``absmax``: the smallest e for which nothing saturates;
- ``mse``: the best of the exponents one below to one above ``ocp``, by squared error.

NVFP4: the tensor's scale is amax(tensor) / (448 * 6), a block's is e4m3(amax / 6 / tensor scale)
(``absmax``; ``mse`` also tries smaller ones). Elements round to nearest, ties to even.
"""

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers.groups import as_rows, group_extremes, padded_groups
from loraq_sim.quantizers.scale_storage import round_scales, scale_of_tensor
from loraq_sim.quantizers.tensor import QuantizedTensor, float_dtype, scale_unit

__all__ = ["BLOCK_RULES", "default_block_rule", "quantize_block"]

BLOCK_RULES = ("ocp", "amd", "absmax", "mse")

_NVFP4_RATIOS = np.linspace(1.0, 0.7, 13, dtype=np.float32)
_AMD_LIMIT = np.float32(1.75)


def default_block_rule(fmt: Format) -> str:
    """``ocp`` for power-of-two scales, ``absmax`` for NVFP4."""
    return "absmax" if fmt.has_tensor_scale else "ocp"


def quantize_block(values: np.ndarray, fmt: Format, rule: str) -> QuantizedTensor:
    """Quantize finite float32 `values` (..., K) to a block format."""
    rows, group = as_rows(values, fmt)
    amax = np.abs(group_extremes(rows, group))
    tensor_scale = None
    if fmt.has_tensor_scale:
        if rule not in ("absmax", "mse"):
            raise InputError(f"{fmt}: the rule {rule!r} is for power-of-two scales; use 'absmax'")
        tensor_scale = scale_of_tensor(float(amax.max()), float(_largest(fmt)), fmt.scale)
        candidates = _e4m3_candidates(amax, fmt, rule, tensor_scale)
    else:
        candidates = _power_candidates(amax, fmt, rule)
    candidates = candidates * scale_unit(fmt, tensor_scale)
    codes, scales = _best(rows, group, candidates.astype(np.float32), fmt)
    return QuantizedTensor(
        codes=codes.reshape(values.shape),
        scales=scales.reshape(fmt.scale_shape(values.shape)),
        format=fmt,
        tensor_scale=tensor_scale,
    )


def _largest(fmt: Format) -> np.float32:
    """Largest magnitude of an element under a stored scale of 1."""
    if fmt.element.is_integer:
        return np.float32(fmt.element.hi * 2.0**-fmt.element.fraction_bits)
    import ml_dtypes

    return np.float32(ml_dtypes.finfo(float_dtype(fmt)).max)


def _power_candidates(amax: np.ndarray, fmt: Format, rule: str) -> np.ndarray:
    """Stored scales 2**e to try, (rows, groups, C); 0 for an all-zero block."""
    # amax = mantissa * 2**exponent with mantissa in [0.5, 1): floor(log2 amax) = exponent - 1.
    mantissa, exponent = np.frexp(amax)
    e = exponent - 1 - fmt.element.emax
    if rule == "amd":
        e = e + (2 * mantissa >= _AMD_LIMIT)
    elif rule == "absmax":
        fits = np.ldexp(amax.astype(np.float64), -e) <= _largest(fmt)
        e = e + ~fits
    steps = np.array([0, -1, 1] if rule == "mse" else [0], dtype=np.int32)
    # From 2**(128 - emax) on, the largest elements would not be finite in float32.
    powers = np.ldexp(1.0, np.minimum(e[..., None] + steps, 127 - fmt.element.emax))
    return round_scales(np.where(amax[..., None] == 0, 0.0, powers), fmt.scale)


def _e4m3_candidates(
    amax: np.ndarray, fmt: Format, rule: str, tensor_scale: np.float32
) -> np.ndarray:
    exact = amax.astype(np.float64) / float(_largest(fmt)) / float(tensor_scale)
    ratios = _NVFP4_RATIOS if rule == "mse" else np.ones(1, dtype=np.float32)
    return round_scales(exact[..., None] * ratios, fmt.scale)


def _best(
    rows: np.ndarray, group: int, candidates: np.ndarray, fmt: Format
) -> tuple[np.ndarray, np.ndarray]:
    """Codes (rows, K) and scales (rows, groups) of least squared error."""
    grouped = padded_groups(rows, group)
    best_error = np.full(candidates.shape[:2], np.inf, dtype=np.float64)
    codes = np.zeros(grouped.shape, dtype=np.float32)
    scales = candidates[:, :, 0].copy()
    for c in range(candidates.shape[2]):
        scale = candidates[:, :, c]
        step = np.where(scale == 0, np.float32(1), scale)[:, :, None]
        rounded = _round(grouped / step, fmt)
        error = np.square(rounded.astype(np.float64) * step - grouped).sum(axis=2)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        codes = np.where(better[:, :, None], rounded, codes)
        scales = np.where(better, scale, scales)
    flat = codes.reshape(rows.shape[0], -1)[:, : rows.shape[1]]
    return flat.astype(np.int8 if fmt.element.is_integer else float_dtype(fmt)), scales


def _round(scaled: np.ndarray, fmt: Format) -> np.ndarray:
    """Nearest element values (codes, for fixed point), ties to even, saturated, as float32."""
    if fmt.element.is_integer:
        return np.clip(np.rint(scaled), fmt.element.lo, fmt.element.hi).astype(np.float32)
    largest = _largest(fmt)
    return np.clip(scaled, -largest, largest).astype(float_dtype(fmt)).astype(np.float32)
