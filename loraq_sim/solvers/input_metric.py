"""Fitting an error as the activations see it: min ||X (E - L R)^T||_F over rank-r L R.

With a factor S of the metric, E S is what a truncated SVD fits, and R S^-1 is the row factor. S is
diagonal for L2QER (mean magnitude of each channel) and the root of the second moment for QERA.
"""

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.solvers.problem import Problem

__all__ = ["mean_magnitudes", "required_activations", "second_moment_root"]

# Share of the mean variance that is added to every direction, so that few rows of activations, or
# channels that are always zero, leave the metric invertible.
_DAMPING = 1e-4


def required_activations(problem: Problem, method: str) -> np.ndarray:
    """The activations (T, K) of `problem`, or an error that says who needs them."""
    if problem.activations is None:
        raise InputError(
            f"method {method!r} needs activations; pass activations=, or use a data-free method "
            "such as 'loraq'"
        )
    return problem.activations


def mean_magnitudes(activations: np.ndarray) -> np.ndarray:
    """Mean |x| of each channel over sqrt(min max) of all, (K,) float32; Zhang et al., eq. 13."""
    sizes = np.abs(activations).mean(axis=0, dtype=np.float64)
    floor = max(float(sizes.max()) * 1e-3, np.finfo(np.float32).tiny)
    sizes = np.maximum(sizes, floor)
    return (sizes / np.sqrt(sizes.min() * sizes.max())).astype(np.float32)


def second_moment_root(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric root of X^T X / T and its inverse, both (K, K) float32."""
    x = activations.astype(np.float64)
    moment = x.T @ x / len(x)
    values, vectors = np.linalg.eigh(moment)
    values = np.maximum(values, 0.0) + _DAMPING * max(float(values.mean()), 1e-30)
    roots = np.sqrt(values)
    root = (vectors * roots) @ vectors.T
    inverse = (vectors / roots) @ vectors.T
    return root.astype(np.float32), inverse.astype(np.float32)
