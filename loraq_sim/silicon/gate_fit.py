"""Fit the closed form of gates to a table of synthesized units, and check it on units left out.

Coefficients are found part by part by non-negative least squares on relative errors. For the check
every fourth unit of the table, in its order, is left out of the fit and predicted; what is shipped
is then fitted to all of them.

What gates, bit cells and the cost model say of published operations, precision-scalable MACs and
chips stands beside what was published of them: `published_operations`, `published_scalable`,
`published_chips`.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

import hwmodels
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
from hwmodels.synthesis import TRANSISTORS_PER_GE, unit_gates
from loraq_sim.machine import cost_split
from loraq_sim.silicon.explore import Design, paper_machine
from loraq_sim.split import parse_split

__all__ = [
    *("FitCheck", "check_fit", "fit_gates", "model_text", "published_chips"),
    *("published_operations", "published_scalable", "read_scalable"),
]

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


_PAIR = ("design", "against")
_SCALABLE_CSV = Path(hwmodels.__file__).parent / "scalable_gates.csv"
_CHIPS = Path(hwmodels.__file__).parent / "published_chips.yaml"
_SIDE = 4096
_CHIP_FIELDS = (
    *("rows", "columns", "products_per_add", "acc_bits", "sram_bytes", "node_nm", "clock_hz"),
)


def published_chips() -> list[dict[str, Any]]:
    """Published chips beside what gates, bit cells and the cost model say of the same machine.

    ``area_error`` and ``energy_error`` are model / published - 1, of mm2 and of joules, these at
    the node's nominal voltage. The model's area is that of `hwmodels.chip_area`; its TOPS/W those
    of a large product, without DRAM and leakage.
    """
    rows = []
    for chip in _published()["chips"]:
        fields = {name: chip[name] for name in _CHIP_FIELDS}
        split = parse_split(chip["precision"])
        design = Design(split=split, overflow="wrap", dram_bytes_per_s=100e9, **fields)
        machine = paper_machine(design, chip["name"])
        area = hwmodels.chip_area(machine)
        _, cost = cost_split(_SIDE, _SIDE, _SIDE, split, machine)
        parts = cost.parts["energy_j"]
        on_chip = sum(value for name, value in parts.items() if name not in ("dram", "static"))
        tops_per_w = 2 * _SIDE**3 / on_chip / 1e12
        nominal = chip["tops_per_w"] * (chip["volts"] / chip["nominal_volts"]) ** 2
        rows.append(
            {
                "chip": chip["name"],
                "node_nm": chip["node_nm"],
                "precision": chip["precision"],
                "macs": chip["rows"] * chip["columns"] * chip["products_per_add"],
                "published_mm2": chip["area_mm2"],
                "model_mm2": sum(area.values()),
                "area_error": sum(area.values()) / chip["area_mm2"] - 1,
                "published_tops_per_w": chip["tops_per_w"],
                "at_nominal_tops_per_w": nominal,
                "model_tops_per_w": tops_per_w,
                "energy_error": nominal / tops_per_w - 1,
                **{f"{name}_mm2": value for name, value in area.items()},
                "mac_share": parts["mac_main"] / on_chip,
                **{
                    name: chip[name] for name in ("title", "area_of", "measured", "volts", "source")
                },
            }
        )
    return rows


def _published() -> dict[str, Any]:
    from ruamel.yaml import YAML

    loaded: dict[str, Any] = YAML(typ="safe").load(_CHIPS.read_text(encoding="utf-8"))
    return loaded


def published_operations() -> list[dict[str, Any]]:
    """Published single operations beside their parts of a synthesized 8 x 8 column of 32 bits.

    Area is that of cells, not placed. The adder's gates are those of the accumulator without its
    flip-flops; its energy has them, for the register clocks with it.
    """
    column = Column()
    parts = unit_gates(column)[0]
    registers = FLIP_FLOP * flip_flops_of(column)
    gates = {"multiplier": parts["multiplier"], "adder": parts["accumulator"] - registers}
    gates["both"] = sum(gates.values())
    rows = []
    for operation in _published()["operations"]:
        node = hwmodels.load_node(operation["node_nm"])
        array = hwmodels.synthesized_array(node_nm=node.name)
        whole = array.energy_pj_per_mac or 0.0
        energy = {"multiplier": node.multiply_pj, "adder": whole - node.multiply_pj, "both": whole}
        part, area = operation["part"], operation["area_um2"]
        model_um2 = gates[part] / TRANSISTORS_PER_GE * node.nand2_um2
        rows.append(
            {
                **{"operation": operation["name"], "node_nm": node.name},
                **{"published_um2": area, "model_um2": model_um2},
                "area_ratio": None if area is None else model_um2 / area,
                **{"published_pj": operation["pj"], "model_pj": energy[part]},
                "energy_ratio": energy[part] / operation["pj"],
                "source": operation["source"],
            }
        )
    return rows


def read_scalable(path: Path = _SCALABLE_CSV) -> dict[str, dict[str, float]]:
    """Numbers of the precision-scalable MACs, as ``hw synth --fill-scalable`` wrote them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {
        row["design"]: {key: float(row[key]) for key in row if key != "design" and row[key]}
        for row in rows
    }


def published_scalable() -> list[dict[str, Any]]:
    """Published areas and energies of precision-scalable MACs beside our own of such designs.

    ``factor`` is the model's over the published ratio, or um2. Areas are of designs, energies of
    one product: of what a cycle of random operands of so many bits takes.
    """
    known = read_scalable()
    rows = []
    for item in _published()["scalable"]:
        ratio, um2, bits = item.get("ratio"), item.get("um2"), item.get("bits")
        column = "transistors" if bits is None else f"units_{bits}"
        of, against = (known[item[key]][column] if key in item else 1.0 for key in _PAIR)
        model = of / against / item.get("products", 1) if um2 is None else None
        model_um2 = None
        if um2 is not None:
            node = hwmodels.load_node(item["node_nm"])
            model_um2 = of / TRANSISTORS_PER_GE * node.nand2_um2
        rows.append(
            {
                **{"comparison": item["name"], "quantity": "area" if bits is None else "energy"},
                **{"published_ratio": ratio, "model_ratio": model},
                **{"published_um2": um2, "model_um2": model_um2},
                "factor": (model or model_um2 or 0.0) / (ratio or um2),
                **{key: item[key] for key in ("design", "source", "differs")},
            }
        )
    return rows
