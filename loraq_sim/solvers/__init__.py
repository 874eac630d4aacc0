"""Solvers: a weight becomes a quantized main branch and a quantized low-rank branch."""

from loraq_sim.solvers.problem import PRESETS, SharedStages
from loraq_sim.solvers.shared_input import solve_group
from loraq_sim.solvers.solution import Solution
from loraq_sim.solvers.solve import METHODS, GroupOptions, SolveOptions, solve, solve_many

__all__ = [
    "METHODS", "PRESETS", "GroupOptions", "SharedStages", "Solution", "SolveOptions", "solve",
    "solve_group", "solve_many",
]  # fmt: skip
