"""A uniform sample of a stream of rows, in memory of a fixed size."""

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["RowSample"]


class RowSample:
    """At most `budget` rows of a stream, every row with the same chance.

    Each row of the stream gets a random key from [0, 1); the rows with the smallest keys are kept
    (bottom-k sampling), so rows may arrive in batches of any size, and only those kept are copied.

    Parameters
    ----------
    budget : int
        Most rows kept.
    seed : int
    name : str
        Seed and name fix the keys, whatever other streams are sampled.
    """

    def __init__(self, budget: int, seed: int, name: str) -> None:
        self._budget = budget
        self._rng = _generator(seed, name)
        self._bound = 1.0
        self._keys = np.empty(0)
        # Firing, time step and place in the stream of each kept row.
        self._origin = np.empty((0, 3), dtype=np.int64)
        self._rows: NDArray[np.float32] | None = None
        self._n_seen = 0

    def choose(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Places among the next `count` rows that are worth reading, and their keys."""
        keys = self._rng.random(count)
        places = np.flatnonzero(keys < self._bound)
        if len(places) > self._budget:
            order = np.argpartition(keys[places], self._budget)
            self._bound = float(keys[places[order[self._budget]]])
            places = np.sort(places[order[: self._budget]])
        return places, keys[places]

    def add(
        self,
        rows: NDArray[np.float32],
        places: NDArray[np.int64],
        keys: NDArray[np.float64],
        *,
        count: int,
        firing: int,
        step: int,
    ) -> None:
        """Offer the rows that `choose` named out of `count`.

        Parameters
        ----------
        rows : ndarray of shape (len(places), K), float32
        places, keys : ndarray of shape (len(places),)
            From `choose`.
        count : int
            Rows of the batch, chosen or not.
        firing : int
            How often the layer had run before.
        step : int
            Index of the time step.
        """
        origin = np.empty((len(places), 3), dtype=np.int64)
        origin[:, 0], origin[:, 1], origin[:, 2] = firing, step, self._n_seen + places
        self._n_seen += count
        self._keys = np.concatenate([self._keys, keys])
        self._origin = np.concatenate([self._origin, origin])
        self._rows = rows if self._rows is None else np.concatenate([self._rows, rows])
        if len(self._keys) > self._budget:
            kept = np.argpartition(self._keys, self._budget)
            self._bound = float(self._keys[kept[self._budget]])
            self._keep(np.sort(kept[: self._budget]))

    def before(self, firing: int, seed: int, name: str) -> "RowSample":
        """A copy without the rows of this firing and later ones, to be continued on its own.

        The bound stays, so the copy remains a uniform sample of all it has seen and will see.
        """
        copy = RowSample(self._budget, seed, name)
        copy._bound, copy._keys, copy._origin = self._bound, self._keys, self._origin
        copy._rows, copy._n_seen = self._rows, self._n_seen
        copy._keep(np.flatnonzero(self._origin[:, 0] < firing))
        return copy

    def in_order(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The kept rows of shape (T, K) in order of time step, then of arrival; and their steps."""
        order = np.lexsort((self._origin[:, 2], self._origin[:, 1]))
        return self._rows[order], self._origin[order, 1]

    def __len__(self) -> int:
        return len(self._keys)

    def _keep(self, places: NDArray[np.int64]) -> None:
        self._keys, self._origin = self._keys[places], self._origin[places]
        if self._rows is not None:
            self._rows = self._rows[places]


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()))
