"""Weights with heavy tails, uneven rows and columns, and a decaying spectrum.

With T iid from Student's t scaled to unit variance, the weight is, up to one factor,

    W = T * exp(0.12 e_n) * exp(0.15 u_k)  +  U diag(s) V^T
    s_i = 0.8 c sqrt(max(N, K)) i^-0.4,   i = 1 ... 0.1 min(N, K)

with e, u standard normal, corr(u, ln of the input channels' root mean square) given, and U, V
orthonormal. The factor sets the standard deviation of all values.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.synthesize_table import WeightStatistics

__all__ = ["draw_weight"]

_ROW_SCALE_STD = 0.12
_COLUMN_SCALE_STD = 0.15
_RANK_SHARE = 0.1
_DECAY = 0.4


def draw_weight(
    n: int,
    statistics: WeightStatistics,
    channel_rms: NDArray[np.float64],
    std: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Draw a weight.

    Parameters
    ----------
    n : int
        Output features N.
    statistics : WeightStatistics
        Its `std` is not used.
    channel_rms : ndarray of shape (K,), float64
        Root mean square of each input channel.
    std : float
        Standard deviation of all values of the weight.

    Returns
    -------
    weight : ndarray of shape (N, K), float32
    """
    k = len(channel_rms)
    weight = _student_t(n, k, statistics.tail_df, rng)
    weight *= np.exp(_ROW_SCALE_STD * rng.standard_normal((n, 1), dtype=np.float32))
    columns = _correlated(np.log(channel_rms), statistics.correlation, rng)
    weight *= np.exp(_COLUMN_SCALE_STD * columns).astype(np.float32)
    left, right = (
        _orthonormal(size, max(round(_RANK_SHARE * min(n, k)), 1), rng) for size in (n, k)
    )
    order = np.arange(1, left.shape[1] + 1, dtype=np.float32)
    left *= 0.8 * statistics.low_rank * max(n, k) ** 0.5 * order**-_DECAY
    weight += left @ right.T
    weight *= np.float32(std / weight.std(dtype=np.float64))
    return weight


def _student_t(n: int, k: int, df: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Student's t over its standard deviation sqrt(df / (df - 2)): a normal over a chi."""
    values = rng.standard_normal((n, k), dtype=np.float32)
    # chi^2 with df degrees of freedom is twice a gamma variable of shape df / 2.
    chi2 = rng.standard_gamma(df / 2, (n, k), dtype=np.float32)
    values /= np.sqrt(chi2, out=chi2)
    values *= np.float32((df / 2 - 1) ** 0.5)
    return values


def _correlated(
    reference: NDArray[np.float64], correlation: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Standard normal values of a given correlation with `reference`."""
    noise = rng.standard_normal(len(reference))
    spread = reference.std()
    if not spread:
        return noise
    known = (reference - reference.mean()) / spread
    return correlation * known + (1 - correlation**2) ** 0.5 * noise


def _orthonormal(size: int, rank: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random orthonormal columns: A C^-T with A normal and A^T A = C C^T.

    A is far from singular, its size being ten times its rank; LAPACK's QR would take most of the
    time of a weight.
    """
    normal = rng.standard_normal((size, rank), dtype=np.float32)
    cholesky = np.linalg.cholesky((normal.T @ normal).astype(np.float64))
    return normal @ np.linalg.inv(cholesky).T.astype(np.float32)
