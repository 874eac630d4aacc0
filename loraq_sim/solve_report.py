"""What a solved layer is worth: bytes, errors, and the gain over baselines of the same bytes."""

import statistics
from collections.abc import Iterable
from typing import Any

from loraq_sim.evaluate import reference_output, sample_rows, solve_split
from loraq_sim.layers import Layer
from loraq_sim.metrics import relative_error
from loraq_sim.solvers import Solution, solve
from loraq_sim.solvers.budget import branch_bytes
from loraq_sim.split import PrecisionSplit

__all__ = [
    "mean_rows",
    "report_solution",
    "solve_with",
    "stored_output_error",
]

_MEANS = ("bits_per_weight", "weight_error", "output_error", "gain_over_rtn", "gain_over_svdquant")
_FP16_BYTES = 2
_SETTINGS = ("method", "preset", "device", "smooth", "rotate")


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
        "rank": solution.rank,
        "weight_bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
        "weight_error": solution.weight_error,
        "output_error": stored_output_error(layer, solution, tokens),
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


def _gains(
    layer: Layer, solution: Solution, split: PrecisionSplit, seed: int
) -> dict[str, float | None]:
    plain = solve(layer.weight, "rtn", split.main_weight)
    gains = {"gain_over_rtn": _ratio(plain.weight_error, solution.weight_error)}
    gains["gain_over_svdquant"] = None
    if solution.rank:
        spent = branch_bytes(layer.n, layer.k, solution.rank, split.branch_weight)
        rank = min(spent // (_FP16_BYTES * (layer.n + layer.k)), layer.n, layer.k)
        if rank:
            published = solve(
                layer.weight, "svdquant", split.main_weight, "fp16", int(rank), seed=seed
            )
            gains["gain_over_svdquant"] = _ratio(published.weight_error, solution.weight_error)
    return gains


def _ratio(baseline: float, error: float) -> float | None:
    return baseline / error if error else None


def mean_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arithmetic means over layers per (split, method); a column with a missing value is None."""
    combinations: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            combinations.setdefault((row["split"], row["method"]), []).append(row)
    return [
        {"split": split, "method": method, "layers": len(members)}
        | {name: _mean([row[name] for row in members]) for name in _MEANS}
        for (split, method), members in combinations.items()
    ]


def _mean(values: list[float | None]) -> float | None:
    return None if any(value is None for value in values) else statistics.fmean(values)
