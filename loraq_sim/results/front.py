"""Pareto fronts of result rows, for any number of objectives, and what a front says.

A row dominates another when it is no worse in every objective and better in at least one. The
front holds every row that no other dominates; rows that are equal in all objectives do not
dominate each other, so ties are all kept. A row whose status is not ``ok``, or that lacks an
objective (None or NaN), is never on the front and dominates nothing. Infinities are numbers, but
for an infinite error, that of an output that is not finite: such a row is on no front either.
Rows are a DataFrame or a list of dicts; what comes back has the same type and order.

**Knee.** Each objective is scaled to 0 at its best and 1 at its worst value on the front; the knee
is the member of the smallest sum (V. Satopaa et al., "Finding a Kneedle in a Haystack", ICDCS
Workshops 2011, for two objectives: the member farthest below the line that joins the two ends).
With D objectives the sum must be less than D - 1, that of the corners best in one objective and
worst in the others. Where no member lies below, every trade is worse than going all the way, and
the knee is the member best in the first objective, which is the error wherever there is one. Of
equals the first is taken; members with an infinite objective are left out. Relative errors count by
their logarithm, as in decibels (`knee_of`): they span decades, and from 8 to 4 % is as far as from
2 to 1 %. All that recommends or marks a knee uses this rule.

**Hypervolume.** The share of the box between the best value of each objective on the front and a
reference point that is dominated by the front: 1 is a front of one point that is best in all, 0 a
front that does not reach the box. The reference point is the worst finite value of each objective
among all rows that compete (not only those on the front), or one that is given.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, named_options, unknown_name
from loraq_sim.results.columns import Limits, checked_limits, is_missing

if TYPE_CHECKING:
    import pandas

    from loraq_sim.results.rows import ResultRow

__all__ = [
    "ERROR_OBJECTIVE",
    "best_under",
    "dominated_volume",
    "group_members",
    "hypervolume",
    "knee_of",
    "knee_point",
    "least_possible",
    "mark_front",
    "non_dominated",
    "pareto_front",
    "per_layer_front",
    "survey_front",
    "within",
]


ERROR_OBJECTIVE = "output_error"
_DEFAULT_OBJECTIVES = (ERROR_OBJECTIVE, "latency_s")
_LAYER_KEYS = ("dump", "accelerator", "layer")
_BLOCK = 256
_TOLERANCE = 1e-9

Frame = TypeVar("Frame", "pandas.DataFrame", "list[dict[str, Any]]", "list[ResultRow]")


@named_options
def pareto_front(
    frame: Frame, minimize: Sequence[str] = _DEFAULT_OBJECTIVES, *, maximize: Sequence[str] = ()
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
    return _take(frame, _front_indices(frame, minimize, maximize, by=()))


def per_layer_front(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT_OBJECTIVES,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> Frame:
    """Rows that are on the front of their own layer on their own accelerator, front by front.

    Rows that agree in all columns of `by` compete with each other and with no others; columns of
    the default that `frame` does not have are left out. Otherwise as `pareto_front`.
    """
    return _take(frame, _front_indices(frame, minimize, maximize, by=by))


def mark_front(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT_OBJECTIVES,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> Frame:
    """Copy of `frame` with the bool column ``pareto``: whether the row is in `per_layer_front`.

    With ``by=()`` all rows compete with each other.
    """
    marks = np.zeros(len(frame), dtype=bool)
    marks[_front_indices(frame, minimize, maximize, by=by)] = True
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
    return np.any(no_worse & better, axis=1)


def _eligible_points(
    frame: Frame, minimize: Sequence[str] = _DEFAULT_OBJECTIVES, maximize: Sequence[str] = ()
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
    eligible = np.all(~np.isnan(points), axis=1)
    for name, values in zip((*minimize, *maximize), columns, strict=True):
        if name.endswith("_error"):
            eligible &= np.isfinite(values)
    if "status" in _columns(frame):
        eligible &= np.array([status == "ok" for status in _values(frame, "status")])
    return points, eligible


def _front_indices(
    frame: Frame,
    minimize: Sequence[str] = _DEFAULT_OBJECTIVES,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = _LAYER_KEYS,
) -> NDArray[np.intp]:
    """Places in `frame` of the rows on the fronts, front by front, each sorted as `pareto_front`.

    The fronts stand in the order in which their groups appear in `frame`.
    """
    points, eligible = _eligible_points(frame, minimize, maximize)
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
        return np.array([np.nan if is_missing(v) else float(v) for v in values], dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"column {name!r} is not numeric and cannot be an objective") from None


def _take(frame: Frame, indices: NDArray[np.intp]) -> Frame:
    if isinstance(frame, list):
        return [frame[index] for index in indices]
    return frame.iloc[indices]


def knee_point(points: NDArray[np.float64], among: Sequence[int] | None = None) -> int | None:
    """Index of the knee among mutually non-dominated `points` (P, D), None if none is finite.

    Smaller is better in every column; see the module for the definition. With `among` only these
    indices can be the knee; all points count for the scale.
    """
    finite = np.flatnonzero(np.isfinite(points).all(axis=1))
    if len(finite) == 0:
        return None
    front = points[finite]
    best = front.min(axis=0)
    extent = front.max(axis=0) - best
    sums = ((front - best) / np.where(extent > 0, extent, 1.0)).sum(axis=1)
    if among is not None:
        allowed = np.isin(finite, among)
        finite, front, sums = finite[allowed], front[allowed], sums[allowed]
        if len(finite) == 0:
            return None
    least = int(sums.argmin())
    if sums[least] < max(float(np.count_nonzero(extent > 0)) - 1, _TOLERANCE) - _TOLERANCE:
        return int(finite[least])
    return int(finite[np.lexsort(front.T[::-1])[0]])


def knee_of(
    points: NDArray[np.float64], names: Sequence[str], among: Sequence[int] | None = None
) -> int | None:
    """`knee_point` of objectives by name: those called ``*_error`` count by their logarithm.

    A column with an error of zero stays as it is.
    """
    scaled = points.copy()
    for column, name in enumerate(names):
        if name.endswith("_error") and (points[:, column] > 0).all():
            scaled[:, column] = np.log(points[:, column])
    return knee_point(scaled, among)


def dominated_volume(points: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Volume that lies above some of `points` (P, D) and below `reference` (D,).

    Exact, by slices along the last objective: O(P log P) for two objectives and at most a factor P
    for each further one. Points not below the reference in every objective add nothing.
    """
    points = points[(points < reference).all(axis=1)]
    if len(points) == 0:
        return 0.0
    return _volume(points[non_dominated(points)], reference)


def hypervolume(
    frame: Any,
    minimize: Sequence[str] = _DEFAULT_OBJECTIVES,
    maximize: Sequence[str] = (),
    *,
    reference: Limits | None = None,
) -> float | None:
    """Share of the box up to the reference point that the front of all rows dominates, 0 to 1.

    `reference` gives the worst value of some or all objectives by column. None if no row is
    eligible or the box has no volume.
    """
    points, eligible = _eligible_points(frame, minimize, maximize)
    return _share(points[eligible], _given(reference, minimize, maximize))


def best_under(
    frame: Any, limits: Limits, minimize: str = ERROR_OBJECTIVE, *, by: Sequence[str] = ()
) -> Any:
    """Rows with the smallest `minimize` among those within `limits`, one per group.

    Parameters
    ----------
    frame : DataFrame or list of dict
        Rows, such as those of `loraq_sim.model_totals`.
    limits : mapping
        Largest value of each column, in base units; met up to 1e-9 of it.
    minimize : str
    by : sequence of str
        Rows that agree in these columns compete; all rows by default. Of equals the first is taken;
        a group without a row within the limits has none.

    Returns
    -------
    DataFrame or list of dict, as `frame`
    """
    points, eligible = _eligible_points(frame, (minimize,))
    eligible &= within(frame, limits)
    chosen = []
    for members in group_members(frame, by):
        members = members[eligible[members]]
        if len(members):
            chosen.append(int(members[points[members, 0].argmin()]))
    if isinstance(frame, list):
        return [frame[index] for index in chosen]
    return frame.iloc[chosen]


def within(frame: Any, limits: Limits) -> NDArray[np.bool_]:
    """Which rows meet every limit; a row that lacks a limited column does not."""
    columns = (
        frame.columns if hasattr(frame, "columns") else {name for row in frame for name in row}
    )
    limits = checked_limits(limits, sorted(map(str, columns)))
    meets = np.ones(len(frame), dtype=bool)
    for column, limit in limits.items():
        values, _ = _eligible_points(frame, (column,))
        # A missing value is NaN, which is not below anything.
        meets &= values[:, 0] <= limit + _TOLERANCE * abs(limit)
    return meets


def survey_front(
    rows: list[dict[str, Any]],
    minimize: Sequence[str] = _DEFAULT_OBJECTIVES,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = (),
    reference: Limits | None = None,
) -> list[dict[str, Any]]:
    """Rows on the front of their group, sorted as by `per_layer_front`, with what the front says.

    Adds ``pareto`` (True), ``is_knee`` and ``hypervolume``, that of the row's group.
    """
    given = _given(reference, minimize, maximize)
    points, eligible = _eligible_points(rows, minimize, maximize)
    group_of = {int(i): n for n, group in enumerate(group_members(rows, by)) for i in group}
    fronts: dict[int, list[int]] = {}
    for index in _front_indices(rows, minimize, maximize, by=by):
        fronts.setdefault(group_of[int(index)], []).append(int(index))
    found = []
    for number, members in enumerate(group_members(rows, by)):
        front = fronts.get(number, [])
        volume = _share(points[members[eligible[members]]], given) if front else None
        knee = knee_of(points[front], _names(minimize)) if front else None
        for place, index in enumerate(front):
            facts = {"pareto": True, "is_knee": place == knee, "hypervolume": volume}
            found.append(rows[index] | facts)
    return found


def _given(
    reference: Limits | None, minimize: Sequence[str], maximize: Sequence[str]
) -> NDArray[np.float64]:
    """The reference point as far as it is given, smaller better, NaN where it is not."""
    minimize, maximize = _names(minimize), _names(maximize)
    known = checked_limits(reference or {}, (*minimize, *maximize))
    values = [known.get(name, np.nan) for name in minimize]
    return np.array(values + [-known.get(name, np.nan) for name in maximize], dtype=np.float64)


def _share(points: NDArray[np.float64], given: NDArray[np.float64]) -> float | None:
    points = points[np.isfinite(points).all(axis=1)]
    if len(points) == 0:
        return None
    reference = np.where(np.isnan(given), points.max(axis=0), given)
    best = points.min(axis=0)
    box = reference - best
    if not (box > 0).all():
        # A box without volume in one objective: nothing there tells rows apart.
        return None
    return dominated_volume((points - best) / box, np.ones_like(box))


def _volume(front: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    if front.shape[1] == 1:
        return float(reference[0] - front[:, 0].min())
    order = front[:, -1].argsort(kind="stable")
    front = front[order]
    if front.shape[1] == 2:
        lowest = np.minimum.accumulate(front[:, 0])
        heights = np.diff(np.append(front[:, 1], reference[1]))
        return float(((reference[0] - lowest) * heights).sum())
    total = 0.0
    ends = np.append(front[1:, -1], reference[-1])
    for count, (start, end) in enumerate(zip(front[:, -1], ends, strict=True), start=1):
        if end > start:
            slab = front[:count, :-1]
            total += float(end - start) * _volume(slab[non_dominated(slab)], reference[:-1])
    return total


def least_possible(frame: Any, limits: Limits) -> str:
    """What no row meets, as a sentence: each limited column and the least value there is."""
    parts = []
    for column, limit in limits.items():
        values, eligible = _eligible_points(frame, (column,))
        if eligible.any():
            parts.append(f"{column} <= {limit:.6g} (least: {values[eligible, 0].min():.6g})")
    if not parts:
        raise InputError(f"no row has a value of {', '.join(limits)}")
    return "no row is within " + " and ".join(parts)
