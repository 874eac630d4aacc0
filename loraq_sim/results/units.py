"""How a column of raw numbers is written for people: one unit a column, three significant digits.

Rows keep SI base units (seconds, joules, bytes, fractions). Only what a person reads is scaled,
and the unit then stands in the heading, so that the cells of a column compare at a glance.
Powers of 1024 carry binary symbols (KiB, MiB); times and energies use powers of 1000.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "NO_VALUE",
    "Unit",
    "choose_unit",
    "format_count",
    "format_number",
    "format_numbers",
    "is_missing",
]

NO_VALUE = "-"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A display unit: `symbol` is printed, `size` is how many base units one of it holds."""

    symbol: str
    size: float


# Largest first; the first unit that the typical value reaches is taken, else the last.
_UNITS = {
    "time": (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)),
    "energy": (("J", 1.0), ("mJ", 1e-3), ("uJ", 1e-6), ("nJ", 1e-9), ("pJ", 1e-12)),
    "bytes": (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10), ("B", 1.0)),
    "percent": (("%", 1e-2),),
    "decibel": (("dB", 1.0),),
    "number": (("", 1.0),),
    "count": (("", 1.0),),
}


def is_missing(value: Any) -> bool:
    """True for None, NaN of any float type, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    return isinstance(value, float) and math.isnan(value)


def choose_unit(values: Iterable[float | None], quantity: str) -> Unit:
    """Unit in which the median of the finite non-zero values is at least 1.

    Parameters
    ----------
    values : iterable of float or None
        In base units (s, J, bytes, fraction). Missing values are skipped.
    quantity : str
        ``time``, ``energy``, ``bytes``, ``percent``, ``decibel``, ``number`` or ``count``.
    """
    sizes = [abs(v) for v in values if not is_missing(v) and math.isfinite(v) and v]
    ladder = [Unit(symbol=symbol, size=size) for symbol, size in _UNITS[quantity]]
    if not sizes:
        return ladder[0]
    typical = statistics.median(sizes)
    # The margin keeps a value that prints as 1.00 from falling to the next unit by float dust.
    return next((unit for unit in ladder if typical >= unit.size * (1 - 1e-9)), ladder[-1])


def format_number(value: float, digits: int = 3) -> str:
    """Value with `digits` significant digits and thousands separators; whole digits are kept.

    >>> [format_number(v) for v in (1234.5, 12.345, 0.012345, 1.2e-7, 0.0)]
    ['1,234', '12.3', '0.0123', '1.2e-07', '0']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if abs(value) < 1e-4 or abs(value) >= 1e9:
        return f"{value:.{digits}g}"
    return f"{value:,.{_decimals(value, digits)}f}"


def format_count(value: float) -> str:
    """Whole number with thousands separators, or `format_number` where it is not whole."""
    return (
        f"{int(value):,}" if math.isfinite(value) and value == int(value) else format_number(value)
    )


def format_numbers(values: Sequence[float | None], digits: int = 3) -> list[str]:
    """Values of one column with equal decimals where their range allows it, else one by one.

    The decimals are those that show the smallest value with `digits` significant digits, so
    right-aligned cells line up at the point. Above a range of 1000 that would print noise.
    """
    sizes = [abs(v) for v in values if not is_missing(v) and math.isfinite(v) and v]
    even = bool(sizes) and min(sizes) >= 1e-4 and max(sizes) < 1000 * min(sizes)
    decimals = _decimals(min(sizes), digits) if even else 0

    def cell(value: float | None) -> str:
        if is_missing(value):
            return NO_VALUE
        if even and math.isfinite(value):
            return f"{value:,.{decimals}f}"
        return format_number(value, digits)

    return [cell(value) for value in values]


def _decimals(value: float, digits: int) -> int:
    return max(0, digits - 1 - math.floor(math.log10(abs(value))))
