"""Numbers of an accelerator file: what each may be, in the unit its key names.

The limits are wide enough for any machine one would describe and narrow enough for a slip of units
to fall outside: 1.2 for 1.2 GHz, 17 for 17 GB/s, 130 for 130 us, joules for picojoules. A number
outside is refused with the key, the value, the range, and what it would be in a likely other unit.
"""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints

__all__ = [
    "BytesPerCycle", "BytesPerSecond", "Capacity", "Count", "ElementsPerCycle", "Fraction", "Hertz",
    "L1Capacity", "MacRate", "Name", "Nanometers", "NonNegative", "Picojoules", "Seconds",
    "Side", "Text", "Watts",
]  # fmt: skip


def _between(
    low: float, high: float, unit: str, *slips: tuple[str, float], or_zero: bool = False
) -> Callable[[float], float]:
    """A check that a number lies from `low` to `high` `unit`.

    `slips`: other units people write, and what one of them is in `unit`; the first that brings the
    number into the range is suggested.
    """

    def check(value: float) -> float:
        if low <= value <= high or (or_zero and value == 0):
            return value
        zero = "0 or " if or_zero else ""
        hint = next(
            (
                f"; {value:g} {name} would be {value * factor:.10g}"
                for name, factor in slips
                if low <= value * factor <= high
            ),
            "",
        )
        raise ValueError(
            f"{value:g} {unit} is outside the plausible range, "
            f"{zero}{low:g} to {high:g} {unit}{hint}"
        )

    return check


def _limits(low: float, high: float) -> dict[str, float]:
    return {"minimum": low, "maximum": high}


_JOULES = (("J", 1e12), ("nJ", 1e3), ("fJ", 1e-3))
_BYTE_SIZES = (("KiB", 1024), ("MiB", 2**20), ("GiB", 2**30))

Count = Annotated[int, Field(ge=1, le=2**40)]
NonNegative = Annotated[float, Field(ge=0, le=1e15)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,39}$")]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3)]

Side = Annotated[int, Field(ge=1, le=2**20)]
"""Rows or columns of units."""

Hertz = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e5, 1e11)),
    AfterValidator(_between(1e5, 1e11, "Hz", ("GHz", 1e9), ("MHz", 1e6))),
]
BytesPerSecond = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e6, 1e16)),
    AfterValidator(_between(1e6, 1e16, "B/s", ("GB/s", 1e9), ("MB/s", 1e6))),
]
Seconds = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 0.1)),
    AfterValidator(_between(0, 0.1, "s", ("us", 1e-6), ("ns", 1e-9))),
]
Capacity = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(1024, 2**40)),
    AfterValidator(_between(1024, 2**40, "B", *reversed(_BYTE_SIZES[:2]))),
]
L1Capacity = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(256, 2**32)),
    AfterValidator(_between(256, 2**32, "B", *_BYTE_SIZES[:2])),
]
BytesPerCycle = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e-2, 1e6)),
    AfterValidator(_between(1e-2, 1e6, "B/cycle", ("B/s at 1 GHz", 1e-9))),
]
ElementsPerCycle = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(1e-3, 1e6)),
    AfterValidator(_between(1e-3, 1e6, "elements/cycle", ("elements/s at 1 GHz", 1e-9))),
]
MacRate = Annotated[
    int,
    Field(ge=1, json_schema_extra=_limits(1, 1e8)),
    AfterValidator(_between(1, 1e8, "MAC/cycle", ("MAC/s at 1 GHz", 1e-9))),
]
Picojoules = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 1e5)),
    AfterValidator(_between(1e-5, 1e5, "pJ", *_JOULES, or_zero=True)),
]
Nanometers = Annotated[
    float,
    Field(gt=0, json_schema_extra=_limits(0.1, 1e4)),
    AfterValidator(_between(0.1, 1e4, "nm", ("m", 1e9), ("um", 1e3))),
]
Watts = Annotated[
    float,
    Field(ge=0, json_schema_extra=_limits(0, 1e5)),
    AfterValidator(_between(0, 1e5, "W", ("mW", 1e-3))),
]
