"""What a solver is given and what it returns."""

from dataclasses import dataclass, field

import numpy as np

from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.effort import Effort

__all__ = ["Branches", "Problem", "Trace", "TraceEntry", "product"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One weight to split into a quantized main branch and a quantized low-rank branch.

    ``weight`` is (N, K) float32 (already smoothed, if at all); ``rank`` is at least 1.
    ``activations`` (T, K) float32 are what enters the smoothed weight, for methods that use data;
    ``is_smoothed`` says that the caller chose the smoothing.
    """

    weight: np.ndarray
    main: Format
    branch: Format
    rank: int
    effort: Effort
    rng: np.random.Generator
    activations: np.ndarray | None = None
    is_smoothed: bool = False

    def relative_error(self, approximation: np.ndarray) -> float:
        """||W - approximation||_F / ||W||_F; 0 for a zero weight that is met exactly."""
        miss = float(np.linalg.norm((self.weight - approximation).astype(np.float64)))
        size = float(np.linalg.norm(self.weight.astype(np.float64)))
        if size == 0.0:
            return 0.0 if miss == 0.0 else float("inf")
        return miss / size


@dataclass(frozen=True, kw_only=True)
class TraceEntry:
    """Relative weight error after one iteration of one stage.

    ``is_stored`` says that the error is that of stored codes, which a solver may return; else the
    branch was not rounded yet.
    """

    stage: str
    iteration: int
    weight_error: float
    is_stored: bool = True


Trace = list[TraceEntry]


@dataclass(frozen=True, kw_only=True)
class Branches:
    """Stored branches: main (N, K), left (N, r) and right (r, K); no factors without a branch.

    ``branch_noise`` is what rounding did to the branch, ||L^ R^ - L R||_F / ||W||_F, where known.
    ``smooth`` (K,) are factors that the method chose itself: the branches then approximate
    W diag(smooth).
    """

    main: QuantizedTensor
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    trace: Trace = field(default_factory=list)
    branch_noise: float | None = None
    smooth: np.ndarray | None = None

    def reconstruct(self) -> np.ndarray:
        """main + left right as float32, (N, K)."""
        total = self.main.dequantize()
        if self.left is not None:
            total += product(self.left, self.right)
        return total


def product(left: QuantizedTensor, right: QuantizedTensor) -> np.ndarray:
    """left right as float32, (N, K), from the stored codes."""
    return left.dequantize() @ right.dequantize()
