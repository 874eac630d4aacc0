"""Output error of one layer at each time step, solved with the activations of chosen steps.

The solver sees the steps that a text names (`chosen_steps`): ``all``, ``first:5``, ``1000``,
``600..400+40``. The error is measured on the rows of every step (`rows_of_steps` thins them out and
loses none): the layer is emulated once, bit exact, and its rows are told apart by step.

With d the emulated minus the full-precision output and y the latter, over the rows of step s,

    squared_error[s] = sum d^2,   squared_output[s] = sum y^2

and the layer's output error is sqrt(sum_s squared_error / sum_s squared_output), the number that
`evaluate_layer` reports on the same rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.steps import require_steps, step_counts
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError
from loraq_sim.evaluate import (
    clipped_where_stored,
    reference_output,
    solve_case,
    transform_columns,
)
from loraq_sim.machine import datapath_for
from loraq_sim.settings import CaseSettings
from loraq_sim.solvers import Solution
from loraq_sim.solvers.solution import check_inputs
from loraq_sim.solvers.solve import CHOOSE_SMOOTHING, NEED_ACTIVATIONS
from loraq_sim.split import PrecisionSplit

__all__ = [
    "CALIBRATED_METHODS",
    "StepErrors",
    "chosen_steps",
    "evaluate_steps",
    "rows_of_steps",
]

CALIBRATED_METHODS = (*CHOOSE_SMOOTHING, *NEED_ACTIVATIONS)
"""Methods that look at activations whatever else is asked for."""

_RANGE = ".."
_SHOWN = 6


def chosen_steps(text: str, values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of the recorded time steps `text` names.

    Parameters
    ----------
    text : str
        ``all``; ``first`` or ``last``, the step that is run first or last; ``first:N`` or
        ``last:N``, N of them; a value such as ``960``; a range of values such as ``1000..800``,
        both ends included, in either order; several of these joined by ``+``.
    values : ndarray of shape (S,), float64
        Values of the steps in the order they were run.

    Returns
    -------
    chosen : ndarray of shape (S,), bool
        At least one is True.

    Raises
    ------
    InputError
        If a part of `text` is not understood or names no recorded step.
    """
    chosen = np.zeros(len(values), dtype=np.bool_)
    for part in text.split("+"):
        named = _named(part.strip(), values)
        if named is None:
            raise InputError(
                f"time steps {part.strip()!r} not understood; use all, first, last, first:N, "
                "last:N, a value, a range such as 1000..800, or several joined by +"
            )
        if not named.any():
            raise InputError(
                f"no time step {part.strip()!r} is recorded; there are {_listed(values)}"
            )
        chosen |= named
    return chosen


def _named(part: str, values: NDArray[np.float64]) -> NDArray[np.bool_] | None:
    if part == "all":
        return np.ones(len(values), dtype=np.bool_)
    end, _, count = part.partition(":")
    if end in ("first", "last"):
        n_wanted = _count(count) if ":" in part else 1
        if n_wanted is None:
            return None
        order = np.arange(len(values))
        return order < n_wanted if end == "first" else order >= len(values) - n_wanted
    low, is_range, high = part.partition(_RANGE)
    ends = [_number(text) for text in ([low, high] if is_range else [part])]
    known = [end for end in ends if end is not None]
    if len(known) < len(ends):
        return None
    return (values >= min(known)) & (values <= max(known))


def _count(text: str) -> int | None:
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if is_number and int(text) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _listed(values: NDArray[np.float64]) -> str:
    texts = [f"{value:g}" for value in values]
    if len(texts) > _SHOWN:
        texts = [*texts[: _SHOWN - 1], "...", texts[-1]]
    return ", ".join(texts)


def rows_of_steps(counts: NDArray[np.int64], tokens: int | None) -> NDArray[np.int64]:
    """Indices of at most `tokens` rows, in order, with every step that has rows among them.

    The rows are those that `loraq_sim.evaluate.sample_rows` takes, evenly spread, as long as these
    miss no step. Otherwise each step gives one row, and the others are shared out in proportion to
    the steps' rows (largest remainders first), evenly spread within each.

    Parameters
    ----------
    counts : ndarray of shape (S,), int64
        Rows of each step; the rows are stored in order of step.
    tokens : int or None
        None takes all rows.

    Raises
    ------
    InputError
        If `tokens` is not a positive integer, or less than the number of steps that have rows.
    """
    n_rows, n_steps = int(counts.sum()), int((counts > 0).sum())
    if tokens is None:
        return np.arange(n_rows, dtype=np.int64)
    if isinstance(tokens, bool) or int(tokens) != tokens or tokens < 1:
        raise InputError(f"tokens must be a positive integer, got {tokens!r}")
    if tokens >= n_rows:
        return np.arange(n_rows, dtype=np.int64)
    if tokens < n_steps:
        raise InputError(
            f"tokens={tokens} cannot represent {n_steps} time steps; use {n_steps} or more"
        )
    starts = np.cumsum(counts) - counts
    even = np.arange(tokens, dtype=np.int64) * n_rows // tokens
    step_of_row = np.repeat(np.arange(len(counts)), counts)
    if len(np.unique(step_of_row[even])) == n_steps:
        return even
    taken = _shared_out(counts, int(tokens))
    return np.concatenate(
        [
            start + np.arange(wanted, dtype=np.int64) * count // max(1, wanted)
            for start, count, wanted in zip(starts, counts, taken, strict=True)
        ]
    )


def _shared_out(counts: NDArray[np.int64], tokens: int) -> NDArray[np.int64]:
    """Rows of each step: one, and a part of the rest in proportion to the step's further rows."""
    least = np.minimum(counts, 1)
    left = tokens - int(least.sum())
    # Exact integers: quotient and remainder of left * further / total. A step's part never exceeds
    # its further rows, since left < total.
    further = counts - least
    quotient, remainder = np.divmod(left * further, int(further.sum()))
    extra = np.argsort(-remainder, kind="stable")[: left - int(quotient.sum())]
    quotient[extra] += 1
    return least + quotient


@dataclass(frozen=True, kw_only=True, eq=False)
class StepErrors:
    """What one layer in one split loses at each time step.

    Attributes
    ----------
    case : dict
        ``layer kind m n k tokens calls_per_step split method preset accelerator calibration
        calibration_rows rank feedback_rank rotation smooth condition finish weight_error inputs
        output_error output_rms overflow_count clipped_count first_clipped status seed``, as a
        result row has them; `calibration` names the steps that the solver saw.
    steps : ndarray of shape (S,), float64
        Values of the time steps in the order they were run.
    rows : ndarray of shape (S,), int64
        Activation rows measured at each step; 0 where the dump has none.
    squared_error, squared_output : ndarray of shape (S,), float64
        Sums over the step's rows and all output features; infinite where the output is not
        finite.
    solution : Solution
        The solved layer, for another accelerator or another number of rows.
    """

    case: dict[str, Any]
    steps: NDArray[np.float64]
    rows: NDArray[np.int64]
    squared_error: NDArray[np.float64]
    squared_output: NDArray[np.float64]
    solution: Solution

    @property
    def output_error(self) -> NDArray[np.float64]:
        """Relative output error of each step, (S,); NaN where it has no rows or no output."""
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = np.sqrt(self.squared_error / self.squared_output)
        return np.where(self.squared_output > 0, relative, np.nan)


def evaluate_steps(
    dump: LayerDump,
    name: str,
    split: "str | PrecisionSplit",
    accelerator: "str | hwmodels.Accelerator",
    *,
    calibrate_on: str = "all",
    method: str = "loraq",
    preset: str = "balanced",
    smooth: float | None = None,
    rotate: str | None = None,
    condition: str | None = None,
    finish: str | None = None,
    tokens: int | None = None,
    family: str = "int",
    group: int = 64,
    datapath: Mapping[str, Any] | None = None,
    seed: int = 0,
    solution: Solution | None = None,
) -> StepErrors:
    """Output error of a layer at every time step, solved with the activations of chosen steps.

    Parameters
    ----------
    dump : LayerDump
        That records time steps.
    name : str
        Layer of the dump.
    split, accelerator, method, preset, smooth, rotate, condition, finish
        See `evaluate_layer`, as for family, group, datapath and seed.
    calibrate_on : str
        Steps whose activations the solver sees, for smoothing, a residual input and whatever else
        is made of data: ``all``, ``first``, ``last``, ``first:5``, ``960``, ``1000..800``, or
        several joined by ``+``; see `loraq_sim.time_steps.errors`. The error is measured on every
        step all the same.
    tokens : int, optional
        Activation rows the error is measured on, every step among them; all by default.
    solution : Solution, optional
        An earlier solution of this layer, split and calibration; solved here by default.

    Raises
    ------
    DumpError
        If the layer is unknown, or the dump does not record its time steps.
    InputError
        If an argument breaks a rule, the layer has no activations, or its output is zero.
    """
    require_steps(dump)
    settings = CaseSettings.of(
        split, family=family, group=group, datapath=datapath, method=method, preset=preset,
        seed=seed, smooth=smooth, rotate=rotate, condition=condition, finish=finish,
    )  # fmt: skip
    split = settings.split
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, settings.datapath)
    found = step_counts(dump, name)
    layer = dump[name]
    rows = layer.activations
    if found is None or rows is None:
        raise InputError(f"{dump.path}: layer {name!r} has no activations, so no error per step")
    values, counts = found
    seen = rows[np.repeat(chosen_steps(calibrate_on, values), counts)]
    if not len(seen):
        raise InputError(
            f"layer {name!r} has no activation row at time steps {calibrate_on}; calibrate on more "
            "steps"
        )
    if solution is None:
        known = replace(layer, activations=seen)
        solution = solve_case(known, settings, accelerator=accelerator)
    check_inputs(solution, split, name)
    index = rows_of_steps(counts, tokens)
    x = rows[index]
    step_of_row = np.repeat(np.arange(len(counts)), counts)[index]
    emulated = run_layer(x, solution, split.for_layer(layer, solution), path, bias=layer.bias)
    y = reference_output(layer, x)
    difference = emulated.y.astype(np.float64) - y
    # NaN, such as 0 times an infinite P, is as wrong as an infinity.
    difference = np.where(np.isnan(difference), np.inf, difference)
    squared_error = _by_step(difference, step_of_row, len(values))
    squared_output = _by_step(y, step_of_row, len(values))
    miss, size = math.fsum(squared_error), math.fsum(squared_output)
    if size == 0.0 and miss:
        raise InputError(f"layer {name!r}: full-precision output is zero, so no relative error")
    stored_clipped = clipped_where_stored(solution)
    case = {
        **{key: getattr(layer, key) for key in ("kind", "m", "n", "k", "calls_per_step")},
        **{"layer": name, "split": split.text, "accelerator": accelerator.name},
        **{"method": solution.method, "preset": solution.preset},
        **transform_columns(settings, solution),
        **{"calibration": calibrate_on, "calibration_rows": len(seen), "seed": seed},
        **{"rank": solution.rank, "feedback_rank": solution.feedback_rank},
        **{"weight_error": solution.weight_error, "tokens": len(x), "inputs": layer.inputs},
        "output_error": math.sqrt(miss / size) if size else 0.0,
        "output_rms": math.sqrt(size / y.size),
        "overflow_count": emulated.statistics.overflow_count,
        "clipped_count": sum(stored_clipped.values()) + emulated.clipped_count,
        "first_clipped": next((f"stored {part}" for part in stored_clipped), None),
        "status": "ok" if np.isfinite(emulated.y).all() else "overflow",
    }
    if emulated.clipped:
        first = emulated.clipped[0]
        case["first_clipped"] = f"{first.tensor} in {first.format}, row {index[first.first_row]}"
    return StepErrors(
        case=case,
        steps=values,
        rows=np.bincount(step_of_row, minlength=len(values)),
        squared_error=squared_error,
        squared_output=squared_output,
        solution=solution,
    )


def _by_step(
    values: NDArray[np.float64], step_of_row: NDArray[np.int64], n_steps: int
) -> NDArray[np.float64]:
    """Sum of squares over the rows of each step, (S,)."""
    per_row = np.einsum("mn,mn->m", values, values)
    return np.asarray(np.bincount(step_of_row, per_row, n_steps), dtype=np.float64)
