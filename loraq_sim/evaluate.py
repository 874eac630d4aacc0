"""The whole data flow of one (layer, split, accelerator) case, on one screen.

1. layer -> `solve` (split) -> stored branches -> weight error, bytes
2. stored branches and activations -> `run_layer` on the accelerator's data path -> output error
3. shapes and bits -> `hwmodels.estimate_cost` -> latency, energy, traffic
4. all of it -> one result row
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

import hwmodels
from loraq_sim.conditioning import hadamard_block
from loraq_sim.emulator.datapath import Datapath, LayerOutput, run_layer
from loraq_sim.emulator.float_overflow import Clipping
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.emulator.scaled_gemm import ZERO_POINT_MODEL
from loraq_sim.error_shares import RoundingWatch
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for, solved_workload
from loraq_sim.metrics import output_error
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.results.rows import COLUMN_NAMES
from loraq_sim.settings import CaseSettings
from loraq_sim.solvers import Solution, solve
from loraq_sim.solvers.problem import SharedStages
from loraq_sim.split import PrecisionSplit, parse_split

__all__ = [
    "UNKNOWN_ROWS",
    "evaluate_case",
    "evaluate_layer",
    "reference_output",
    "sample_rows",
    "solve_case",
    "solve_split",
]

UNKNOWN_ROWS = "rows per call not known: no latency, energy or traffic (give rows)"
"""What the message of a row says where M is not known."""

_STATISTICS = ("overflow_count", "safe_acc_bits", "guaranteed_acc_bits", "arithmetic")
_ERRORS = ("output_error", "sqnr_db", "cosine", "max_abs_error", "output_rms")


def evaluate_layer(
    layer: Layer,
    split: "str | PrecisionSplit",
    accelerator: "str | hwmodels.Accelerator",
    *,
    seed: int = 0,
    method: str = "loraq",
    preset: str = "balanced",
    tokens: int | None = None,
    family: str = "int",
    group: int = 64,
    fused: bool = True,
    smooth: float | None = None,
    rotate: str | None = None,
    rows: int | None = None,
    datapath: Mapping[str, Any] | None = None,
    solution: Solution | None = None,
) -> dict[str, Any]:
    """Error and cost of one layer in one precision split on one accelerator, as a result row.

    The output error compares the emulated integer data path with the full-precision layer (float64,
    bias included) on the layer's own activations. Without activations the output columns are None.
    Where values leave their float format, ``clipped_count`` counts them and ``message`` says which;
    an output with infinities or NaN has an infinite error and the status ``overflow``.

    Parameters
    ----------
    layer : Layer
    split : str or PrecisionSplit
        For example ``"W4A4+W8A8r64"``.
    accelerator : str or Accelerator
        Name, path of a YAML file, or a loaded description.
    family, group
        Element family and group of a split given as text.
    seed, method, preset, tokens, fused, smooth, rotate, rows, datapath
        See `loraq_sim.settings.CaseSettings`. A split without a branch is rounded to nearest
        (``rtn``).
    solution : Solution, optional
        An earlier solution of this layer and split; solved here by default.

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
    return evaluate_case(layer, settings, accelerator, solution=solution)


def evaluate_case(
    layer: Layer,
    settings: CaseSettings,
    accelerator: "str | hwmodels.Accelerator",
    *,
    solution: Solution | None = None,
) -> dict[str, Any]:
    """`evaluate_layer` with the settings of one record; `solution` is what they solve to."""
    started = time.perf_counter()
    split = settings.split
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, settings.datapath)
    x = sample_rows(layer.activations, settings.tokens)
    if solution is None:
        solution = solve_case(layer, settings)
    m = layer.m if settings.rows is None else settings.rows
    emulated, watch = None, None
    if x is not None:
        watch = RoundingWatch(len(x))
        emulated = run_layer(x, solution, split, path, layer.bias, on_step=watch)
    row = {
        **_identity(layer, m, settings, accelerator, x),
        **_transforms(settings, solution),
        "method": solution.method,
        "preset": solution.preset,
        "rank": solution.rank,
        "weight_bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
        "weight_error": solution.weight_error,
        **_measured(layer, x, emulated, watch),
        **_clipped(layer, x, solution, emulated),
        **describe_array(path.mac),
        **_cost(m, settings, solution, path, accelerator),
        "message": "; ".join(
            (*_remarks(layer, x, solution, emulated), *_setting_remarks(settings, m, solution))
        ),
        "seconds": time.perf_counter() - started,
        "seed": settings.seed,
        "pareto": False,
    }
    return {name: row[name] for name in COLUMN_NAMES if name in row}


_COSTS = (
    *("latency_s", "cycles", "energy_j", "dram_bytes", "utilization", "bound"),
    *("peak_activation_bytes", "working_set_bytes", "fits_in"),
)


def _cost(
    m: int | None,
    settings: CaseSettings,
    solution: Solution,
    path: Datapath,
    accelerator: "hwmodels.Accelerator",
) -> dict[str, Any]:
    """Cost of one call; nothing is known of a call whose rows are not."""
    if m is None:
        return dict.fromkeys(_COSTS)
    work = solved_workload(m, solution, settings.split, path, fused=settings.fused)
    cost = hwmodels.estimate_cost(work, accelerator)
    return {name: getattr(cost, name) for name in _COSTS}


def solve_case(
    layer: Layer, settings: CaseSettings, *, shared: SharedStages | None = None
) -> Solution:
    """What `settings` solve to; stages already in `shared` are used again."""
    return _solved(layer, settings.split, settings.solving() | {"shared": shared})


def solve_split(layer: Layer, split: PrecisionSplit, **options: Any) -> Solution:
    """`loraq_sim.solve` with the formats, rank and budget of `split`; errors name the layer."""
    parts = {"main": split.main_weight, "branch": split.branch_weight}
    return _solved(layer, split, parts | {"rank": split.rank, "budget": split.budget} | options)


def _solved(layer: Layer, split: PrecisionSplit, arguments: Mapping[str, Any]) -> Solution:
    try:
        return solve(layer.weight, activations=layer.activations, **arguments)
    except InputError as error:
        raise InputError(f"layer {layer.name!r}, split {split}: {error}") from error


def reference_output(layer: Layer, x: np.ndarray) -> np.ndarray:
    """x W^T + bias in float64, (M, N)."""
    y = x.astype(np.float64) @ layer.weight.T.astype(np.float64)
    return y if layer.bias is None else y + layer.bias.astype(np.float64)


# Every split of a layer is measured against the same output; tasks go layer by layer.
@lru_cache(maxsize=1)
def _layer_reference(layer: Layer, tokens: int) -> np.ndarray:
    return reference_output(layer, sample_rows(layer.activations, tokens))


def sample_rows(activations: np.ndarray | None, tokens: int | None) -> np.ndarray | None:
    """At most `tokens` rows, spread evenly: dumps hold time steps one after the other."""
    if activations is None or tokens is None:
        return activations
    if isinstance(tokens, bool) or int(tokens) != tokens or tokens < 1:
        raise InputError(f"tokens must be a positive integer, got {tokens!r}")
    n_rows = len(activations)
    if tokens >= n_rows:
        return activations
    return activations[_sampled(n_rows, tokens)]


def _sampled(n_rows: int, tokens: int) -> np.ndarray:
    """Indices of `tokens` rows of `n_rows`, spread evenly, (tokens,) int64."""
    return np.arange(tokens, dtype=np.int64) * n_rows // tokens


def _identity(
    layer: Layer,
    m: int | None,
    settings: CaseSettings,
    accelerator: "hwmodels.Accelerator",
    x: np.ndarray | None,
) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "group": layer.group,
        "m": m,
        "m_source": layer.m_source if settings.rows is None else "given",
        "n": layer.n,
        "k": layer.k,
        "tokens": 0 if x is None else len(x),
        "calls_per_step": layer.calls_per_step,
        "split": settings.split.text,
        "accelerator": accelerator.name,
    }


def _transforms(settings: CaseSettings, solution: Solution) -> dict[str, Any]:
    """How the inputs are transformed, in the words of the settings where they are the solution's"""
    rotation = None if solution.rotation is None else f"hadamard:{solution.rotation}"
    if hadamard_block(settings.rotate, solution.main.shape[1]) == solution.rotation:
        rotation = settings.rotate
    return {
        "rotation": rotation,
        "smooth": None if solution.smooth is None else settings.smooth,
    }


def _first_overflow(emulated: LayerOutput) -> str | None:
    """The first GEMM of the data path that overflowed, and where along K."""
    for name, seen in emulated.gemms.items():
        if seen.first_overflow_k is not None:
            return f"{name} k={seen.first_overflow_k}"
    return None


def _remarks(
    layer: Layer, x: np.ndarray | None, solution: Solution, emulated: LayerOutput | None
) -> Iterator[str]:
    if emulated is not None:
        if not np.isfinite(emulated.y).all():
            wild = int(emulated.y.size - np.isfinite(emulated.y).sum())
            yield f"the output is not finite: {wild:,} of {emulated.y.size:,} values"
        for found in emulated.clipped:
            yield _in_dump(found, layer, x).sentence()
    for name, part in _stored_parts(solution):
        if part.scales is None and part.n_clipped:
            count = f"{part.n_clipped:,} of {part.codes.size:,} values of {name}"
            yield f"{count} are clamped to the largest {part.format}: rescale the layer"
        elif part.n_saturated_scales:
            count = f"{part.n_saturated_scales} of {part.scales.size} scales of {name}"
            width = part.format.scale.name
            yield f"{count} are at an end of the {width} range: rescale the layer or widen them"
    if x is None:
        yield "no activations: output error not measured"
    elif beside := [n for n, seen in emulated.gemms.items() if seen.arithmetic == ZERO_POINT_MODEL]:
        yield (
            f"zero points are not on the integer path: {', '.join(beside)} ran as float32 sums, so "
            "no accumulator was emulated there and none could overflow"
        )


def _setting_remarks(settings: CaseSettings, m: int | None, solution: Solution) -> Iterator[str]:
    if solution.smooth is not None and settings.smooth is None:
        yield "activations are smoothed by factors of the solution"
    if m is None:
        yield UNKNOWN_ROWS


def _stored_parts(solution: Solution) -> list[tuple[str, QuantizedTensor]]:
    parts = [(name, getattr(solution, name)) for name in ("main", "left", "right")]
    return [(name, part) for name, part in parts if part is not None]


def _in_dump(found: Clipping, layer: Layer, x: np.ndarray) -> Clipping:
    """`found` with its first row counted in the dump, of which `x` may be a sample."""
    rows = _sampled(len(layer.activations), len(x))
    return replace(found, first_row=int(rows[found.first_row]))


def _clipped(
    layer: Layer, x: np.ndarray | None, solution: Solution, emulated: LayerOutput | None
) -> dict[str, Any]:
    """Values beyond their float format: where they are stored, then along the data path."""
    stored = [(name, part.n_clipped) for name, part in _stored_parts(solution) if part.n_clipped]
    along = [] if emulated is None else [_in_dump(found, layer, x) for found in emulated.clipped]
    first = None
    if along:
        first = f"{along[0].tensor} in {along[0].format}, row {along[0].first_row}"
    elif stored:
        first = f"stored {stored[0][0]}"
    total = sum(count for _, count in stored) + sum(found.count for found in along)
    return {"clipped_count": total, "first_clipped": first}


def _measured(
    layer: Layer,
    x: np.ndarray | None,
    emulated: LayerOutput | None,
    watch: RoundingWatch | None,
) -> dict[str, Any]:
    if emulated is None:
        return dict.fromkeys((*_ERRORS, *_STATISTICS, "first_overflow")) | {"status": "ok"}
    reference = _layer_reference(layer, len(x))
    error = output_error(emulated.y, reference)
    return {
        "output_error": error.relative,
        "sqnr_db": error.sqnr_db,
        "cosine": None if math.isnan(error.cosine) else error.cosine,
        "max_abs_error": error.max_abs,
        "output_rms": error.rms,
        **{name: getattr(emulated.statistics, name) for name in _STATISTICS},
        "first_overflow": _first_overflow(emulated),
        **watch.shares(emulated.y, reference, error.relative),
        "status": "ok" if np.isfinite(emulated.y).all() else "overflow",
    }
