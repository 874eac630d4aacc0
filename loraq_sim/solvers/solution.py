"""A solved layer: what is stored, what it costs and how close it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from loraq_sim.hadamard import rotate_channels
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.diagnostics import Diagnostics, diagnose
from loraq_sim.solvers.problem import Branches, Trace

__all__ = ["Solution"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A solved layer: stored branches, what they cost and how close they are.

    ``main`` is (N, K), ``left`` (N, r), ``right`` (r, K); the factors are None at rank 0.
    ``smooth`` is (K,) float32 or None and ``rotation`` a block size or None: the branches
    approximate W diag(smooth) H, with H the block Hadamard matrix of `loraq_sim.hadamard`; at run
    time the activations are divided by ``smooth``, then rotated. ``weight_error`` is
    ||W - reconstruct()||_F / ||W||_F in the original weight. ``trace`` holds (stage, iteration,
    error) in order; ``seconds`` is wall time. ``branch_noise`` is what rounding did to the branch,
    relative to the weight, where known. ``charged`` maps parts that several layers hold in common
    (``right``, ``smooth``) to this layer's share of their bytes: see `solve_group`.
    """

    method: str
    preset: str
    seed: int
    main: QuantizedTensor
    left: QuantizedTensor | None
    right: QuantizedTensor | None
    smooth: np.ndarray | None
    weight_error: float
    trace: Trace
    seconds: float
    branch_noise: float | None = None
    rotation: int | None = None
    charged: Mapping[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Rank of the branch; 0 without one."""
        return 0 if self.left is None else self.left.shape[1]

    @property
    def shared_by(self) -> int:
        """How many layers hold the right factor in common, and so X R^T; 1 for a layer alone."""
        if self.right is None or not self.charged.get("right"):
            return 1
        # Even shares, so that the quotient is within a part in a thousand of the count.
        return max(1, round(self.right.nbytes / self.charged["right"]))

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Stored bytes of each part, scales and padding included; a share of common parts."""
        parts = {"main": self.main, "left": self.left, "right": self.right}
        sizes = {name: 0 if part is None else part.nbytes for name, part in parts.items()}
        sizes["smooth"] = 0 if self.smooth is None else 2 * self.smooth.size
        return sizes | dict(self.charged)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts (`pack()` of each writes exactly these)."""
        return sum(self.bytes_by_part.values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (N K)."""
        return 8.0 * self.nbytes / (self.main.shape[0] * self.main.shape[1])

    def diagnose(self, weight: np.ndarray) -> Diagnostics:
        """Group ranges, spectrum of what is left and more; see `loraq_sim.solvers.diagnostics`."""
        return diagnose(self, weight)

    def _repr_html_(self) -> str:
        from loraq_sim.result_cards import solution_card

        return solution_card(self)

    def reconstruct(self) -> np.ndarray:
        """The weight as stored, (N, K) float32, rotation and smoothing undone."""
        stored = Branches(main=self.main, left=self.left, right=self.right).reconstruct()
        if self.rotation is not None:
            stored = rotate_channels(stored, self.rotation)
        return stored if self.smooth is None else stored / self.smooth
