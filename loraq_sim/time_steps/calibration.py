"""Which time steps a solver sees: ``all``, ``first:5``, ``1000``, ``600..400+40``.

Steps are named as the dump records them, in the order they were run; ``+`` joins several choices.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError

__all__ = ["CALIBRATED_METHODS", "chosen_steps"]

CALIBRATED_METHODS = ("svdquant_tuned", "l2qer", "qera")
"""Methods that look at activations; all others do only when smoothing by strength is asked for."""

_RANGE = ".."
_SHOWN = 6


def chosen_steps(text: str, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the recorded time steps `text` names.

    Parameters
    ----------
    text : str
        ``all``; ``first`` or ``last``, the step that is run first or last; ``first:N`` or
        ``last:N``, N of them; a value such as ``960``; a range of values such as ``1000..800``,
        both ends included, in either order; several of these joined by ``+``.
    values : ndarray of shape (S,), float64
        Values of the steps in the order they were run.

    Returns
    -------
    chosen : ndarray of shape (S,), bool
        At least one is True.

    Raises
    ------
    InputError
        If a part of `text` is not understood or names no recorded step.
    """
    chosen = np.zeros(len(values), dtype=np.bool_)
    for part in text.split("+"):
        named = _named(part.strip(), values)
        if named is None:
            raise InputError(
                f"time steps {part.strip()!r} not understood; use all, first, last, first:N, "
                "last:N, a value, a range such as 1000..800, or several joined by +"
            )
        if not named.any():
            raise InputError(
                f"no time step {part.strip()!r} is recorded; there are {_listed(values)}"
            )
        chosen |= named
    return chosen


def _named(part: str, values: NDArray[np.float64]) -> NDArray[np.bool_] | None:
    if part == "all":
        return np.ones(len(values), dtype=np.bool_)
    end, _, count = part.partition(":")
    if end in ("first", "last"):
        n_wanted = _count(count) if ":" in part else 1
        if n_wanted is None:
            return None
        order = np.arange(len(values))
        return order < n_wanted if end == "first" else order >= len(values) - n_wanted
    low, is_range, high = part.partition(_RANGE)
    ends = [_number(low), _number(high)] if is_range else [_number(part)] * 2
    if None in ends:
        return None
    return (values >= min(ends)) & (values <= max(ends))


def _count(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if is_number and int(text) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _listed(values: NDArray[np.float64]) -> str:
    texts = [f"{value:g}" for value in values]
    if len(texts) > _SHOWN:
        texts = [*texts[: _SHOWN - 1], "...", texts[-1]]
    return ", ".join(texts)
