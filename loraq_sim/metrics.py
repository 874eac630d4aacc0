"""Error measures of an approximation against its reference."""

import math
from dataclasses import dataclass

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["OutputError", "output_error", "relative_error"]


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
