"""How Jupyter shows results: a title, facts and tables as HTML, every text escaped.

Each card takes the object whose ``_repr_html_`` it is; this room stands below theirs, so it names
their types in words only. The HTML of all is made by `hwmodels.errors`; machines and costs have
theirs beside them.
"""

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hwmodels.errors import bar_text, html_card
from loraq_sim.errors import StoreError, counted
from loraq_sim.results.columns import column_for
from loraq_sim.results.wording import value_text

__all__ = [
    "allocation_card",
    "dump_card",
    "explanation_card",
    "first_failure",
    "gemm_card",
    "model_card",
    "shortened",
    "solution_card",
    "study_card",
    "study_lines",
    "verdict_card",
]


def solution_card(solution: Any) -> str:
    """A `Solution`: its rank, error and bytes, then the stored parts."""
    shape = " x ".join(str(size) for size in solution.main.shape)
    noise = solution.branch_noise
    facts = {
        "method": f"{solution.method}, preset {solution.preset}, seed {solution.seed}",
        "rank": solution.rank,
        "residual input": f"{solution.feedback_rank} of them" if solution.feedback_rank else None,
        "weight error": f"{solution.weight_error:.3%}",
        "branch noise": None if noise is None else f"{noise:.3%} of the weight",
        "stored": f"{_bytes_text(solution.nbytes)}, {solution.bits_per_weight:.3g} bits per weight",
        "rotation": solution.rotation and f"Hadamard blocks of {solution.rotation}",
        "solved in": f"{solution.seconds:.3g} s",
    }
    stored = solution.parts
    rows = [
        {
            "part": part,
            "format": stored[part].format if part in stored else "float16",
            "shape": " x ".join(
                str(size) for size in getattr(stored.get(part), "shape", (solution.main.shape[1],))
            ),
            "bytes": f"{size:,}",
            "share": f"{size / solution.nbytes:.1%}",
            "": bar_text(size / solution.nbytes),
        }
        for part, size in solution.bytes_by_part.items()
        if size
    ]
    return html_card(f"Solution of a {shape} weight", facts, rows)


def gemm_card(report: Any) -> str:
    """A `GemmReport`: what overflowed and which accumulator would have been wide enough."""
    rows, columns = report.acc.shape
    facts = {
        "overflowing adds": _count(report.overflow_count),
        "overflowing tree sums": _count(report.tree_overflow_count),
        "outputs affected": _count(report.outputs_affected, of=report.acc.size),
        "first overflow at k": report.first_overflow_k,
        "bits these operands need": report.safe_acc_bits,
        "bits any activations need": report.guaranteed_acc_bits,
        "route": report.route,
    }
    return html_card(f"Accumulators of {rows} x {columns} outputs", facts)


def allocation_card(allocation: Any) -> str:
    """An `Allocation`: totals against budgets, then the split of each layer."""
    limits = allocation.budget
    totals = [
        {
            "quantity": name,
            "total": f"{value:.4g}",
            "budget": f"{limits[name]:.4g}" if name in limits else "",
            "used": f"{value / limits[name]:.1%}" if limits.get(name) else "",
        }
        for name, value in allocation.totals.items()
    ]
    facts = {
        "minimized": f"{allocation.minimize} = {allocation.value:.4g}",
        "found by": f"{allocation.method}, at most {allocation.gap:.2%} above the optimum",
    }
    names = ("layer", "kind", "split", "rank")
    layers = [{name: row.get(name) for name in names} for row in allocation.rows]
    title = f"One split for each of {counted(len(layers), 'layer')} on {allocation.accelerator}"
    return html_card(title, facts, totals, layers)


def explanation_card(explanation: Any) -> str:
    """An `Explanation`: sources of error, then parts of the cost."""
    row, summary = explanation.row, explanation.summary
    measure = summary["measure"]
    errors = [
        {
            "source": term["source"],
            "share of the squared error": f"{term['share']:.1%}",
            "": bar_text(term["share"]),
            "error without it": _percent(term.get("error_without")),
            "error alone": _percent(term.get("error_alone")),
            "meaning": term["meaning"],
        }
        for term in explanation.errors
    ]
    costs = [
        {
            "quantity": part["quantity"],
            "part": part["part"],
            "value": f"{part['value']:,.5g}",
            "share": f"{part['share']:.1%}",
            "": bar_text(part["share"]),
        }
        for part in explanation.costs
    ]
    facts = {measure.replace("_", " "): _percent(summary["total_error"])}
    facts |= {f"note {i}": note for i, note in enumerate(explanation.notes, start=1)}
    title = f"{row['layer']} in {row['split']} on {row['accelerator']}"
    return html_card(title, facts, errors, costs)


def dump_card(path: object, infos: Mapping[str, Any], skipped: int) -> str:
    """A `LayerDump`: its layers; None stands for one that cannot be described."""
    facts = {"layers": len(infos), "tensors left out": skipped or None}
    rows = [
        {"layer": name, "kind": "cannot be read", "n": "", "k": "", "tokens": "", "bytes": ""}
        if info is None
        else {
            "layer": name,
            "kind": info.kind,
            "n": f"{info.n:,}",
            "k": f"{info.k:,}",
            "tokens": "" if info.tokens is None else f"{info.tokens:,}",
            "bytes": f"{info.nbytes:,}",
        }
        for name, info in infos.items()
    ]
    return html_card(f"Layer dump {path}", facts, rows)


def model_card(path: object, records: Mapping[str, Any]) -> str:
    """A `QuantizedModel`: what the file's directory says of each layer; no tensor is read."""
    rows = [
        {
            "layer": name,
            "method": record.get("method"),
            **{part: _format_of(record, part) for part in ("main", "left", "right")},
            "weight error": _percent(record.get("weight_error")),
        }
        for name, record in records.items()
    ]
    return html_card(f"Quantized model {path}", {"layers": len(rows)}, rows)


def _format_of(record: Mapping[str, Any], part: str) -> str:
    stored = record["parts"].get(part)
    if not isinstance(stored, Mapping):
        return ""
    shape = stored.get("shape")
    sizes = "x".join(str(size) for size in shape) if isinstance(shape, list) else ""
    return f"{stored.get('format')} {sizes}".rstrip()


def _count(count: int | None, of: int | None = None) -> str:
    if count is None:
        return "not counted"
    return f"{count:,}" if not of else f"{count:,} of {of:,} ({count / of:.2%})"


def _percent(value: object) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.3%}" if is_number else ""


def _bytes_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} GiB"


_LONGEST = 300
_FRONT = ("output_error", "weight_error", "latency_s", "energy_j", "weight_bytes", "dram_bytes")


def first_failure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The first of `rows` that failed, and why; empty if none did."""
    failed = [row for row in rows if row.get("status") == "failed"]
    if not failed:
        return ""
    more = f"{len(failed)} of {counted(len(rows), 'case')} failed, the first"
    return f"{more} {failed[0]['split']} in {failed[0]['layer']}: {failed[0].get('message')}"


def study_lines(study: Any) -> list[str]:
    """A `Study`: what it holds, what it lacks and what it says, a line each."""
    rows = study.rows
    n_failed = sum(row.get("status") == "failed" for row in rows)
    splits = dict.fromkeys(row["split"] for row in rows)
    layers = dict.fromkeys(row["layer"] for row in rows)
    lines = [
        f"Study of {counted(len(rows), 'case')}: {counted(len(layers), 'layer')}, "
        f"{counted(len(splits), 'split')}" + (f", {n_failed} failed" if n_failed else "")
    ]
    if n_failed:
        lines.append(shortened(first_failure(rows)))
    if study.partial:
        lines.append(shortened(study.partial))
    try:
        verdict = study.verdict()
        lines += [verdict.headline, *([shortened(verdict.why)] if verdict.why else [])]
    except StoreError as error:
        lines.append(str(error))
    return [*lines, *([f"in {study.path}"] if study.path is not None else [])]


def study_card(study: Any) -> str:
    """The lines of a `Study`, and the front of the model."""
    title, *lines = study_lines(study)
    try:
        rows = [row for row in study.totals if row["pareto"]]
    except StoreError:
        rows = []
    return html_card(title, {}, _front_cells(rows)) + _paragraphs(lines)


def verdict_card(verdict: Any) -> str:
    """A `Verdict`: the headline, and every sentence on a line of its own."""
    return html_card(verdict.headline, {}) + _paragraphs(verdict.sentences)


def shortened(text: str, most: int = _LONGEST) -> str:
    """`text` cut at a word."""
    return textwrap.shorten(text, most, placeholder=" ...")


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f'<p style="max-width:60em;margin:.4em 0">{escape(line)}</p>' for line in lines)


def _front_cells(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    known = [name for name in _FRONT if any(row.get(name) is not None for row in rows)]
    several = len({row.get("accelerator") for row in rows}) > 1
    return [
        {
            **({"accelerator": str(row["accelerator"])} if several else {}),
            "front": str(row["split"]),
            **{column_for(name).heading: value_text(name, row.get(name)) for name in known},
        }
        for row in rows
    ]
