"""The float branch a stored one stands for.

Let Q be the stored main weight, L R the stored branch and W the weight, smoothed and rotated as the
solution is. Two steps of
least squares take the rounding out of the branch: L' fits W - Q with the stored R, then R' fits it
with L'. With B = L' R' the error of the weight is the sum of two parts,

    Q + L R - W = (Q + B - W) + (L R - B):

what the branch before its rounding does not take up of the main weight's rounding, and what
rounding the factors adds. (The best fit of all, a truncated SVD, would say less: where singular
values are nearly equal it is far from the stored branch and hardly better.)
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.layers import Layer
from loraq_sim.solvers import Solution

__all__ = ["FloatBranch", "entering_rows", "float_branch", "leaving_rows", "stored_weight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatBranch:
    """``left`` (N, r) and ``right`` (r, K), float64, with left @ right = B."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]

    def product(self) -> NDArray[np.float64]:
        """B, (N, K)."""
        return self.left @ self.right


def stored_weight(layer: Layer, solution: Solution) -> NDArray[np.float64]:
    """The weight the branches approximate, smoothed and rotated, (N, K) float64."""
    weight = layer.weight.astype(np.float64)
    smooth = solution.smooth
    return _rotated(weight if smooth is None else weight * smooth.astype(np.float64), solution)


def entering_rows(x: NDArray[np.float32], solution: Solution) -> NDArray[np.float64]:
    """Activations (M, K) as the branches take them, without any rounding."""
    exact, smooth = x.astype(np.float64), solution.smooth
    return _rotated(exact if smooth is None else exact / smooth.astype(np.float64), solution)


def leaving_rows(rows: NDArray[np.float64], solution: Solution) -> NDArray[np.float64]:
    """Rows (N, K) beside the stored weight, with rotation and smoothing undone."""
    undone = _rotated(rows, solution)
    return undone if solution.smooth is None else undone / solution.smooth.astype(np.float64)


def _rotated(rows: NDArray[np.float64], solution: Solution) -> NDArray[np.float64]:
    """`rows` times the solution's block Hadamard matrix, which is its own inverse."""
    block = solution.rotation
    if block is None:
        return rows
    from scipy.linalg import hadamard

    matrix = hadamard(block).astype(np.float64) / np.sqrt(block)
    return (rows.reshape(len(rows), -1, block) @ matrix).reshape(rows.shape)


def float_branch(layer: Layer, solution: Solution) -> FloatBranch | None:
    """The float branch beside the solution's main weight; None without a branch."""
    if solution.left is None:
        return None
    residual = stored_weight(layer, solution) - solution.main.dequantize()
    stored = solution.right.dequantize().astype(np.float64)
    left = residual @ np.linalg.pinv(stored)
    return FloatBranch(left=left, right=np.linalg.pinv(left) @ residual)
