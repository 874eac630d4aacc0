"""The evaluation that `sweep_scaling` sweeps with: the product's own, its stages timed.

Times go to a file per worker process, so that the store holds what a user's would.
"""

import json
import os
import resource
import time
from pathlib import Path

import hwmodels
from loraq_sim import evaluate as stages
from loraq_sim.sweeps.worker import evaluate_case

__all__ = ["evaluate"]

_SECONDS: dict[str, float] = {}


def _timed(stage: str, function):
    def call(*args, **options):
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            _SECONDS[stage] = _SECONDS.get(stage, 0.0) + time.perf_counter() - started

    return call


# Where `loraq_sim.evaluate` looks its stages up.
stages.solve_split = _timed("solve", stages.solve_split)
stages.run_layer = _timed("emulate", stages.run_layer)
stages._layer_reference = _timed("reference", stages._layer_reference)
stages.output_error = _timed("compare", stages.output_error)
hwmodels.estimate_cost = _timed("cost", hwmodels.estimate_cost)


def evaluate(layer, case):
    """Evaluate one case and note where its time went, in seconds, and the worker's peak memory."""
    _SECONDS.update(dict.fromkeys(("solve", "emulate", "reference", "compare", "cost"), 0.0))
    started = time.perf_counter()
    row = evaluate_case(layer, case)
    facts = {
        "layer": layer.name, "work": layer.n * layer.k, "case": time.perf_counter() - started,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **_SECONDS,
    }  # fmt: skip
    path = Path(os.environ["SWEEP_SCALING_TIMES"]) / f"times-{os.getpid()}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    return row
