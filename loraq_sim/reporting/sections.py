"""The tables of a report, one function a section; each works for one context and may be empty.

Solvers are compared where they store the same bytes for the same main branch. The last section says
where the numbers come from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median
from typing import Any

from loraq_sim.reporting.labels import main_and_branch
from loraq_sim.reporting.report_data import BOUND_NAMES, PART_NAMES, Answer, MixedModel, ReportData
from loraq_sim.reporting.tables import ResultTable, result_table
from loraq_sim.results.columns import column_for, is_missing
from loraq_sim.results.rows import EVALUATED, AnyRow

__all__ = [
    "MethodClass",
    "TEXT_NAMES",
    "accumulators_table",
    "arrays_table",
    "choices_table",
    "compare_methods",
    "compared_table",
    "costs_table",
    "devices_table",
    "failures_table",
    "kinds_table",
    "method_sentences",
    "methods_table",
    "mixed_table",
    "provenance_view",
    "totals_of_context_table",
    "validation_table",
]

# Ranks are whole, so two branches of one budget differ by less than a rank's bytes.
_EQUAL_BYTES = 0.01
TEXT_NAMES = {
    "command": "This case again",
    "recipe": "Its split as a recipe",
    "vectors": "Vectors of the layer with the widest sums",
}
"""What can be copied of a case (`points.case_texts`), in words."""
# Shares and savings: equal decimals would show the digits of the least of them for all.
_SHARE_DIGITS = 2
# Sums in another order differ in the last bits.
_NO_SAVING = 1e-9
_DIGEST_DIGITS = 16
_SHOWN = ("bits_per_weight", "weight_bytes", "latency_s", "energy_j", "dram_bytes")


@dataclass(frozen=True, kw_only=True)
class MethodClass:
    """Totals of one context, one main precision and weights of (within 1 %) the same bytes.

    `best` holds each method's total of least `error`; `bits` (per weight) and `name` say what the
    class is.
    """

    context: str
    main: str
    bits: float
    name: str
    error: str
    best: Mapping[str, AnyRow]


def choices_table(data: ReportData, answer: Answer) -> ResultTable:
    """What to build, and what instead if one number matters most."""
    rows = [{"what matters": role, "case": row["label"], **row} for role, row in answer.choices]
    keys = ["what matters", "case", *_errors(data), *_SHOWN]
    return _table(rows, keys, f"What to build on {answer.context}, and what instead")


def totals_of_context_table(data: ReportData, context: str) -> ResultTable:
    """All cases of a context, fastest first, with a mark on those of the front."""
    rows = [
        {"case": row["label"], **row}
        for row in sorted(data.totals_of(context), key=lambda r: _number(r.get("latency_s")))
    ]
    keys = ["pareto", "case", "rank", *_errors(data), "weight_error", *_SHOWN, "bound"]
    if any(row.get("peak_activation_bytes") for row in rows):
        # Beside the weights: both have to be held.
        keys.insert(keys.index("weight_bytes") + 1, "peak_activation_bytes")
    return _table(rows, list(dict.fromkeys(keys)), f"Whole model on {context}, fastest first")


def kinds_table(data: ReportData, answer: Answer) -> ResultTable:
    """Error by layer kind under the cases the answer speaks of."""
    labels = [row["label"] for _, row in answer.choices]
    own = [row for row in data.kinds if row["context"] == answer.context]
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in own):
        of_kind = {row["label"]: row for row in own if row["kind"] == kind}
        errors = {
            f"{label} {data.error}": of_kind[label].get(data.error)
            for label in labels
            if label in of_kind
        }
        n_layers = max(row["n_layers"] for row in of_kind.values())
        rows.append({"kind": kind, "n_layers": n_layers, **errors})
    heading = column_for(data.error).heading
    table = _table(rows, None, f"{heading[:1].upper()}{heading[1:]} by layer kind")
    headings = {f"{label} {data.error}": label for label in labels}
    return _with_headings(table, {"n_layers": "layers", **headings})


def costs_table(data: ReportData, answer: Answer) -> ResultTable:
    """Where the latency of the answer goes: one line a shape, longest first."""
    if answer.best is None:
        return _table([], None, "")
    own = [
        row
        for row in data.parts
        if row["context"] == answer.context and row["label"] == answer.best["label"]
    ]
    sums = {id(row): sum(row["parts"]["latency_s"].values()) * row["calls"] for row in own}
    total = sum(sums.values()) or 1.0
    rows = []
    for row in sorted(own, key=lambda r: -sums[id(r)]):
        parts = row["parts"]["latency_s"]
        longest = max(parts, key=parts.__getitem__)
        rows.append(
            {
                "kind": row["kind"],
                "M x K x N": f"{row['m']} x {row['k']} x {row['n']}",
                "rank": row["rank"],
                "n_layers": row["n_layers"],
                "latency_s": sums[id(row)],
                "share": sums[id(row)] / total,
                "bound": BOUND_NAMES.get(row["bound"], row["bound"]),
                "longest part": PART_NAMES.get(longest, longest),
                "part_share": parts[longest] / (sum(parts.values()) or 1.0),
            }
        )
    table = _table(rows, None, f"Latency of {answer.best['label']} on {answer.context} by shape")
    return _with_headings(
        table,
        {"n_layers": "layers", "share": "share of model", "part_share": "its share"},
        percent=("share", "part_share"),
    )


def compared_table(data: ReportData, context: str) -> ResultTable:
    """Cases of this store beside those of the one before: error and costs, and by how much."""
    known = {row["label"]: row for row in data.before if row["context"] == context}
    rows = []
    for total in data.totals_of(context):
        earlier = known.get(total["label"])
        if earlier is None or earlier.get("status") != "ok":
            continue
        row: dict[str, Any] = {"case": total["label"]}
        for key in (data.error, "latency_s", "weight_bytes", "energy_j"):
            old, new = earlier.get(key), total.get(key)
            if is_missing(old) or is_missing(new):
                continue
            row |= {f"before {key}": old, key: new}
            row[f"change {key}"] = new / old - 1 if old else None
        rows.append(row)
    table = _table(rows, None, f"Before and now on {context}")
    return _as_before(table)


def _as_before(table: ResultTable) -> ResultTable:
    columns = []
    for column in table.columns:
        way, _, key = column.key.partition(" ")
        if way in ("before", "change") and key:
            known = column_for(key)
            heading = f"{known.heading} before" if way == "before" else "change"
            quantity = known.quantity if way == "before" else "percent"
            digits = known.digits if way == "before" else _SHARE_DIGITS
            column = replace(column, heading=heading, quantity=quantity, digits=digits)
        columns.append(column)
    return replace(table, columns=tuple(columns))


def accumulators_table(data: ReportData, context: str) -> ResultTable:
    """Width of the array, what this input needed, what any input could need, and overflows."""
    rows = [
        {
            "case": case["label"],
            "acc_bits": case["array"],
            "overflow": case["rule"],
            "overflow_count": case["overflows"],
            "safe_acc_bits": case["high"],
            "widest layer": case["layer"],
            "guaranteed_acc_bits": case["guaranteed"],
        }
        for case in data.accumulators
        if case["context"] == context
    ]
    rows.sort(key=lambda row: -row["safe_acc_bits"])
    table = _table(rows, None, f"Accumulator widths on {context}")
    return _with_headings(
        table,
        {
            "acc_bits": "array bits",
            "overflow": "overflow rule",
            "overflow_count": "overflows",
            "safe_acc_bits": "bits needed here",
            "guaranteed_acc_bits": "bits for any input",
        },
    )


def arrays_table(data: ReportData, context: str) -> ResultTable:
    """Arrays that the answer's split ran on: gates by part, error and overflows, smallest first."""
    rows = [
        {
            "pareto": row["is_answer"],
            **{key: row[key] for key in ("products_per_add", "acc_bits", "overflow")},
            "accumulators": row["accumulators"] if (row["accumulators"] or 1) > 1 else None,
            "area_ge": row["area_ge"],
            **row["parts"],
            **{key: row[key] for key in ("area_mm2", "array_energy_j")},
            data.error: row["error"],
            "overflow_count": row["overflow_count"],
        }
        for row in data.arrays
        if row["context"] == context
    ]
    rows.sort(key=lambda row: row["area_ge"])
    table = _table(rows, None, f"Arrays on {context}, smallest first: gate equivalents per MAC")
    return _with_headings(
        table,
        {
            "pareto": "answer",
            "acc_bits": "array bits",
            "overflow": "overflow rule",
            "overflow_count": "overflows",
            "area_ge": "GE",
        },
    )


def methods_table(data: ReportData, classes: Sequence[MethodClass], context: str) -> ResultTable:
    """Least error of each method in each class of equal bytes."""
    own = [item for item in classes if item.context == context]
    methods = sorted({method for item in own for method in item.best})
    rows = []
    for item in own:
        errors = {
            f"{method} {data.error}": item.best[method][item.error] if method in item.best else None
            for method in methods
        }
        winner = min(item.best.values(), key=lambda row: row[item.error])
        row = {"main": item.main, "bits_per_weight": item.bits, **errors}
        rows.append({**row, "best case": winner["label"]})
    heading = column_for(data.error).heading
    table = _table(rows, None, f"{heading[:1].upper()}{heading[1:]} of each method at equal bytes")
    return _with_headings(table, {f"{m} {data.error}": m for m in methods})


def mixed_table(mix: MixedModel) -> ResultTable:
    """How much less error a mix of splits has than each uniform split, at no more cost."""
    rows = []
    for gain in mix.gains:
        mixed, uniform = gain.get("mixed_error"), gain.get(mix.error)
        cut = None if is_missing(mixed) or not uniform else 1 - mixed / uniform
        cut = 0.0 if cut is not None and cut < _NO_SAVING else cut
        rows.append(
            {
                "case": gain["label"],
                mix.cost: gain.get(mix.cost),
                mix.error: uniform,
                "mixed_error": mixed,
                "cut": cut,
            }
        )
    rows.sort(key=lambda row: _number(row[mix.cost]))
    heading = column_for(mix.cost).heading
    table = _table(rows, None, f"One split for all layers against a mix of no more {heading}")
    return _with_headings(
        table,
        {mix.error: "error, one split", "mixed_error": "error, mixed", "cut": "less by"},
        percent=("cut",),
    )


def devices_table(data: ReportData) -> ResultTable:
    """How far the model is from measurement, per device."""
    return _table(
        list(data.devices), None, "Predicted against measured times, per device, of all kernels"
    )


def validation_table(data: ReportData) -> ResultTable:
    """Every measured GEMM with its prediction."""
    keys = ["device", "kernel", "m", "k", "n", "main", "rank", "measured_ms", "predicted_ms"]
    return _table(list(data.validation), [*keys, "error", "bound"], "Every measured GEMM")


def failures_table(data: ReportData) -> ResultTable:
    """Cases without a result, and why; equal reasons once."""
    reasons: dict[tuple[str, str], list[AnyRow]] = {}
    for row in data.rows:
        if row.get("status") not in EVALUATED:
            where = (str(row["layer"]), str(row.get("message") or "no reason given"))
            reasons.setdefault(where, []).append(row)
    rows = [
        {"layer": layer, "cases": len(own), "first case": own[0]["label"], "message": message}
        for (layer, message), own in reasons.items()
    ]
    return _table(rows, None, "Cases that failed")


def _errors(data: ReportData) -> list[str]:
    return [data.error, "sqnr_db"] if data.error == "output_error" else [data.error]


def _number(value: Any) -> float:
    return float("inf") if is_missing(value) else float(value)


def _table(rows: Sequence[AnyRow], keys: Sequence[str] | None, title: str) -> ResultTable:
    """Table of those of `keys` that hold a value in some row."""
    chosen = keys or list(dict.fromkeys(key for row in rows for key in row))
    shown = [key for key in chosen if any(not is_missing(row.get(key)) for row in rows)]
    cut = [{key: row.get(key) for key in shown} for row in rows]
    return result_table(cut, shown or None, title=title)


def _with_headings(
    table: ResultTable, headings: Mapping[str, str], *, percent: Sequence[str] = ()
) -> ResultTable:
    columns = tuple(
        replace(
            column,
            heading=headings.get(column.key, column.heading),
            quantity="percent" if column.key in percent else column.quantity,
            digits=_SHARE_DIGITS if column.key in percent else column.digits,
        )
        for column in table.columns
    )
    return replace(table, columns=columns)


def compare_methods(data: ReportData) -> list[MethodClass]:
    """Classes in which two methods or more have a result, by context, main precision and bytes."""
    classes = []
    for context in data.contexts:
        rows = [
            row
            for row in data.totals_of(context)
            if row.get("weight_bytes")
            and not any(is_missing(row.get(key)) for key in (data.error, "bits_per_weight"))
        ]
        by_main: dict[str, list[AnyRow]] = {}
        for row in sorted(rows, key=lambda r: r["weight_bytes"]):
            by_main.setdefault(main_and_branch(str(row["split"]))[0], []).append(row)
        for main, own in by_main.items():
            for members in _equal_bytes(own):
                found = _class(context, main, members, data.error)
                if len(found.best) > 1:
                    classes.append(found)
    return classes


def _equal_bytes(rows: Sequence[AnyRow]) -> list[list[AnyRow]]:
    """Rows, sorted by bytes, in runs that end 1 % above their first."""
    runs: list[list[AnyRow]] = []
    for row in rows:
        if runs and row["weight_bytes"] <= runs[-1][0]["weight_bytes"] * (1 + _EQUAL_BYTES):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _class(context: str, main: str, members: Sequence[AnyRow], error: str) -> MethodClass:
    best: dict[str, AnyRow] = {}
    for row in sorted(members, key=lambda r: r[error]):
        best.setdefault(str(row.get("method")), row)
    bits = members[0]["bits_per_weight"]
    return MethodClass(
        context=context,
        main=main,
        bits=bits,
        name=f"{main}, {bits:.2f} bits per weight",
        error=error,
        best=dict(sorted(best.items())),
    )


def method_sentences(classes: Sequence[MethodClass], context: str) -> list[str]:
    """How often and by how much each pair of methods differs, one sentence a pair."""
    own = [item for item in classes if item.context == context]
    sentences = []
    for first, second in combinations(sorted({m for item in own for m in item.best}), 2):
        ratios = [
            item.best[first][item.error] / item.best[second][item.error]
            for item in own
            if first in item.best and second in item.best and item.best[second][item.error]
        ]
        if ratios:
            sentences.append(_sentence(first, second, ratios, column_for(own[0].error).heading))
    return sentences


def _sentence(first: str, second: str, ratios: Sequence[float], error: str) -> str:
    wins = sum(ratio < 1 for ratio in ratios)
    if wins * 2 < len(ratios):
        first, second = second, first
        ratios = [1 / ratio for ratio in ratios if ratio]
        wins = sum(ratio < 1 for ratio in ratios)
    change = 100 * (1 - median(ratios))
    times = f"in {wins} of {len(ratios)} comparisons" if len(ratios) > 1 else "in the only case"
    if not wins:
        return f"{first} and {second} have the same {error} at equal bytes."
    return (
        f"At equal bytes {first} has less {error} than {second} {times}; "
        f"at the median {abs(change):.0f} % {'less' if change >= 0 else 'more'}."
    )


def provenance_view(data: ReportData) -> dict[str, Any]:
    """Facts of each sweep, its plan, and each accelerator's numbers with their sources."""
    return {
        "runs": [{"title": _title(run), "facts": _facts(run)} for run in data.runs],
        "machines": [
            {"name": name, "title": machine.get("title") or "", "facts": _sourced(machine)}
            for name, machine in data.machines.items()
        ],
    }


def _title(run: Mapping[str, Any]) -> str:
    started = run.get("started")
    return f"Sweep {run.get('run', '')} of {started}" if started else f"Sweep {run.get('run', '')}"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = run.get("plan") or {}
    facts: list[tuple[str, Any]] = [
        ("Command", " ".join(map(str, run.get("command") or ()))),
        ("Layer dump", plan.get("dump")),
        ("Digest of the dump's layers", _digest(run.get("dump_digest"))),
    ]
    for name, digest in (run.get("accelerator_digests") or {}).items():
        facts.append((f"Digest of {name}", _digest(digest)))
    facts += [
        ("Digest of the code", _digest(run.get("code_digest"))),
        ("Plan", _settings(plan, without=("dump",))),
        ("Seed", run.get("seed")),
        ("Cases", _counts(run)),
        ("Versions", _settings(run.get("versions") or {})),
        ("Machine", _listing(run, ("cpu", "machine", "platform"))),
        ("Started, ended", _listing(run, ("started", "ended"))),
        ("Remarks", "; ".join(map(str, run.get("notes") or ()))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", [], {})]


def _digest(value: Any) -> str:
    return str(value)[:_DIGEST_DIGITS] if value else ""


def _settings(values: Mapping[str, Any], *, without: Iterable[str] = ()) -> str:
    parts = []
    for name, value in values.items():
        if name in without or value in (None, "", [], {}):
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


def _counts(run: Mapping[str, Any]) -> str:
    words = (("n_ok", "ok"), ("n_failed", "failed"), ("n_skipped", "found from earlier sweeps"))
    return ", ".join(f"{run[key]:,} {word}" for key, word in words if run.get(key))


def _listing(run: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(str(run[key]) for key in keys if run.get(key))


def _sourced(machine: Mapping[str, Any]) -> list[dict[str, str]]:
    """Numbers of one machine by source, so that a source is read once."""
    by_source: dict[tuple[str, str], list[str]] = {}
    for fact in machine.get("facts") or ():
        where = (str(fact.get("source") or "not stated"), str(fact.get("confidence") or ""))
        value = f"{fact['value']} {fact.get('unit') or ''}".strip()
        by_source.setdefault(where, []).append(f"{fact['key']} = {value}")
    return [
        {"source": source, "confidence": confidence, "numbers": "; ".join(numbers)}
        for (source, confidence), numbers in by_source.items()
    ]
