"""One layer, split and accelerator taken apart: where its error comes from, where its cost goes.

Each source of error is switched off in turn, and each is measured alone. With e the error vector of
the whole layer and d_s what switching source s off changes of it,

    share_s = <d_s, e> / <e, e>

is how much of the squared error is due to s. Shares add up to 1 where errors add up; what is left
is interaction (one rounding changes what another one sees). Independent errors add in squares:
the root of the sum of squares of each alone would then be the whole error.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.dumps import LayerDump, read_layer_dump
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.errors import CaseFailed, InputError
from loraq_sim.evaluate import (
    UNKNOWN_ROWS,
    evaluate_case,
    reference_output,
    sample_rows,
    solve_case,
)
from loraq_sim.explain.switchable import (
    OVERFLOW,
    SOURCES,
    SwitchableLayer,
    float_branch,
    leaving_rows,
    stored_weight,
)
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for, model_step, solved_workload
from loraq_sim.results.cards import shortened
from loraq_sim.results.rows import ResultRow
from loraq_sim.settings import CaseOptions, CaseSettings
from loraq_sim.solvers import Solution
from loraq_sim.split import PrecisionSplit

__all__ = [
    "Explanation",
    "INTERACTION",
    "dump_of_row",
    "explain_case",
    "explain_row",
    "output_terms",
    "step_rests_on",
    "weight_terms",
]

INTERACTION = "interaction"
Terms = list[dict[str, Any]]
_DEFAULT_TOKENS = 256
_MOST_SHOWN = 5


def output_terms(
    switchable: SwitchableLayer, reference: NDArray[np.float64]
) -> tuple[Terms, dict[str, Any]]:
    """Rows of all sources, and a summary, of errors relative to the Frobenius norm of `reference`.

    Each row has ``source``, ``share``, ``error_without`` (all sources but this), ``error_alone``
    and ``meaning``; the last row is the interaction. The summary has ``total_error``, ``root_sum_
    of_squares`` of the errors alone, and ``unexplained_error``, what is left with all switched off.

    An output that is not finite has an infinite error, all of it due to values beyond a float
    format: ``error_without`` that source is the error of the others.
    """
    size = float(np.linalg.norm(reference)) or 1.0
    every = frozenset(switchable.sources)
    whole = switchable.output(every)
    if not np.isfinite(whole).all():
        return _overflowed_terms(switchable, reference, size)
    error = whole - reference
    square = float(np.vdot(error, error))
    rows: Terms = []
    for source in switchable.sources:
        without = switchable.output(every - {source})
        alone = switchable.output({source})
        change = whole - without
        rows.append(
            {
                "source": source,
                "share": float(np.vdot(change, error)) / square if square else 0.0,
                "error_without": float(np.linalg.norm(without - reference)) / size,
                "error_alone": float(np.linalg.norm(alone - reference)) / size,
                "meaning": SOURCES[source],
            }
        )
    nothing = switchable.output(())
    return _finished(rows), {
        "total_error": math.sqrt(square) / size,
        "root_sum_of_squares": _root(rows),
        "unexplained_error": float(np.linalg.norm(nothing - reference)) / size,
    }


def _overflowed_terms(
    switchable: SwitchableLayer, reference: NDArray[np.float64], size: float
) -> tuple[Terms, dict[str, Any]]:
    every = frozenset(switchable.sources)

    def error_of(on: frozenset[str]) -> float:
        error = float(np.linalg.norm(switchable.output(on) - reference)) / size
        return error if math.isfinite(error) else math.inf

    rows = [
        {
            "source": source,
            "share": 1.0 if source == OVERFLOW else 0.0,
            "error_without": error_of(every - {source}) if source == OVERFLOW else math.inf,
            "error_alone": error_of(frozenset({source})),
            "meaning": SOURCES[source],
        }
        for source in switchable.sources
    ]
    return _finished(rows), {
        "total_error": math.inf,
        "root_sum_of_squares": math.inf,
        "unexplained_error": error_of(frozenset()),
    }


def weight_terms(layer: Layer, solution: Solution) -> tuple[Terms, dict[str, Any]]:
    """As `output_terms` of the weight itself, for a layer without activations.

    Only the rounding of the main weight and of the factors can be told; their errors add exactly.
    """
    weight = stored_weight(layer, solution)
    branch = float_branch(layer, solution)
    main, left, right = solution.main.dequantize(), solution.left, solution.right
    if branch is None or left is None or right is None:
        parts = {"main_weight": main - weight}
    else:
        fit = branch.product()
        stored = left.dequantize().astype(np.float64) @ right.dequantize()
        parts = {"main_weight": main + fit - weight, "branch_weight": stored - fit}
    if solution.feedback is not None and solution.feedback_left is not None:
        # The others act on D = X - X V^T V.
        v = solution.feedback.dequantize().astype(np.float64)
        parts = {name: part - (part @ v.T) @ v for name, part in parts.items()}
        missed = solution.feedback_left.dequantize() - weight @ v.T
        parts["feedback_weight"] = missed @ v
    parts = {name: leaving_rows(part, solution) for name, part in parts.items()}
    size = float(np.linalg.norm(layer.weight.astype(np.float64))) or 1.0
    error = sum(parts.values())
    square = float(np.vdot(error, error))
    rows: Terms = [
        {
            "source": name,
            "share": float(np.vdot(part, error)) / square if square else 0.0,
            "error_without": float(np.linalg.norm(error - part)) / size,
            "error_alone": float(np.linalg.norm(part)) / size,
            "meaning": SOURCES[name],
        }
        for name, part in parts.items()
    ]
    summary = {"total_error": math.sqrt(square) / size, "root_sum_of_squares": _root(rows)}
    return _finished(rows), summary | {"unexplained_error": 0.0}


def _root(rows: Terms) -> float:
    return math.hypot(*(row["error_alone"] for row in rows))


def _finished(rows: Terms) -> Terms:
    """`rows`, and what they leave of the squared error."""
    left = {"source": INTERACTION, "share": 1.0 - math.fsum(row["share"] for row in rows)}
    left |= {"error_without": None, "error_alone": None}
    left["meaning"] = "what the sources do to each other: one rounding changes what another sees"
    return [*rows, left]


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """One case taken apart.

    Attributes
    ----------
    row : ResultRow
        The result row of the case, as `loraq_sim.evaluate_layer` gives it.
    errors : list of dict
        One row per source of error and one for their interaction: ``source``, ``share`` of the
        squared error (they add up to 1), ``error_without`` it, ``error_alone``, ``meaning``.
    summary : dict
        ``total_error``, ``root_sum_of_squares`` of the errors alone, ``unexplained_error``, and
        ``measure``: ``output_error``, or ``weight_error`` without activations.
    costs : list of dict
        ``quantity`` (cycles, energy_j, dram_bytes, weight_bytes), ``part``, ``value``, ``share``;
        the parts of a quantity add up to it.
    notes : tuple of str
        What could not be told.
    """

    row: ResultRow
    errors: list[dict[str, Any]]
    summary: dict[str, Any]
    costs: list[dict[str, Any]]
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        row, summary = self.row, self.summary
        told = [
            f"{term['source']} {term['share']:.0%}"
            for term in sorted(self.errors, key=lambda term: -term["share"])[:_MOST_SHOWN]
        ]
        costs = [
            f"{part['quantity']}: {part['part']} {part['share']:.0%}"
            for part in self.costs
            if part["share"]
            == max(p["share"] for p in self.costs if p["quantity"] == part["quantity"])
        ]
        error = f"{summary['measure'].replace('_', ' ')} {summary['total_error']:.3%}"
        lines = [f"{row['layer']} in {row['split']} on {row['accelerator']}: {error}"]
        lines += [f"squared error: {', '.join(told)}", f"largest parts: {', '.join(costs)}"]
        return "\n".join([*lines, *map(shortened, self.notes[:_MOST_SHOWN])])

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import explanation_card

        return explanation_card(self)


def explain_case(
    layer: Layer,
    split: "str | PrecisionSplit",
    accelerator: "str | hwmodels.Accelerator",
    *,
    family: str = "int",
    group: int = 64,
    datapath: Mapping[str, Any] | None = None,
    solution: Solution | None = None,
    **options: Unpack[CaseOptions],
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
    options.setdefault("tokens", _DEFAULT_TOKENS)
    settings = CaseSettings.of(split, family=family, group=group, datapath=datapath, **options)
    split = settings.split
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, settings.datapath)
    x = sample_rows(layer.activations, settings.tokens)
    if solution is None:
        solution = solve_case(layer, settings, accelerator=accelerator)
    row = evaluate_case(layer, settings, accelerator, solution=solution)
    split = split.for_layer(layer, solution)
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
        notes = tuple(
            text for text in (row["message"] or "").split("; ") if text and text != UNKNOWN_ROWS
        )
    costs = []
    if row["m"] is None:
        notes = (*notes, f"layer {layer.name!r}: {UNKNOWN_ROWS}")
    else:
        work = solved_workload(row["m"], solution, split, path, fused=settings.fused)
        machine = hwmodels.machine_with_array(accelerator, path.mac)
        cost = hwmodels.estimate_cost(work, machine, kernel=settings.kernel)
        costs = _cost_parts(cost)
    return Explanation(row=row, errors=errors, summary=summary, costs=costs, notes=notes)


def dump_of_row(
    row: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    dump: "str | Path | LayerDump | None" = None,
) -> LayerDump:
    """The dump that a row was swept from, by the provenance of its store; `dump` if it is given.

    Raises
    ------
    InputError
        If the file is not where the sweep read it.
    """
    if isinstance(dump, LayerDump):
        return dump
    plans = [run.get("plan") or {} for run in reversed(runs)]
    known = (p for p in plans if Path(str(p.get("dump"))).name == row.get("dump"))
    plan = next(known, {})
    path = Path(dump or plan.get("dump") or str(row.get("dump")))
    if not path.exists():
        raise InputError(f"the dump {path} is not there any more; give dump=PATH")
    drawn = bool(plan.get("synthesize_inputs")) and (plan.get("tokens") or True)
    return read_layer_dump(path, synthesize_inputs=drawn, lora=plan.get("lora") or ())


def explain_row(
    layer: Layer, row: Mapping[str, Any], accelerator: "hwmodels.Accelerator"
) -> Explanation:
    """As `explain_case`, of the case that a row of a store is the result of.

    Raises
    ------
    InputError
        If the row holds what no sweep writes.
    """
    try:
        others = json.loads(row.get("options") or "{}")
        datapath = dict(others.get("datapath") or {})
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"options of the row are no settings: {row['options']!r:.80}") from None
    array = describe_array(datapath_for(accelerator, datapath).mac)
    datapath |= {name: row[name] for name, value in array.items() if row.get(name) != value}
    # What was chosen by a condition is not given once more.
    given = {} if row.get("condition") else {"smooth": row["smooth"], "rotate": row["rotation"]}
    return explain_case(
        layer,
        row["split"],
        accelerator,
        family=row["family"] or "int",
        group=row["group_size"] or 64,
        datapath=datapath,
        method=row["method"],
        preset=row["preset"],
        seed=row["seed"],
        tokens=row["token_limit"],
        condition=row["condition"],
        finish=row["finish"],
        rows=row["m"],
        fused=others.get("fused", True),
        kernel=others.get("kernel"),
        **given,
    )


def _cost_parts(cost: "hwmodels.Cost") -> list[dict[str, Any]]:
    """Parts of each quantity with their share; parts that are zero are left out."""
    cycles_per_s = cost.cycles / cost.latency_s
    scales = {
        "cycles": ("latency_s", cycles_per_s),
        "energy_j": ("energy_j", 1.0),
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


def step_rests_on(
    model: str, split: PrecisionSplit, accelerator: "hwmodels.Accelerator", **how: Any
) -> str:
    """Assumed numbers that the latency of a denoising step rests on, as JSON of elasticities.

    `how`: options of `model_step`.
    """

    def total(_: None, machine: "hwmodels.Accelerator") -> Any:
        try:
            return SimpleNamespace(**model_step(model, split, machine, **how).rows[-1])
        except CaseFailed as error:
            raise hwmodels.AcceleratorError(str(error)) from error

    effects = hwmodels.rests_on(None, accelerator, cost_of=total)
    return json.dumps({key: round(effect, 4) for key, effect in effects.items()})
