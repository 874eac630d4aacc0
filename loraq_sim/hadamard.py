"""Rotation of input channels by a block-diagonal Hadamard matrix: outliers spread over a block.

With H = diag(H_b, H_b, ...) / sqrt(b), where H_b is Sylvester's Hadamard matrix of order b, the
rows of W and of X both become (.) H, and X W^T is unchanged: H is symmetric and its own inverse.
Rounding sees W H and X H, whose channels are mixtures of b channels. At run time that is
log2(b) additions per activation (the fast Walsh-Hadamard transform) and one multiplication by
1/sqrt(b), which a scale can absorb.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024.
"""

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["check_rotation", "hadamard_block", "rotate_channels"]


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
