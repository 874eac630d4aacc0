"""The denoising time steps: errors of each step, calibration on some of them, what dominates."""

from loraq_sim.time_steps.errors import (
    CALIBRATED_METHODS,
    StepErrors,
    chosen_steps,
    evaluate_steps,
    rows_of_steps,
)
from loraq_sim.time_steps.shares import StepReport, step_report

__all__ = [
    "CALIBRATED_METHODS",
    "StepErrors",
    "StepReport",
    "chosen_steps",
    "evaluate_steps",
    "rows_of_steps",
    "step_report",
]
