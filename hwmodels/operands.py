"""How the operands of a product are coded and stored: bits, signs, zero points, groups and scales.

A precision such as ``W4A8`` names both of them; the family says which groups and scales they have.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from hwmodels.errors import AcceleratorError

__all__ = [
    *("FAMILIES", "QUANTIZED_BITS", "Operand", "grouping_of", "parse_operands"),
    *("parse_precision", "tensor_bytes"),
]

FAMILIES = ("int", "mxint", "mxfp", "nvfp")
_BLOCK_SCALES = {4: (16, 8)}  # NVFP4: 16 elements per e4m3 scale; other widths are MX formats.
_MX_SCALE = (32, 8)
QUANTIZED_BITS = range(2, 9)
_PRECISION = re.compile(r"[Ww](\d+)(u\d{0,3})?[Aa](\d+)(u\d{0,3}|z-?\d{1,3}|i)?")


class Operand(NamedTuple):
    """How one operand is coded: bits, and a letter for what its width does not say.

    ``""``: two's complement, or a float of 16 bits; ``u``: unsigned with a zero point beside each
    scale; ``uN`` and ``zN``: unsigned and signed with the fixed zero point N; ``i``: an integer of
    16 bits.
    """

    bits: int
    letter: str = ""

    @property
    def is_unsigned(self) -> bool:
        """Whether codes are unsigned."""
        return self.letter[:1] == "u"

    @property
    def is_float(self) -> bool:
        """Whether it is a 16-bit float, stored without scales."""
        return self.bits == 16 and not self.letter

    @property
    def stores_zeros(self) -> bool:
        """Whether a zero point is stored beside each scale."""
        return self.letter == "u"

    @property
    def needs_correction(self) -> bool:
        """Whether a code other than 0 may stand for zero."""
        return self.stores_zeros or self.letter[1:] not in ("", "0")

    def __str__(self) -> str:
        return f"{self.bits}{self.letter}"


@lru_cache(maxsize=256)
def parse_operands(text: str) -> tuple[Operand, Operand]:
    """Weights and activations of a precision such as ``"W4A8"``, ``"W4A4u"`` or ``"W8A16i"``.

    Raises
    ------
    AcceleratorError
        If `text` is not WxAy with x and y in 2 to 8 or 16, or a letter does not fit its width.
    """
    match = _PRECISION.fullmatch(text) if isinstance(text, str) else None
    found = (Operand(0), Operand(0))
    if match:
        found = Operand(int(match[1]), match[2] or ""), Operand(int(match[3]), match[4] or "")
    if any(bits != 16 and bits not in QUANTIZED_BITS for bits, _ in found):
        raise AcceleratorError(
            f"precision {text!r} must be WxAy with x weight bits and y activation bits, "
            "each 2 to 8 or 16; for example 'W4A8'"
        )
    for operand in found:
        if operand.letter and (operand.letter == "i") is not (operand.bits == 16):
            raise AcceleratorError(
                f"precision {text!r}: {operand} does not exist; i marks 16-bit integers (A16i), u "
                "and z zero points of 2 to 8 bits (A4u, A4u8, A8z-3)"
            )
    return found


def parse_precision(text: str) -> tuple[int, int]:
    """Weight and activation bits of ``"W4A8"``: (4, 8); errors as of `parse_operands`."""
    weights, activations = parse_operands(text)
    return weights.bits, activations.bits


def grouping_of(family: str, bits: int, group: int | None) -> tuple[int | None, int]:
    """Elements per scale and bits per scale; integers have `group` and 16 bits."""
    if family == "int":
        return group, 16
    return _BLOCK_SCALES.get(bits, _MX_SCALE) if family == "nvfp" else _MX_SCALE


def tensor_bytes(
    rows: int, columns: int, bits: int, *, group: int | None = 64, scale_bits: int = 16
) -> int:
    """Stored bytes of a (rows, columns) tensor with groups along the columns.

    rows * ceil(columns * bits / 8) of codes plus rows * ceil(columns / group) scales of
    `scale_bits`; 16-bit tensors have no scales. `group` None: one scale per row.
    """
    if bits == 16:
        return 2 * rows * columns
    groups = 1 if group is None else -(-columns // group)
    return rows * -(-columns * bits // 8) + -(-rows * groups * scale_bits // 8)
