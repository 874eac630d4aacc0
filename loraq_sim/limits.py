"""Limits on columns, as people write them: ``latency_s=3ms``, ``weight_bytes=400MB``, ``5%``.

A number alone is in base units (s, J, bytes, fractions). Units of a column are those of its
suffix; K, M and G are powers of 1000, Ki, Mi and Gi of 1024.
"""

import math
import re
from collections.abc import Iterable, Mapping
from decimal import Decimal

from loraq_sim.errors import InputError, unknown_name

__all__ = ["Limits", "checked_limits", "parse_limits"]

Limits = Mapping[str, float]
"""Largest value of each column, in base units."""

_SI = {"n": -9, "u": -6, "µ": -6, "m": -3, "": 0}
_LARGE = {"": 0, "k": 3, "K": 3, "M": 6, "G": 9}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30}
# Exact sizes, so that 2.95ms is the number 0.00295.
_UNITS = {
    "_s": {f"{prefix}s": Decimal(10) ** power for prefix, power in _SI.items()},
    "_j": {f"{prefix}J": Decimal(10) ** power for prefix, power in {**_SI, "p": -12}.items()},
    "_bytes": {f"{prefix}B": Decimal(10) ** power for prefix, power in _LARGE.items()}
    | {f"{prefix}B": Decimal(2) ** power for prefix, power in _BINARY.items()},
    "_error": {"%": Decimal("0.01")},
}
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([^\d\s.]*)")


def parse_limits(texts: Iterable[str], known: Iterable[str]) -> dict[str, float]:
    """Limits of texts such as ``latency_s=3ms,weight_bytes=400MB``; `known` are the columns.

    Raises
    ------
    InputError
        If a text is not of this form, a column is unknown or named twice, or a unit is not one of
        the column's.
    """
    limits: dict[str, float] = {}
    for text in (part.strip() for given in texts for part in given.split(",") if part.strip()):
        column, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not column or not value:
            raise InputError(f"limit {text!r} must look like latency_s=3ms or weight_bytes=400MB")
        if column in limits:
            raise InputError(f"{column} has two limits; give one")
        limits[column] = _number(column, value)
    return checked_limits(limits, known)


def checked_limits(limits: Limits, known: Iterable[str]) -> dict[str, float]:
    """`limits` as floats, each of a known column and a number.

    Raises
    ------
    InputError
        If a column is unknown or a limit is not a number.
    """
    names = list(known)
    for column, limit in limits.items():
        if column not in names:
            raise InputError(unknown_name("column", column, names))
        is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not is_number or math.isnan(limit):
            raise InputError(f"the limit of {column} must be a number, got {limit!r}")
    return {column: float(limit) for column, limit in limits.items()}


def _number(column: str, text: str) -> float:
    units = next((units for suffix, units in _UNITS.items() if column.endswith(suffix)), {})
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] and match[2] not in units):
        accepted = ", ".join(units) or "no unit"
        raise InputError(f"{column}={text}: want a number, with {accepted} if any unit")
    return float(Decimal(match[1]) * units.get(match[2], 1))
