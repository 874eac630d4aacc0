"""Axis ranges and ticks: round values, few of them, written the way people write numbers."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axis import Axis

__all__ = ["nice_log_ticks", "set_linear_axis", "set_log_axis", "tick_texts"]

# Mantissas of the tick sets to try, coarse to fine, until enough ticks fall into the range.
_MANTISSAS = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0),
    tuple(1.0 + 0.1 * i for i in range(90)),
    tuple(1.0 + 0.02 * i for i in range(450)),
)


def nice_log_ticks(low: float, high: float, *, fewest: int = 5, most: int = 9) -> list[float]:
    """Round ticks between `low` and `high` (positive): the coarsest set with enough of them."""
    ticks: list[float] = []
    for mantissas in _MANTISSAS:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**d for d in decades for m in mantissas]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= fewest:
            break
    return ticks[:: math.ceil(len(ticks) / most)] if ticks else [low]


def tick_texts(ticks: Sequence[float], *, even: bool = False) -> list[str]:
    """Labels with thousands separators and no needless zeros; `even` gives all equal decimals.

    >>> tick_texts([0.5, 1.0, 1500.0]), tick_texts([1.5, 2.0], even=True)
    (['0.5', '1', '1,500'], ['1.5', '2.0'])
    """
    short = [f"{float(f'{tick:.6g}'):.12f}".rstrip("0").rstrip(".") for tick in ticks]
    decimals = [len(text.partition(".")[2]) for text in short]
    most = max(decimals, default=0)
    return [f"{tick:,.{most if even else own}f}" for tick, own in zip(ticks, decimals, strict=True)]


def set_log_axis(axis: "Axis", values: Sequence[float], *, below: float, above: float) -> None:
    """Log axis over positive `values`, with margins as fractions of their logarithmic spread."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    # Equal values still need a range: about a factor of 1.5.
    spread = math.log(max(values) / min(values)) or 0.4
    low, high = min(values) * math.exp(-below * spread), max(values) * math.exp(above * spread)
    _fix(axis, low, high, nice_log_ticks(low, high), even=False)


def set_linear_axis(axis: "Axis", values: Sequence[float], *, below: float, above: float) -> None:
    """Linear axis over `values`, with margins as fractions of their spread; not forced to zero."""
    from matplotlib.ticker import MaxNLocator

    spread = (max(values) - min(values)) or 0.2 * abs(values[0]) or 1.0
    low, high = min(values) - below * spread, max(values) + above * spread
    if min(values) >= 0:
        low = max(low, 0.0)
    ticks = MaxNLocator(nbins=7, steps=[1, 2, 5, 10]).tick_values(low, high)
    _fix(axis, low, high, [float(tick) for tick in ticks if low <= tick <= high], even=True)


def _fix(axis: "Axis", low: float, high: float, ticks: Sequence[float], *, even: bool) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter(tick_texts(ticks, even=even)))
