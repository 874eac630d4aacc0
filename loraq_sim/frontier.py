"""What a front says: its knee, the volume it dominates, and the best row within limits.

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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError
from loraq_sim.limits import Limits, checked_limits
from loraq_sim.pareto import (
    ERROR_OBJECTIVE,
    eligible_points,
    front_indices,
    group_members,
    non_dominated,
)

__all__ = [
    "best_under",
    "dominated_volume",
    "hypervolume",
    "knee_of",
    "knee_point",
    "least_possible",
    "survey_front",
    "within",
]

_TOLERANCE = 1e-9
_DEFAULT = (ERROR_OBJECTIVE, "latency_s")


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
    if sums[least] < max(np.count_nonzero(extent > 0) - 1, _TOLERANCE) - _TOLERANCE:
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
    minimize: Sequence[str] = _DEFAULT,
    maximize: Sequence[str] = (),
    *,
    reference: Limits | None = None,
) -> float | None:
    """Share of the box up to the reference point that the front of all rows dominates, 0 to 1.

    `reference` gives the worst value of some or all objectives by column. None if no row is
    eligible or the box has no volume.
    """
    points, eligible = eligible_points(frame, minimize, maximize)
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
    points, eligible = eligible_points(frame, (minimize,))
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
        values, _ = eligible_points(frame, (column,))
        # A missing value is NaN, which is not below anything.
        meets &= values[:, 0] <= limit + _TOLERANCE * abs(limit)
    return meets


def survey_front(
    rows: list[dict[str, Any]],
    minimize: Sequence[str] = _DEFAULT,
    maximize: Sequence[str] = (),
    *,
    by: Sequence[str] = (),
    reference: Limits | None = None,
) -> list[dict[str, Any]]:
    """Rows on the front of their group, sorted as by `per_layer_front`, with what the front says.

    Adds ``pareto`` (True), ``is_knee`` and ``hypervolume``, that of the row's group.
    """
    given = _given(reference, minimize, maximize)
    points, eligible = eligible_points(rows, minimize, maximize)
    names = (minimize,) if isinstance(minimize, str) else tuple(minimize)
    group_of = {int(i): n for n, group in enumerate(group_members(rows, by)) for i in group}
    fronts: dict[int, list[int]] = {}
    for index in front_indices(rows, minimize, maximize, by=by):
        fronts.setdefault(group_of[int(index)], []).append(int(index))
    found = []
    for number, members in enumerate(group_members(rows, by)):
        front = fronts.get(number, [])
        volume = _share(points[members[eligible[members]]], given) if front else None
        knee = knee_of(points[front], names) if front else None
        for place, index in enumerate(front):
            facts = {"pareto": True, "is_knee": place == knee, "hypervolume": volume}
            found.append(rows[index] | facts)
    return found


def _given(
    reference: Limits | None, minimize: Sequence[str], maximize: Sequence[str]
) -> NDArray[np.float64]:
    """The reference point as far as it is given, smaller better, NaN where it is not."""
    minimize = (minimize,) if isinstance(minimize, str) else tuple(minimize)
    maximize = (maximize,) if isinstance(maximize, str) else tuple(maximize)
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
        values, eligible = eligible_points(frame, (column,))
        if eligible.any():
            parts.append(f"{column} <= {limit:.6g} (least: {values[eligible, 0].min():.6g})")
    if not parts:
        raise InputError(f"no row has a value of {', '.join(limits)}")
    return "no row is within " + " and ".join(parts)
