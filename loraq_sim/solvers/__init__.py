"""Solvers: a weight becomes a quantized main branch and a quantized low-rank branch."""

from loraq_sim.solvers.solve import METHODS, PRESETS, Solution, solve

__all__ = ["METHODS", "PRESETS", "Solution", "solve"]
