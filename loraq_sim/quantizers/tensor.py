"""A quantized tensor: integer codes with their scales, or the elements of a plain float format."""

from dataclasses import dataclass

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers.bit_packing import pack_rows, unpack_rows
from loraq_sim.quantizers.scale_storage import scales_from_bytes, scales_to_bytes

__all__ = ["QuantizedTensor", "float_dtype", "scale_unit"]


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """Codes, scales and format of one tensor quantized along its last axis.

    ``codes`` is int8 (integers), uint8 (``uintN``) or the float dtype of the element, in the shape
    of the original. ``scales`` is float32, of shape ``format.scale_shape(codes.shape)``, and is
    what one step (of a float element: 1.0) is worth; None for plain floats. ``zero_points`` is
    uint8 of the same shape for ``uintN``, else None. Value = (code - zero point) * scale.

    Scales are exactly the stored values, with two exceptions: those of fixed-point block elements
    are the stored power of two times 2**-fraction_bits, and e4m3 ones (``nvfp4``, integers with
    such scales) the float32 product of the stored scale and ``tensor_scale``. A group of zeros has
    the scale 0, or 2**-127 where scales are e8m0, which has no zero.
    """

    codes: np.ndarray
    scales: np.ndarray | None
    format: Format
    zero_points: np.ndarray | None = None
    tensor_scale: np.float32 | None = None

    def __post_init__(self) -> None:
        if self.scales is None or self.format.scale.name != "e8m0" or self.scales.all():
            return
        smallest = np.float32(2.0**-127) * self._scale_unit()
        filled = np.where(self.scales == 0, smallest, self.scales).astype(np.float32)
        object.__setattr__(self, "scales", filled)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of `pack()`: codes, scales, zero points and padding."""
        return self.format.storage_bytes(self.codes.shape)

    @property
    def n_saturated_scales(self) -> int:
        """Scales at an end of their format: what they scale is clipped, or lost in rounding.

        Under the scale of a tensor, its largest group has the largest stored scale by construction.
        """
        if self.scales is None:
            return 0
        stored = np.abs(self.scales / self._scale_unit())
        scale = self.format.scale
        clipped = (stored >= scale.largest) & (self.tensor_scale is None)
        return int((clipped | (stored == scale.smallest)).sum())

    @property
    def n_clipped(self) -> int:
        """Scales, or 16-bit float values, at the largest of their format: they were clamped."""
        if self.scales is None:
            if self.format.element.bits > 16:
                return 0
            import ml_dtypes

            largest = ml_dtypes.finfo(self.codes.dtype).max
            return int((np.abs(self.codes) >= largest).sum())
        if self.format.has_tensor_scale:
            # The largest block has the largest scale by construction.
            return 0
        stored = np.abs(self.scales / self._scale_unit())
        return int((stored >= self.format.scale.largest).sum())

    def dequantize(self) -> np.ndarray:
        """Values as float32; each is the float32 product of (code - zero point) and scale."""
        if self.scales is None:
            return self.codes.astype(np.float32)
        levels = self.codes.astype(np.float32)
        if self.zero_points is not None:
            levels -= self._along_last_axis(self.zero_points).astype(np.float32)
        # A scale that overflowed is infinite: 0 times infinity is NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            levels *= self._along_last_axis(self.scales)
        return levels

    def pack(self) -> bytes:
        """Stored bytes: packed codes row by row, scales, the tensor's scale, zero points."""
        if self.scales is None:
            return np.ascontiguousarray(self.codes).tobytes()
        bits = self.format.element.bits
        stored = self.scales / self._scale_unit()
        parts = [pack_rows(self.codes, bits), scales_to_bytes(stored, self.format.scale)]
        if self.tensor_scale is not None:
            parts.append(np.float32(self.tensor_scale).tobytes())
        if self.zero_points is not None:
            parts.append(pack_rows(self.zero_points, bits))
        return b"".join(parts)

    @classmethod
    def unpack(cls, data: bytes, fmt: "str | Format", shape: tuple[int, ...]) -> "QuantizedTensor":
        """The tensor whose `pack()` gave `data`.

        Raises
        ------
        InputError
            If the length of `data` is not what `fmt` and `shape` need.
        """
        fmt = parse_format(fmt)
        needed = fmt.storage_bytes(shape)
        if len(data) != needed:
            raise InputError(
                f"{fmt} tensor of shape {tuple(shape)} takes {needed} bytes, got {len(data)}"
            )
        if fmt.scale is None:
            codes = np.frombuffer(data, dtype=float_dtype(fmt)).reshape(shape).copy()
            return cls(codes=codes, scales=None, format=fmt)
        element, scale_shape = fmt.element, fmt.scale_shape(shape)
        is_signed = element.is_integer and element.is_signed
        codes, used = unpack_rows(data, 0, shape, element.bits, is_signed)
        if element.minifloat is not None:
            codes = codes.view(float_dtype(fmt))
        end = used + int(np.prod(scale_shape)) * fmt.scale.nbytes
        stored = scales_from_bytes(data[used:end], fmt.scale, scale_shape)
        zero_points = tensor_scale = None
        if fmt.has_tensor_scale:
            tensor_scale = np.frombuffer(data, dtype="<f4", count=1, offset=end)[0]
            end += tensor_scale.nbytes
        if element.has_zero_point:
            zero_points, _ = unpack_rows(data, end, scale_shape, element.bits, False)
        unit = scale_unit(fmt, tensor_scale)
        return cls(
            codes=codes,
            scales=stored * unit,
            format=fmt,
            zero_points=zero_points,
            tensor_scale=tensor_scale,
        )

    def _scale_unit(self) -> np.float32:
        return scale_unit(self.format, self.tensor_scale)

    def _along_last_axis(self, per_group: np.ndarray) -> np.ndarray:
        if self.format.granularity != "group":
            return per_group
        k = self.codes.shape[-1]
        # A group may be far longer than the row; nothing longer than the row is built.
        return np.repeat(per_group, min(self.format.group_size, k), axis=-1)[..., :k]


def scale_unit(fmt: Format, tensor_scale: np.float32 | None = None) -> np.float32:
    """What a stored scale of 1 is worth in steps of the element."""
    if tensor_scale is not None:
        return np.float32(tensor_scale)
    return np.float32(2.0**-fmt.element.fraction_bits)


def float_dtype(fmt: Format) -> np.dtype:
    """NumPy dtype of a plain or small float format."""
    if fmt.element.name == "bf16" or fmt.element.minifloat is not None:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, fmt.element.minifloat or "bfloat16"))
    return np.dtype({"fp16": np.float16, "fp32": np.float32}[fmt.element.name])
