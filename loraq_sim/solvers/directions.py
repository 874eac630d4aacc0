"""The two directions of a descent of `loraq`, from the Numba kernels.

A direction is a matrix D (N, K) along which the product P = L R of a branch moves: see
`loraq_sim.solvers.descent`.
"""

from typing import Any, Protocol

import numpy as np

from loraq_sim.solvers.main_grid import MainGrid

__all__ = ["CpuDirections", "Directions"]


class Directions(Protocol):
    """Directions for one weight W and one main grid; factors and D are arrays of one device.

    A returned D is scratch: it holds until the next call.
    """

    def distance(self, left: Any, right: Any) -> float:
        """||W - L R||_F."""

    def flatten(self, left: Any, right: Any, doublings: int) -> Any:
        """Towards smaller ranges of the groups of W - L R, by the norm of power 2**doublings."""

    def leave(self, left: Any, right: Any, step: int) -> Any:
        """The error that rounding leaves of W - L R; its scales follow from call to call."""

    def finish(self) -> list[float]:
        """Hand the scales back to the main grid; the Frobenius norms of what was left."""


class CpuDirections:
    """`Directions` in NumPy; the scales are those of `grid` itself."""

    def __init__(self, rest: np.ndarray, grid: MainGrid) -> None:
        self._rest = rest
        self._grid = grid
        self._buffer = np.empty_like(rest)
        self._norms: list[float] = []

    def distance(self, left: np.ndarray, right: np.ndarray) -> float:
        product = np.matmul(left, right, out=self._buffer)
        return float(np.linalg.norm(np.subtract(self._rest, product, out=product)))

    def flatten(self, left: np.ndarray, right: np.ndarray, doublings: int) -> np.ndarray:
        from loraq_sim.kernels.range_gradient import range_direction

        np.matmul(left, right, out=self._buffer)
        (rest, group), (product, _) = self._grid.rows(self._rest), self._grid.rows(self._buffer)
        range_direction(rest, product, group, doublings, np.float32(self._grid.center_offset))
        return self._buffer

    def leave(self, left: np.ndarray, right: np.ndarray, step: int) -> np.ndarray:
        np.matmul(left, right, out=self._buffer)
        self._norms.append(self._grid.leave(self._rest, self._buffer, step))
        return self._buffer

    def finish(self) -> list[float]:
        return self._norms
