"""The one verdict: which split to build, why, what ties with it and what would change it.

`verdict_of` reads model totals and nothing else. Sweep, `pareto`, report, pictures and Python all
ask it, so that one store gives one answer in the same words. `loraq_sim.results.choice` is the rule
that chooses, `loraq_sim.results.reasons` the sentences.

**Over several accelerators** (and dumps) each has its verdict. The one split for all of them is
chosen by the same rule from the splits that all have: the error is the worst one, the cost the
geometric mean of cost / least cost, bytes, energy and traffic likewise, and the margins are the
largest.

**Over several arrays** a split stands for itself once: on the array of least area in which no add
overflows, or, where every array overflows, on that of least error. All of them are compared in a
sentence, and in area on the front.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import shown_line
from loraq_sim.results.choice import (
    COSTS,
    Candidate,
    choose,
    has_cost,
    has_error,
    latency_accuracy,
    objectives_of,
)
from loraq_sim.results.columns import number_of, plain_rows
from loraq_sim.results.front import ERROR_OBJECTIVE
from loraq_sim.results.planned import partial_text
from loraq_sim.results.reasons import Case, Change, changes_of, headline_of, sentences_of, ties_of
from loraq_sim.results.rows import EVALUATED, IDENTITY, Row
from loraq_sim.results.wording import context_of, labelled, listing, value_text

__all__ = ["Verdict", "verdict_of"]


_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict:
    """What to build on one accelerator, or on all of them.

    Attributes
    ----------
    context : str
        The accelerator (``dump on accelerator`` with several dumps); all of them, listed, of the
        verdict over all.
    split, label : str or None
        The split to build, and with the settings in which cases of that split differ. Over several
        accelerators that is the one split for all. None where there is nothing to build.
    headline : str
        The verdict in one line.
    why : str
        What the split costs and loses, and why it is the one.
    ties : tuple of str
        Labels of what the cost model cannot tell from it by the cost that decides; less error, then
        fewer bytes, decided between them.
    would_change : tuple of Change
        The limits at which another split becomes the answer.
    notes : tuple of str
        Why others lose, and what to know before building it.
    text : str
        All of it, one sentence or two a line; the first line is the headline.
    joint : str
        Over several accelerators that do not agree: the sentence on the one split for all.
    partial : str
        What was planned and has no result yet, so that the verdict may change; empty if nothing.
    is_fit : bool
        Whether its error is finite and at most 25 %.
    error, cost : str
        Columns it was read from; `cost` is empty where no cost is known.
    row : dict or None
        The total of the split; of several seeds, the one of the median error.
    area : str
        ``area_ge`` where splits were evaluated on several arrays, else empty.
    on : mapping of str to Verdict
        The verdicts by context; of the verdict of a context, that one alone.
    """

    context: str
    split: str | None
    label: str | None
    headline: str
    why: str = ""
    ties: tuple[str, ...] = ()
    would_change: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    text: str = ""
    joint: str = ""
    partial: str = ""
    is_fit: bool = False
    error: str = ERROR_OBJECTIVE
    cost: str = ""
    row: Row | None = None
    area: str = ""
    on: Mapping[str, "Verdict"] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        from loraq_sim.results.cards import shortened

        shown = [self.headline, *map(shortened, self.sentences[:_MOST_SHOWN])]
        n_more = len(self.sentences) - _MOST_SHOWN
        return "\n".join([*shown, *([f"... {n_more} more in .text"] if n_more > 0 else [])])

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import verdict_card

        return verdict_card(self)

    @property
    def objectives(self) -> list[str]:
        """Columns that a front is made of: error, cost, and area where arrays compete."""
        return [name for name in (self.error, self.cost, self.area) if name]

    @property
    def sentences(self) -> tuple[str, ...]:
        """The lines of the text after the headline."""
        return tuple(self.text.split("\n")[1:])

    def as_dict(self) -> dict[str, Any]:
        """The verdict as plain values, for JSON: without rows; by context under ``on``."""
        names = (
            "context",
            "split",
            "label",
            "headline",
            "why",
            "ties",
            "notes",
            "joint",
            "partial",
            "text",
        )
        plain = {name: getattr(self, name) for name in (*names, "is_fit", "error", "cost")}
        plain["would_change"] = [change.as_dict() for change in self.would_change]
        if len(self.on) > 1:
            plain["on"] = {context: verdict.as_dict() for context, verdict in self.on.items()}
        return plain


def verdict_of(totals: Any, *, error: str | None = None, cost: str | None = None) -> Verdict:
    """The verdict on model totals.

    Parameters
    ----------
    totals : DataFrame or sequence of mappings
        Rows of `loraq_sim.model_totals`, or of one layer.
    error : str, optional
        Column to judge by; by default ``output_error``, or ``weight_error`` on an accelerator where
        no total has an output error.
    cost : str, optional
        Column to weigh against it; by default the first of latency, weight memory, energy and DRAM
        traffic that is known.
    """
    cases = list(_cases(plain_rows(totals), error, cost))
    found = {case.context: _verdict(case) for case in cases}
    if len(found) == 1:
        (only,) = found.values()
        return only
    return _over_all(cases, found)


def said_of_a_part(
    verdict: Verdict,
    rows: Sequence[Mapping[str, Any]],
    missing: Sequence[Mapping[str, Any]],
    *,
    is_kept: bool = True,
) -> Verdict:
    """`verdict` on `rows`, which says what of its sweeps is `missing`, in each context its own.

    `missing` are cases of `ResultStore.missing`; `is_kept`: whether there is a store.
    """
    if not missing:
        return verdict
    several = len({row.get("dump") for row in rows}) > 1
    n_rows = Counter(context_of(row, several_dumps=several) for row in rows)
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for case in filter(None, missing):
        cases.setdefault(context_of(case, several_dumps=several), []).append(case)
    on = {
        context: _said(own, partial_text(n_rows[context], cases.get(context, ()), is_kept=is_kept))
        for context, own in verdict.on.items()
    }
    told = _said(verdict, partial_text(len(rows), missing, is_kept=is_kept))
    # Of one context, whatever else was planned: what is said of it is said of all.
    on = {context: told for context in on} if len(on) == 1 else on
    return replace(told, on=on)


def _said(verdict: Verdict, partial: str) -> Verdict:
    if not partial:
        return verdict
    text = "\n".join((verdict.headline, shown_line(partial), *verdict.sentences))
    return replace(verdict, notes=(*verdict.notes, partial), text=text, partial=partial)


def the_context(verdict: Verdict, accelerator: str | None) -> str:
    """The one context of a verdict, or the one of this accelerator.

    Raises
    ------
    InputError
        If there are several to choose from, or none of this name.
    """
    names = {
        context: str(own.row["accelerator"]) if own.row else context
        for context, own in verdict.on.items()
    }
    found = [context for context, name in names.items() if accelerator in (None, name, context)]
    if not found:
        raise InputError(unknown_name("accelerator", str(accelerator), names))
    if len(found) > 1:
        raise InputError(f"there are {listing(found)}; choose one by accelerator=...")
    return found[0]


def _cases(rows: Sequence[Row], error: str | None, cost: str | None) -> Iterator[Case]:
    """What there is to choose from in each context, in order of appearance."""
    several = len({row.get("dump") for row in rows}) > 1
    contexts: dict[str, list[tuple[str, Row]]] = {}
    # Seeds are no choice of the architect: their rows are one candidate.
    for row, named in zip(rows, labelled([row | {"seed": None} for row in rows]), strict=True):
        members = contexts.setdefault(context_of(row, several_dumps=several), [])
        if row.get("status", "ok") in EVALUATED:
            members.append((named["label"], row))
    for context, members in contexts.items():
        yield _case(context, members, error, cost)


_ARRAY = ("acc_bits", "overflow", "products_per_add", "accumulators")
_ARRAY_OPTIONS = ("tree_bits", "tree_overflow", "array")
_APART = (*_ARRAY, "options", "seed")
_AREA = "area_ge"


def _options_apart(row: Row) -> tuple[str, str]:
    """Options of a row without those of its array, and these."""
    text = row.get("options") or ""
    try:
        options = json.loads(text or "{}")
        inner = dict(options.get("datapath", {}))
    except (AttributeError, TypeError, ValueError):
        return str(text), ""
    own = {name: inner.pop(name) for name in _ARRAY_OPTIONS if name in inner}
    rest = {**options, "datapath": inner} if inner else {**options}
    if not inner:
        rest.pop("datapath", None)
    return json.dumps(rest, sort_keys=True), json.dumps(own, sort_keys=True) if own else ""


def _without_arrays(
    named: Sequence[tuple[str, Row]], error: str
) -> tuple[list[tuple[str, Row]], dict[str, tuple[Row, ...]]]:
    """Rows of splits on one array each, and the others' totals by the label of that one."""
    splits: dict[tuple, dict[tuple, list[tuple[str, Row]]]] = {}
    for label, row in named:
        rest, own = _options_apart(row)
        key = (rest, *(row.get(name) for name in IDENTITY if name not in _APART))
        array = (own, *(row.get(name) for name in _ARRAY))
        splits.setdefault(key, {}).setdefault(array, []).append((label, row))
    kept: list[tuple[str, Row]] = []
    compared: dict[str, tuple[Row, ...]] = {}
    for arrays in splits.values():
        groups = list(arrays.values())
        needed = (_AREA, "acc_bits", "products_per_add")
        is_priced = all(
            number_of(row, name) for group in groups for _, row in group for name in needed
        )
        if len(groups) == 1 or not is_priced:
            kept += [pair for group in groups for pair in group]
            continue
        best = min(groups, key=lambda group: _array_rank(group, error))
        kept += best
        middle = [
            sorted(g, key=lambda pair: _error_of(pair[1], error))[(len(g) - 1) // 2] for g in groups
        ]
        compared[best[0][0]] = tuple(
            {**row, "options": _options_apart(row)[1]} for _, row in middle
        )
    return kept, compared


def _array_rank(group: Sequence[tuple[str, Row]], error: str) -> tuple[float, ...]:
    """Arrays without overflow first, the smallest of them; then by error."""
    rows = [row for _, row in group]
    area = float(rows[0][_AREA])
    if all(row.get("overflow_count") == 0 for row in rows):
        return (0.0, area, float(rows[0].get("acc_bits") or 0))
    return (1.0, max(_error_of(row, error) for row in rows), area)


def _case(
    context: str, named: Sequence[tuple[str, Row]], error: str | None, cost: str | None
) -> Case:
    rows = [row for _, row in named]
    error, cost = objectives_of(rows, error=error or "", cost=cost or "")
    named, arrays = _without_arrays(named, error)
    judged = [(label, row) for label, row in named if has_error(row, error)]
    seeds: dict[str, list[Row]] = {}
    for label, row in judged:
        if not cost or has_cost(row, cost):
            seeds.setdefault(label, []).append(row)
    pairs = [_candidate(label, members, error, cost) for label, members in seeds.items()]
    accelerator = str(rows[0].get("accelerator") or "") if rows else ""
    worst, seen = latency_accuracy(accelerator) if accelerator else (0.0, "")
    return Case(
        context=context,
        accelerator=accelerator,
        candidates=tuple(candidate for candidate, _ in pairs),
        rows=tuple(row for _, row in pairs),
        error=error,
        cost=cost,
        margin=worst,
        seen=seen,
        n_without_cost=len({label for label, _ in judged}) - len(seeds),
        arrays=arrays,
    )


def _error_of(row: Row, error: str) -> float:
    value = number_of(row, error)
    return math.inf if value is None else float(value)


def _candidate(label: str, members: Sequence[Row], error: str, cost: str) -> tuple[Candidate, Row]:
    """The candidate of rows that differ in the seed only, and the row of their median error."""
    ordered = sorted(members, key=lambda row: _error_of(row, error))
    errors = [_error_of(row, error) for row in ordered]
    row = ordered[(len(ordered) - 1) // 2]
    names = dict.fromkeys((*((cost,) if cost else ()), *COSTS))
    candidate = Candidate(
        label=label,
        split=str(row["split"]),
        # One seed that overflows is enough to overflow in use.
        error=errors[(len(errors) - 1) // 2] if math.isfinite(errors[-1]) else math.inf,
        costs={name: float(row[name]) for name in names if has_cost(row, name)},
        spread=errors[-1] / errors[0] - 1 if errors[0] > 0 and math.isfinite(errors[0]) else 0.0,
    )
    return candidate, row


def _verdict(case: Case) -> Verdict:
    index = choose(case.candidates, case.cost or None, case.margin)
    case = replace(case, chosen=index)
    changes, ties = changes_of(case), ties_of(case)
    headline = headline_of(case)
    said = sentences_of(case, ties, changes)
    # Names from files may hold line ends; a sentence is one line.
    lines = [shown_line(line) for line in (headline, *said.lines)]
    best = case.best
    verdict = Verdict(
        context=case.context,
        split=best.split if best else None,
        label=best.label if best else None,
        headline=lines[0],
        why=said.why,
        ties=tuple(candidate.label for candidate in ties),
        would_change=tuple(changes),
        notes=tuple(said.notes),
        text="\n".join(lines),
        is_fit=case.is_fit,
        error=case.error,
        cost=case.cost,
        row=case.rows[index] if index is not None else None,
        area=_AREA if case.arrays else "",
    )
    return replace(verdict, on={case.context: verdict})


def _over_all(cases: Sequence[Case], found: Mapping[str, Verdict]) -> Verdict:
    headline = _joint_headline(found)
    labels = {verdict.label for verdict in found.values()}
    joint = _joint_case(cases)
    line = ""
    if len(labels) == 1:
        (label,) = labels
        same = next(iter(found.values()), None)
        split = same.split if same else None
    else:
        best = joint.best
        label, split = (best.label, best.split) if best else (None, None)
        line = _joint_line(joint, found) if found else ""
    lines = [headline, *([line] if line else [])]
    lines += [f"{name}: {text}" for name, verdict in found.items() for text in verdict.sentences]
    shared = [set(verdict.ties) for verdict in found.values()]
    first = next(iter(found.values()), None)
    return Verdict(
        context=listing(list(found)),
        split=split,
        label=label,
        headline=headline,
        why=line or " ".join(f"{name}: {verdict.why}" for name, verdict in found.items()),
        ties=tuple(t for t in first.ties if all(t in own for own in shared)) if first else (),
        would_change=tuple(change for v in found.values() for change in v.would_change),
        notes=tuple(f"{name}: {note}" for name, v in found.items() for note in v.notes),
        text="\n".join(lines),
        joint=line,
        is_fit=bool(found) and all(verdict.is_fit for verdict in found.values()),
        error=first.error if first else ERROR_OBJECTIVE,
        cost=first.cost if first else "",
        area=next((verdict.area for verdict in found.values() if verdict.area), ""),
        on=dict(found),
    )


def _joint_headline(found: Mapping[str, Verdict]) -> str:
    picks: dict[str, list[str]] = {}
    for context, verdict in found.items():
        if verdict.label is not None and verdict.is_fit:
            picks.setdefault(verdict.label, []).append(context)
    parts = [f"{label} on {listing(places)}" for label, places in picks.items()]
    unfit = [verdict.headline for verdict in found.values() if not verdict.is_fit]
    if not parts:
        # Each names its accelerator.
        first, *others = unfit or [headline_of(None)]
        return "; ".join([first, *map(_within_sentence, others)])
    return "; ".join([f"Build {listing(parts)}", *map(_within_sentence, unfit)])


def _within_sentence(headline: str) -> str:
    """A headline of a split that is not built, after a semicolon."""
    return f"{headline[:1].lower()}{headline[1:]}"


def _joint_case(cases: Sequence[Case]) -> Case:
    """What all contexts have to choose from, errors and costs taken together, and the choice."""
    by_label = [{c.label: c for c in case.candidates} for case in cases]
    common = [
        label for label in (by_label[0] if cases else ()) if all(label in b for b in by_label)
    ]
    kinds = {case.error for case in cases}
    if not common or len(kinds) > 1:
        return Case(context=listing([case.context for case in cases]))
    least = [
        {
            name: min(c.costs[name] for c in case.candidates if name in c.costs)
            for name in {name for c in case.candidates for name in c.costs}
        }
        for case in cases
    ]

    def joined(label: str) -> Candidate:
        own = [candidates[label] for candidates in by_label]
        names = set.intersection(*(set(c.costs) for c in own))
        costs = {
            name: math.exp(
                sum(
                    math.log(c.costs[name] / low[name]) if low[name] > 0 else 0.0
                    for c, low in zip(own, least, strict=True)
                )
                / len(own)
            )
            for name in names
        }
        worst = max(own, key=lambda c: c.error)
        return replace(worst, costs=costs, spread=max(c.spread for c in own))

    candidates = tuple(joined(label) for label in common)
    shared = [name for name in COSTS if all(name in c.costs for c in candidates)]
    cost = shared[0] if shared else ""
    case = Case(
        context=listing([case.context for case in cases]),
        candidates=candidates,
        error=cases[0].error,
        cost=cost,
        margin=max(case.margin for case in cases),
    )
    return replace(case, chosen=choose(candidates, cost or None, case.margin))


def _joint_line(joint: Case, found: Mapping[str, Verdict]) -> str:
    best = joint.best
    if best is None:
        has = "is fit to build" if joint.candidates else "has a result"
        return f"No split {has} on all of {listing(list(found))}."
    worst = f"{value_text(joint.error, best.error)} {joint.error.replace('_', ' ')} at worst"
    fit = "" if joint.is_fit else ", which is more than 25 %: none of them is fit for all"
    return f"One split for all of {listing(list(found))}: {best.label}, with {worst}{fit}."
