"""A quantized tensor: codes and scales in memory, and the bytes they are stored as.

Elements that share one scale form a group along the last axis (`as_rows` says which). Codes of 2 to
8 bits are packed tightly, little-endian bits, and every row starts on a byte; scales follow in
their own format, rounded to it before any code is computed.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError
from loraq_sim.formats import Format, ScaleFormat, parse_format

__all__ = [
    *("QuantizedTensor", "all_finite", "as_rows", "float_dtype"),
    *("GroupEnds", "ends_of_groups", "group_ends", "padded_groups"),
    *("round_scales", "scale_of_tensor", "scale_unit", "scales_from_bytes", "scales_to_bytes"),
    *("clip_ratios", "pack_rows", "spread", "stored_scales", "unit_of_tensor", "unpack_rows"),
]


def pack_rows(codes: np.ndarray, bits: int) -> bytes:
    """Bytes of integer `codes`, `bits` bits each (2 to 8, or 16), along the last axis."""
    if bits == 16:
        return np.ascontiguousarray(codes, dtype="<i2").tobytes()
    rows = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, codes.shape[-1])
    if bits == 8:
        return rows.tobytes()
    # Bit j of a code goes to stream position bits * index + j; two's complement keeps low bits.
    planes = (rows[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = planes.reshape(rows.shape[0], rows.shape[1] * bits)
    return np.packbits(stream, axis=1, bitorder="little").tobytes()


def unpack_rows(
    data: bytes, start: int, shape: tuple[int, ...], bits: int, is_signed: bool
) -> tuple[np.ndarray, int]:
    """Codes of `shape` packed at `start`, and where they end.

    int8 if signed, else uint8; 16 bits are int16.
    """
    k = shape[-1]
    n_rows = int(np.prod(shape[:-1], dtype=np.int64))
    if bits == 16:
        words = np.frombuffer(data, dtype="<i2", count=n_rows * k, offset=start)
        return words.astype(np.int16).reshape(shape), start + words.nbytes
    row_bytes = -(-k * bits // 8)
    stop = start + n_rows * row_bytes
    raw = np.frombuffer(data, dtype=np.uint8, count=stop - start, offset=start)
    raw = raw.reshape(n_rows, row_bytes)
    stream = np.unpackbits(raw, axis=1, count=k * bits, bitorder="little")
    planes = stream.reshape(n_rows, k, bits) << np.arange(bits, dtype=np.uint8)
    codes = planes.sum(axis=2, dtype=np.uint8)
    if is_signed:
        # Shift the sign bit to bit 7 and back, so that it fills the byte.
        spare = np.int8(8 - bits)
        codes = (codes << np.uint8(8 - bits)).view(np.int8) >> spare
    return codes.reshape(shape), stop


# Optimal clipping of a 2-bit group lies near 0.4 amax, of a 4-bit one near 0.8; wider grids clip
# less. A step of 2.5 % costs less than 0.1 % of the error against a continuous search.
_RATIOS = {2: np.linspace(1.0, 0.25, 31), 3: np.linspace(1.0, 0.4, 25)}
_RATIOS_DEFAULT = np.linspace(1.0, 0.6, 17)
_RATIOS_WIDE = np.linspace(1.0, 0.8, 9)


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


def unit_of_tensor(reach: float, fmt: Format) -> np.float32 | None:
    """What an e4m3 scale of 1 is worth, where `reach` is the largest range of the codes 0 to hi."""
    return (
        scale_of_tensor(reach, fmt.element.hi, fmt.scale_format) if fmt.has_tensor_scale else None
    )


def stored_scales(scales: np.ndarray, fmt: Format, unit: np.float32 | None) -> np.ndarray:
    """Positive `scales` as the format holds them, float32.

    Those of 16-bit integers are rounded up: to nearest, a step of fp16 would clip more codes at the
    ends than the grid is fine.
    """
    scale = fmt.scale_format
    exact = scales if unit is None else scales / unit
    stored = round_scales(exact, scale)
    if fmt.element.bits == 16 and scale.name in ("fp16", "bf16", "e4m3"):
        above = np.nextafter(stored.astype(_dtype(scale)), _dtype(scale).type(scale.largest))
        stored = np.where(stored < exact, above.astype(np.float32), stored)
    return stored if unit is None else stored * unit


def clip_ratios(bits: int) -> np.ndarray:
    """Factors of a scale that a search for the least squared error tries, float32."""
    grid = _RATIOS.get(bits, _RATIOS_WIDE if bits >= 6 else _RATIOS_DEFAULT)
    return grid.astype(np.float32)


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


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class QuantizedTensor:
    """Codes, scales and format of one tensor quantized along its last axis.

    ``codes`` is int8 (integers), int16 (``int16``), uint8 (``uintN``) or the float dtype of the
    element, in the shape of the original. ``scales`` is float32, of shape
    ``format.scale_shape(codes.shape)``, and is what one step (of a float element: 1.0) is worth,
    negative where the rule says so; None for plain floats. ``zero_points`` has the same shape and
    the dtype of the codes for ``uintN`` and for a zero fixed by the format, else None.
    Value = (code - zero point) * scale.

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
        if self.scales is None or self.format.scale_format.name != "e8m0" or self.scales.all():
            return
        smallest = np.float32(2.0**-127) * self._scale_unit()
        filled = np.where(self.scales == 0, smallest, self.scales).astype(np.float32)
        object.__setattr__(self, "scales", filled)

    def __repr__(self) -> str:
        shape = " x ".join(map(str, self.codes.shape))
        return f"QuantizedTensor({str(self.format)!r}, {shape}, {self.nbytes:,} bytes)"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original tensor."""
        return self.codes.shape

    @property
    def group_scales(self) -> np.ndarray:
        """`scales` of a tensor that has them; TypeError for plain floats."""
        if self.scales is None:
            raise TypeError(f"{self.format} is stored without scales")
        return self.scales

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
        scale = self.format.scale_format
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
        return int((stored >= self.format.scale_format.largest).sum())

    def dequantize(self) -> np.ndarray:
        """Values as float32; each is the float32 product of (code - zero point) and scale."""
        if self.scales is None:
            return self.codes.astype(np.float32)
        levels = self.codes.astype(np.float32)
        if self.zero_points is not None:
            levels -= spread(self.zero_points, self.format, self.shape).astype(np.float32)
        # A scale that overflowed is infinite: 0 times infinity is NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            levels *= spread(self.scales, self.format, self.shape)
        return levels

    def pack(self) -> bytes:
        """Stored bytes: packed codes row by row, scales, the tensor's scale, zero points."""
        if self.scales is None:
            return np.ascontiguousarray(self.codes).tobytes()
        bits = self.format.element.bits
        stored = self.scales / self._scale_unit()
        parts = [pack_rows(self.codes, bits), scales_to_bytes(stored, self.format.scale_format)]
        if self.tensor_scale is not None:
            parts.append(np.float32(self.tensor_scale).tobytes())
        if self.zero_points is not None and self.format.stores_zero_points:
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
        if fmt.stores_zero_points:
            zero_points, _ = unpack_rows(data, end, scale_shape, element.bits, False)
        elif fmt.zero is not None:
            zero_points = np.full(scale_shape, fmt.zero, dtype=codes.dtype)
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

    @property
    def T(self) -> "QuantizedTensor":  # noqa: N802
        """The transposed matrix, which has the same blocks.

        Raises
        ------
        ValueError
            If its scales belong to rows, so that the transposed matrix has another format.
        """
        if self.format.granularity not in ("block", "tensor", "none"):
            raise ValueError(f"the scales of {self.format} run along one axis; use int8/b64")
        scales, zeros = self.scales, self.zero_points
        return replace(
            self,
            codes=np.ascontiguousarray(self.codes.T),
            scales=None if scales is None else np.ascontiguousarray(scales.T),
            zero_points=None if zeros is None else np.ascontiguousarray(zeros.T),
        )

    def rows(self, picked: NDArray[np.integer]) -> "QuantizedTensor":
        """Some rows of a matrix, with the scales they are stored under."""
        one = self.by_rows()

        def of_rows(stored: np.ndarray | None) -> np.ndarray | None:
            return stored if stored is None or len(stored) < len(one.codes) else stored[picked]

        return replace(
            one,
            codes=one.codes[picked],
            scales=of_rows(one.scales),
            zero_points=of_rows(one.zero_points),
        )

    def by_rows(self) -> "QuantizedTensor":
        """The same values with scales (and zero points) for each row: ``bN`` read as ``gN``."""
        if self.format.granularity != "block":
            return self

        def of_each_row(per_block: np.ndarray | None) -> np.ndarray | None:
            if per_block is None:
                return None
            rows = self.codes.shape[-2]
            return np.repeat(per_block, self.format.group_width(rows), axis=-2)[..., :rows, :]

        return replace(
            self,
            format=replace(self.format, granularity="group"),
            scales=of_each_row(self.scales),
            zero_points=of_each_row(self.zero_points),
        )


def spread(per_group: np.ndarray, fmt: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Values per group, in the shape of scales, as values per element that broadcast to `shape`."""
    if fmt.group_size is None:
        return per_group
    # A group may be far longer than the row; nothing longer than the row is built.
    k = shape[-1]
    values = np.repeat(per_group, fmt.group_width(k), axis=-1)[..., :k]
    if fmt.granularity == "block" and len(shape) > 1:
        values = np.repeat(values, fmt.group_width(shape[-2]), axis=-2)[..., : shape[-2], :]
    return values


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


def as_rows(values: np.ndarray, fmt: Format) -> tuple[np.ndarray, int]:
    """`values` as (rows, K) with one scale per `group` consecutive elements of a row.

    Blocks do not lie in one piece: `loraq_sim.quantizers.quantize` takes them out first.
    """
    if fmt.granularity == "block":
        raise TypeError(f"the scales of {fmt} do not run along rows")
    if fmt.granularity == "tensor":
        return values.reshape(1, -1), values.size
    k = values.shape[-1]
    return values.reshape(-1, k), fmt.group_width(k)


def padded_groups(rows: np.ndarray, group: int) -> np.ndarray:
    """`rows` as (rows, groups, group); a short last group is filled with zeros.

    Zero lies in the range of every group and is exactly a code, so it changes neither the range
    nor the error.
    """
    pad = -rows.shape[1] % group
    return np.pad(rows, ((0, 0), (0, pad))).reshape(rows.shape[0], -1, group)


class GroupEnds(NamedTuple):
    """The smallest and the largest element of each group, zero included, (rows, groups) float32."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]

    @property
    def are_finite(self) -> bool:
        """Whether all values of all groups are: one that is not is an end of its group."""
        return bool(np.isfinite(self.low).all() and np.isfinite(self.high).all())

    @property
    def extremes(self) -> NDArray[np.float32]:
        """The signed element of largest magnitude of each group."""
        return np.where(self.high >= -self.low, self.high, self.low)

    @property
    def amax(self) -> NDArray[np.float32]:
        """The largest magnitude of each group."""
        return np.maximum(self.high, np.abs(self.low))


def group_ends(rows: np.ndarray, group: int) -> GroupEnds:
    """The ends of each group of `group` elements of float32 `rows`.

    Infinities and NaN count as beyond all others of their sign.
    """
    from loraq_sim.kernels.float_passes import group_ranges

    shape = len(rows), -(-rows.shape[1] // group)
    ends = GroupEnds(np.empty(shape, np.float32), np.empty(shape, np.float32))
    values = np.ascontiguousarray(rows, np.float32)
    group_ranges(values.view(np.int32), group, *(end.view(np.int32) for end in ends))
    return ends


def ends_of_groups(values: np.ndarray, fmt: Format) -> GroupEnds | None:
    """The ends of the scale groups of `values`; None where no scale runs along rows."""
    if fmt.element.is_plain_float or fmt.granularity == "block":
        return None
    return group_ends(*as_rows(values, fmt))


def all_finite(values: NDArray[np.float32]) -> bool:
    """Whether no value is infinite or NaN, without an array of answers."""
    from loraq_sim.kernels.float_passes import largest_bits

    return bool(largest_bits(np.ascontiguousarray(values).reshape(-1).view(np.int32)) < _INFINITY)


_INFINITY = int(np.float32(np.inf).view(np.int32))
