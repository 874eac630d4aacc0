"""Why a split is chosen, what ties with it and what would change it: facts and their sentences.

Of a split that was evaluated on several arrays it is also said what each width of accumulator saves
in area behind each adder tree, where the first add overflows, and what that costs in error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loraq_sim.errors import counted
from loraq_sim.results.choice import (
    COSTS,
    WORST_ERROR,
    Candidate,
    Margins,
    choose,
    diagnoses,
    front_beyond_ties,
    margins_of,
)
from loraq_sim.results.columns import column_for, is_missing
from loraq_sim.results.rows import Row
from loraq_sim.results.totals import is_synthetic
from loraq_sim.results.wording import (
    comparison,
    drawn_text,
    limit_text,
    listing,
    percent_text,
    resting_of,
    some_of,
    value_text,
)

__all__ = ["Case", "Change", "Said", "changes_of", "headline_of", "sentences_of", "ties_of"]

_MOST_CHANGES = 3
# Limits looked at for each column; an answer that holds further down is given down to the last.
_MOST_LEVELS = 40


@dataclass(frozen=True, kw_only=True)
class Case:
    """What there is to choose from in one context.

    `rows` are the totals of `candidates`; `margin` is the relative error of the cost model and
    `seen` what that was seen on; `cost` is empty where none is known; `n_without_cost` candidates
    lack it and do not compete; `chosen` is the index of the answer. `arrays` are, by the label of
    a candidate that stands for several arrays, the totals of all of them.
    """

    context: str
    accelerator: str = ""
    candidates: tuple[Candidate, ...] = ()
    rows: tuple[Row, ...] = ()
    error: str = "output_error"
    cost: str = ""
    margin: float = 0.0
    seen: str = ""
    n_without_cost: int = 0
    chosen: int | None = None
    arrays: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)

    @property
    def best(self) -> Candidate | None:
        """The answer."""
        return None if self.chosen is None else self.candidates[self.chosen]

    @property
    def is_fit(self) -> bool:
        """Whether the answer's error is one to build with."""
        return self.best is not None and self.best.error <= WORST_ERROR

    @property
    def margins(self) -> Margins:
        """What counts as no difference."""
        return margins_of(self.candidates, self.margin)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A limit that changes the answer: with `column` at most L for any down_to <= L < below.

    `value` is the error of the split that is then the answer; `text` says it.
    """

    context: str
    column: str
    below: float
    down_to: float
    split: str
    label: str
    value: float
    text: str

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = ("context", "column", "below", "down_to", "split", "label", "text")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class Said:
    """Sentences: `lines` are all of them in order, `why` and `notes` parts of them."""

    why: str
    notes: tuple[str, ...]
    lines: tuple[str, ...]


def headline_of(case: Case | None) -> str:
    """The answer in one line."""
    place = f" on {case.context}" if case and case.context else ""
    if case is None or not case.candidates:
        return f"No split could be evaluated{place}"
    best = case.best
    if best is None:
        return f"No split is fit to build{place}: every output is infinite or NaN"
    if not case.is_fit:
        told = f"{value_text(case.error, best.error)} {_heading(case.error)}"
        return f"No split is fit to build{place}: the best trade, {best.label}, has {told}"
    return f"Build {best.label}{place}"


def ties_of(case: Case) -> list[Candidate]:
    """Candidates that the cost which decides cannot tell from the answer, least error first."""
    best = case.best
    if best is None:
        return []
    tied = [
        candidate
        for candidate in case.candidates
        if candidate is not best
        and candidate.error < float("inf")
        and (
            case.margins.ties(case.cost, candidate.value(case.cost), best.value(case.cost))
            if case.cost
            else case.margins.ties("error", candidate.error, best.error)
        )
    ]
    return sorted(tied, key=lambda candidate: candidate.error)


def changes_of(case: Case) -> list[Change]:
    """The answers under limits below what the answer has, column by column, mildest limit first."""
    best = case.best
    if best is None:
        return []
    names = [name for name in COSTS if name in best.costs]
    if case.margins.error == 0:
        # With several seeds a limit on the error is met by some seeds of a split and not by others.
        names.append("error")
    return [change for name in names for change in _changes_by(case, best, name)]


def _changes_by(case: Case, best: Candidate, name: str) -> list[Change]:
    levels = sorted(
        {value for c in case.candidates if (value := c.value(name)) < best.value(name)},
        reverse=True,
    )
    column = case.error if name == "error" else name
    found: list[Change] = []
    above = best.value(name)
    for level in levels[:_MOST_LEVELS]:
        allowed = [c for c in case.candidates if c.value(name) <= level]
        index = choose(allowed, case.cost or None, case.margin)
        if index is None:
            break
        then = allowed[index]
        if found and found[-1].label == then.label:
            found[-1] = _change(case, column, found[-1].below, level, then)
        elif len(found) == _MOST_CHANGES:
            break
        else:
            found.append(_change(case, column, above, level, then))
        above = level
    return found


def _change(case: Case, column: str, below: float, down_to: float, then: Candidate) -> Change:
    change = Change(
        context=case.context,
        column=column,
        below=below,
        down_to=down_to,
        split=then.split,
        label=then.label,
        value=then.error,
        text="",
    )
    return replace(change, text=f"{_limit_of(change)}: then {_then(case, change)}")


def _limit_of(change: Change) -> str:
    limit = limit_text(change.column, change.below, change.down_to)
    return f"{_heading(change.column)} must stay below {limit}"


def _then(case: Case, change: Change) -> str:
    unfit = ", more than 25 %" if change.value > WORST_ERROR else ""
    told = f"{value_text(case.error, change.value)} {_heading(case.error)}{unfit}"
    return f"{change.label} with {told}"


def sentences_of(case: Case, ties: Sequence[Candidate], changes: Sequence[Change]) -> Said:
    """All that is said of one context, after its headline."""
    notes = _notes(case)
    best = case.best
    if best is None:
        return Said(why="", notes=notes, lines=notes)
    why = " ".join(
        [_what_it_is(case, best), *_what_decides(case, best), *_against_least_error(case, best)]
    )
    lines = (why, *_ties_line(case, best, ties), *_changes_line(case, best, changes), *notes)
    return Said(why=why, notes=notes, lines=lines)


def _heading(column: str) -> str:
    return column_for(column).heading


def _total(case: Case, candidate: Candidate) -> Row:
    """The total of a candidate, under its label."""
    return {**case.rows[case.candidates.index(candidate)], "label": candidate.label}


def _what_it_is(case: Case, best: Candidate) -> str:
    row = _total(case, best)
    facts = f"{value_text(case.error, best.error)} {_heading(case.error)}"
    if case.error == "output_error" and not is_missing(row.get("sqnr_db")):
        facts += f" ({value_text('sqnr_db', row['sqnr_db'])} SQNR)"
    if case.error == "output_error" and is_synthetic(row):
        facts += " on synthetic inputs"
    text = f"{best.label} has {facts}"
    if not is_missing(row.get("weight_bytes")):
        text += f" with {value_text('weight_bytes', row['weight_bytes'])} of weights"
        if not is_missing(row.get("bits_per_weight")):
            text += f" ({value_text('bits_per_weight', row['bits_per_weight'])} bits per weight)"
    if not is_missing(row.get("peak_activation_bytes")):
        text += f" and at most {value_text('activation_bytes', row['peak_activation_bytes'])} of "
        text += "activations at once"
        if row.get("fits_in"):
            text += f" (the largest working set of a layer fits in {row['fits_in'].upper()})"
    costs = [
        f"{value_text(key, row[key])} {word}".strip()
        for key, word in (("latency_s", ""), ("energy_j", ""), ("dram_bytes", "of DRAM traffic"))
        if not is_missing(row.get(key))
    ]
    rows = f"; rows per call: {row['m_source']}" if row.get("m_source") else ""
    return f"{text}; a denoising step takes {listing(costs)}{rows}." if costs else f"{text}."


def _competing(case: Case) -> list[int]:
    """Candidates the choice was among: fit ones where there are some."""
    finite = [i for i, c in enumerate(case.candidates) if c.error < float("inf")]
    return [i for i in finite if case.candidates[i].error <= WORST_ERROR] or finite


def _what_decides(case: Case, best: Candidate) -> list[str]:
    """Why this one: the only one, the most accurate of equals, or the knee."""
    among = _competing(case)
    if len(among) == 1:
        return [f"It is the only split {_of_what(case)}."]
    if not case.cost:
        return ["It has the least error; no cost is known."]
    members = [case.candidates[i] for i in among]
    front = [members[i] for i in front_beyond_ties(members, case.cost, case.margins)]
    cheapest = min(members, key=lambda c: (c.value(case.cost), c.error))
    dearest = max(members, key=lambda c: c.value(case.cost))
    cost = _heading(case.cost)
    if case.margins.ties(case.cost, cheapest.value(case.cost), dearest.value(case.cost)):
        how_far = f"lie within {percent_text(case.margins.of(case.cost))}, which is as far as the"
        alike = f"{how_far} model may be off" if case.margins.of(case.cost) else "are equal"
        return [f"The {_plural(case.cost)} of all {len(members)} splits {alike}, so error decides."]
    if best.label == cheapest.label:
        least = min(c.error for c in members)
        both = " and the least error" if best.error == least else ""
        return [f"It has the least {cost}{both} of {len(members)} splits."]
    base = _total(case, cheapest)
    told = list(dict.fromkeys((case.cost, "latency_s", "weight_bytes")))
    if not base[case.error] or best.error >= base[case.error]:
        return []
    gains = f"{cheapest.label} has the least {cost}; the choice "
    gains += f"{comparison(_total(case, best), base, told, case.error)}."
    if len(front) == 1 and case.margins.of(case.cost):
        step = percent_text(case.margins.of(case.cost))
        return [
            gains,
            f"From one to the other no step in {cost} is beyond the {step} that the model may be "
            "off, so error decides.",
        ]
    return [gains]


def _of_what(case: Case) -> str:
    return "evaluated" if len(case.candidates) == 1 else "with at most 25 % error"


def _plural(cost: str) -> str:
    return {"latency_s": "latencies", "energy_j": "energies"}.get(cost, f"{_heading(cost)} values")


def _against_least_error(case: Case, best: Candidate) -> list[str]:
    least = min(case.candidates, key=lambda c: (c.error, c.value("weight_bytes")))
    if least.label == best.label or least.error >= best.error or not least.error:
        return []
    costs = ("latency_s", "weight_bytes")
    told = comparison(_total(case, least), _total(case, best), costs, case.error)
    return [f"Least error of all: {least.label} {told}."]


def _ties_line(case: Case, best: Candidate, ties: Sequence[Candidate]) -> list[str]:
    if not ties or not case.cost:
        return []
    margins = case.margins
    equal = [c for c in ties if margins.ties("error", c.error, best.error)]
    worse = [c for c in ties if c not in equal and c.error > best.error]
    margin = margins.of(case.cost)
    sure = f" (the model may be off by {percent_text(margin)}: {case.seen})" if margin else ""
    parts = []
    if worse:
        parts.append(f"{some_of([c.label for c in worse])}, which {_have(worse)} more error")
    if equal:
        within = f"no more than the {percent_text(margins.error)} between seeds"
        told = (
            f"differ{'s' * (len(equal) == 1)} in error by {within}"
            if margins.error
            else (f"{_have(equal)} the same error")
        )
        parts.append(f"{some_of([c.label for c in equal])}, which {told}; fewer bytes decided")
    return [f"Its {_heading(case.cost)} ties with that of {'; and of '.join(parts)}{sure}."]


def _beyond(count: int) -> str:
    return "is beyond its" if count == 1 else "are beyond their"


def _have(candidates: Sequence[Candidate]) -> str:
    return "has" if len(candidates) == 1 else "have"


def _changes_line(case: Case, best: Candidate, changes: Sequence[Change]) -> list[str]:
    """The mildest limit of each column that changes the answer, by what is then the answer."""
    first: dict[str, Change] = {}
    for change in changes:
        first.setdefault(change.column, change)
    thens: dict[str, list[Change]] = {}
    for change in first.values():
        thens.setdefault(change.label, []).append(change)
    told = []
    for members in thens.values():
        head, *rest = (_limit_of(change) for change in members)
        limits = [head, *(limit.replace(" must stay below", " below") for limit in rest)]
        either = " or ".join(filter(None, [", ".join(limits[:-1]), limits[-1]]))
        told.append(f"{either} (then {_then(case, members[0])})")
    return [f"{best.label} wins unless {'; or '.join(told)}."] if told else []


# Savings below it are within what placing and timing a design moves.
_NO_SAVING = 0.05
_WORDS = {1: "one product", 2: "two products", 4: "four products", 8: "eight products"}
_TREE = ("products_per_add", "accumulators", "options")


def _arrays_said(case: Case, best: Candidate) -> list[str]:
    """What the width of the accumulator buys in area, behind every adder tree that was tried."""
    points = case.arrays.get(best.label, ())
    trees: dict[tuple, list[Row]] = {}
    for row in sorted(points, key=lambda row: (row["products_per_add"], row["accumulators"] or 1)):
        trees.setdefault(tuple(row.get(key) for key in _TREE), []).append(row)
    told = [_tree_said(case, members) for members in trees.values()]
    if not told:
        return []
    lossless = [row for row in points if row.get("overflow_count") == 0]
    text = f"Arrays of {best.split} at equal throughput: {'; '.join(told)}."
    if lossless:
        least = min(lossless, key=lambda row: row["area_ge"])
        text += f" The smallest without overflow has {_array_text(least)} and "
        text += f"{least['area_ge']:,.0f} GE a MAC"
        if not is_missing(least.get("area_mm2")):
            text += f" ({least['area_mm2']:.3g} mm2)"
        text += "."
    return [text]


def _tree_said(case: Case, members: Sequence[Row]) -> str:
    """Of arrays that differ in width and overflow rule: the narrowest that holds every sum."""
    count = members[0]["products_per_add"]
    turns = members[0]["accumulators"] or 1
    place = f"with {_WORDS.get(count, f'{count} products')} an add"
    place += f" and {turns} accumulators" if turns > 1 else ""
    # Of a narrow tree or a preset, which no column of a row names.
    more = re.findall(r"[a-z0-9_]+", str(members[0].get("options") or ""))
    place += f" ({' '.join(more).replace('_', ' ')})" if more else ""
    lossless = [row for row in members if row.get("overflow_count") == 0]
    least_error = min(members, key=lambda row: _error_or_inf(row, case.error))
    if not lossless:
        error = value_text(case.error, least_error.get(case.error))
        return f"{place} all overflow, the least error is {error} at {_width_text(least_error)}"
    best = min(lossless, key=lambda row: (row["area_ge"], row["acc_bits"]))
    widest = max(members, key=lambda row: (row["acc_bits"], -row["area_ge"]))
    saved = 1 - best["area_ge"] / widest["area_ge"]
    if best["acc_bits"] == widest["acc_bits"]:
        text = f"{place} {_width_text(best)} is the smallest without overflow"
    elif saved < _NO_SAVING:
        text = f"{place} {_width_text(best)} for {widest['acc_bits']} buys nothing "
        text += f"({percent_text(saved)} of the area)"
    else:
        text = f"{_width_text(best)} takes {100 * saved:.0f} % less area than "
        text += f"{widest['acc_bits']} {place}, no add overflows on these layers"
    return text + _cliff_said(case, members, best)


def _cliff_said(case: Case, members: Sequence[Row], best: Row) -> str:
    """The next narrower accumulator, which overflows, by its better rule: error and area."""
    below = [row for row in members if row["acc_bits"] < best["acc_bits"]]
    if not below:
        return ""
    bits = max(row["acc_bits"] for row in below)
    step = min(
        (row for row in below if row["acc_bits"] == bits),
        key=lambda row: _error_or_inf(row, case.error),
    )
    saved = 1 - step["area_ge"] / best["area_ge"]
    area = f"{percent_text(saved)} less area" if saved > 0 else "no less area"
    error = value_text(case.error, step.get(case.error))
    return f" ({_width_text(step)}: {error} {_heading(case.error)} for {area})"


def _error_or_inf(row: Row, error: str) -> float:
    value = row.get(error)
    return float("inf") if is_missing(value) else float(value or 0.0)


def _width_text(row: Row) -> str:
    return f"{row['acc_bits']} bits ({str(row['overflow']).replace('_', ' ')})"


def _array_text(row: Row) -> str:
    count = row["products_per_add"]
    return f"{_width_text(row)}, {_WORDS.get(count, f'{count} products')} an add"


def _notes(case: Case) -> tuple[str, ...]:
    labels = [c.label for c in case.candidates if c.error == float("inf")]
    notes = [] if case.best is None else _arrays_said(case, case.best)
    notes += diagnoses(case.candidates, case.rows, case.error, case.chosen)
    gaps = [row for row in case.rows if not is_missing(row.get("n_missing")) and row["n_missing"]]
    if gaps:
        # The totals that are compared all lack the same layers.
        n = gaps[0]["n_missing"]
        notes.append(
            f"{n} of {gaps[0]['n_layers'] + n} layers missing: no number here counts them."
        )
    if case.error == "weight_error" and case.candidates:
        notes.append(
            "Ranked by the error of the weights: output errors are not known without activations."
        )
    if case.error == "output_error" and any(is_synthetic(row) for row in case.rows):
        notes.append(drawn_text(case.rows))
    if case.candidates and not any("latency_s" in c.costs for c in case.candidates):
        decides = f"; {_heading(case.cost)} is weighed against the error" if case.cost else ""
        notes.append(f"Latencies are not known{decides}.")
    if case.n_without_cost:
        n = case.n_without_cost
        splits = counted(n, "split")
        notes.append(f"{splits} without a known {_heading(case.cost)} did not compete.")
    if labels:
        what = "outputs that are infinite or NaN (a float format overflows)"
        notes.append(f"{some_of(labels)}: {what}; not fit to build.")
    best = case.best
    if best is not None:
        if resting := resting_of(_total(case, best)):
            notes.append(f"The latency of {best.label} {resting}.")
        clipped = _total(case, best).get("clipped_count")
        if not is_missing(clipped) and clipped:
            label = best.label
            notes.append(f"{counted(clipped, 'float value')} of {label} {_beyond(clipped)} format.")
        if not case.is_fit:
            notes.append(
                f"An error of {value_text(case.error, best.error)} is above the 25 % up to "
                "which a split counts as fit; look for the reason before building anything."
            )
    return tuple(notes)
