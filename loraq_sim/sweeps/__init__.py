"""Sweeps: every layer of a dump in every split, in parallel, into a result store."""

from loraq_sim.sweeps.digests import SolutionCache
from loraq_sim.sweeps.forecast import SweepForecast, estimate
from loraq_sim.sweeps.plan import ComposedSweep, compose
from loraq_sim.sweeps.plan_file import SweepPlan
from loraq_sim.sweeps.progress import SweepEvent
from loraq_sim.sweeps.run import SweepOutcome, run_sweep

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
