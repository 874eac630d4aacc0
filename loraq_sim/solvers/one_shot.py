"""The record every method that rounds once returns."""

from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.problem import Branches, Problem, TraceEntry

__all__ = ["rounded_once"]


def rounded_once(
    problem: Problem,
    stage: str,
    main: QuantizedTensor,
    left: QuantizedTensor,
    right: QuantizedTensor,
) -> Branches:
    """The branches with a trace of their one error."""
    solved = Branches(main=main, left=left, right=right)
    error = problem.relative_error(solved.reconstruct())
    entry = TraceEntry(stage=stage, iteration=0, weight_error=error)
    return Branches(main=main, left=left, right=right, trace=[entry])
