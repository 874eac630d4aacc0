"""The answer of a report: the verdict in each context, and what else to know about it.

Which split to build is the verdict's (`loraq_sim.results.verdict`); here it gets the numbers around
it: how sure the costs are, what overflows, what a mix would save, what is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraq_sim.results.columns import column_for
from loraq_sim.results.units import is_missing
from loraq_sim.results.verdict import Verdict
from loraq_sim.results.wording import listing, percent_text
from loraq_sim.rows import EVALUATED
from reports.report_data import COSTS, ReportData

__all__ = ["Answer", "answers"]

Row = Mapping[str, Any]

# Savings below half a percent would read as 0 %.
_WORTH_SAYING = 0.005


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of one context.

    `best` is the total of the verdict's split, None where there is none; `cost` the cost it was
    read from; `choices` are (role, total) pairs to choose from instead; `sentences` say it all, the
    verdict's first.
    """

    context: str
    verdict: Verdict
    best: Row | None
    cost: str
    choices: Sequence[tuple[str, Row]]
    sentences: Sequence[str]


def answers(data: ReportData) -> list[Answer]:
    """One answer for each context of `data`."""
    return [_answer(data, context) for context in data.contexts]


def _answer(data: ReportData, context: str) -> Answer:
    verdict = data.verdict.on[context]
    best = verdict.row
    if best is None:
        return Answer(
            context=context,
            verdict=verdict,
            best=None,
            cost=verdict.cost,
            choices=(),
            sentences=(f"{verdict.headline}.", *verdict.sentences, *_gaps(data, context)),
        )
    rows = [row for row in data.totals_of(context) if _has(row, verdict.error)]
    return Answer(
        context=context,
        verdict=verdict,
        best=best,
        cost=verdict.cost,
        choices=_choices(rows, best, verdict.error),
        sentences=(
            *verdict.sentences,
            *_how_sure(data, context, rows),
            *_overflows(data, best),
            *_mixed(data, context, best, verdict.cost),
            *_gaps(data, context),
        ),
    )


def _has(row: Row, key: str) -> bool:
    return not is_missing(row.get(key))


def _how_sure(data: ReportData, context: str, rows: Sequence[Row]) -> list[str]:
    if not any(_has(row, "latency_s") for row in rows):
        return []
    found = []
    name = data.accelerator_of(context)
    known = data.uncertainty.get(name, {})
    if "worst_error" in known:
        n = known["rows"]
        found.append(
            f"The latency model was off by {percent_text(known['mean_error'])} on average and "
            f"{percent_text(known['worst_error'])} at worst on {n} measured "
            f"GEMM{'s' * (n != 1)} of {name}."
        )
    else:
        elsewhere = f": taken as {percent_text(known['bound'])}, {known['seen']}" if known else ""
        found.append(
            f"Too little was measured on {name} to say how far its latencies are off{elsewhere}."
        )
    return found


def _overflows(data: ReportData, best: Row) -> list[str]:
    count, width = best.get("overflow_count"), best.get("safe_acc_bits")
    if is_missing(count) or is_missing(width):
        return []
    bits = best.get("acc_bits")
    array = f"its {bits}-bit accumulators" if bits else "its accumulators"
    if count:
        return [
            f"{count:,} sums overflow {array}; {width} bits would hold every sum of this input."
        ]
    return [f"No sum overflows {array}; {width} bits would do for this input."]


def _mixed(data: ReportData, context: str, best: Row, cost: str) -> list[str]:
    for mix in data.mixed:
        if (mix.context, mix.cost) != (context, cost):
            continue
        for gain in mix.gains:
            if gain["label"] != best["label"] or not gain.get(mix.error):
                continue
            cut = 1 - gain["mixed_error"] / gain[mix.error]
            if cut >= _WORTH_SAYING:
                return [
                    f"A split for each layer does better still: with no more "
                    f"{column_for(cost).heading} a mix has {100 * cut:.0f} % less error."
                ]
    return []


def _gaps(data: ReportData, context: str) -> list[str]:
    own = [row for row in data.rows if row["context"] == context]
    failed = sum(row.get("status") not in EVALUATED for row in own)
    found = []
    if failed:
        n = len(own)
        found.append(f"{failed} of {n} layer cases failed; they are listed at the end.")
    partial = {
        str(row["message"])
        for row in data.totals
        if row["context"] == context and row.get("message")
    }
    return found + [f"{text[:1].upper()}{text[1:]}." for text in sorted(partial)]


def _choices(rows: Sequence[Row], best: Row, error: str) -> list[tuple[str, Row]]:
    roles: dict[str, tuple[list[str], Row]] = {best["label"]: (["verdict"], best)}
    for key in (error, *COSTS):
        usable = [row for row in rows if _has(row, key)]
        if not usable:
            continue
        row = min(usable, key=lambda r: (r[key], r[error]))
        roles.setdefault(row["label"], ([], row))[0].append(f"least {column_for(key).heading}")
    return [(listing(names), row) for names, row in roles.values()]
