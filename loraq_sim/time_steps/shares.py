"""Which layers and time steps make up the squared output error of the model.

With E_ls and Y_ls the squared error and output of layer l at step s (`StepErrors`), n_ls the rows
measured there, and w_l the layer's weight in the aggregate (`loraq_sim.metrics`):

- the layer's error is e_l^2 = E_l / Y_l with E_l = sum_s E_ls, Y_l = sum_s Y_ls, and the model's is
  e^2 = sum_l w_l e_l^2 / sum_l w_l, as in `model_totals`;
- ``share`` of a cell = (w_l E_ls / Y_l) / sum_l w_l e_l^2. Shares add up to 1, those of a layer to
  what the layer adds to e^2, with nothing left over;
- ``run_share`` is the same with E_ls / n_ls and Y_ls / n_ls in place of E_ls and Y_ls. A sampled
  dump has more rows of one step than of another by chance, while a run of the model has the same
  number at each; so this says what dominates a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.steps import plain_step
from loraq_sim.errors import InputError
from loraq_sim.metrics import DEFAULT_AGGREGATE, aggregate_of
from loraq_sim.time_steps.errors import StepErrors

__all__ = ["StepReport", "step_report"]

_CASE = (
    *("accelerator", "split", "method", "preset", "rotation", "smooth", "condition", "finish"),
    *("calibration", "seed"),
)


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Errors and shares of one case, as rows of plain values (None where there is nothing).

    Attributes
    ----------
    case : dict
        ``accelerator split method preset rotation smooth condition finish calibration seed
        aggregate n_layers n_steps tokens output_error dominant_layer dominant_step half_layers
        half_steps``; the last two are the fewest layers and the fewest steps that make half of the
        squared error of a run.
    layers : list of dict
        ``layer kind tokens calibration_rows output_error inputs share run_share dominant_step``.
    steps : list of dict
        ``step rows output_error share run_share dominant_layer``; the error is the aggregate of the
        layers' errors at this step.
    cells : list of dict
        ``layer kind step rows squared_error squared_output output_error share run_share``.
    """

    case: dict[str, Any]
    layers: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    cells: list[dict[str, Any]]


def step_report(errors: Sequence[StepErrors], *, aggregate: str = DEFAULT_AGGREGATE) -> StepReport:
    """Put the layers of one case together.

    Parameters
    ----------
    errors : sequence of StepErrors
        One a layer, of one dump and case.
    aggregate : str
        How layer errors become one, of `loraq_sim.metrics.AGGREGATES`.

    Raises
    ------
    InputError
        If there is no layer, the layers' steps differ, or the aggregate is unknown.
    """
    if not errors:
        raise InputError("no layer was measured; give the errors of one layer or more")
    steps = errors[0].steps
    if any(not np.array_equal(one.steps, steps) for one in errors):
        raise InputError("the layers record different time steps; put those of one dump together")
    weight = aggregate_of("output_error", aggregate).weight
    weights = np.array([weight(one.case) for one in errors], dtype=np.float64)
    miss = np.stack([one.squared_error for one in errors])
    size = np.stack([one.squared_output for one in errors])
    rows = np.stack([one.rows for one in errors])
    parts = _parts(miss, size, weights)
    per_row = np.maximum(rows, 1)
    share, run_share = _shares(parts), _shares(_parts(miss / per_row, size / per_row, weights))
    by_layer, by_step = run_share.sum(axis=1), run_share.sum(axis=0)
    names = [one.case["layer"] for one in errors]
    values = [plain_step(value) for value in steps]
    case = {key: errors[0].case[key] for key in _CASE} | {
        # A budget may leave rank 0, plain rounding, to some layers.
        "method": _method(errors),
        "aggregate": aggregate,
        "n_layers": len(errors),
        "n_steps": len(steps),
        "tokens": int(rows.sum()),
        "output_error": math.sqrt(math.fsum(parts.ravel()) / float(weights.sum())),
        "dominant_layer": names[int(by_layer.argmax())],
        "dominant_step": values[int(by_step.argmax())],
        "half_layers": _fewest(by_layer),
        "half_steps": _fewest(by_step),
    }
    return StepReport(
        case=case,
        layers=[_layer_row(one, share[i], run_share[i], values) for i, one in enumerate(errors)],
        steps=_step_rows(errors, weights, rows, (share, run_share), (names, values)),
        cells=_cells(errors, share, run_share, values),
    )


def _parts(
    miss: NDArray[np.float64], size: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What each cell adds to sum_l w_l e_l^2, (L, S)."""
    whole = size.sum(axis=1, keepdims=True)
    # A layer whose output is zero and exact has no error.
    return weights[:, None] * miss / np.where(whole > 0, whole, 1.0)


def _shares(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = math.fsum(parts.ravel())
    if math.isinf(whole):
        # Beside an infinite error every other one is nothing.
        infinite = np.isinf(parts)
        return infinite / np.count_nonzero(infinite)
    return parts / whole if whole else np.zeros_like(parts)


def _method(errors: Sequence[StepErrors]) -> str:
    methods = dict.fromkeys(one.case["method"] for one in errors)
    return next((method for method in methods if method != "rtn"), "rtn")


def _fewest(shares: NDArray[np.float64]) -> int:
    """How many of the largest shares make half of the whole; 0 if there is no error."""
    if not shares.any():
        return 0
    reached = np.cumsum(np.sort(shares)[::-1])
    return int(np.searchsorted(reached, 0.5 * reached[-1])) + 1


def _layer_row(
    one: StepErrors,
    share: NDArray[np.float64],
    run_share: NDArray[np.float64],
    values: list[float],
) -> dict[str, Any]:
    keys = ("layer", "kind", "tokens", "calibration_rows", "output_error")
    return {key: one.case[key] for key in keys} | {
        "inputs": one.case.get("inputs"),
        "share": math.fsum(share),
        "run_share": math.fsum(run_share),
        "dominant_step": values[int(run_share.argmax())] if run_share.any() else None,
    }


def _step_rows(
    errors: Sequence[StepErrors],
    weights: NDArray[np.float64],
    rows: NDArray[np.int64],
    shares: tuple[NDArray[np.float64], NDArray[np.float64]],
    labels: tuple[list[str], list[float]],
) -> list[dict[str, Any]]:
    relative = np.stack([one.output_error for one in errors])
    measured = ~np.isnan(relative)
    squares = (weights[:, None] * np.where(measured, relative, 0.0) ** 2).sum(axis=0)
    whole = (weights[:, None] * measured).sum(axis=0)
    share, run_share = shares
    names, values = labels
    return [
        {
            "step": value,
            "rows": int(rows[:, s].sum()),
            "output_error": math.sqrt(squares[s] / whole[s]) if whole[s] else None,
            "share": math.fsum(share[:, s]),
            "run_share": math.fsum(run_share[:, s]),
            "dominant_layer": names[int(run_share[:, s].argmax())] if run_share[:, s].any() else "",
        }
        for s, value in enumerate(values)
    ]


def _cells(
    errors: Sequence[StepErrors],
    share: NDArray[np.float64],
    run_share: NDArray[np.float64],
    values: list[float],
) -> list[dict[str, Any]]:
    cells = []
    for i, one in enumerate(errors):
        relative = one.output_error
        for s, value in enumerate(values):
            has_rows = bool(one.rows[s])
            cells.append(
                {
                    "layer": one.case["layer"],
                    "kind": one.case["kind"],
                    "inputs": one.case.get("inputs"),
                    "step": value,
                    "rows": int(one.rows[s]),
                    "squared_error": float(one.squared_error[s]),
                    "squared_output": float(one.squared_output[s]),
                    "output_error": None if np.isnan(relative[s]) else float(relative[s]),
                    "share": float(share[i, s]) if has_rows else None,
                    "run_share": float(run_share[i, s]) if has_rows else None,
                }
            )
    return cells
