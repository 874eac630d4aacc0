"""Adam on the two factors of a branch, with steps relative to their size.

Both stages of `loraq` are descents of one kind: a direction D of shape (N, K) for P = L R gives
D R^T for L and L^T D for R. A stage only says how D comes from P.

Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, with a cosine schedule.
"""

import math
from collections.abc import Callable

import numpy as np

__all__ = ["descend"]

_BETA_1, _BETA_2 = 0.9, 0.95
# The last step, as a share of the first.
_LAST = 0.02
_TINY = np.float32(1e-20)


def descend(
    left: np.ndarray,
    right: np.ndarray,
    direction: Callable[[np.ndarray, int], None],
    *,
    steps: int,
    rate: float,
    buffer: np.ndarray,
) -> None:
    """Move `left` and `right` in place along what `direction` makes of their product.

    Parameters
    ----------
    left : ndarray of shape (N, r), float32
    right : ndarray of shape (r, K), float32
    direction : callable
        Gets the product (N, K) and the step from 0, and overwrites the product by the direction.
    steps : int
    rate : float
        First step of an element, as a share of the root mean square of its factor.
    buffer : ndarray of shape (N, K), float32
        Scratch.
    """
    movers = [_Mover(left, rate), _Mover(right, rate)]
    for step in range(steps):
        np.matmul(left, right, out=buffer)
        direction(buffer, step)
        ascents = (buffer @ right.T, left.T @ buffer)
        share = _LAST + (1 - _LAST) * (1 + math.cos(math.pi * step / steps)) / 2
        for mover, ascent in zip(movers, ascents, strict=True):
            mover.move(ascent, step + 1, share)


class _Mover:
    """Adam's moments of one factor."""

    def __init__(self, factor: np.ndarray, rate: float) -> None:
        self.factor = factor
        self.rate = rate * math.sqrt(float(np.square(factor).mean()))
        self.mean = np.zeros_like(factor)
        self.square = np.zeros_like(factor)

    def move(self, ascent: np.ndarray, count: int, share: float) -> None:
        self.mean += np.float32(1 - _BETA_1) * (ascent - self.mean)
        np.square(ascent, out=ascent)
        self.square += np.float32(1 - _BETA_2) * (ascent - self.square)
        size = self.rate * share / (1 - _BETA_1**count) * math.sqrt(1 - _BETA_2**count)
        self.factor += np.float32(size) * self.mean / (np.sqrt(self.square) + _TINY)
