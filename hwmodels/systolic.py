"""Cycles of one systolic array, by the name under which scripts import them.

The closed form and its source stand in `hwmodels.kernel_cycles`, with the other arrays.
"""

from hwmodels.kernel_cycles import systolic_cycles

__all__ = ["systolic_cycles"]
