"""Number formats: what one stored tensor costs in bytes, which codes it holds, how values round.

A format string is ``element/granularity[/scale][/zN]``, for example ``int4/g64/fp16``:

- element: ``int2`` .. ``int8`` and ``int16`` (two's complement, symmetric), ``uint2`` .. ``uint8``
  (asymmetric, with a zero point per scale), a block element (below), or a plain float ``fp16``,
  ``bf16``, ``fp32`` (no scale);
- granularity: ``tensor``, ``row`` (per output channel for weights, per token for activations),
  ``gN`` (N consecutive elements along the last axis; the last group may be short) or ``bN`` (blocks
  of N rows x N columns: one scale serves products along either axis; those at the ends may be
  smaller);
- scale: ``fp32``, ``fp16``, ``bf16``, ``e4m3`` or ``e8m0``; by default fp32 for ``tensor`` and for
  ``int16`` (in whose other scales codes are lost), else fp16. ``e4m3`` has four bits of range only,
  so that a tensor with such scales stores one fp32 scale on top, as ``nvfp4`` does;
- ``zN``: the code N stands for zero in the whole tensor, so that no zero points are stored:
  ``uint8/tensor/fp32/z128``, ``int8/tensor/fp32/z-3``, ``uint4/g64/fp16/z0`` (nothing below zero).

Block elements bring their granularity and scale along, so their name is a whole format string:

- ``mxint4``, ``mxint6``, ``mxint8``: fixed point in [-2, 2), ``g32/e8m0``
  (OCP Microscaling Formats v1.0, sections 5.3.4 and 6.3; the 4- and 6-bit ones by analogy);
- ``mxfp4``, ``mxfp6_e2m3``, ``mxfp6_e3m2``, ``mxfp8_e4m3``, ``mxfp8_e5m2``: ``g32/e8m0`` (OCP);
- ``nvfp4``: e2m1, ``g16/e4m3`` and one fp32 scale per tensor (NVIDIA Blackwell);
- ``bfp16ebs8``: 8 values share an 8-bit exponent, 9 bytes, ``g8/e8m0`` (AMD AIE2P).

To add an element, add one line to ``ELEMENTS``; to add a scale format, one line to ``SCALES``.

How a number gets into a format is said by `Rounding` and `Saturation` (shift-round-saturate). Their
names are those of ``aie::rounding_mode``; the increments follow the table of AMD UG1583 and
``aie_api`` (AIE-ML, AIE2P). The two AI Engine generations number the same modes differently, so a
raw code means nothing without its generation: use `rounding_code` and `rounding_from_code`.
"""

import functools
import re
from dataclasses import dataclass
from enum import StrEnum

from loraq_sim.errors import InputError, unknown_name

__all__ = [
    "ELEMENTS",
    "Element",
    "Format",
    "Rounding",
    "SCALES",
    "Saturation",
    "ScaleFormat",
    "parse_format",
    "parse_rounding",
    "parse_saturation",
    "rounding_code",
    "rounding_from_code",
]


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element type.

    ``is_integer``: codes are integers (two's complement if ``is_signed``), each worth one scale
    step. ``minifloat`` names the ml_dtypes type of a small float. Neither: a plain float.
    ``block`` is the (group, scale format) that a block element brings along. ``emax`` is the
    exponent of the largest power of two a block element represents with scale 1;
    ``fraction_bits`` is how far below that a step of a fixed-point block element lies.
    """

    name: str
    bits: int
    is_integer: bool = False
    is_signed: bool = True
    minifloat: str | None = None
    block: tuple[int, str] | None = None
    emax: int = 0
    fraction_bits: int = 0

    @property
    def is_plain_float(self) -> bool:
        """Whether the element is stored without any scale."""
        return not self.is_integer and self.minifloat is None

    @property
    def has_zero_point(self) -> bool:
        """Whether tensors of this element store a zero point per scale."""
        return self.is_integer and not self.is_signed

    @property
    def lo(self) -> int:
        """Smallest code of an integer element; fixed-point block elements stay symmetric."""
        if not self.is_signed:
            return 0
        return -self.hi if self.block is not None else -self.hi - 1

    @property
    def hi(self) -> int:
        """Largest code of an integer element."""
        return (1 << (self.bits - 1)) - 1 if self.is_signed else (1 << self.bits) - 1


@dataclass(frozen=True, kw_only=True)
class ScaleFormat:
    """How one scale is stored: bytes, and its smallest and largest positive value."""

    name: str
    nbytes: int
    smallest: float
    largest: float


def _fixed(name: str, bits: int, group: int) -> Element:
    return Element(
        name=name, bits=bits, is_integer=True, block=(group, "e8m0"), fraction_bits=bits - 2
    )


def _float(name: str, bits: int, minifloat: str, emax: int) -> Element:
    return Element(name=name, bits=bits, minifloat=minifloat, block=(32, "e8m0"), emax=emax)


ELEMENTS = {
    element.name: element
    for element in (
        *(Element(name=f"int{b}", bits=b, is_integer=True) for b in range(2, 9)),
        *(Element(name=f"uint{b}", bits=b, is_integer=True, is_signed=False) for b in range(2, 9)),
        Element(name="int16", bits=16, is_integer=True),
        _fixed("mxint4", 4, 32),
        _fixed("mxint6", 6, 32),
        _fixed("mxint8", 8, 32),
        _fixed("bfp16ebs8", 8, 8),
        _float("mxfp4", 4, "float4_e2m1fn", 2),
        _float("mxfp6_e2m3", 6, "float6_e2m3fn", 2),
        _float("mxfp6_e3m2", 6, "float6_e3m2fn", 4),
        _float("mxfp8_e4m3", 8, "float8_e4m3fn", 8),
        _float("mxfp8_e5m2", 8, "float8_e5m2", 15),
        Element(
            name="nvfp4",
            bits=4,
            minifloat="float4_e2m1fn",
            block=(16, "e4m3"),
            emax=2,
        ),
        Element(name="fp16", bits=16),
        Element(name="bf16", bits=16),
        Element(name="fp32", bits=32),
    )
}

# fp32 scales stop at the smallest normal number: dividing by a subnormal overflows float32.
SCALES = {
    scale.name: scale
    for scale in (
        ScaleFormat(name="fp32", nbytes=4, smallest=2.0**-126, largest=3.4028234663852886e38),
        ScaleFormat(name="fp16", nbytes=2, smallest=2.0**-24, largest=65504.0),
        ScaleFormat(name="bf16", nbytes=2, smallest=2.0**-126, largest=3.3895313892515355e38),
        ScaleFormat(name="e4m3", nbytes=1, smallest=2.0**-9, largest=448.0),
        ScaleFormat(name="e8m0", nbytes=1, smallest=2.0**-126, largest=2.0**127),
    )
}

_TENSOR_SCALE_BYTES = 4
_GROUP = re.compile(r"([gb])([1-9][0-9]*)")
_ZERO = re.compile(r"z-?[0-9]{1,6}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Format:
    """A parsed format string.

    ``granularity`` is ``"tensor"``, ``"row"``, ``"group"``, ``"block"`` or, for plain floats,
    ``"none"``; ``group_size`` is set for ``"group"`` and ``"block"`` only; ``scale`` is None for
    plain floats. ``zero`` is the code that stands for zero in all of a tensor, None where each
    scale has a zero point of its own (``uintN``) or none.
    """

    element: Element
    granularity: str
    group_size: int | None = None
    scale: ScaleFormat | None = None
    zero: int | None = None

    def __repr__(self) -> str:
        return f"Format({str(self)!r})"

    def __str__(self) -> str:
        if self.scale is None:
            return self.element.name
        usual = ("group", *(self.element.block or ()))
        if (self.granularity, self.group_size, self.scale.name) == usual:
            return self.element.name
        where = self.granularity
        if self.group_size is not None:
            where = f"{self.granularity[0]}{self.group_size}"
        fixed = "" if self.zero is None else f"/z{self.zero}"
        return f"{self.element.name}/{where}/{self.scale.name}{fixed}"

    @property
    def has_zero_point(self) -> bool:
        """Whether a code other than 0 may stand for zero, stored or fixed."""
        return self.element.has_zero_point or self.zero is not None

    @property
    def stores_zero_points(self) -> bool:
        """Whether a tensor stores a zero point beside each scale."""
        return self.element.has_zero_point and self.zero is None

    @property
    def letter(self) -> str:
        """What hardware needs to know of codes beyond their width, ``""`` for nothing.

        ``u``: unsigned with zero points; ``uN``, ``zN``: unsigned and signed with the zero point N;
        ``i``: an integer where a width stands for a float.
        """
        if self.element.name == "int16":
            return "i"
        if self.stores_zero_points:
            return "u"
        sign = "z" if self.element.is_signed else "u"
        return "" if self.zero is None else f"{sign}{self.zero}"

    @property
    def scale_format(self) -> ScaleFormat:
        """`scale` of a format that has one; TypeError for plain floats."""
        if self.scale is None:
            raise TypeError(f"{self} is stored without scales")
        return self.scale

    @property
    def has_tensor_scale(self) -> bool:
        """Whether a tensor stores one fp32 scale on top of its e4m3 scales."""
        return self.scale is not None and self.scale.name == "e4m3"

    @property
    def spans_rows(self) -> bool:
        """Whether one scale serves several rows, so that they cannot be quantized apart."""
        return self.granularity in ("tensor", "block") or self.has_tensor_scale

    def group_width(self, k: int) -> int:
        """Elements that share a scale along the last axis of length `k`; never more than `k`."""
        return k if self.group_size is None else min(self.group_size, k)

    def n_groups(self, k: int) -> int:
        """Scales along the last axis of length `k` (the last group may be short)."""
        return 1 if self.group_size is None else -(-k // self.group_size)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale array of a tensor of `shape`; ``(1, ..., 1)`` for ``tensor``."""
        if self.granularity == "tensor":
            return (1,) * len(shape)
        rows = shape[:-1]
        if self.granularity == "block" and rows:
            rows = (*rows[:-1], self.n_groups(rows[-1]))
        return (*rows, self.n_groups(shape[-1]))

    def storage_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes a tensor of `shape` takes when packed.

        Codes are packed tightly along the last axis and every row starts on a byte; scales follow
        at their own width; then the scale of the tensor; then zero points, packed like codes.
        """
        n_rows = _product(shape[:-1])
        code_bytes = n_rows * _packed_row_bytes(shape[-1], self.element.bits)
        if self.scale is None:
            return code_bytes
        scale_shape = self.scale_shape(shape)
        total = code_bytes + _product(scale_shape) * self.scale.nbytes
        if self.has_tensor_scale:
            total += _TENSOR_SCALE_BYTES
        if self.stores_zero_points:
            zero_row_bytes = _packed_row_bytes(scale_shape[-1], self.element.bits)
            total += _product(scale_shape[:-1]) * zero_row_bytes
        return total


def parse_format(text: "str | Format") -> Format:
    """Parse ``element/granularity[/scale][/zN]``; a `Format` is returned as it is.

    Raises
    ------
    InputError
        If the element, granularity or scale is unknown or does not fit together.
    """
    return text if isinstance(text, Format) else _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Format:
    parts = str(text).strip().lower().split("/")
    zero = parts.pop() if len(parts) > 2 and _ZERO.fullmatch(parts[-1]) else None
    element = ELEMENTS.get(parts[0])
    if element is None:
        raise InputError(
            unknown_name("element", parts[0], ELEMENTS) + f" (in format {text!r:.100})"
        )
    if element.is_plain_float:
        if len(parts) > 1 or zero is not None:
            raise InputError(
                f"format {text!r:.100}: {element.name} is stored without scales; "
                f"write {element.name!r}"
            )
        return Format(element=element, granularity="none")
    if element.block is not None:
        if zero is not None:
            raise InputError(
                f"format {text!r:.100}: {element.name} has no zero point; drop {zero!r}"
            )
        return _parse_block(element, element.block, parts, text)
    if len(parts) not in (2, 3):
        raise InputError(
            f"format {text!r:.100} must be element/granularity[/scale]; for example "
            f"{element.name}/g64, {element.name}/row or {element.name}/tensor/fp32, and /zN last "
            "for a zero point that is fixed"
        )
    granularity, group_size = _parse_granularity(parts[1], text)
    is_wide = granularity == "tensor" or element.bits == 16
    name = parts[2] if len(parts) == 3 else ("fp32" if is_wide else "fp16")
    if name not in SCALES:
        raise InputError(unknown_name("scale", name, SCALES) + f" (in format {text!r:.100})")
    return Format(
        element=element,
        granularity=granularity,
        group_size=group_size,
        scale=SCALES[name],
        zero=None if zero is None else _fixed_zero(zero, element, text),
    )


def _fixed_zero(part: str, element: Element, text: str) -> int:
    code = int(part[1:])
    if not element.lo <= code <= element.hi:
        raise InputError(
            f"format {text!r:.100}: zero point {code} is outside the codes of {element.name} "
            f"({element.lo}..{element.hi}); it is the code that stands for 0"
        )
    return code


def _parse_block(element: Element, block: tuple[int, str], parts: list[str], text: str) -> Format:
    """A block element alone, or with another group size; its scale format is part of it."""
    group: int | None
    granularity, (group, scale) = "group", block
    if len(parts) > 1:
        granularity, group = _parse_granularity(parts[1], text)
        if granularity not in ("group", "block") or parts[2:] not in ([], [scale]):
            raise InputError(
                f"format {text!r:.100}: {element.name} has groups with {scale} scales; "
                f"write {element.name!r} or, for other groups, '{element.name}/gN' or '/bN'"
            )
    return Format(element=element, granularity=granularity, group_size=group, scale=SCALES[scale])


def _parse_granularity(part: str, text: str) -> tuple[str, int | None]:
    if part in ("tensor", "row"):
        return part, None
    match = _GROUP.fullmatch(part)
    if match is None or len(part) > 9:
        raise InputError(
            f"format {text!r:.100}: granularity must be tensor, row, gN or bN with N from 1 to "
            f"99999999 (such as g64), got {part!r:.60}"
        )
    return {"g": "group", "b": "block"}[match.group(1)], int(match.group(2))


def _packed_row_bytes(n_codes: int, bits: int) -> int:
    return -(-n_codes * bits // 8)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


class Rounding(StrEnum):
    """How the bits dropped by a right shift decide the last bit kept.

    ``FLOOR`` toward minus infinity; ``CEIL`` toward plus infinity; ``SYMMETRIC_FLOOR`` toward
    zero; ``SYMMETRIC_CEIL`` away from zero. The other six round to nearest and differ on ties:
    ``NEGATIVE_INF`` down, ``POSITIVE_INF`` up, ``SYMMETRIC_ZERO`` toward zero, ``SYMMETRIC_INF``
    away from zero, ``CONV_EVEN`` to even, ``CONV_ODD`` to odd.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    SYMMETRIC_FLOOR = "symmetric_floor"
    SYMMETRIC_CEIL = "symmetric_ceil"
    NEGATIVE_INF = "negative_inf"
    POSITIVE_INF = "positive_inf"
    SYMMETRIC_ZERO = "symmetric_zero"
    SYMMETRIC_INF = "symmetric_inf"
    CONV_EVEN = "conv_even"
    CONV_ODD = "conv_odd"


class Saturation(StrEnum):
    """What happens to a rounded value outside the output range.

    ``NONE`` keeps the low output bits (the hardware's reset default); ``SATURATE`` clamps to the
    output range; ``SYMMETRIC`` clamps to the range without its most negative value.
    """

    NONE = "none"
    SATURATE = "saturate"
    SYMMETRIC = "symmetric"


# CORE_CR rounding field: AIE-ML and AIE2P from llvm-aie aie2p_defines.h and UG1583,
# AIE1 from the AMD Vitis Libraries (table 67). AIE1 has no symmetric_floor or symmetric_ceil.
_ROUNDING_CODES: dict[str, dict[Rounding, int]] = {
    "aie-ml": {
        Rounding.FLOOR: 0,
        Rounding.CEIL: 1,
        Rounding.SYMMETRIC_FLOOR: 2,
        Rounding.SYMMETRIC_CEIL: 3,
        Rounding.NEGATIVE_INF: 8,
        Rounding.POSITIVE_INF: 9,
        Rounding.SYMMETRIC_ZERO: 10,
        Rounding.SYMMETRIC_INF: 11,
        Rounding.CONV_EVEN: 12,
        Rounding.CONV_ODD: 13,
    },
    "aie1": {
        Rounding.FLOOR: 0,
        Rounding.CEIL: 1,
        Rounding.POSITIVE_INF: 2,
        Rounding.NEGATIVE_INF: 3,
        Rounding.SYMMETRIC_INF: 4,
        Rounding.SYMMETRIC_ZERO: 5,
        Rounding.CONV_EVEN: 6,
        Rounding.CONV_ODD: 7,
    },
}


def parse_rounding(name: str) -> Rounding:
    """Return the rounding mode called `name`; InputError names the nearest modes otherwise."""
    try:
        return Rounding(name)
    except ValueError:
        raise InputError(
            unknown_name("rounding", name, [mode.value for mode in Rounding])
        ) from None


def parse_saturation(name: str) -> Saturation:
    """Return the saturation mode called `name`; InputError names the nearest modes otherwise."""
    try:
        return Saturation(name)
    except ValueError:
        valid = [mode.value for mode in Saturation]
        raise InputError(unknown_name("saturation", name, valid)) from None


def rounding_code(mode: str, generation: str) -> int:
    """Return the register code of a rounding mode on one AI Engine generation.

    Parameters
    ----------
    mode : str or Rounding
    generation : {"aie-ml", "aie1"}
        ``aie-ml`` also covers AIE2P, which uses the same codes.

    Raises
    ------
    InputError
        If the mode or generation is unknown, or the generation lacks the mode.
    """
    codes = _codes_of(generation)
    rounding = parse_rounding(mode)
    if rounding not in codes:
        raise InputError(
            f"{generation} has no rounding mode {rounding.value!r}; "
            f"it has {', '.join(known.value for known in codes)}"
        )
    return codes[rounding]


def rounding_from_code(code: int, generation: str) -> Rounding:
    """Return the rounding mode that a register code selects on one AI Engine generation."""
    codes = _codes_of(generation)
    for mode, known in codes.items():
        if known == code:
            return mode
    raise InputError(
        f"rounding code {code!r} is reserved on {generation}; "
        f"its codes are {', '.join(str(known) for known in sorted(codes.values()))}"
    )


def _codes_of(generation: str) -> dict[Rounding, int]:
    try:
        return _ROUNDING_CODES[generation]
    except KeyError:
        raise InputError(
            unknown_name("AI Engine generation", generation, _ROUNDING_CODES)
        ) from None
