"""The float branch a stored one stands for.

Let Q be the stored main weight, L R the stored branch and W the (smoothed) weight. Two steps of
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

__all__ = ["FloatBranch", "float_branch", "smoothed_weight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatBranch:
    """``left`` (N, r) and ``right`` (r, K), float64, with left @ right = B."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]

    def product(self) -> NDArray[np.float64]:
        """B, (N, K)."""
        return self.left @ self.right


def smoothed_weight(layer: Layer, solution: Solution) -> NDArray[np.float64]:
    """The weight the branches approximate, (N, K) float64."""
    weight = layer.weight.astype(np.float64)
    return weight if solution.smooth is None else weight * solution.smooth.astype(np.float64)


def float_branch(layer: Layer, solution: Solution) -> FloatBranch | None:
    """The float branch beside the solution's main weight; None without a branch."""
    if solution.left is None:
        return None
    residual = smoothed_weight(layer, solution) - solution.main.dequantize()
    stored = solution.right.dequantize().astype(np.float64)
    left = residual @ np.linalg.pinv(stored)
    return FloatBranch(left=left, right=np.linalg.pinv(left) @ residual)
