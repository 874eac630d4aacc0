"""Fit the closed form of gates to a table of synthesized units, and check it on units left out.

Coefficients are found part by part by non-negative least squares on relative errors. For the check
every fourth unit of the table, in its order, is left out of the fit and predicted; what is shipped
is then fitted to all of them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from hwmodels.gates import (
    FLIP_FLOP,
    Column,
    GroupSum,
    Narrowing,
    Terms,
    Unit,
    UnitGates,
    depth_terms,
    flip_flops_of,
    part_terms,
)

__all__ = ["FitCheck", "check_fit", "fit_gates", "model_text"]

_LEFT_OUT_EVERY = 4
_FEWEST_TO_CHECK = 12
_KINDS: dict[str, type[Column] | type[Narrowing] | type[GroupSum]] = {
    "column": Column,
    "srs": Narrowing,
    "group_sum": GroupSum,
}


@dataclass(frozen=True, kw_only=True)
class FitCheck:
    """Relative errors of area and depth on units that the fit has not seen, by kind of unit."""

    units: int
    mean_area_error: float
    worst_area_error: float
    mean_depth_error: float
    worst_depth_error: float


def fit_gates(table: Mapping[Unit, UnitGates]) -> dict[str, Terms]:
    """Coefficients of every part and of the depth of every kind of unit, none negative."""
    known: dict[str, Terms] = {}
    for name, kind in _KINDS.items():
        units = [unit for unit in table if isinstance(unit, kind)]
        for part in part_terms(units[0]):
            rows = [part_terms(unit)[part] for unit in units]
            totals = [_transistors(table[unit], unit, part) for unit in units]
            # A part's error matters as much as the part does in its unit.
            weights = [1.0 / table[unit].transistors for unit in units]
            known[part] = _fit(rows, totals, weights)
        depths = [float(table[unit].depth) for unit in units]
        known[f"depth_{name}"] = _fit(
            [depth_terms(unit) for unit in units], depths, [1.0 / depth for depth in depths]
        )
    return known


def _transistors(gates: UnitGates, unit: Unit, part: str) -> float:
    """Transistors of a part without its flip-flops."""
    registers = FLIP_FLOP * flip_flops_of(unit)
    if not isinstance(unit, Column):
        return gates.transistors - registers
    found: int = getattr(gates, part)
    return found - registers if part == "accumulator" else found


def _fit(rows: Sequence[Terms], totals: Sequence[float], weights: Sequence[float]) -> Terms:
    names = list(rows[0])
    matrix = np.array([[row[name] for name in names] for row in rows], np.float64)
    scale = np.array(weights, np.float64)
    solution, _ = nnls(matrix * scale[:, None], np.array(totals, np.float64) * scale)
    return {name: round(float(value), 6) for name, value in zip(names, solution, strict=True)}


def check_fit(table: Mapping[Unit, UnitGates]) -> dict[str, FitCheck]:
    """Errors on every fourth unit of each kind, predicted from the others.

    A kind with too few units for that has no check.
    """
    by_kind = {
        name: [unit for unit in table if isinstance(unit, kind)] for name, kind in _KINDS.items()
    }
    tested = {
        name: units[1::_LEFT_OUT_EVERY]
        for name, units in by_kind.items()
        if len(units) >= _FEWEST_TO_CHECK
    }
    left_out = {unit for units in tested.values() for unit in units}
    known = fit_gates({unit: gates for unit, gates in table.items() if unit not in left_out})
    checks = {}
    for name, seen in tested.items():
        areas = [_area_error(known, unit, table[unit]) for unit in seen]
        depths = [
            abs(_sum(known[f"depth_{name}"], depth_terms(unit)) / table[unit].depth - 1)
            for unit in seen
        ]
        checks[name] = FitCheck(
            units=len(seen),
            mean_area_error=float(np.mean(areas)),
            worst_area_error=max(areas),
            mean_depth_error=float(np.mean(depths)),
            worst_depth_error=max(depths),
        )
    return checks


def _area_error(known: Mapping[str, Terms], unit: Unit, gates: UnitGates) -> float:
    parts = part_terms(unit)
    total = sum(_sum(known[part], terms) for part, terms in parts.items())
    return abs((total + FLIP_FLOP * flip_flops_of(unit)) / gates.transistors - 1)


def _sum(known: Terms, terms: Terms) -> float:
    return sum(known[name] * value for name, value in terms.items())


def model_text(
    table: Mapping[Unit, UnitGates], notes: Sequence[str], energy: Mapping[str, Any]
) -> str:
    """The file that `hwmodels` reads: coefficients of all units, errors of the check, activity."""
    errors = {
        name: {key: round(float(value), 4) for key, value in vars(check).items()}
        for name, check in check_fit(table).items()
    }
    record = {"notes": list(notes), "left_out": errors, "coefficients": fit_gates(table)}
    record["energy"] = dict(energy)
    return json.dumps(record, indent=1) + "\n"
