"""Round to nearest: the main branch alone, scales by the default rule of the format."""

from loraq_sim.formats import Format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers.problem import Branches

__all__ = ["round_to_nearest"]


def round_to_nearest(weight, main: Format) -> Branches:
    """Quantize `weight` (N, K) to `main` with the default scales of the format, no branch."""
    return Branches(main=quantize(weight, main))
