"""A quantized tensor: integer codes with their scales, or the elements of a plain float format."""

from dataclasses import dataclass

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers.bit_packing import pack_rows, unpack_rows
from loraq_sim.quantizers.scale_storage import scales_from_bytes, scales_to_bytes

__all__ = ["QuantizedTensor", "float_dtype"]


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedTensor:
    """Codes, scales and format of one tensor quantized along its last axis.

    ``codes`` is int8 (``intN``), uint8 (``uintN``) or the float dtype of the element, in the shape
    of the original. ``scales`` is float32 and holds exactly the stored values, of shape
    ``format.scale_shape(codes.shape)``; None for plain floats. ``zero_points`` is uint8 of the same
    shape for ``uintN``, else None. Value = (code - zero point) * scale.
    """

    codes: np.ndarray
    scales: np.ndarray | None
    format: Format
    zero_points: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of `pack()`: codes, scales, zero points and padding."""
        return self.format.storage_bytes(self.codes.shape)

    def dequantize(self) -> np.ndarray:
        """Values as float32; each is the float32 product of (code - zero point) and scale."""
        if self.scales is None:
            return self.codes.astype(np.float32)
        levels = self.codes.astype(np.float32)
        if self.zero_points is not None:
            levels -= self._along_last_axis(self.zero_points).astype(np.float32)
        levels *= self._along_last_axis(self.scales)
        return levels

    def pack(self) -> bytes:
        """Stored bytes: packed codes row by row, then scales, then packed zero points."""
        if self.scales is None:
            return np.ascontiguousarray(self.codes).tobytes()
        bits = self.format.element.bits
        parts = [pack_rows(self.codes, bits), scales_to_bytes(self.scales, self.format.scale)]
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
        codes, used = unpack_rows(data, 0, shape, element.bits, element.is_signed)
        n_scale_bytes = int(np.prod(scale_shape)) * fmt.scale.nbytes
        scales = scales_from_bytes(data[used : used + n_scale_bytes], fmt.scale, scale_shape)
        zero_points = None
        if element.has_zero_point:
            zero_points, _ = unpack_rows(
                data, used + n_scale_bytes, scale_shape, element.bits, False
            )
        return cls(codes=codes, scales=scales, format=fmt, zero_points=zero_points)

    def _along_last_axis(self, per_group: np.ndarray) -> np.ndarray:
        if self.format.granularity != "group":
            return per_group
        k = self.codes.shape[-1]
        return np.repeat(per_group, self.format.group_size, axis=-1)[..., :k]


def float_dtype(fmt: Format) -> np.dtype:
    """NumPy dtype of a plain float format."""
    if fmt.element.name == "bf16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"fp16": np.float16, "fp32": np.float32}[fmt.element.name])
