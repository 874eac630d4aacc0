"""Error measures of one layer's output, and how those of layers become one number of the model.

Every aggregate is sqrt( sum_l w_l e_l^2 / sum_l w_l ) over layers l with relative errors e_l, and
differs in the weights w_l only. Weights depend on the layer, never on its split, so squared errors
add up and a choice of splits can be optimized exactly. One infinite error makes the aggregate
infinite: a model with a layer whose output is not finite has none.

The default weighs a layer by the numbers it writes. Of the weights that need no images it ranks
mixed recipes of a trained transformer best: Spearman's correlation with the error of the images is
0.85 against 0.67 for equal weights (`benchmarks/image_evidence.md`).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraq_sim.errors import InputError, unknown_name

__all__ = [
    "AGGREGATES",
    "Aggregate",
    "DEFAULT_AGGREGATE",
    "OutputError",
    "aggregate_of",
    "output_error",
    "relative_error",
]


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far y_hat is from y.

    ``relative`` = ||y_hat - y||_F / ||y||_F; ``sqnr_db`` = -20 log10(relative), in dB, infinite for
    an exact result; ``cosine`` = <y_hat, y> / (||y_hat|| ||y||); ``max_abs`` = max |y_hat - y|;
    ``rms`` = root mean square of y (to read ``max_abs`` against). Where y_hat is not finite
    ``relative`` and ``max_abs`` are infinite (also for NaN), ``sqnr_db`` is -inf, ``cosine`` NaN.
    """

    relative: float
    sqnr_db: float
    cosine: float
    max_abs: float
    rms: float


def relative_error(approximation: np.ndarray, reference: np.ndarray) -> float:
    """||approximation - reference||_F / ||reference||_F in float64; 0 if both are zero.

    Infinite where the approximation is not finite.
    """
    _check_shapes(approximation, reference)
    if not np.isfinite(approximation).all():
        return math.inf
    exact = reference.astype(np.float64)
    miss = float(np.linalg.norm(approximation.astype(np.float64) - exact))
    return _ratio(miss, float(np.linalg.norm(exact)))


def output_error(y_hat: np.ndarray, y: np.ndarray) -> OutputError:
    """All measures of `y_hat` against the reference `y`, both (M, N), computed in float64."""
    _check_shapes(y_hat, y)
    approximate, exact = y_hat.astype(np.float64), y.astype(np.float64)
    if not np.isfinite(approximate).all():
        size = float(np.linalg.norm(exact)) / math.sqrt(exact.size)
        inf = math.inf
        return OutputError(relative=inf, sqnr_db=-inf, cosine=math.nan, max_abs=inf, rms=size)
    miss = approximate - exact
    size, size_hat = float(np.linalg.norm(exact)), float(np.linalg.norm(approximate))
    relative = _ratio(float(np.linalg.norm(miss)), size)
    if size == 0.0 or size_hat == 0.0:
        cosine = 1.0 if size == size_hat else 0.0
    else:
        cosine = float(np.vdot(approximate, exact)) / (size * size_hat)
    return OutputError(
        relative=relative,
        sqnr_db=-20.0 * math.log10(relative) if relative else math.inf,
        cosine=cosine,
        max_abs=float(np.abs(miss).max()),
        rms=size / math.sqrt(exact.size),
    )


def _ratio(miss: float, size: float) -> float:
    if size == 0.0:
        return 0.0 if miss == 0.0 else math.inf
    return miss / size


def _check_shapes(approximation: np.ndarray, reference: np.ndarray) -> None:
    if approximation.shape != reference.shape or reference.size == 0:
        raise InputError(
            f"shapes must agree and hold values: got {approximation.shape} against "
            f"{reference.shape}"
        )


DEFAULT_AGGREGATE = "outputs"


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """A named choice of weights; `formula` is what reports print, `weight` takes a result row."""

    name: str
    formula: str
    weight: Callable[[Mapping[str, Any]], float]


def _calls(row: Mapping[str, Any]) -> float:
    return row.get("calls_per_step") or 1


def _outputs(row: Mapping[str, Any]) -> float:
    return _calls(row) * row["m"] * row["n"]


def _output_energy(row: Mapping[str, Any]) -> float:
    return _outputs(row) * row["output_rms"] * row["output_rms"]


def _macs(row: Mapping[str, Any]) -> float:
    return _outputs(row) * row["k"]


def _size(row: Mapping[str, Any]) -> float:
    return row["n"] * row["k"]


# One line an aggregate.
_CHOICES = (
    (
        "outputs",
        "c_l m_l n_l",
        "c_l: calls of layer l per denoising step, m_l n_l: outputs of one call",
        _outputs,
    ),
    ("rms", "c_l", "c_l: calls of layer l per denoising step", _calls),
    ("energy", "c_l P_l", "c_l: its calls, P_l: sum of squares of its output", _output_energy),
    ("macs", "c_l M_l", "c_l: its calls, M_l: multiply-adds of one call", _macs),
)
AGGREGATES = {
    name: Aggregate(
        name=name,
        formula=f"output_error = sqrt( sum_l {weights} e_l^2 / sum_l {weights} ), "
        f"e_l: relative output error of layer l, {meaning}",
        weight=weight,
    )
    for name, weights, meaning, weight in _CHOICES
}
_WEIGHT_ERROR = Aggregate(
    name="weights",
    formula="weight_error = sqrt( sum_l n_l k_l w_l^2 / sum_l n_l k_l ), "
    "w_l: relative weight error of layer l, n_l k_l: its number of weights",
    weight=_size,
)


def aggregate_of(column: str, name: str = DEFAULT_AGGREGATE) -> Aggregate:
    """The aggregate of an error column; `name` chooses that of the output error.

    Raises
    ------
    InputError
        If `name` is unknown.
    """
    if name not in AGGREGATES:
        raise InputError(unknown_name("aggregate", name, AGGREGATES))
    return _WEIGHT_ERROR if column == "weight_error" else AGGREGATES[name]
