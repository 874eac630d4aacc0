"""Solvers: a weight becomes a quantized main branch and a quantized low-rank branch."""

from loraq_sim.solvers.many import solve_many
from loraq_sim.solvers.shared_stages import SharedStages
from loraq_sim.solvers.solve import METHODS, PRESETS, Solution, solve

__all__ = ["METHODS", "PRESETS", "SharedStages", "Solution", "solve", "solve_many"]
