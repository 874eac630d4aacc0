"""Sweeps: every layer of a dump in every split, in parallel, into a result store."""

from loraq_sim.sweep.forecast import SweepForecast, estimate
from loraq_sim.sweep.plan import ComposedSweep, SweepPlan, compose
from loraq_sim.sweep.progress import SweepEvent, SweepOutcome
from loraq_sim.sweep.run import run_sweep
from loraq_sim.sweep.solution_cache import SolutionCache

__all__ = [
    "ComposedSweep",
    "SolutionCache",
    "SweepEvent",
    "SweepForecast",
    "SweepOutcome",
    "SweepPlan",
    "compose",
    "estimate",
    "run_sweep",
]
