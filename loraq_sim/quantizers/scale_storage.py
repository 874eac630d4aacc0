"""How scales are rounded to their stored format, written and read back."""

import numpy as np

from loraq_sim.formats import ScaleFormat

__all__ = ["round_scales", "scale_of_tensor", "scales_from_bytes", "scales_to_bytes"]

# OCP Microscaling Formats v1.0, section 5.4.1: byte b is 2**(b - 127), and 255 is NaN.
_E8M0_BIAS = 127
_E8M0_NAN = 255


def round_scales(scales: np.ndarray, stored: ScaleFormat) -> np.ndarray:
    """Positive `scales` (float32 or float64) rounded to values that `stored` can hold, as float32.

    fp32, fp16, bf16, e4m3: to nearest, ties to even. e8m0: up to the next power of two, so that no
    element is clipped that an exact scale would not have clipped. Scales beyond the format
    saturate at its ends; zero stays zero (an all-zero group).
    """
    bounded = np.clip(scales, 0, stored.largest).astype(np.float32, copy=False)
    if stored.name == "e8m0":
        mantissa, exponent = np.frexp(bounded)
        rounded = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
    else:
        rounded = bounded.astype(_dtype(stored)).astype(np.float32)
    rounded = np.maximum(rounded, np.float32(stored.smallest))
    return np.where(scales == 0, np.float32(0), rounded).astype(np.float32, copy=False)


def scale_of_tensor(amax: float, largest: float, stored: ScaleFormat) -> np.float32:
    """The fp32 scale of a whole tensor under which its largest group has the largest stored scale.

    `amax` is the largest magnitude of the tensor, `largest` that of an element with scale 1.
    """
    reach = stored.largest * largest
    scale = np.float32(amax / reach)
    if float(scale) * reach > float(np.finfo(np.float32).max):
        scale = np.nextafter(scale, np.float32(0))
    # A subnormal float32 scale would lose precision, a zero one everything.
    return np.maximum(scale, np.float32(2.0**-126)) if scale else np.float32(1)


def scales_to_bytes(scales: np.ndarray, stored: ScaleFormat) -> bytes:
    """Little-endian bytes of `scales`, which must be values that `stored` can hold."""
    if stored.name == "e8m0":
        _, exponent = np.frexp(scales)
        # Byte 255 is NaN; there is no zero, and an all-zero group has byte 0, which is 2**-127.
        codes = np.where(scales == 0, 0, exponent - 1 + _E8M0_BIAS)
        codes = np.where(np.isnan(scales), _E8M0_NAN, codes)
        return codes.astype(np.uint8).tobytes()
    return scales.astype(_dtype(stored)).tobytes()


def scales_from_bytes(data: bytes, stored: ScaleFormat, shape: tuple[int, ...]) -> np.ndarray:
    """Scales of `shape` as float32 from what `scales_to_bytes` wrote."""
    if stored.name == "e8m0":
        codes = np.frombuffer(data, dtype=np.uint8).astype(np.int32)
        values = np.ldexp(np.float32(1), np.minimum(codes, _E8M0_NAN - 1) - _E8M0_BIAS)
        return np.where(codes == _E8M0_NAN, np.float32(np.nan), values).reshape(shape)
    return np.frombuffer(data, dtype=_dtype(stored)).astype(np.float32).reshape(shape)


def _dtype(stored: ScaleFormat) -> np.dtype:
    if stored.name in ("bf16", "e4m3"):
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16 if stored.name == "bf16" else ml_dtypes.float8_e4m3fn)
    return np.dtype({"fp32": "<f4", "fp16": "<f2"}[stored.name])
