"""Groups of elements that share one scale."""

import numpy as np

from loraq_sim.formats import Format

__all__ = ["as_rows", "group_extremes", "padded_groups"]


def as_rows(values: np.ndarray, fmt: Format) -> tuple[np.ndarray, int]:
    """`values` as (rows, K) with one scale per `group` consecutive elements of a row."""
    if fmt.granularity == "tensor":
        return values.reshape(1, -1), values.size
    k = values.shape[-1]
    return values.reshape(-1, k), min(fmt.group_size, k) if fmt.granularity == "group" else k


def padded_groups(rows: np.ndarray, group: int) -> np.ndarray:
    """`rows` as (rows, groups, group); a short last group is filled with zeros.

    Zero lies in the range of every group and is exactly a code, so it changes neither the range
    nor the error.
    """
    pad = -rows.shape[1] % group
    return np.pad(rows, ((0, 0), (0, pad))).reshape(rows.shape[0], -1, group)


def group_extremes(rows: np.ndarray, group: int) -> np.ndarray:
    """The signed element of largest magnitude of each group, (rows, groups) float32."""
    low, high = group_ends(rows, group)
    return np.where(high >= -low, high, low)


def group_ends(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest element of each group, zero included, (rows, groups) each."""
    starts = np.arange(0, rows.shape[1], group)
    high = np.maximum.reduceat(rows, starts, axis=1)
    low = np.minimum.reduceat(rows, starts, axis=1)
    return np.minimum(low, 0), np.maximum(high, 0)
