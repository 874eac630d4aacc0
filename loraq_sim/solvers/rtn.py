"""Round to nearest: the main branch alone, scale from the largest magnitude of each group."""

from loraq_sim.formats import Format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers.problem import Branches

__all__ = ["round_to_nearest"]


def round_to_nearest(weight, main: Format) -> Branches:
    """Quantize `weight` (N, K) to `main` with absmax scales and no low-rank branch."""
    return Branches(main=quantize(weight, main, "absmax"))
