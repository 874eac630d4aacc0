"""Quantization of the low-rank branch: R first, then L refitted by least squares against stored R.

Groups of R run along K inside one row, so the row's size is absorbed by its scales: singular values
belong in R. After R is rounded, L = E R^T (R R^T)^-1 is the best left factor for what is stored.
Each refinement refits R against the stored L and L against the stored R again.
"""

import numpy as np

from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.learned_rotation import learned_rotation

__all__ = ["least_squares", "round_branch", "round_factors"]

_REFINEMENTS = 2
# Eigenvalues below this share of the largest are rounding noise of the float32 Gram matrix.
_RANK_CUTOFF = 1e-7


def round_branch(
    target: np.ndarray, right: np.ndarray, fmt: Format, rotation: str | None = None
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Stored factors (left, right) whose product is close to `target`.

    Parameters
    ----------
    target : ndarray of shape (N, K), float32
        What the branch should carry.
    right : ndarray of shape (r, K), float32
        Row factor of the unquantized fit.
    fmt : Format
        Format of both factors: R in groups along K, L in groups along the rank.
    rotation : None or "learned"
        Whether R is turned first; see `loraq_sim.solvers.learned_rotation`.
    """
    if rotation is not None:
        right = learned_rotation(right, fmt).T @ right
    best = None
    best_miss = np.inf
    for refinement in range(_REFINEMENTS + 1):
        stored_right = quantize(right, fmt, "mse")
        rows = stored_right.dequantize()
        stored_left = quantize(least_squares(target @ rows.T, rows @ rows.T), fmt, "mse")
        columns = stored_left.dequantize()
        miss = float(np.linalg.norm(target - columns @ rows))
        if miss < best_miss:
            best, best_miss = (stored_left, stored_right), miss
        if refinement < _REFINEMENTS:
            right = least_squares(target.T @ columns, columns.T @ columns).T
    return best


def round_factors(
    left: np.ndarray, right: np.ndarray, fmt: Format, rotation: str | None = None
) -> tuple[QuantizedTensor, QuantizedTensor]:
    """Stored factors close to `left` (N, r) and `right` (r, K), each rounded as it is.

    For fits in another metric than the Frobenius norm, which a refit would leave.
    """
    if rotation is not None:
        turn = learned_rotation(right, fmt)
        left, right = left @ turn, turn.T @ right
    rule = None if fmt.element.is_plain_float else "mse"
    return quantize(left, fmt, rule), quantize(right, fmt, rule)


def least_squares(moment: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """moment gram^+ for a symmetric positive semidefinite (r, r) `gram`, as float32.

    The pseudo-inverse keeps a factor row that was rounded to zero, or repeats another, solvable.
    """
    inverse = np.linalg.pinv(gram.astype(np.float64), rcond=_RANK_CUTOFF, hermitian=True)
    return np.ascontiguousarray(moment @ inverse, dtype=np.float32)
