"""Which of several candidates to take, when costs and errors are known only up to a margin.

**Beats.** Of two candidates U beats V if it has less error and costs no more, or costs less and has
no more error, where *less* is beyond the margin and *no more* is up to it: U / V < 1 / (1 + margin)
against U / V <= 1 + margin. The margin of a modelled cost is the error its model was seen to have,
that of the error the spread over seeds, that of bytes is zero. With zero margins this is Pareto
dominance. It has no circles: with distances in units of log(1 + margin), each step from a candidate
to one that beats it lowers the sum of log error and log cost. So some candidates are never beaten:
the front beyond ties.

**Choice.** The knee (`results.front.knee_point`) of the Pareto front, errors as logarithms,
taken among the members of the front beyond ties. Of those that tie with the knee in both, the one
with the fewest bytes is taken, then with the least error, energy and DRAM traffic. Candidates of at
most `WORST_ERROR` come first: others are chosen only where there is no better one.

**Margin of a latency.** The error of a measured GEMM is predicted / measured - 1. With w the worst
absolute one of a device, on rows of the kernel families that a layer would get, the true latency is
taken to lie between predicted / (1 + w) and predicted / (1 - w). A device with fewer than
`FEWEST_ROWS` measured GEMMs gets the worst of all devices: few rows say little. What the model gets
wrong for all splits alike cancels between them, so that differences of splits may be known better
than the bounds suggest. Energies have no measured table, so they have no bounds.

**Why a split loses** is read from what its total says of its roundings. Rounding P between the
factors of a branch is a reason where a P of 16 bits, whose error is measured beside that of the
split, would take away a fifth of the error or more. Of the answer it is said what causes at least
half of its squared error.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hwmodels
from hwmodels.families import usual_families
from loraq_sim.errors import InputError, counted
from loraq_sim.formats import parse_format
from loraq_sim.results.columns import number_of
from loraq_sim.results.front import knee_of, non_dominated
from loraq_sim.results.rows import AnyRow, Row
from loraq_sim.results.wording import main_and_branch_of, value_text

__all__ = [
    "COSTS",
    "Candidate",
    "FEWEST_ROWS",
    "Margins",
    "WORST_ERROR",
    "choose",
    "diagnoses",
    "front_beyond_ties",
    "has_cost",
    "has_error",
    "OF_USUAL_KERNELS",
    "latency_accuracy",
    "rows_of_usual_kernels",
    "margins_of",
    "objectives_of",
    "with_latency_bounds",
]


COSTS = ("latency_s", "weight_bytes", "energy_j", "dram_bytes")
"""Costs of a candidate; the first that all of them have is the one the choice is made by."""

WORST_ERROR = 0.25
"""Relative error above which nothing is recommended without a word."""

_MODELLED = ("latency_s", "energy_j")
_TIE_BREAKERS = ("weight_bytes", "error", "energy_j", "dram_bytes", "latency_s")
_ROUNDING = 1e-9


def objectives_of(rows: Sequence[AnyRow], *, error: str = "", cost: str = "") -> tuple[str, str]:
    """Error and cost that rows are judged by, where `error` and `cost` name none.

    The error is that of the output; where no row knows it, for want of activations, that of the
    weights. The cost is the first of `COSTS` that a row with an error knows, empty if none does.
    """
    if not error:
        error = "output_error"
        if rows and not any(has_error(row, error) for row in rows):
            error = "weight_error"
    asked = (cost,) if cost else COSTS
    judged = [row for row in rows if has_error(row, error)]
    return error, next((name for name in asked if any(has_cost(r, name) for r in judged)), "")


def has_error(row: AnyRow, error: str) -> bool:
    """Whether a row has the error; an output that is not finite has an infinite one."""
    value = number_of(row, error)
    return row.get("status") == "overflow" or (value is not None and value >= 0)


def has_cost(row: AnyRow, cost: str) -> bool:
    """Whether a row has the cost: a file may hold anything."""
    value = number_of(row, cost)
    return value is not None and 0 <= value < math.inf


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to build: `label` and `split` name it, `error` and `costs` are what it is judged by.

    `costs` holds those of `COSTS` that are known; `spread` is by how much the error differs between
    seeds, largest / smallest - 1.
    """

    label: str
    split: str
    error: float
    costs: Mapping[str, float] = field(default_factory=dict)
    spread: float = 0.0

    def value(self, name: str) -> float:
        """The error, or a cost; infinite where it is not known."""
        return self.error if name == "error" else self.costs.get(name, math.inf)


@dataclass(frozen=True, kw_only=True)
class Margins:
    """Relative differences that are none: of modelled costs (latency, energy) and of errors."""

    cost: float = 0.0
    error: float = 0.0

    def of(self, name: str) -> float:
        """The margin of ``error`` or of a cost; bytes are counted, not modelled."""
        if name == "error":
            return self.error
        return self.cost if name in _MODELLED else 0.0

    def ties(self, name: str, first: float, second: float) -> bool:
        """Whether two values of `name` do not differ beyond the margin."""
        return max(first, second) <= min(first, second) * self._factor(name)

    def _factor(self, name: str) -> float:
        return (1 + self.of(name)) * (1 + _ROUNDING)


def front_beyond_ties(
    candidates: Sequence[Candidate], cost: str | None, margins: Margins
) -> list[int]:
    """Indices of the candidates that none beats, in their order; `cost` None: by error alone.

    In O(C log C). Errors must be finite.
    """
    errors = np.array([c.error for c in candidates], dtype=np.float64)
    costs = np.array([c.value(cost) if cost else 0.0 for c in candidates], dtype=np.float64)
    order = np.argsort(costs, kind="stable")
    least = np.minimum.accumulate(errors[order])
    cost_factor = (1 + (margins.of(cost) if cost else 0.0)) * (1 + _ROUNDING)
    error_factor = (1 + margins.error) * (1 + _ROUNDING)

    def least_error_of(last: NDArray[np.intp]) -> NDArray[np.float64]:
        """Least error of the `last` cheapest candidates; infinite of none."""
        return np.where(last > 0, least[np.maximum(last, 1) - 1], np.inf)

    no_dearer = np.searchsorted(costs[order], costs * cost_factor, side="right")
    cheaper = np.searchsorted(costs[order], costs / cost_factor, side="left")
    beaten = least_error_of(no_dearer) * error_factor < errors
    beaten |= least_error_of(cheaper) <= errors * error_factor
    return np.flatnonzero(~beaten).tolist()


def margins_of(candidates: Sequence[Candidate], cost_margin: float) -> Margins:
    """Margins among these candidates: the errors of all are as sure as those of the least sure."""
    spreads = [c.spread for c in candidates if math.isfinite(c.spread)]
    return Margins(cost=cost_margin, error=max(spreads, default=0.0))


def choose(
    candidates: Sequence[Candidate], cost: str | None, cost_margin: float = 0.0
) -> int | None:
    """Index of the candidate to take, None if no error is finite; see the module for the rule."""
    margins = margins_of(candidates, cost_margin)
    finite = [i for i, c in enumerate(candidates) if math.isfinite(c.error)]
    fit = [i for i in finite if candidates[i].error <= WORST_ERROR] or finite
    if not fit:
        return None
    members = [candidates[i] for i in fit]
    front = front_beyond_ties(members, cost, margins)
    points = np.array([[c.error, c.value(cost) if cost else 0.0] for c in members])
    # The scale is that of the whole front: its cheap end may tie with better ones and be beaten.
    spanning = sorted({*np.flatnonzero(non_dominated(points)).tolist(), *front})
    among = [spanning.index(i) for i in front]
    knee = knee_of(points[spanning], ("output_error", cost or "cost"), among)
    chosen = front[0] if knee is None else spanning[knee]
    return fit[_last_tie(members, front, chosen, cost, margins)]


def _last_tie(
    members: Sequence[Candidate],
    front: Sequence[int],
    chosen: int,
    cost: str | None,
    margins: Margins,
) -> int:
    """The member of the front that is taken among those that tie with the chosen one."""

    def rank(index: int) -> tuple[float, ...]:
        return tuple(members[index].value(name) for name in _TIE_BREAKERS)

    names = ("error", cost) if cost else ("error",)
    while True:
        tied = [
            index
            for index in front
            if all(
                margins.ties(name, members[index].value(name), members[chosen].value(name))
                for name in names
            )
        ]
        best = min(tied, key=rank)
        if rank(best) >= rank(chosen):
            return chosen
        chosen = best


_MOST_OF_IT = 0.5
# A cure that takes less than a fifth of the error is none.
_WORTH_IT = 0.8


def diagnoses(
    candidates: Sequence[Candidate], rows: Sequence[Row], error: str, chosen: int | None
) -> list[str]:
    """A sentence for the split that rounding P hurts most, and one for what limits the answer."""
    if error != "output_error":
        return []
    cases = list(zip(candidates, rows, strict=True))
    found = []
    losing = [
        (candidate, row)
        for index, (candidate, row) in enumerate(cases)
        if index != chosen and _is_hurt_by_p(candidate, row, candidates)
    ]
    if losing:
        found.append(_p_sentence(*max(losing, key=lambda case: case[1]["p_error_share"]), cases))
    if chosen is not None:
        found += _what_limits(*cases[chosen])
    return found


def _is_hurt_by_p(candidate: Candidate, row: Row, candidates: Sequence[Candidate]) -> bool:
    share, wide = number_of(row, "p_error_share"), number_of(row, "wide_p_error")
    if share is None or wide is None or not math.isfinite(candidate.error):
        return False
    # However little it takes, where it turns a branch that helps into one that harms.
    harms = any(wide < plain.error for plain in _without_branch(candidate, candidates))
    return share > 0 and (harms or wide <= _WORTH_IT * candidate.error)


def _without_branch(candidate: Candidate, candidates: Iterable[Candidate]) -> list[Candidate]:
    """Candidates of the same main branch alone that are no worse."""
    main, branch = main_and_branch_of(candidate.split)
    return [c for c in candidates if branch and c.split == main and c.error <= candidate.error]


def _p_sentence(candidate: Candidate, row: Row, cases: Sequence[tuple[Candidate, Row]]) -> str:
    text = f"{candidate.label} loses because P rounded to {_bits_text(row.get('p_format'))} causes "
    text += f"{_share_text(row['p_error_share'])} of its squared error; a 16-bit P gives "
    text += value_text("output_error", row["wide_p_error"])
    plain = _without_branch(candidate, (c for c, _ in cases))
    if plain:
        told = value_text("output_error", plain[0].error)
        text += f", and {plain[0].label} without a branch {told}"
    return f"{text}."


def _what_limits(candidate: Candidate, row: Row) -> list[str]:
    for name, what in (
        ("p_error_share", f"rounding P to {_bits_text(row.get('p_format'))}"),
        ("activation_error_share", "rounding the activations of its main branch"),
    ):
        share = number_of(row, name)
        if share is not None and share >= _MOST_OF_IT:
            return [f"{_share_text(share)} of the squared error of {candidate.label} is {what}."]
    return []


def _share_text(share: float) -> str:
    return f"{100 * min(share, 1.0):.0f} %"


def _bits_text(fmt: Any) -> str:
    try:
        return f"{parse_format(fmt).element.bits} bits"
    except (InputError, TypeError, ValueError, AttributeError):
        return "its format"


FEWEST_ROWS = 3
OF_USUAL_KERNELS = "the kernels that a layer would get"
"""Which measured rows the margin of a latency is read from."""


@functools.lru_cache(maxsize=64)
def latency_accuracy(accelerator: str) -> tuple[float, str]:
    """Worst relative error of the latency model, and what it was seen on.

    An accelerator that is not shipped has the worst error of all that are.
    """
    own = _summary(accelerator) if accelerator in hwmodels.list_accelerators() else None
    if own is not None and own["rows"] >= FEWEST_ROWS:
        seen = f"worst of {own['rows']} GEMMs measured on {accelerator}, of {OF_USUAL_KERNELS}"
        return own["worst_error"], seen
    shipped = {name: _summary(name) for name in hwmodels.list_accelerators()}
    summaries = {name: summary for name, summary in shipped.items() if summary is not None}
    rows = sum(summary["rows"] for summary in summaries.values())
    worst = max(summary["worst_error"] for summary in summaries.values())
    n_own = own["rows"] if own is not None else 0
    measured = f"{counted(rows, 'GEMM')} of {counted(len(summaries), 'device')}"
    return worst, f"worst of {measured}, {n_own} of them {accelerator}"


@functools.lru_cache(maxsize=64)
def _summary(name: str) -> dict[str, Any] | None:
    """How far the rows measured on a shipped accelerator are off; None where there are none."""
    machine = hwmodels.load_accelerator(name)
    own = rows_of_usual_kernels(machine, hwmodels.validate(machine))
    return hwmodels.summarize(own, "accelerator")[0] if own else None


def rows_of_usual_kernels(
    machine: "hwmodels.Accelerator", rows: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of `hwmodels.validate` that ran in kernels which a layer on `machine` would get."""
    usual = usual_families(machine)
    return [row | {"accelerator": machine.name} for row in rows if row["kernel_family"] in usual]


def with_latency_bounds(
    rows: Sequence[dict[str, Any]], *, by: Sequence[str] = ("accelerator",)
) -> list[dict[str, Any]]:
    """Copies of `rows` with ``latency_lo_s``, ``latency_hi_s`` and ``within_uncertainty``.

    The last counts the other rows with the same values in `by` whose latency differs by no more
    than the model's error: the verdict takes them as equal. None where the latency is not known.
    """
    bounded = [dict(row) | _bounds(row) for row in rows]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in bounded:
        if row["latency_lo_s"] is not None:
            groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    for members in groups.values():
        for row in members:
            far = 1 + latency_accuracy(row["accelerator"])[0]
            latency = row["latency_s"]
            alike = [
                max(latency, other["latency_s"]) <= far * min(latency, other["latency_s"])
                for other in members
            ]
            row["within_uncertainty"] = sum(alike) - 1
    return bounded


def _bounds(row: dict[str, Any]) -> dict[str, Any]:
    latency = row.get("latency_s")
    if latency is None or not row.get("accelerator"):
        return dict.fromkeys(("latency_lo_s", "latency_hi_s", "within_uncertainty"))
    worst, _ = latency_accuracy(row["accelerator"])
    return {"latency_lo_s": latency / (1 + worst), "latency_hi_s": latency / max(1 - worst, 1e-9)}
