"""What a solved layer is worth: bytes, errors, and the gain over baselines of the same bytes.

`report_solution` is the row of one solution. `compare_methods` sets solvers side by side on one
layer, each as published, at equal bytes: the split sets the bytes of the branch; ``lqer``,
``l2qer``, ``alternating`` and ``loraq`` spend them on a branch in the split's format; the methods
published with a 16-bit branch on the fp16 branch of the largest rank that fits the same bytes.
``rtn`` has no branch and takes less.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from loraq_sim.errors import InputError
from loraq_sim.evaluate import reference_output, sample_rows, solve_split
from loraq_sim.formats import Format, parse_format
from loraq_sim.layers import Layer
from loraq_sim.metrics import relative_error
from loraq_sim.solvers import Solution, solve
from loraq_sim.solvers.problem import SplitOptions
from loraq_sim.split import WITHOUT_BRANCH, PrecisionSplit, branch_bytes

__all__ = [
    "compare_methods",
    "comparison_means",
    "comparison_table_rows",
    "mean_rows",
    "report_solution",
    "solve_with",
    "stored_output_error",
]


_MEANS = ("bits_per_weight", "weight_error", "output_error", "gain_over_rtn", "gain_over_svdquant")
_FP16_BYTES = 2
_SETTINGS = ("method", "preset", "device", "smooth", "rotate", "condition", "finish")


def solve_with(
    layer: Layer, split: PrecisionSplit, settings: dict[str, Any], seed: int
) -> Solution:
    """Solve with what `settings` says of method, preset, device, smoothing and rotation."""
    options = {key: settings[key] for key in _SETTINGS if key in settings}
    return solve_split(layer, split, seed=seed, **options)


def report_solution(
    layer: Layer, solution: Solution, split: PrecisionSplit, *, seed: int, tokens: int | None
) -> dict[str, Any]:
    """Columns of one solved layer.

    ``output_error`` is `stored_output_error`.
    ``gain_over_rtn`` is the weight error of round to nearest over this one;
    ``gain_over_svdquant`` that of SVDQuant (no smoothing) with the 16-bit branch that fits the same
    bytes, None if not even rank 1 fits.
    """
    gains = _gains(layer, solution, split, seed)
    return {
        "kind": layer.kind,
        "n": layer.n,
        "k": layer.k,
        "method": solution.method,
        "inputs": layer.inputs,
        **_stored(layer, solution, tokens),
        **gains,
        "seconds": solution.seconds,
        "bytes_by_part": solution.bytes_by_part,
        "status": "ok",
        "message": "",
    }


def stored_output_error(layer: Layer, solution: Solution, tokens: int | None) -> float | None:
    """||X W_hat^T - X W^T||_F / ||X W^T + b||_F with full-precision activations, float64.

    The part of the output error that is due to the stored weight; None without activations.
    """
    x = sample_rows(layer.activations, tokens)
    if x is None:
        return None
    stored = x.astype("float64") @ solution.reconstruct().T.astype("float64")
    if layer.bias is not None:
        stored += layer.bias
    return relative_error(stored, reference_output(layer, x))


def _stored(layer: Layer, solution: Solution, tokens: int | None) -> dict[str, Any]:
    """What is stored of a layer, and what that loses."""
    return {
        "rank": solution.rank,
        "weight_bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
        "weight_error": solution.weight_error,
        "output_error": stored_output_error(layer, solution, tokens),
    }


def _gains(
    layer: Layer, solution: Solution, split: PrecisionSplit, seed: int
) -> dict[str, float | None]:
    plain = solve(layer.weight, "rtn", main=split.main_weight)
    gains = {
        "gain_over_rtn": _ratio(plain.weight_error, solution.weight_error),
        "gain_over_svdquant": None,
    }
    if solution.rank and split.branch_weight is not None:
        sizes = (layer.n, layer.k, solution.rank)
        spent = branch_bytes(*sizes, split.branch_weight, solution.feedback_rank)
        rank = _fp16_rank(layer, spent)
        if rank:
            published = solve(
                layer.weight,
                "svdquant",
                main=split.main_weight,
                branch="fp16",
                rank=rank,
                seed=seed,
            )
            gains["gain_over_svdquant"] = _ratio(published.weight_error, solution.weight_error)
    return gains


def _fp16_rank(layer: Layer, spent: int) -> int:
    """The largest rank of an fp16 branch in `spent` bytes; 0 if not even rank 1 fits."""
    return min(spent // (_FP16_BYTES * (layer.n + layer.k)), layer.n, layer.k)


def _ratio(baseline: float | None, error: float | None) -> float | None:
    return baseline / error if baseline is not None and error else None


def mean_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arithmetic means over layers per (split, method); a column with a missing value is None."""
    return [
        {"split": split, "method": method, "layers": len(members)}
        | {name: _mean([row[name] for row in members]) for name in _MEANS}
        for (split, method), members in _combinations(rows).items()
    ]


def _combinations(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows that are ok, by split and method."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["split"], row["method"]), []).append(row)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


# Published with factors in 16 bits: arXiv 2411.05007, 2310.08659, 2410.06040, 2412.07902.
_SIXTEEN_BIT_BRANCH = ("svdquant", "svdquant_tuned", "svdquant_published", "loftq", "qera", "lrc")


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
    if split.branch_weight is None:
        raise InputError(
            f"comparing methods needs a split with a branch, got {split}; "
            f"write for example {split}+W8A8@fp16r32"
        )
    rows = []
    for method in methods:
        chosen = _as_published(method, split, split.branch_weight, layer)
        options: SplitOptions = {
            "method": method, "preset": preset, "seed": seed, "device": device,
        }  # fmt: skip
        solution = solve_split(layer, chosen, **options)
        rows.append(_row(layer, solution, chosen, split, method, tokens) | {"seed": seed})
    last = rows[-1]
    for row in rows:
        row["gain"] = _ratio(row["weight_error"], last["weight_error"])
        row["output_gain"] = _ratio(row["output_error"], last["output_error"])
    return rows


def _as_published(
    method: str, split: PrecisionSplit, branch: Format, layer: Layer
) -> PrecisionSplit:
    if method in WITHOUT_BRANCH:
        return dataclasses.replace(split, feedback=None)
    if method not in _SIXTEEN_BIT_BRANCH:
        return split
    rank, feedback_rank = split.ranks(layer.n, layer.k)
    spent = branch_bytes(layer.n, layer.k, rank, branch, feedback_rank)
    fits = _fp16_rank(layer, spent)
    if not fits:
        raise InputError(
            f"layer {layer.name!r}, split {split}: its branch takes {spent} bytes, less than the "
            f"{_FP16_BYTES * (layer.n + layer.k)} of the 16-bit rank-1 branch {method} would need"
        )
    return dataclasses.replace(
        split, branch_weight=parse_format("fp16"), rank=fits, budget=None, feedback=None
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
        "inputs": layer.inputs,
        **_stored(layer, solution, tokens),
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
    return [_mean_row(*key, members) for key, members in _combinations(rows).items()]


def _mean_row(split: str, method: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    gains = [row["gain"] for row in members]
    known = None not in gains and min(gains) > 0
    return {
        "split": split,
        "method": method,
        "layers": len(members),
        "weight_bytes": sum(row["weight_bytes"] for row in members),
        **{
            name: _mean([row[name] for row in members])
            for name in ("bits_per_weight", "weight_error", "output_error")
        },
        "mean_gain": math.exp(statistics.fmean(map(math.log, gains))) if known else None,
        "least_gain": min(gains) if known else None,
        "seconds": sum(row["seconds"] for row in members),
    }
