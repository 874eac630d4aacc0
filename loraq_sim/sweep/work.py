"""How much work a case is next to others of its effort. What a unit of it takes is measured.

Nothing here knows what a solver does inside: cases of one effort (a method with a preset, plain
rounding, or a solution that an earlier case has) are compared by the size of the layer alone,

    N K (1 + r / 64)  where it is solved,  and  N K / 8 + T (N + K)  for what is emulated,

with N K weights, rank r and T activation rows. Seconds per unit come from a probe of each effort
or from finished cases (`loraq_sim.sweep.forecast`, `loraq_sim.sweep.progress`).
"""

import math
import re
from collections.abc import Iterable, Mapping

from loraq_sim.case_settings import CaseSettings
from loraq_sim.dumps import LayerInfo

__all__ = ["SOLVED", "case_work", "effort_of", "rank_of", "seconds_of", "units_by_effort"]

SOLVED = "solved"
_ROUNDED = "rtn"
_RANK = 64.0
_WEIGHTS_PER_VALUE = 8.0


def effort_of(settings: CaseSettings, *, is_solved: bool) -> str:
    """Cases of one effort take the same time per unit of work."""
    if is_solved:
        return SOLVED
    if not settings.split.has_branch:
        return _ROUNDED
    return f"{settings.method} {settings.preset}"


def case_work(settings: CaseSettings, info: LayerInfo | None, *, is_solved: bool) -> float:
    """Units of work of one case; 1 for a layer that nobody could describe."""
    if info is None:
        return 1.0
    weights = info.n * info.k
    rows = min(settings.tokens or math.inf, info.tokens or 0)
    units = weights / _WEIGHTS_PER_VALUE + rows * (info.n + info.k)
    if not is_solved:
        units += weights * (1.0 + min(rank_of(settings), info.n, info.k) / _RANK)
    return units


def units_by_effort(work: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sum of units by effort, of (effort, units) pairs."""
    sums: dict[str, float] = {}
    for effort, units in work:
        sums[effort] = sums.get(effort, 0.0) + units
    return sums


def seconds_of(units: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    """Seconds of `units` at `rates` (seconds per unit), by effort; None if a rate is missing."""
    needed = {effort: amount for effort, amount in units.items() if amount > 0}
    if not needed.keys() <= rates.keys():
        return None
    return sum(amount * rates[effort] for effort, amount in needed.items())


def rank_of(settings: CaseSettings) -> int:
    """Rank of the branch, for a budget about the rank its codes alone would allow."""
    split = settings.split
    if not split.has_branch:
        return 0
    if split.rank is not None:
        return split.rank
    bits = int(re.match(r"W(\d+)", split.branch)[1])
    return int(split.budget.rpartition("@")[2]) * 16 // bits
