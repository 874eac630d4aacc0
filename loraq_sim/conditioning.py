"""What a layer's input channels go through before its weight is quantized: smoothing, rotation.

Smoothing moves activation outliers into the weight, W diag(s) and X diag(1/s). SmoothQuant (Xiao et
al., ICML 2023, eq. 4): s_k = max_t|x_tk|^alpha / max_n|w_nk|^(1 - alpha), here normalized to a
geometric mean of 1.

Rotation by a block-diagonal Hadamard matrix spreads outliers over a block. With
H = diag(H_b, H_b, ...) / sqrt(b), where H_b is Sylvester's Hadamard matrix of order b, the rows of
W and of X both become (.) H, and X W^T is unchanged: H is symmetric and its own inverse. Rounding
sees W H and X H, whose channels are mixtures of b channels. At run time that is log2(b) additions
per activation (the fast Walsh-Hadamard transform) and one multiplication by 1/sqrt(b), which a
scale can absorb. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS
2024.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError, unknown_name

CONDITIONS = ("auto", "rms")
"""Ways to choose smoothing and rotation; see `loraq_sim.solve`."""

__all__ = [
    "as_stored",
    "CONDITIONS",
    "balanced_smoothing",
    "check_condition",
    "check_rotation",
    "hadamard_block",
    "power_smoothing",
    "rotate_channels",
    "shift_of_channels",
    "smoothing_vector",
]


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


# Of the size of the median channel: as quiet as one may be taken to be.
_QUIETEST = 0.3


def power_smoothing(
    alpha: float,
    beta: float,
    weight: np.ndarray,
    activations: np.ndarray,
    *,
    trust_quiet: bool = True,
) -> np.ndarray:
    """max|x|^alpha / max|w|^beta of each channel, (K,), of geometric mean 1, float16 values.

    Without `trust_quiet` as `balanced_smoothing` takes channels that were quiet in all rows.
    """
    tiny = np.float32(1e-5)
    x_max = np.maximum(np.abs(activations).max(axis=0), tiny).astype(np.float64)
    if not trust_quiet:
        x_max = _not_quiet(x_max, float(tiny))
    w_max = np.maximum(np.abs(weight).max(axis=0), tiny).astype(np.float64)
    return _stored_factors(alpha * np.log(x_max) - beta * np.log(w_max))


def _stored_factors(log_s: np.ndarray) -> np.ndarray:
    # Within 2**-10 .. 2**10 float16 keeps full precision and no channel dominates the weight.
    factors = np.exp(np.clip(log_s - log_s.mean(), -6.93, 6.93))
    return factors.astype(np.float16).astype(np.float32)


def balanced_smoothing(weight: np.ndarray, activations: np.ndarray) -> np.ndarray:
    """sqrt(rms x / rms w) of each channel, (K,), of geometric mean 1, float16 values.

    The closed form of SmoothQuant with root mean squares for its maxima: where a rotation or a
    group shares out what is loud, the rounding errors of X and W follow the sums of (x_k / s_k)^2
    and (w_k s_k)^2 over its channels, and these factors make the product of the two least.

    No channel is taken to be quieter than 0.3 of the median one: what an activation function kept
    near zero in all rows seen is loud in some others, and would be amplified there a thousand
    times. Where quiet ones stay quiet it costs nothing.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32
    """
    tiny = 1e-10
    x, w = (
        np.sqrt(np.maximum(np.square(values, dtype=np.float64).mean(axis=0), tiny * tiny))
        for values in (activations, weight)
    )
    return _stored_factors(0.5 * (np.log(_not_quiet(x, tiny)) - np.log(w)))


def _not_quiet(sizes: np.ndarray, tiny: float) -> np.ndarray:
    """`sizes`, none below a share of the median of those that were heard at all, above `tiny`."""
    heard = sizes[sizes > tiny]
    return np.maximum(sizes, _QUIETEST * np.median(heard)) if len(heard) else sizes


def hadamard_block(rotate: str | None, k: int) -> int | None:
    """Block size that `rotate` names for `k` channels; None without rotation.

    Parameters
    ----------
    rotate : None or str
        ``"hadamard"``: the largest power of two that divides `k` (128 for 1152, 32 for 5600);
        ``"hadamard:64"``: blocks of 64.
    k : int

    Raises
    ------
    InputError
        If `rotate` is something else, or the block is no power of two from 2 on that divides `k`.
    """
    if rotate is None:
        return None
    name, colon, size = str(rotate).partition(":")
    if name != "hadamard" or (colon and not (size.isascii() and size.isdigit())):
        raise InputError(
            f"rotate must be None, 'hadamard' or 'hadamard:BLOCK' such as 'hadamard:64', "
            f"got {rotate!r}"
        )
    largest = k & -k
    block = int(size) if colon else largest
    if block < 2 or block & (block - 1) or k % block:
        allowed = f"up to {largest}" if largest > 1 else "but K is odd, so none fits"
        raise InputError(
            f"rotate {rotate!r}: a block must be a power of two from 2 that divides K={k} "
            f"({allowed}), got {block}"
        )
    return block


def check_rotation(rotate: str | None) -> str | None:
    """`rotate` if `hadamard_block` takes it for some number of channels; else its InputError."""
    hadamard_block(rotate, 1 << 40)
    return rotate


def check_condition(condition: str | None) -> str | None:
    """`condition` if it is None or one of `CONDITIONS`; else an InputError."""
    if condition is not None and condition not in CONDITIONS:
        raise InputError(unknown_name("condition", condition, CONDITIONS))
    return condition


def rotate_channels(values: np.ndarray, block: int) -> np.ndarray:
    """`values` (..., K) float32 times the block Hadamard matrix; twice gives `values` back.

    Parameters
    ----------
    values : ndarray of shape (..., K), float32
        Not modified.
    block : int
        Power of two that divides K.

    Returns
    -------
    ndarray of shape (..., K), float32
        Sums in float32, in a fixed order: log2(block) roundings per value and one by the factor.
    """
    out = np.array(values, dtype=np.float32, order="C")
    half = 1
    while half < block:
        pairs = out.reshape(-1, 2, half)
        first = pairs[:, 0].copy()
        pairs[:, 0] += pairs[:, 1]
        np.subtract(first, pairs[:, 1], out=pairs[:, 1])
        half *= 2
    out *= np.float32(1 / np.sqrt(block))
    return out


def shift_of_channels(
    k: int, shift: float, smooth: NDArray[np.floating] | None = None
) -> NDArray[np.float32]:
    """What a shift of X adds to each of `k` channels once they are divided by `smooth`, (k,)."""
    added = np.full(k, shift, np.float32)
    return added if smooth is None else np.divide(added, smooth, dtype=np.float32)


def as_stored(
    weight: np.ndarray,
    activations: np.ndarray | None,
    factors: np.ndarray | None,
    block: int | None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Weight and activations smoothed, then rotated: what the branches and the data path see."""
    if factors is not None:
        weight = weight * factors
        activations = None if activations is None else activations / factors
    if block is not None:
        weight = rotate_channels(weight, block)
        activations = None if activations is None else rotate_channels(activations, block)
    return weight, activations
