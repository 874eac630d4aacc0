"""`explain_case`: one layer, split and accelerator taken apart into errors and costs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hwmodels
from loraq_sim.case_settings import CaseSettings
from loraq_sim.evaluate import (
    UNKNOWN_ROWS,
    evaluate_case,
    reference_output,
    sample_rows,
    solve_case,
)
from loraq_sim.explain.error_terms import output_terms, weight_terms
from loraq_sim.explain.switchable import SwitchableLayer
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for, solved_workload
from loraq_sim.solvers import Solution
from loraq_sim.split import PrecisionSplit, parse_split

__all__ = ["Explanation", "explain_case"]

_DEFAULT_TOKENS = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """One case taken apart.

    Attributes
    ----------
    row : dict
        The result row of the case, as `loraq_sim.evaluate_layer` gives it.
    errors : list of dict
        One row per source of error and one for their interaction: ``source``, ``share`` of the
        squared error (they add up to 1), ``error_without`` it, ``error_alone``, ``meaning``.
    summary : dict
        ``total_error``, ``root_sum_of_squares`` of the errors alone, ``unexplained_error``, and
        ``measure``: ``output_error``, or ``weight_error`` without activations.
    costs : list of dict
        ``quantity`` (cycles, energy_pj, dram_bytes, weight_bytes), ``part``, ``value``, ``share``;
        the parts of a quantity add up to it.
    notes : tuple of str
        What could not be told.
    """

    row: dict[str, Any]
    errors: list[dict[str, Any]]
    summary: dict[str, Any]
    costs: list[dict[str, Any]]
    notes: tuple[str, ...]

    def _repr_html_(self) -> str:
        from loraq_sim.result_cards import explanation_card

        return explanation_card(self)


def explain_case(
    layer: Layer,
    split: "str | PrecisionSplit",
    accelerator: "str | hwmodels.Accelerator",
    *,
    seed: int = 0,
    method: str = "loraq",
    preset: str = "balanced",
    tokens: int | None = _DEFAULT_TOKENS,
    family: str = "int",
    group: int = 64,
    fused: bool = True,
    smooth: float | None = None,
    rotate: str | None = None,
    rows: int | None = None,
    datapath: Mapping[str, Any] | None = None,
    solution: Solution | None = None,
) -> Explanation:
    """Where the error of one (layer, split, accelerator) comes from, and where its cost goes.

    Parameters are those of `loraq_sim.evaluate_layer`; at most 256 activation rows are used unless
    `tokens` says otherwise (None: all).

    Raises
    ------
    InputError
        If an argument breaks a rule.
    hwmodels.AcceleratorError
        If the accelerator is unknown or its file is broken.
    """
    settings = CaseSettings(
        split=parse_split(split, family=family, group=group),
        method=method,
        preset=preset,
        seed=seed,
        smooth=smooth,
        rotate=rotate,
        tokens=tokens,
        rows=rows,
        fused=fused,
        datapath=datapath or {},
    )
    split = settings.split
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, datapath)
    x = sample_rows(layer.activations, tokens)
    if solution is None:
        solution = solve_case(layer, settings)
    row = evaluate_case(layer, settings, accelerator, solution=solution)
    notes: tuple[str, ...] = ()
    if x is None:
        errors, summary = weight_terms(layer, solution)
        summary["measure"] = "weight_error"
        notes = (
            "the layer has no activations: only the errors of its weight are told apart, not those "
            "of activations, accumulators, P and output",
        )
    else:
        switchable = SwitchableLayer(layer, solution, split, path, x)
        errors, summary = output_terms(switchable, reference_output(layer, x))
        summary |= {"measure": "output_error", "overflows": switchable.overflows}
        summary["clipped_count"] = sum(found.count for found in switchable.clipped)
        # What is not known of the costs is said below.
        notes = tuple(text for text in row["message"].split("; ") if text and text != UNKNOWN_ROWS)
    costs = []
    if row["m"] is None:
        notes = (*notes, f"layer {layer.name!r}: {UNKNOWN_ROWS}")
    else:
        work = solved_workload(row["m"], solution, split, path, fused=fused)
        costs = _cost_parts(hwmodels.estimate_cost(work, accelerator))
    return Explanation(row=row, errors=errors, summary=summary, costs=costs, notes=notes)


def _cost_parts(cost: "hwmodels.Cost") -> list[dict[str, Any]]:
    """Parts of each quantity with their share; parts that are zero are left out."""
    cycles_per_s = cost.cycles / cost.latency_s
    scales = {
        "cycles": ("latency_s", cycles_per_s),
        "energy_pj": ("energy_j", 1e12),
        "dram_bytes": ("dram_bytes", 1.0),
        "weight_bytes": ("weight_bytes", 1.0),
    }
    rows = []
    for quantity, (name, scale) in scales.items():
        total = sum(cost.parts[name].values())
        for part, value in cost.parts[name].items():
            if value:
                facts = {"quantity": quantity, "part": part, "value": value * scale}
                rows.append(facts | {"share": value / total})
    return rows
