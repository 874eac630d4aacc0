"""Each source of error switched off in turn, and each alone.

With e the error vector of the whole layer and d_s what switching source s off changes of it,

    share_s = <d_s, e> / <e, e>

is how much of the squared error is due to s. Shares add up to 1 where errors add up; what is left
is interaction (one rounding changes what another one sees). Independent errors add in squares:
the root of the sum of squares of each alone would then be the whole error.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.explain.float_branch import float_branch, leaving_rows, stored_weight
from loraq_sim.explain.sources import OVERFLOW, SOURCES
from loraq_sim.explain.switchable import SwitchableLayer
from loraq_sim.layers import Layer
from loraq_sim.solvers import Solution

__all__ = ["INTERACTION", "output_terms", "weight_terms"]

INTERACTION = "interaction"
Terms = list[dict[str, Any]]


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
    fit = branch.product() if branch is not None else 0.0
    parts = {"main_weight": solution.main.dequantize() + fit - weight}
    if branch is not None:
        stored = solution.left.dequantize().astype(np.float64) @ solution.right.dequantize()
        parts["branch_weight"] = stored - fit
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
