"""One precision split per layer, chosen so that the whole model is best under budgets."""

from loraq_sim.allocation.model import Allocation, allocate, allocate_each

__all__ = ["Allocation", "allocate", "allocate_each"]
