"""Fewer activation rows, with every time step still among them."""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError

__all__ = ["rows_of_steps"]


def rows_of_steps(counts: NDArray[np.int64], tokens: int | None) -> NDArray[np.int64]:
    """Indices of at most `tokens` rows, in order, with every step that has rows among them.

    The rows are those that `loraq_sim.evaluate.sample_rows` takes, evenly spread, as long as these
    miss no step. Otherwise each step gives one row, and the others are shared out in proportion to
    the steps' rows (largest remainders first), evenly spread within each.

    Parameters
    ----------
    counts : ndarray of shape (S,), int64
        Rows of each step; the rows are stored in order of step.
    tokens : int or None
        None takes all rows.

    Raises
    ------
    InputError
        If `tokens` is not a positive integer, or less than the number of steps that have rows.
    """
    n_rows, n_steps = int(counts.sum()), int((counts > 0).sum())
    if tokens is None:
        return np.arange(n_rows, dtype=np.int64)
    if isinstance(tokens, bool) or int(tokens) != tokens or tokens < 1:
        raise InputError(f"tokens must be a positive integer, got {tokens!r}")
    if tokens >= n_rows:
        return np.arange(n_rows, dtype=np.int64)
    if tokens < n_steps:
        raise InputError(
            f"tokens={tokens} cannot represent {n_steps} time steps; use {n_steps} or more"
        )
    starts = np.cumsum(counts) - counts
    even = np.arange(tokens, dtype=np.int64) * n_rows // tokens
    step_of_row = np.repeat(np.arange(len(counts)), counts)
    if len(np.unique(step_of_row[even])) == n_steps:
        return even
    taken = _shared_out(counts, int(tokens))
    return np.concatenate(
        [
            start + np.arange(wanted, dtype=np.int64) * count // max(1, wanted)
            for start, count, wanted in zip(starts, counts, taken, strict=True)
        ]
    )


def _shared_out(counts: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Rows of each step: one, and a part of the rest in proportion to the step's further rows."""
    least = np.minimum(counts, 1)
    left = tokens - int(least.sum())
    # Exact integers: quotient and remainder of left * further / total. A step's part never exceeds
    # its further rows, since left < total.
    further = counts - least
    quotient, remainder = np.divmod(left * further, int(further.sum()))
    extra = np.argsort(-remainder, kind="stable")[: left - int(quotient.sum())]
    quotient[extra] += 1
    return least + quotient
