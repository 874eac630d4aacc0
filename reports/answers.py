"""The answer of a report: which split to build in each context, what it costs and what it loses.

Every sentence is put together from the rows. The answer is the knee of the front (see
`reports.findings`) of error and the first cost that tells the splits apart: latency, else weight
memory, else energy, else DRAM traffic. A cost does not tell splits apart where all of them lie
closer together than the cost model was off on measured hardware, or than `_CLOSE`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraq_sim.results.columns import column_for
from loraq_sim.results.units import choose_unit, format_numbers, is_missing
from reports.findings import comparison, headline_rows, knee
from reports.report_data import COSTS, ReportData

__all__ = ["Answer", "answers", "headline", "listing", "pretty_unit", "value_text"]

Row = Mapping[str, Any]

# Where no measurement says how far the model is off, latencies within 5 % count as equal.
_CLOSE = 0.05
# Savings below half a percent would read as 0 %.
_WORTH_SAYING = 0.005
_MODELLED = ("latency_s", "energy_j")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of one context.

    `best` is the total to build, None where nothing was evaluated; `cost` the cost whose front it
    is read from; `choices` are (role, total) pairs to choose from instead; `sentences` say it all.
    """

    context: str
    best: Row | None
    cost: str
    choices: Sequence[tuple[str, Row]]
    sentences: Sequence[str]


def answers(data: ReportData) -> list[Answer]:
    """One answer for each context of `data`."""
    return [_answer(data, context) for context in data.contexts]


def headline(found: Sequence[Answer]) -> str:
    """The answers in one line."""
    picks: dict[str, list[str]] = {}
    for answer in found:
        if answer.best is not None:
            picks.setdefault(answer.best["label"], []).append(answer.context)
    if not picks:
        return "No split could be evaluated"
    return "Build " + listing([f"{name} on {listing(places)}" for name, places in picks.items()])


def listing(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else ""


def value_text(key: str, value: Any) -> str:
    """One value with its unit: ``4.17 %``, ``2.97 ms``; ``not known`` if it is missing."""
    if is_missing(value):
        return "not known"
    column = column_for(key)
    unit = choose_unit([value], column.quantity)
    (text,) = format_numbers([value / unit.size], column.digits)
    return f"{text} {pretty_unit(unit.symbol)}".strip()


def pretty_unit(symbol: str) -> str:
    """A unit as print writes it: tables of the terminal keep to ASCII."""
    return f"\u00b5{symbol[1:]}" if symbol in ("us", "uJ") else symbol


def _answer(data: ReportData, context: str) -> Answer:
    rows = [row for row in data.totals_of(context) if _has(row, data.error)]
    cost = _telling_cost(data, context, rows)
    costed = [row for row in rows if _has(row, cost)]
    front = headline_rows(
        [{**row, "pareto": cost in row["fronts"]} for row in costed], cost, data.error
    )
    if not front:
        return Answer(
            context=context,
            best=None,
            cost=cost,
            choices=(),
            sentences=(f"No split could be evaluated on {context}.", *_gaps(data, context)),
        )
    best = knee(front, cost, data.error)
    sentences = [
        _what_it_is(best, data.error),
        *_against_cheapest(front, best, cost, data.error),
        *_against_least_error(rows, best, data.error),
        *_how_sure(data, context, cost, rows),
        *_overflows(data, best),
        *_mixed(data, context, best, cost),
        *_gaps(data, context),
    ]
    return Answer(
        context=context,
        best=best,
        cost=cost,
        choices=_choices(rows, best, data.error),
        sentences=tuple(sentences),
    )


def _has(row: Row, key: str) -> bool:
    return not is_missing(row.get(key))


def _margin(data: ReportData, context: str, cost: str) -> float:
    """Fraction within which two costs of a context are the same."""
    if cost not in _MODELLED:
        return 0.0
    known = data.uncertainty.get(data.accelerator_of(context), {})
    return max(_CLOSE, known.get("worst_error", 0.0))


def _spread(rows: Sequence[Row], cost: str) -> float | None:
    values = [row[cost] for row in rows if _has(row, cost)]
    return max(values) / min(values) - 1 if values and min(values) > 0 else None


def _telling_cost(data: ReportData, context: str, rows: Sequence[Row]) -> str:
    for cost in COSTS:
        spread = _spread(rows, cost)
        if spread is not None and spread > _margin(data, context, cost):
            return cost
    return COSTS[0]


def _what_it_is(best: Row, error: str) -> str:
    facts = f"{value_text(error, best[error])} {column_for(error).heading}"
    if error == "output_error" and _has(best, "sqnr_db"):
        facts += f" ({value_text('sqnr_db', best['sqnr_db'])} SQNR)"
    text = f"{best['label']} has {facts}"
    if _has(best, "weight_bytes"):
        text += f" with {value_text('weight_bytes', best['weight_bytes'])} of weights"
        text += f" ({value_text('bits_per_weight', best['bits_per_weight'])} bits per weight)"
    costs = [
        f"{value_text(key, best[key])} {word}".strip()
        for key, word in (("latency_s", ""), ("energy_j", ""), ("dram_bytes", "of DRAM traffic"))
        if _has(best, key)
    ]
    return f"{text}; a denoising step takes {listing(costs)}." if costs else f"{text}."


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _against_cheapest(front: Sequence[Row], best: Row, cost: str, error: str) -> list[str]:
    base = front[0]
    if base["label"] == best["label"]:
        return []
    costs = list(dict.fromkeys((cost, "latency_s", "weight_bytes")))
    told = column_for(cost).heading
    return [
        f"{base['label']} has the least {told}; the choice {comparison(best, base, costs, error)}."
    ]


def _against_least_error(rows: Sequence[Row], best: Row, error: str) -> list[str]:
    least = min(rows, key=lambda row: (row[error], row.get("weight_bytes") or 0))
    if least["label"] == best["label"] or least[error] >= best[error] or not least[error]:
        return []
    told = comparison(least, best, ("latency_s", "weight_bytes"), error)
    return [f"Least error of all: {least['label']} {told}."]


def _how_sure(data: ReportData, context: str, cost: str, rows: Sequence[Row]) -> list[str]:
    spread = _spread(rows, "latency_s")
    if spread is None:
        return []
    found = []
    name = data.accelerator_of(context)
    known = data.uncertainty.get(name, {})
    if "worst_error" in known:
        n = known["rows"]
        found.append(
            f"The latency model was off by {_percent(known['mean_error'])} on average and "
            f"{_percent(known['worst_error'])} at worst on {n} measured GEMM{'s' * (n != 1)} of "
            f"{name}."
        )
    else:
        elsewhere = f": taken as {_percent(known['bound'])}, {known['seen']}" if known else ""
        found.append(
            f"Too little was measured on {name} to say how far its latencies are off{elsewhere}."
        )
    if cost != "latency_s" and len(rows) > 1:
        found.append(
            f"The latencies of all {len(rows)} cases lie within {_percent(spread)}, too close to "
            f"choose by; the choice is read from {column_for(cost).heading}."
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
    failed = sum(row.get("status") != "ok" for row in own)
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
    roles: dict[str, tuple[list[str], Row]] = {best["label"]: (["best trade"], best)}
    for key in (error, *COSTS):
        usable = [row for row in rows if _has(row, key)]
        if not usable:
            continue
        row = min(usable, key=lambda r: (r[key], r[error]))
        roles.setdefault(row["label"], ([], row))[0].append(f"least {column_for(key).heading}")
    return [(listing(names), row) for names, row in roles.values()]
