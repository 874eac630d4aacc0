"""The whole data flow of one (layer, split, accelerator) case.

1. layer -> `solve` (split) -> stored branches -> weight error, bytes
2. stored branches and activations -> `run_layer` on the accelerator's data path -> output error
3. shapes and bits -> `hwmodels.estimate_cost` -> latency, energy, traffic
4. all of it -> one result row

What a rounding adds to the error is seen while the data path runs (`RoundingWatch`). With e the
error of the output and d what one rounding changes of it, <d, e> / <e, e> is the share of the
squared error that is due to it, as `loraq_sim.explain` counts them. Here only two roundings are
told, on a sample of rows, so that every case can have them: d = (X_a - X') Q^T of the activations
of the main branch, d = (P^ - P) L^T of P. A P of 16 bits in place of the stored one turns e into
e - (P^ - fp16(P)) L^T.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Unpack, cast

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.conditioning import hadamard_block
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.float_overflow import Clipping
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.emulator.walk import LayerOutput, StepResult, run_layer
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.layers import Layer
from loraq_sim.machine import (
    array_columns,
    check_machine,
    datapath_for,
    excluded_on,
    solved_workload,
)
from loraq_sim.metrics import output_error
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.results.rows import COLUMN_NAMES, ResultRow, ShownRow
from loraq_sim.settings import CaseOptions, CaseSettings
from loraq_sim.solvers import Solution, solve
from loraq_sim.solvers.problem import SharedStages, SplitOptions
from loraq_sim.solvers.solution import check_inputs, transforms_in_words
from loraq_sim.split import PrecisionSplit

__all__ = [
    "RoundingWatch",
    "UNKNOWN_ROWS",
    "clipped_where_stored",
    "evaluate_case",
    "evaluate_layer",
    "reference_output",
    "sample_rows",
    "solve_case",
    "solve_split",
    "transform_columns",
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
    family: str = "int",
    group: int = 64,
    datapath: Mapping[str, Any] | None = None,
    solution: Solution | None = None,
    **options: Unpack[CaseOptions],
) -> ResultRow:
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
    datapath : mapping, optional
        Overrides of the accelerator's data path.
    solution : Solution, optional
        An earlier solution of this layer and split; solved here by default.
    **options
        ``seed``, ``method``, ``preset``, ``tokens``, ``fused``, ``kernel``, ``smooth``,
        ``rotate``, ``condition``, ``finish`` and ``rows`` as in
        `loraq_sim.settings.CaseSettings`. A split without a branch is rounded to nearest
        (``rtn``), or by ``gptq``.

    Raises
    ------
    InputError
        If an argument breaks a rule.
    hwmodels.AcceleratorError
        If the accelerator is unknown, its file is broken, or it lacks a transform of the layer.
    """
    settings = CaseSettings.of(split, family=family, group=group, datapath=datapath, **options)
    row = evaluate_case(layer, settings, accelerator, solution=solution)
    # A dict of 70 columns that shows what it says.
    return cast(ResultRow, ShownRow(row))


def evaluate_case(
    layer: Layer,
    settings: CaseSettings,
    accelerator: "str | hwmodels.Accelerator",
    *,
    solution: Solution | None = None,
) -> ResultRow:
    """`evaluate_layer` with the settings of one record; `solution` is what they solve to."""
    started = time.perf_counter()
    split = settings.split
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, settings.datapath)
    x = sample_rows(layer.activations, settings.tokens)
    if solution is None:
        # Before the time of a solve.
        check_machine(settings, accelerator)
        solution = solve_case(layer, settings, accelerator=accelerator)
    check_inputs(solution, split, layer.name)
    m = layer.m if settings.rows is None else settings.rows
    split = split.for_layer(layer, solution)
    run = None if x is None else _emulated(layer, x, solution, split, path)
    row: dict[str, Any] = {
        **_identity(layer, m, settings, accelerator, x),
        **transform_columns(settings, solution),
        "method": solution.method,
        "preset": solution.preset,
        "rank": solution.rank,
        "feedback_rank": solution.feedback_rank,
        "weight_bytes": solution.nbytes,
        "bits_per_weight": solution.bits_per_weight,
        "weight_error": solution.weight_error,
        **_measured(layer, run),
        **_clipped(layer, solution, run),
        **describe_array(path.mac),
        **_cost(m, settings, solution, split, path, accelerator),
        "message": "; ".join(
            (*_remarks(layer, solution, run), *_setting_remarks(settings, split, m, solution))
        ),
        "seconds": time.perf_counter() - started,
        "seed": settings.seed,
        "pareto": False,
    }
    # The columns of a row are those of its type.
    return cast(ResultRow, {name: row[name] for name in COLUMN_NAMES if name in row})


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run:
    """One emulation: the activation rows it took, its output, and what its roundings did."""

    x: NDArray[np.float32]
    output: LayerOutput
    watch: "RoundingWatch"


def _emulated(
    layer: Layer, x: NDArray[np.float32], solution: Solution, split: PrecisionSplit, path: Datapath
) -> _Run:
    watch = RoundingWatch(len(x))
    output = run_layer(x, solution, split, path, bias=layer.bias, on_step=watch)
    return _Run(x=x, output=output, watch=watch)


_COSTS = (
    *("latency_s", "cycles", "energy_j", "dram_bytes", "utilization", "bound"),
    *("peak_activation_bytes", "working_set_bytes", "fits_in"),
    *("kernel", "confidence", "latency_low_s", "latency_high_s"),
)


def _cost(
    m: int | None,
    settings: CaseSettings,
    solution: Solution,
    split: PrecisionSplit,
    path: Datapath,
    accelerator: "hwmodels.Accelerator",
) -> dict[str, Any]:
    """Cost of one call in the array of the data path; of a call whose rows are not known, area."""
    work = solved_workload(m or 1, solution, split, path, fused=settings.fused)
    array = array_columns(work, accelerator, path)
    if m is None:
        return dict.fromkeys((*_COSTS, "rests_on")) | array | {"array_energy_j": None}
    machine = hwmodels.machine_with_array(accelerator, path.mac)
    cost = hwmodels.estimate_cost(work, machine, kernel=settings.kernel)
    resting = None
    if machine.assumed:
        resting = hwmodels.resting(work, machine, kernel=settings.kernel)
    return {name: getattr(cost, name) for name in _COSTS} | array | {"rests_on": resting}


def solve_case(
    layer: Layer,
    settings: CaseSettings,
    *,
    accelerator: "hwmodels.Accelerator | None" = None,
    shared: SharedStages | None = None,
) -> Solution:
    """What `settings` solve to, without what `accelerator` lacks; stages in `shared` are reused."""
    excluded = () if accelerator is None else excluded_on(accelerator, settings.split)
    return _solved(layer, settings.split, settings.solving(excluded) | {"shared": shared})


def solve_split(layer: Layer, split: PrecisionSplit, **options: Unpack[SplitOptions]) -> Solution:
    """`loraq_sim.solve` with the formats, rank and budget of `split`; errors name the layer."""
    asked = CaseSettings(
        split=split,
        method=options.get("method", "loraq"),
        condition=options.get("condition"),
        finish=options.get("finish"),
    ).solving()
    defaults = {"method", "preset", "seed", "smooth", "rotate"}
    parts = {key: value for key, value in asked.items() if key not in defaults}
    return _solved(layer, split, parts | options)


def _solved(layer: Layer, split: PrecisionSplit, arguments: Mapping[str, Any]) -> Solution:
    if layer.reads_patches and layer.activations is None:
        # What is alike, a Hadamard matrix gathers in few channels: without rows to tell, no choice.
        excluded = (*arguments.get("excluded", ()), "hadamard")
        arguments = {**arguments, "excluded": excluded}
    try:
        return solve(layer.weight, activations=layer.activations, **arguments)
    except InputError as error:
        raise InputError(f"layer {layer.name!r}, split {split}: {error}") from error


def reference_output(layer: Layer, x: NDArray[np.floating]) -> NDArray[np.float64]:
    """x W^T + bias in float64, (M, N)."""
    y = x.astype(np.float64) @ layer.weight.T.astype(np.float64)
    return y if layer.bias is None else y + layer.bias.astype(np.float64)


# Every split of a layer is measured against the same output; tasks go layer by layer.
@lru_cache(maxsize=1)
def _layer_reference(layer: Layer, tokens: int) -> NDArray[np.float64] | None:
    x = sample_rows(layer.activations, tokens)
    return None if x is None else reference_output(layer, x)


def sample_rows(
    activations: NDArray[np.float32] | None, tokens: int | None
) -> NDArray[np.float32] | None:
    """At most `tokens` rows, spread evenly: dumps hold time steps one after the other."""
    if activations is None or tokens is None:
        return activations
    if isinstance(tokens, bool) or int(tokens) != tokens or tokens < 1:
        raise InputError(f"tokens must be a positive integer, got {tokens!r}")
    n_rows = len(activations)
    if tokens >= n_rows:
        return activations
    return activations[_sampled(n_rows, tokens)]


def _sampled(n_rows: int, tokens: int) -> NDArray[np.int64]:
    """Indices of `tokens` rows of `n_rows`, spread evenly, (tokens,) int64."""
    return np.arange(tokens, dtype=np.int64) * n_rows // tokens


def _identity(
    layer: Layer,
    m: int | None,
    settings: CaseSettings,
    accelerator: "hwmodels.Accelerator",
    x: NDArray[np.float32] | None,
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
        "inputs": layer.inputs,
        "calls_per_step": layer.calls_per_step,
        "split": settings.split.text,
        "accelerator": accelerator.name,
    }


def transform_columns(settings: CaseSettings, solution: Solution) -> dict[str, Any]:
    """How the inputs are transformed, in the words of the settings where they are the solution's"""
    chosen = {"condition": settings.condition, "finish": settings.finish}
    if settings.condition is not None:
        # What is chosen layer by layer is one case; the message says what it was.
        return {"rotation": settings.rotate, "smooth": settings.smooth, **chosen}
    rotation = None if solution.rotation is None else f"hadamard:{solution.rotation}"
    if hadamard_block(settings.rotate, solution.main.shape[1]) == solution.rotation:
        rotation = settings.rotate
    return {
        "rotation": rotation,
        "smooth": None if solution.smooth is None else settings.smooth,
        **chosen,
    }


def _first_overflow(emulated: LayerOutput) -> str | None:
    """The first GEMM of the data path that overflowed, and where along K."""
    for name, seen in emulated.gemms.items():
        if seen.first_overflow_k is not None:
            return f"{name} k={seen.first_overflow_k}"
    return None


def _remarks(layer: Layer, solution: Solution, run: _Run | None) -> Iterator[str]:
    if run is not None:
        y = run.output.y
        if not np.isfinite(y).all():
            wild = int(y.size - np.isfinite(y).sum())
            yield f"the output is not finite: {wild:,} of {y.size:,} values"
        for found in _clippings(layer, run):
            yield found.sentence()
    for name, part in _stored_parts(solution):
        if part.scales is None and part.n_clipped:
            count = f"{part.n_clipped:,} of {part.codes.size:,} values of {name}"
            yield f"{count} are clamped to the largest {part.format}: rescale the layer"
        elif part.n_saturated_scales and part.scales is not None and part.format.scale is not None:
            count = f"{part.n_saturated_scales} of {part.scales.size} scales of {name}"
            width = part.format.scale.name
            yield f"{count} are at an end of the {width} range: rescale the layer or widen them"
    if run is None:
        yield "no activations: output error not measured"
    elif layer.inputs_source:
        yield f"output error on {layer.inputs_source} inputs"


def _setting_remarks(
    settings: CaseSettings, split: PrecisionSplit, m: int | None, solution: Solution
) -> Iterator[str]:
    if settings.split.gelu and split.shift:
        yield f"inputs after GELU run as {split.main_activation} of x + {split.shift:g}"
    if settings.condition is not None:
        words = transforms_in_words(solution, split)
        listed = " and ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
        yield f"condition {settings.condition} chose {listed or 'nothing'}"
    elif solution.smooth is not None and settings.smooth is None:
        yield "activations are smoothed by factors of the solution"
    if m is None:
        yield UNKNOWN_ROWS


def _stored_parts(solution: Solution) -> list[tuple[str, QuantizedTensor]]:
    return list(solution.parts.items())


def _clippings(layer: Layer, run: _Run) -> list[Clipping]:
    """What was clipped on the way, first rows counted in the dump, of which a sample may run."""
    n_rows = len(run.x if layer.activations is None else layer.activations)
    rows = _sampled(n_rows, len(run.x))
    return [replace(one, first_row=int(rows[one.first_row])) for one in run.output.clipped]


def _clipped(layer: Layer, solution: Solution, run: _Run | None) -> dict[str, Any]:
    """Values beyond their float format: where they are stored, then along the data path."""
    stored = clipped_where_stored(solution)
    along = [] if run is None else _clippings(layer, run)
    first = None
    if along:
        first = f"{along[0].tensor} in {along[0].format}, row {along[0].first_row}"
    elif stored:
        first = f"stored {next(iter(stored))}"
    total = sum(stored.values()) + sum(found.count for found in along)
    return {"clipped_count": total, "first_clipped": first}


def clipped_where_stored(solution: Solution) -> dict[str, int]:
    """Values of each stored part that lie beyond its float format, of the parts with any."""
    return {name: part.n_clipped for name, part in _stored_parts(solution) if part.n_clipped}


def _measured(layer: Layer, run: _Run | None) -> dict[str, Any]:
    reference = None if run is None else _layer_reference(layer, len(run.x))
    if run is None or reference is None:
        return dict.fromkeys((*_ERRORS, *_STATISTICS, "first_overflow")) | {"status": "ok"}
    y = run.output.y
    error = output_error(y, reference)
    return {
        "output_error": error.relative,
        "sqnr_db": error.sqnr_db,
        "cosine": None if math.isnan(error.cosine) else error.cosine,
        "max_abs_error": error.max_abs,
        "output_rms": error.rms,
        **{name: getattr(run.output.statistics, name) for name in _STATISTICS},
        "first_overflow": _first_overflow(run.output),
        **run.watch.shares(y, reference, error.relative),
        "status": "ok" if np.isfinite(y).all() else "overflow",
    }


_MOST_ROWS = 64
_LARGEST_FP16 = 65504.0


class RoundingWatch:
    """Takes the steps of one run (`loraq_sim.emulator.walk.run_layer`'s `on_step`).

    Parameters
    ----------
    n_rows : int
        Activation rows of the run; at most 64 of them, spread evenly, are looked at.
    """

    def __init__(self, n_rows: int) -> None:
        count = min(n_rows, _MOST_ROWS)
        self._rows = np.arange(count, dtype=np.int64) * n_rows // max(count, 1)
        self._changes: dict[str, NDArray[np.float64]] = {}
        self._weights: dict[str, Any] = {}
        self._p: NDArray[np.float32] | None = None
        self._p_format: Format | None = None

    def __call__(self, done: StepResult) -> None:
        """Keep what is needed of a step."""
        name = done.step.name
        if name in ("main", "up"):
            self._weights[name] = done.weight
        elif name in ("round_main", "round_p"):
            before = np.asarray(done.inputs[0])[self._rows]
            after = done.result.rows(self._rows).dequantize()
            gemm = "main" if name == "round_main" else "up"
            with np.errstate(invalid="ignore"):
                self._changes[gemm] = after.astype(np.float64) - before
            if gemm == "up":
                self._p, self._p_format = before, done.step.format

    def shares(
        self, output: NDArray[np.float32], reference: NDArray[np.float64], error: float
    ) -> dict[str, Any]:
        """Columns of the result row: shares of the squared error, and the error with a wide P.

        Parameters
        ----------
        output, reference : ndarray of shape (M, N)
        error : float
            Relative error of the whole output.

        Returns
        -------
        dict
            ``activation_error_share``, ``p_error_share``, ``wide_p_error`` and ``p_format``; None
            where there is no P, no error, or a value that is not finite.
        """
        found: dict[str, Any] = dict.fromkeys(
            ("activation_error_share", "p_error_share", "wide_p_error", "p_format")
        )
        if self._p is not None:
            found["p_format"] = str(self._p_format)
        miss = output[self._rows].astype(np.float64) - reference[self._rows]
        square = float(np.vdot(miss, miss))
        if not np.isfinite(square) or square == 0.0:
            return found
        for gemm, name in (("main", "activation_error_share"), ("up", "p_error_share")):
            change = self._change(gemm, self._changes.get(gemm))
            if change is not None:
                found[name] = float(np.vdot(change, miss)) / square
        wide = self._wide_p()
        if wide is not None:
            left = miss - wide
            found["wide_p_error"] = error * float(np.sqrt(np.vdot(left, left) / square))
        return found

    def _change(self, gemm: str, operand: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """What a change of the rows of an operand changes of the output, (rows, N)."""
        if operand is None or not np.isfinite(operand).all():
            return None
        weight = self._weights[gemm].dequantize()
        return operand.astype(np.float32) @ weight.T if len(operand) else None

    def _wide_p(self) -> NDArray[np.float64] | None:
        """What the stored P changes of the output against one in fp16; None if that is no wider."""
        if self._p is None or self._p_format is None or self._p_format.element.bits >= 16:
            return None
        if not np.abs(self._p).max(initial=0.0) <= _LARGEST_FP16:
            return None
        rounding = self._p.astype(np.float16).astype(np.float64) - self._p
        return self._change("up", self._changes["up"] - rounding)
