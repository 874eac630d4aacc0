"""What a solver is given and what it returns."""

from dataclasses import dataclass, field

import numpy as np

from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor

__all__ = ["Branches", "Problem", "Trace", "TraceEntry", "product"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One weight to split into a quantized main branch and a quantized low-rank branch.

    ``weight`` is (N, K) float32 (already smoothed, if at all); ``rank`` is at least 1;
    ``iterations`` comes from the preset.
    """

    weight: np.ndarray
    main: Format
    branch: Format
    rank: int
    iterations: int
    rng: np.random.Generator

    def relative_error(self, approximation: np.ndarray) -> float:
        """||W - approximation||_F / ||W||_F; 0 for a zero weight that is met exactly."""
        miss = float(np.linalg.norm((self.weight - approximation).astype(np.float64)))
        size = float(np.linalg.norm(self.weight.astype(np.float64)))
        if size == 0.0:
            return 0.0 if miss == 0.0 else float("inf")
        return miss / size


@dataclass(frozen=True, kw_only=True)
class TraceEntry:
    """Relative weight error after one iteration of one stage."""

    stage: str
    iteration: int
    weight_error: float


Trace = list[TraceEntry]


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Stored branches: main (N, K), left (N, r) and right (r, K); no factors without a branch."""

    main: QuantizedTensor
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    trace: Trace = field(default_factory=list)

    def reconstruct(self) -> np.ndarray:
        """main + left right as float32, (N, K)."""
        total = self.main.dequantize()
        if self.left is not None:
            total += product(self.left, self.right)
        return total


def product(left: QuantizedTensor, right: QuantizedTensor) -> np.ndarray:
    """left right as float32, (N, K), from the stored codes."""
    return left.dequantize() @ right.dequantize()
