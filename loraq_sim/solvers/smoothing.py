"""Smoothing: move activation outliers into the weight, W diag(s) and X diag(1/s).

SmoothQuant (Xiao et al., ICML 2023, eq. 4): s_k = max_t|x_tk|^alpha / max_n|w_nk|^(1 - alpha),
here normalized to a geometric mean of 1.
"""

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["power_smoothing", "smoothing_vector"]


def smoothing_vector(
    smooth: "float | np.ndarray | None", weight: np.ndarray, activations: np.ndarray | None
) -> np.ndarray | None:
    """The factors s of shape (K,), float16 values as float32, or None without smoothing.

    Parameters
    ----------
    smooth : None, float or ndarray of shape (K,)
        None, the SmoothQuant strength alpha in [0, 1] (needs `activations`), or s itself.
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32, optional
    """
    if smooth is None:
        return None
    k = weight.shape[1]
    if np.ndim(smooth) == 0:
        factors = _smoothquant(float(smooth), weight, activations)
    else:
        factors = np.asarray(smooth, dtype=np.float32)
        if factors.shape != (k,):
            raise InputError(
                f"smooth must have shape ({k},), one factor per input channel, got {factors.shape}"
            )
    stored = factors.astype(np.float16).astype(np.float32)
    if not np.isfinite(stored).all() or (stored <= 0).any():
        worst = int(np.argmin(np.where(np.isfinite(stored), stored, -np.inf)))
        raise InputError(
            f"smooth factors must be positive and finite as float16; channel {worst} is "
            f"{factors[worst]}"
        )
    return stored


def _smoothquant(alpha: float, weight: np.ndarray, activations: np.ndarray | None) -> np.ndarray:
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"smooth strength alpha must be from 0 to 1, got {alpha}")
    if activations is None:
        raise InputError("smoothing by strength needs activations; pass smooth=None or a vector")
    return power_smoothing(alpha, 1.0 - alpha, weight, activations)


def power_smoothing(
    alpha: float, beta: float, weight: np.ndarray, activations: np.ndarray
) -> np.ndarray:
    """max|x|^alpha / max|w|^beta of each channel, (K,), of geometric mean 1, float16 values."""
    tiny = np.float32(1e-5)
    x_max = np.maximum(np.abs(activations).max(axis=0), tiny).astype(np.float64)
    w_max = np.maximum(np.abs(weight).max(axis=0), tiny).astype(np.float64)
    log_s = alpha * np.log(x_max) - beta * np.log(w_max)
    # Within 2**-10 .. 2**10 float16 keeps full precision and no channel dominates the weight.
    factors = np.exp(np.clip(log_s - log_s.mean(), -6.93, 6.93))
    return factors.astype(np.float16).astype(np.float32)
