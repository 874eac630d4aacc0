"""Pareto fronts of result rows: exact, for any number of objectives.

A row dominates another when it is no worse in every objective and better in at least one. The
front holds every row that no other dominates; rows that are equal in all objectives do not
dominate each other, so ties are all kept. A row whose status is not ``ok``, or that lacks an
objective (None or NaN), is never on the front and dominates nothing. Infinities are numbers, but
for an infinite error, that of an output that is not finite: such a row is on no front either.

Rows are a DataFrame or a list of dicts; what comes back has the same type and order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, unknown_name

if TYPE_CHECKING:
    import pandas

__all__ = [
    "COST_OBJECTIVE",
    "ERROR_OBJECTIVE",
    "eligible_points",
    "front_indices",
    "group_members",
    "mark_front",
    "non_dominated",
    "objectives_of",
    "pareto_front",
    "per_layer_front",
]

ERROR_OBJECTIVE = "output_error"
COST_OBJECTIVE = "latency_s"
_DEFAULT = (ERROR_OBJECTIVE, COST_OBJECTIVE)
_LAYER_KEYS = ("dump", "accelerator", "layer")
_BLOCK = 256

Frame = TypeVar("Frame", "pandas.DataFrame", "list[dict]")


def pareto_front(
    frame: Frame, minimize: Sequence[str] = _DEFAULT, maximize: Sequence[str] = ()
) -> Frame:
    """Rows of `frame` that no other row dominates, sorted by the second objective, best first.

    Parameters
    ----------
    frame : DataFrame, or list of dict
    minimize, maximize : sequence of str
        Numeric columns to be small or large; together at least one.

    Raises
    ------
    InputError
        If there is no objective, or one is not a column or not numeric.
    """
    return _take(frame, front_indices(frame, minimize, maximize, by=()))


def objectives_of(frame: "Sequence[dict]") -> tuple[str, str]:
    """Error and cost that rows can be ranked by: those of the data path where they are known.

    Without activations there is no output error, and without rows per call no latency: the error
    of the weight and its bytes then stand for them.
    """

    def is_known(name: str) -> bool:
        return any(row.get(name) is not None for row in frame)

    error = ERROR_OBJECTIVE if is_known(ERROR_OBJECTIVE) else "weight_error"
    return error, COST_OBJECTIVE if is_known(COST_OBJECTIVE) else "weight_bytes"


def per_layer_front(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> Frame:
    """Rows that are on the front of their own layer on their own accelerator, front by front.

    Rows that agree in all columns of `by` compete with each other and with no others; columns of
    the default that `frame` does not have are left out. Otherwise as `pareto_front`.
    """
    return _take(frame, front_indices(frame, minimize, maximize, by=by))


def mark_front(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> Frame:
    """Copy of `frame` with the bool column ``pareto``: whether the row is in `per_layer_front`.

    With ``by=()`` all rows compete with each other.
    """
    marks = np.zeros(len(frame), dtype=bool)
    marks[front_indices(frame, minimize, maximize, by=by)] = True
    if isinstance(frame, list):
        return [row | {"pareto": bool(mark)} for row, mark in zip(frame, marks, strict=True)]
    return frame.assign(pareto=marks)


def non_dominated(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points no other point dominates, when smaller is better in every column.

    Parameters
    ----------
    points : ndarray of shape (P, D), float64
        Without NaN. D is at least 1.

    Returns
    -------
    ndarray of shape (P,), bool
        Equal points are either all on the front or none of them.

    Notes
    -----
    In lexicographic order a point can only be dominated by an earlier one. Two columns then need
    one running minimum, O(P log P); more columns compare blocks of points with the front so far,
    O(P F D) for a front of F points.
    """
    keep = np.zeros(len(points), dtype=bool)
    order = np.lexsort(points.T[::-1])
    ordered = points[order]
    keep[order] = _front_of_pairs(ordered) if points.shape[1] == 2 else _front_by_blocks(ordered)
    return keep


def _front_of_pairs(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    x, y = points.T
    if len(x) == 0:
        return np.zeros(0, dtype=bool)
    starts = np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
    run = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(x))))
    # Within a run of equal x the first y is the smallest; it must beat every smaller x strictly.
    smallest = y[starts]
    before = np.concatenate([[np.inf], np.minimum.accumulate(smallest)[:-1]])
    is_first_run = np.arange(len(starts)) == 0
    on_front = is_first_run | (smallest < before)
    return on_front[run] & (y == smallest[run])


def _front_by_blocks(points: NDArray[np.float64]) -> NDArray[np.bool_]:
    keep = np.ones(len(points), dtype=bool)
    front = points[:0]
    for start in range(0, len(points), _BLOCK):
        block = points[start : start + _BLOCK]
        alive = ~_dominated(block, front)
        alive[alive] = ~_dominated(block[alive], block[alive])
        keep[start : start + _BLOCK] = alive
        front = np.concatenate([front, block[alive]])
    return keep


def _dominated(points: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of `points` (P, D) are dominated by one of `by` (F, D); memory P * F bytes."""
    no_worse = np.ones((len(points), len(by)), dtype=bool)
    better = np.zeros((len(points), len(by)), dtype=bool)
    for mine, other in zip(points.T, by.T, strict=True):
        no_worse &= other[None, :] <= mine[:, None]
        better |= other[None, :] < mine[:, None]
    return (no_worse & better).any(axis=1)


def eligible_points(
    frame: Frame, minimize: Sequence[str] = _DEFAULT, maximize: Sequence[str] = ()
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Objectives of every row, smaller better, and which rows may be on a front.

    Returns
    -------
    points : ndarray of shape (rows, objectives), float64
        Columns to minimize, then columns to maximize with their sign turned; NaN where missing.
    eligible : ndarray of shape (rows,), bool
        Rows with every objective, no infinite error, and a status that is ``ok``, where there is
        one.
    """
    minimize, maximize = _names(minimize), _names(maximize)
    if not minimize and not maximize:
        raise InputError("a Pareto front needs at least one column to minimize or maximize")
    if len(frame) == 0:
        return np.zeros((0, len(minimize) + len(maximize))), np.zeros(0, dtype=bool)
    columns = [_numbers(frame, name) for name in minimize]
    columns += [-_numbers(frame, name) for name in maximize]
    points = np.stack(columns, axis=1)
    eligible = ~np.isnan(points).any(axis=1)
    for name, values in zip((*minimize, *maximize), columns, strict=True):
        if name.endswith("_error"):
            eligible &= np.isfinite(values)
    if "status" in _columns(frame):
        eligible &= np.array([status == "ok" for status in _values(frame, "status")])
    return points, eligible


def front_indices(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> NDArray[np.intp]:
    """Places in `frame` of the rows on the fronts, front by front, each sorted as `pareto_front`.

    The fronts stand in the order in which their groups appear in `frame`.
    """
    points, eligible = eligible_points(frame, minimize, maximize)
    found = [np.zeros(0, dtype=np.intp)]
    for members in group_members(frame, by):
        members = members[eligible[members]]
        front = members[non_dominated(points[members])]
        keys = points[front][:, :2]
        # The last key of lexsort counts most; it is stable, so that equal rows keep their order.
        found.append(front[np.lexsort(keys.T)])
    return np.concatenate(found)


def _names(names: Sequence[str]) -> tuple[str, ...]:
    # A lone string would otherwise be taken letter by letter.
    return (names,) if isinstance(names, str) else tuple(names)


def group_members(frame: Frame, by: Sequence[str] = _LAYER_KEYS) -> list[NDArray[np.intp]]:
    """Indices of the rows that agree in all columns of `by`, group by group, in their order."""
    by = _names(by)
    if len(frame) == 0:
        return []
    if by == _LAYER_KEYS:
        by = [name for name in by if name in _columns(frame)]
    members: dict[tuple, list[int]] = {}
    for index, key in enumerate(zip(*(_values(frame, name) for name in by), strict=True)):
        members.setdefault(key, []).append(index)
    if not by:
        return [np.arange(len(frame))]
    return [np.array(indices) for indices in members.values()]


def _columns(frame: Frame) -> list[str]:
    if isinstance(frame, list):
        return list(dict.fromkeys(name for row in frame for name in row))
    return [str(name) for name in frame.columns]


def _values(frame: Frame, name: str) -> list:
    if name not in _columns(frame):
        raise InputError(unknown_name("column", name, _columns(frame)))
    return [row.get(name) for row in frame] if isinstance(frame, list) else frame[name].tolist()


def _numbers(frame: Frame, name: str) -> NDArray[np.float64]:
    values = _values(frame, name)
    try:
        return np.array([np.nan if _is_missing(v) else float(v) for v in values], dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"column {name!r} is not numeric and cannot be an objective") from None


def _is_missing(value: object) -> bool:
    # A pandas NA has no truth value and is not a float; its type name is all NumPy code can ask.
    return value is None or type(value).__name__ == "NAType"


def _take(frame: Frame, indices: NDArray[np.intp]) -> Frame:
    if isinstance(frame, list):
        return [frame[index] for index in indices]
    return frame.iloc[indices]
