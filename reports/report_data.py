"""Everything a report shows, gathered elsewhere: frames of plain rows and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from loraq_sim.results.choice import COSTS
from loraq_sim.results.verdict import Verdict, verdict_of

__all__ = ["COSTS", "MixedModel", "ReportData"]

Row = Mapping[str, Any]


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
    frontier: Sequence[Row]
    gains: Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What `reports.html` and `reports.bundle` show; every number in base units.

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
    validation, devices : sequence of rows
        Predicted against measured times, and their summary per device.
    uncertainty : mapping of str to row
        By accelerator: ``bound``, the relative error the latency model is taken to have, and
        ``seen``, what that was seen on; ``rows``, ``mean_error`` and ``worst_error`` where enough
        was measured on this accelerator.
    machines : mapping of str to mapping
        By accelerator: ``title`` and ``facts``, the numbers of its file with their sources.
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
    rows: Sequence[Row]
    totals: Sequence[Row]
    kinds: Sequence[Row] = ()
    parts: Sequence[Row] = ()
    mixed: Sequence[MixedModel] = ()
    validation: Sequence[Row] = ()
    devices: Sequence[Row] = ()
    uncertainty: Mapping[str, Row] = field(default_factory=dict)
    machines: Mapping[str, Row] = field(default_factory=dict)
    runs: Sequence[Row] = ()
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
        return verdict_of(self.totals)

    def accelerator_of(self, context: str) -> str:
        """Name of the accelerator of a context."""
        return next(str(r["accelerator"]) for r in self.totals if r["context"] == context)

    def totals_of(self, context: str) -> list[Row]:
        """Totals of one context that hold numbers."""
        return [
            row for row in self.totals if row["context"] == context and row.get("status") == "ok"
        ]
