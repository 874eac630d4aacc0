"""Best rank-r approximation: exact for small matrices, randomized subspace iteration otherwise.

Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM Review 53 (2011), algorithm 4.4.
"""

import numpy as np

from loraq_sim.solvers.device import CPU, Device

__all__ = ["balanced_factors", "principal_factors", "truncated_svd"]

_OVERSAMPLE = 8
# Below this share of the smaller side the sketch is cheaper than LAPACK's full decomposition.
_SKETCH_SHARE = 1 / 3


def truncated_svd(
    matrix: np.ndarray,
    rank: int,
    *,
    rng: np.random.Generator,
    power_iterations: int = 2,
    start: np.ndarray | None = None,
    device: Device = CPU,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (left, right) of the best rank-`rank` fit; left is orthonormal, sizes in right.

    Parameters
    ----------
    matrix : ndarray of shape (N, K), float32
    rank : int
        1 to min(N, K).
    rng : numpy.random.Generator
        Draws the sketch; unused when the decomposition is exact.
    power_iterations : int
        Passes of subspace iteration; two leave the residual within 1 % of the optimum on
        spectra as flat as those of rounding errors.
    start : ndarray of shape (r, K), optional
        Row space of an earlier fit, used as part of the sketch.
    device : Device
        Where the sketch is multiplied and made orthonormal; decompositions run on the CPU.

    Returns
    -------
    left : ndarray of shape (N, rank), float32, orthonormal columns
    right : ndarray of shape (rank, K), float32
    """
    n, k = matrix.shape
    size = min(rank + _OVERSAMPLE, n, k)
    if size > min(n, k) * _SKETCH_SHARE:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return np.ascontiguousarray(u[:, :rank]), s[:rank, None] * vt[:rank]
    sketch = rng.standard_normal((k, size), dtype=np.float32)
    if start is not None:
        kept = min(start.shape[0], size)
        sketch[:, :kept] = start[:kept].T
    with device.working():
        held = device.put(matrix)
        basis = device.orthonormal(held @ device.put(sketch))
        for _ in range(power_iterations):
            rows = device.orthonormal(held.T @ basis)
            basis = device.orthonormal(held @ rows)
        basis, seen = device.get(basis), device.get(basis.T @ held)
    u, s, vt = np.linalg.svd(seen, full_matrices=False)
    return np.ascontiguousarray(basis @ u[:, :rank]), s[:rank, None] * vt[:rank]


def principal_factors(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with orthonormal left columns and sizes, in falling order, in right.

    Parameters
    ----------
    left : ndarray of shape (N, r), float32
    right : ndarray of shape (r, K), float32
    """
    basis, mixing = np.linalg.qr(left)
    u, s, vt = np.linalg.svd(mixing @ right, full_matrices=False)
    return np.ascontiguousarray(basis @ u), s[:, None] * vt


def balanced_factors(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with both factors of a component equally large, for orthonormal left."""
    roots = np.sqrt(np.linalg.norm(right, axis=1))
    shares = np.where(roots == 0, np.float32(1), roots)
    return np.ascontiguousarray(left * roots), np.ascontiguousarray(right / shares[:, None])
