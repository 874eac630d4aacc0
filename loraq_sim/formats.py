"""Number formats: what one stored tensor costs in bytes, and which codes it may hold.

A format string is ``element/granularity[/scale]``, for example ``int4/g64/fp16``:

- element: ``int2`` .. ``int8`` (two's complement, symmetric), ``uint2`` .. ``uint8`` (asymmetric,
  with a zero point per scale), or a plain float ``fp16``, ``bf16``, ``fp32`` (no scale);
- granularity: ``tensor``, ``row`` (per output channel for weights, per token for activations) or
  ``gN`` (N consecutive elements along the last axis; the last group may be short);
- scale: ``fp32``, ``fp16``, ``bf16`` or ``e8m0``; by default fp32 for ``tensor``, else fp16.

To add an element, add one line to ``ELEMENTS``; to add a scale format, one line to ``SCALES``.
"""

import functools
import re
from dataclasses import dataclass

from loraq_sim.errors import InputError, unknown_name

__all__ = ["ELEMENTS", "SCALES", "Element", "Format", "ScaleFormat", "parse_format"]


@dataclass(frozen=True, kw_only=True)
class Element:
    """One element type: its width and, for integers, the range of its codes."""

    name: str
    bits: int
    is_integer: bool
    is_signed: bool = True

    @property
    def has_zero_point(self) -> bool:
        """Whether tensors of this element store a zero point per scale."""
        return self.is_integer and not self.is_signed

    @property
    def lo(self) -> int:
        """Smallest code of an integer element."""
        return -(1 << (self.bits - 1)) if self.is_signed else 0

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


ELEMENTS = {
    element.name: element
    for element in (
        *(Element(name=f"int{b}", bits=b, is_integer=True) for b in range(2, 9)),
        *(Element(name=f"uint{b}", bits=b, is_integer=True, is_signed=False) for b in range(2, 9)),
        Element(name="fp16", bits=16, is_integer=False),
        Element(name="bf16", bits=16, is_integer=False),
        Element(name="fp32", bits=32, is_integer=False),
    )
}

# fp32 scales stop at the smallest normal number: dividing by a subnormal overflows float32.
SCALES = {
    scale.name: scale
    for scale in (
        ScaleFormat(name="fp32", nbytes=4, smallest=2.0**-126, largest=3.4028234663852886e38),
        ScaleFormat(name="fp16", nbytes=2, smallest=2.0**-24, largest=65504.0),
        ScaleFormat(name="bf16", nbytes=2, smallest=2.0**-126, largest=3.3895313892515355e38),
        ScaleFormat(name="e8m0", nbytes=1, smallest=2.0**-126, largest=2.0**127),
    )
}

_GROUP = re.compile(r"g([1-9][0-9]*)")


@dataclass(frozen=True, kw_only=True)
class Format:
    """A parsed format string.

    ``granularity`` is ``"tensor"``, ``"row"``, ``"group"`` or, for plain floats, ``"none"``;
    ``group_size`` is set for ``"group"`` only; ``scale`` is None for plain floats.
    """

    element: Element
    granularity: str
    group_size: int | None = None
    scale: ScaleFormat | None = None

    def __str__(self) -> str:
        if self.scale is None:
            return self.element.name
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"{self.element.name}/{where}/{self.scale.name}"

    def n_groups(self, k: int) -> int:
        """Scales along the last axis of length `k` (the last group may be short)."""
        return -(-k // self.group_size) if self.granularity == "group" else 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale array of a tensor of `shape`; ``(1, ..., 1)`` for ``tensor``."""
        if self.granularity == "tensor":
            return (1,) * len(shape)
        return (*shape[:-1], self.n_groups(shape[-1]))

    def storage_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes a tensor of `shape` takes when packed.

        Codes are packed tightly along the last axis and every row starts on a byte; scales follow
        at their own width; zero points are packed like codes, a row of them for each row.
        """
        n_rows = _product(shape[:-1])
        code_bytes = n_rows * _packed_row_bytes(shape[-1], self.element.bits)
        if self.scale is None:
            return code_bytes
        scale_shape = self.scale_shape(shape)
        total = code_bytes + _product(scale_shape) * self.scale.nbytes
        if self.element.has_zero_point:
            zero_row_bytes = _packed_row_bytes(scale_shape[-1], self.element.bits)
            total += _product(scale_shape[:-1]) * zero_row_bytes
        return total


def parse_format(text: "str | Format") -> Format:
    """Parse ``element/granularity[/scale]``; a `Format` is returned as it is.

    Raises
    ------
    InputError
        If the element, granularity or scale is unknown or does not fit together.
    """
    return text if isinstance(text, Format) else _parse(text)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> Format:
    parts = str(text).strip().lower().split("/")
    element = ELEMENTS.get(parts[0])
    if element is None:
        raise InputError(unknown_name("element", parts[0], ELEMENTS) + f" (in format {text!r})")
    if not element.is_integer:
        if len(parts) > 1:
            raise InputError(
                f"format {text!r}: {element.name} is stored without scales; write {element.name!r}"
            )
        return Format(element=element, granularity="none")
    if len(parts) not in (2, 3):
        raise InputError(
            f"format {text!r} must be element/granularity[/scale]; "
            f"for example {element.name}/g64, {element.name}/row or {element.name}/tensor/fp32"
        )
    granularity, group_size = _parse_granularity(parts[1], text)
    name = parts[2] if len(parts) == 3 else ("fp32" if granularity == "tensor" else "fp16")
    if name not in SCALES:
        raise InputError(unknown_name("scale", name, SCALES) + f" (in format {text!r})")
    return Format(
        element=element, granularity=granularity, group_size=group_size, scale=SCALES[name]
    )


def _parse_granularity(part: str, text: str) -> tuple[str, int | None]:
    if part in ("tensor", "row"):
        return part, None
    match = _GROUP.fullmatch(part)
    if match is None or len(part) > 9:
        raise InputError(
            f"format {text!r}: granularity must be tensor, row or gN with N from 1 to 99999999 "
            f"(such as g64), got {part!r}"
        )
    return "group", int(match.group(1))


def _packed_row_bytes(n_codes: int, bits: int) -> int:
    return -(-n_codes * bits // 8)


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
