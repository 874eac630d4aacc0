"""Everything a report shows, gathered elsewhere, and its answer: the verdict in each context.

`ReportData` holds frames of plain rows and where they come from. Which split to build is the
verdict's (`loraq_sim.results.verdict`); here it gets the numbers around it: how sure the costs are,
what overflows, what a mix would save, what is missing. Parts of a cost get the names that people
read.

An error of the choice is also told **in images**: `benchmarks/image_anchors.py` has run a small
trained diffusion transformer in splits of many errors. The PSNR of images is read from the straight
line through them on the logarithm of the error, with their distance from it, and not beyond them.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import numpy as np

from loraq_sim.errors import counted
from loraq_sim.files import shown_line
from loraq_sim.results.choice import COSTS, OF_USUAL_KERNELS
from loraq_sim.results.columns import column_for, is_missing
from loraq_sim.results.rows import EVALUATED, AnyRow, StoredRow, cells_of
from loraq_sim.results.verdict import Verdict, said_of_a_part, verdict_of
from loraq_sim.results.wording import listing, percent_text, some_of

__all__ = [
    "Answer",
    "BOUND_NAMES",
    "COSTS",
    "MixedModel",
    "PART_NAMES",
    "ReportData",
    "answers",
    "error_in_images",
    "image_anchors",
    "shown_records",
]


@dataclass(frozen=True, kw_only=True)
class MixedModel:
    """Allocations of one split per layer in one context.

    Attributes
    ----------
    context : str
        Which `ReportData.contexts` entry.
    cost, error : str
        Columns of the rows.
    frontier : sequence of rows
        Allocations, cheapest first, each with `cost`, `error` and ``mix`` (how many layers run
        which split).
    gains : sequence of rows
        One for each uniform split: ``split``, its `cost` and `error`, and the `mixed_error` of the
        best allocation that costs no more.
    """

    context: str
    cost: str
    error: str
    frontier: Sequence[AnyRow]
    gains: Sequence[AnyRow]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What the page and its files show; every number in base units.

    Attributes
    ----------
    title : str
        What was swept, for the head of the page.
    error : str
        ``output_error``, or ``weight_error`` where no layer has activations.
    rows : sequence of rows
        One per layer and case, with ``label`` and ``context``.
    totals : sequence of rows
        Model totals with ``label``, ``context``, ``pareto`` (front of error and latency) and
        ``fronts`` (names of the costs on whose front with the error the row is).
    kinds : sequence of rows
        Totals of the layers of one ``kind``.
    parts : sequence of rows
        Cost of one call: ``context``, ``label``, ``kind``, ``m``, ``n``, ``k``, ``n_layers``,
        ``calls``, ``bound`` and, for each of `COSTS`, ``parts[cost]`` as ``{part: value}``.
    mixed : sequence of MixedModel
    arrays : sequence of rows
        Of the answer's split on several arrays: each array, its area and ``parts`` of it in gate
        equivalents per MAC, its ``error`` and overflows, and whether it ``is_answer``.
    validation, devices : sequence of rows
        Predicted against measured times, and their summary per device.
    uncertainty : mapping of str to row
        By accelerator: ``bound``, the relative error the latency model is taken to have, and
        ``seen``, what that was seen on; ``rows``, ``mean_error`` and ``worst_error`` where enough
        was measured on this accelerator.
    machines : mapping of str to mapping
        By accelerator: ``title``, ``facts``, the numbers of its file with their sources, and the
        bandwidth of its DRAM, ``dram_bytes_per_s``.
    grids : mapping of str to row
        By context: costs of its cases on other machines (`points.machine_grid`).
    before : sequence of rows
        Totals of another store that this one is compared with, like `totals`.
    verdict_before : Verdict or None
        What these say.
    missing : sequence of rows
        Cases that were planned and have no row.
    runs : sequence of rows
        Provenance of every sweep into the store.
    notes : sequence of str
        What could not be shown, and why.
    formulas : sequence of str
        How errors of a model are formed.
    version : str
        Of the program.
    """

    title: str
    error: str
    rows: Sequence[AnyRow]
    totals: Sequence[AnyRow]
    kinds: Sequence[AnyRow] = ()
    parts: Sequence[AnyRow] = ()
    mixed: Sequence[MixedModel] = ()
    arrays: Sequence[AnyRow] = ()
    validation: Sequence[AnyRow] = ()
    devices: Sequence[AnyRow] = ()
    uncertainty: Mapping[str, AnyRow] = field(default_factory=dict)
    machines: Mapping[str, AnyRow] = field(default_factory=dict)
    grids: Mapping[str, AnyRow] = field(default_factory=dict)
    before: Sequence[AnyRow] = ()
    verdict_before: Verdict | None = None
    missing: Sequence[AnyRow] = ()
    runs: Sequence[AnyRow] = ()
    notes: Sequence[str] = ()
    formulas: Sequence[str] = ()
    version: str = ""

    @property
    def contexts(self) -> list[str]:
        """Where numbers compare: accelerators, or dumps on accelerators, in order."""
        return list(dict.fromkeys(row["context"] for row in self.totals))

    @cached_property
    def verdict(self) -> Verdict:
        """What to build, in each context and in all of them."""
        return said_of_a_part(verdict_of(self.totals), self.rows, self.missing)

    def accelerator_of(self, context: str) -> str:
        """Name of the accelerator of a context."""
        return next(str(r["accelerator"]) for r in self.totals if r["context"] == context)

    @cached_property
    def n_layers(self) -> int:
        """How many layers have a row."""
        return len({row["layer"] for row in self.rows})

    @cached_property
    def accumulators(self) -> list[dict[str, Any]]:
        """Per context and case: bits the least and the most demanding layer needed, and overflows.

        ``low`` and ``high`` are the bits on this input, ``layer`` needs the most; ``guaranteed``
        are enough for any input, ``array`` and ``rule`` the accumulator and its overflow rule.
        """
        names = ("context", "label", "safe_acc_bits", "guaranteed_acc_bits", "overflow_count")
        cases: dict[tuple[str, str], tuple[list[Any], ...]] = {}
        for row, values in zip(self.rows, cells_of(self.rows, names), strict=True):
            if not is_missing(values[2]):
                own = cases.setdefault(values[:2], ([], [], [], []))
                for known, value in zip(own, (*values[2:], row), strict=True):
                    known.append(value)
        found = []
        for (context, label), (bits, guaranteed, overflows, rows) in cases.items():
            widest = rows[bits.index(max(bits))]
            found.append(
                {
                    "context": context,
                    "label": label,
                    "low": min(bits),
                    "high": max(bits),
                    "layer": str(widest["layer"]),
                    "guaranteed": max((n for n in guaranteed if not is_missing(n)), default=None),
                    "array": widest.get("acc_bits"),
                    "rule": widest.get("overflow"),
                    "overflows": sum(count or 0 for count in overflows),
                }
            )
        return found

    @cached_property
    def _rows_by_context(self) -> dict[str, list[AnyRow]]:
        found: dict[str, list[AnyRow]] = {}
        for row in self.rows:
            found.setdefault(row["context"], []).append(row)
        return found

    def rows_of(self, context: str) -> list[AnyRow]:
        """Rows of layers in one context."""
        return self._rows_by_context.get(context, [])

    def totals_of(self, context: str) -> list[AnyRow]:
        """Totals of one context that hold numbers."""
        return [
            row for row in self.totals if row["context"] == context and row.get("status") == "ok"
        ]


def shown_records(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Records whose texts can be drawn and printed: fonts have no control characters."""
    texts: set[str] = set()
    kinds: set[type] = set()
    names: set[Any] = set()
    for record in records:
        values = record.cells if isinstance(record, StoredRow) else record.values()
        texts.update(value for value in values if type(value) is str)
        kinds.update(map(type, values))
        names.update(record)
    is_flat = not any(issubclass(kind, dict | list) for kind in kinds)
    # Nearly always; copying 100,000 rows takes seconds.
    if is_flat and all(shown_line(text) == text for text in (*texts, *names)):
        return list(records)
    line = lru_cache(maxsize=None)(shown_line)

    def clean(value: Any) -> Any:
        if type(value) is str:
            return line(value)
        if isinstance(value, Mapping):
            return {clean(key): clean(entry) for key, entry in value.items()}
        return [clean(entry) for entry in value] if isinstance(value, list) else value

    return [clean(record) for record in records]


PART_NAMES = {
    "main": "main branch",
    "branch_down": "branch, X R\u1d40",
    "branch_up": "branch, P L\u1d40",
    "combine": "group scaling",
    "tile": "tile overhead",
    "stall": "stall",
    "fill": "pipeline fill",
    "dispatch": "dispatch",
    "mac_main": "MACs, main branch",
    "mac_branch": "MACs, branch",
    "vector": "vector unit",
    "unpack": "unpacking",
    "l1": "L1",
    "l2": "L2",
    "dram": "DRAM",
    "static": "static power",
    "activations": "activations",
    "weights": "main weights",
    "factors": "branch factors",
    "output": "output",
    "p": "P",
    "left": "branch, L",
    "right": "branch, R",
}
"""A part that is not listed keeps its own name."""

BOUND_NAMES = {
    "compute": "MAC rate",
    "vector": "vector unit",
    "l1": "L1 bandwidth",
    "l2": "L2 bandwidth",
    "dram": "DRAM bandwidth",
    "dispatch": "dispatch",
    "side": "side unit",
}


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
    best: AnyRow | None
    cost: str
    choices: Sequence[tuple[str, AnyRow]]
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
            *_in_images(verdict.error, best),
            *_how_sure(data, context, rows),
            *_overflows(data, best),
            *_mixed(data, context, best, verdict.cost),
            *_gaps(data, context),
        ),
    )


def _has(row: AnyRow, key: str) -> bool:
    return not is_missing(row.get(key))


def _how_sure(data: ReportData, context: str, rows: Sequence[AnyRow]) -> list[str]:
    if not any(_has(row, "latency_s") for row in rows):
        return []
    found = []
    name = data.accelerator_of(context)
    known = data.uncertainty.get(name, {})
    if "worst_error" in known:
        found.append(
            f"The latency model was off by {percent_text(known['mean_error'])} on average and "
            f"{percent_text(known['worst_error'])} at worst on "
            f"{counted(known['rows'], 'measured GEMM')} of {name}, of {OF_USUAL_KERNELS}."
        )
    else:
        elsewhere = f": taken as {percent_text(known['bound'])}, {known['seen']}" if known else ""
        found.append(
            f"Too little was measured on {name} to say how far its latencies are off{elsewhere}."
        )
    return found


def _in_images(error: str, best: AnyRow) -> list[str]:
    """What the error of the choice came to in the images of a small model."""
    text = error_in_images(best.get(error)) if error == "output_error" else ""
    if not text:
        return []
    about = image_anchors()["about"]
    return [
        f"In images, {text}: PSNR against full precision, from splits measured on "
        f"{about['images']} images each of that small model, not of this one."
    ]


@lru_cache(maxsize=1)
def image_anchors() -> dict[str, Any]:
    """Pairs of output error and image error as `benchmarks/image_anchors.py` measured them.

    Keys ``about`` (model, command, how many images), ``reference`` (a strip of images in full
    precision, PNG in base64) and ``anchors``, largest error first: ``split``, ``method``,
    ``output_error``, ``psnr_db``, ``psnr_std`` (over seeds), ``ssim`` and ``strip``.
    """
    text = (files("loraq_sim.reporting") / "image_anchors.json").read_text(encoding="utf-8")
    known = json.loads(text)
    return known | {"line": _line_through(known["anchors"])}


def _line_through(known: Sequence[AnyRow]) -> dict[str, float]:
    """Least squares of PSNR on log10 of the error, and how far the points lie from it (rms)."""
    x = np.log10([anchor["output_error"] for anchor in known])
    y = np.array([anchor["psnr_db"] for anchor in known])
    slope, intercept = np.polyfit(x, y, 1)
    missed = y - intercept - slope * x
    return {
        "slope": float(slope),
        "intercept": float(intercept),
        "spread": float(np.sqrt((missed**2).mean())),
        "low": float(10 ** x.min()),
        "high": float(10 ** x.max()),
    }


def error_in_images(error: Any) -> str:
    """``2.6 % is about 37 dB (± 1) on tiny_pixart``; empty beyond the errors that were measured."""
    if is_missing(error):
        return ""
    known = image_anchors()
    line, model = known["line"], known["about"]["model"]
    if not line["low"] <= error <= line["high"]:
        return ""
    psnr = line["intercept"] + line["slope"] * math.log10(error)
    return f"{percent_text(error)} is about {psnr:.0f} dB (± {line['spread']:.0f}) on {model}"


def _overflows(data: ReportData, best: AnyRow) -> list[str]:
    count, width = best.get("overflow_count"), best.get("safe_acc_bits")
    if is_missing(count) or is_missing(width):
        return []
    bits = best.get("acc_bits")
    array = f"its {bits}-bit accumulators" if bits else "its accumulators"
    if count:
        return [
            f"{counted(count, 'sum', 'overflows')} {array}; {width} bits would hold every sum of "
            "this input."
        ]
    return [f"No sum overflows {array}; {width} bits would do for this input."]


def _mixed(data: ReportData, context: str, best: AnyRow, cost: str) -> list[str]:
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
    own = data.rows_of(context)
    failed = sum(row.get("status") not in EVALUATED for row in own)
    found = []
    if failed:
        n = len(own)
        found.append(f"{failed} of {n} layer cases failed; they are listed at the end.")
    totals = [row for row in data.totals if row["context"] == context]
    partial: dict[str, list[str]] = {}
    for row in totals:
        for part in filter(None, str(row.get("message") or "").split("; ")):
            partial.setdefault(part, []).append(row["label"])
    notes = data.verdict.on[context].notes if context in data.verdict.on else ()
    for part, labels in sorted(partial.items()):
        if not any(note.startswith(part) for note in notes):
            cases = "" if len(labels) == len(totals) else f" in {some_of(labels)}"
            found.append(f"{part[:1].upper()}{part[1:]}{cases}.")
    return found


def _choices(rows: Sequence[AnyRow], best: AnyRow, error: str) -> list[tuple[str, AnyRow]]:
    roles: dict[str, tuple[list[str], AnyRow]] = {best["label"]: (["verdict"], best)}
    for key in (error, *COSTS):
        usable = [row for row in rows if _has(row, key)]
        if not usable:
            continue
        row = min(usable, key=lambda r: (r[key], r[error]))
        roles.setdefault(row["label"], ([], row))[0].append(f"least {column_for(key).heading}")
    return [(listing(names), row) for names, row in roles.values()]
