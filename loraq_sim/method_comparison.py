"""Solvers side by side on one layer, each as published, at equal bytes.

The split sets the bytes of the branch. ``lqer``, ``l2qer``, ``alternating`` and ``loraq`` spend
them on a branch in the split's format; the methods published with a 16-bit branch on the fp16
branch of the largest rank that fits the same bytes. ``rtn`` has no branch and takes less.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from loraq_sim.errors import InputError
from loraq_sim.evaluate import solve_split
from loraq_sim.formats import parse_format
from loraq_sim.layers import Layer
from loraq_sim.solve_report import stored_output_error
from loraq_sim.solvers import Solution
from loraq_sim.solvers.budget import branch_bytes, rank_for_budget
from loraq_sim.split import PrecisionSplit

__all__ = ["compare_methods", "comparison_means", "comparison_table_rows"]

# Published with factors in 16 bits: arXiv 2411.05007, 2310.08659, 2410.06040.
_SIXTEEN_BIT_BRANCH = ("svdquant", "svdquant_tuned", "loftq", "qera")
_FP16_BYTES = 2


def compare_methods(
    layer: Layer,
    split: PrecisionSplit,
    methods: Sequence[str],
    *,
    preset: str = "balanced",
    seed: int = 0,
    tokens: int | None = None,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """One row per method, in order; ``gain`` is its weight error over that of the last method.

    ``output_error`` is due to the stored weight alone (full-precision activations), None without
    activations; ``output_gain`` is its ratio. ``branch`` is the format of the factors.

    Raises
    ------
    InputError
        If the split has no branch, or its bytes hold no 16-bit rank-1 branch where one is needed.
    """
    if not split.has_branch:
        raise InputError(
            f"comparing methods needs a split with a branch, got {split}; "
            f"write for example {split}+W8A8@fp16r32"
        )
    rows = []
    for method in methods:
        chosen = _as_published(method, split, layer)
        options = {"method": method, "preset": preset, "seed": seed, "device": device}
        solution = solve_split(layer, chosen, **options)
        rows.append(_row(layer, solution, chosen, split, method, tokens) | {"seed": seed})
    last = rows[-1]
    for row in rows:
        row["gain"] = _ratio(row["weight_error"], last["weight_error"])
        row["output_gain"] = _ratio(row["output_error"], last["output_error"])
    return rows


def _as_published(method: str, split: PrecisionSplit, layer: Layer) -> PrecisionSplit:
    if method not in _SIXTEEN_BIT_BRANCH:
        return split
    rank = split.rank
    if split.budget is not None:
        rank = rank_for_budget(layer.n, layer.k, split.branch_weight, split.budget)
    spent = branch_bytes(layer.n, layer.k, rank, split.branch_weight)
    fits = min(spent // (_FP16_BYTES * (layer.n + layer.k)), layer.n, layer.k)
    if not fits:
        raise InputError(
            f"layer {layer.name!r}, split {split}: its branch takes {spent} bytes, less than the "
            f"{_FP16_BYTES * (layer.n + layer.k)} of the 16-bit rank-1 branch {method} would need"
        )
    return dataclasses.replace(
        split, branch_weight=parse_format("fp16"), rank=int(fits), budget=None
    )


def _row(
    layer: Layer,
    solution: Solution,
    chosen: PrecisionSplit,
    split: PrecisionSplit,
    method: str,
    tokens: int | None,
) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "n": layer.n,
        "k": layer.k,
        "split": split.text,
        "method": method,
        "preset": solution.preset,
        "branch": str(chosen.branch_weight) if solution.rank else "",
        "rank": solution.rank,
        "weight_bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
        "weight_error": solution.weight_error,
        "output_error": stored_output_error(layer, solution, tokens),
        "seconds": solution.seconds,
        "status": "ok",
        "message": "",
    }


def comparison_table_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One wide row per (layer, split): the error of each method and the last one's gain over it."""
    wide: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["status"] != "ok":
            continue
        key = (row["layer"], row["split"])
        entry = wide.setdefault(
            key, {name: row[name] for name in ("layer", "n", "k", "split")} | {"gains": {}}
        )
        entry["weight_bytes"] = row["weight_bytes"]
        entry[f"{row['method']}_error"] = row["weight_error"]
        entry["gains"][f"gain_over_{row['method']}"] = row["gain"]
        entry["last"] = row["method"]
    for entry in wide.values():
        gains, last = entry.pop("gains"), entry.pop("last")
        gains.pop(f"gain_over_{last}")
        entry |= gains
    return list(wide.values())


def comparison_means(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per (split, method) over layers: mean errors, geometric mean and smallest of the gains."""
    combinations: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            combinations.setdefault((row["split"], row["method"]), []).append(row)
    return [_mean_row(*key, members) for key, members in combinations.items()]


def _mean_row(split: str, method: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(name: str) -> float | None:
        values = [row[name] for row in members]
        return None if None in values else statistics.fmean(values)

    gains = [row["gain"] for row in members]
    known = None not in gains and min(gains) > 0
    return {
        "split": split,
        "method": method,
        "layers": len(members),
        "weight_bytes": sum(row["weight_bytes"] for row in members),
        **{name: mean(name) for name in ("bits_per_weight", "weight_error", "output_error")},
        "mean_gain": math.exp(statistics.fmean(map(math.log, gains))) if known else None,
        "least_gain": min(gains) if known else None,
        "seconds": sum(row["seconds"] for row in members),
    }


def _ratio(error: float | None, last: float | None) -> float | None:
    return error / last if error is not None and last else None
