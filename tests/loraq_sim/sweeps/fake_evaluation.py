"""Stands in for the real evaluation: a layer's `kind` says what happens, `group` a marker file."""

import os
import signal
import time
from pathlib import Path

from loraq_sim.errors import InputError


def evaluate(layer, case):
    marker = Path(layer.group) if layer.group else None
    settings = case.settings
    split = settings.split.text
    second = split == "W4A8"
    if layer.kind == "steady":
        time.sleep(0.03)
    if layer.kind == "slow":
        time.sleep(3600)
    if layer.kind == "kills_always" and second:
        os.kill(os.getpid(), signal.SIGKILL)
    if layer.kind == "kills_once" and second and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if layer.kind == "exits" and second:
        os._exit(7)
    if layer.kind == "crashes" and second:
        return {"output_error": 1 / 0}
    if layer.kind == "refuses" and second:
        raise InputError("rank 99 is too large\nfor this layer")
    return {
        **{"layer": layer.name, "kind": layer.kind, "split": split, "method": settings.method},
        **{"m": layer.m, "n": layer.n, "k": layer.k, "tokens": 2, "calls_per_step": 1},
        **{
            "preset": settings.preset,
            "accelerator": case.labels["accelerator"],
            "seed": settings.seed,
            "rank": 0,
        },
        **{"output_error": 1 / len(split), "latency_s": float(len(split))},
        **{"status": "ok", "message": "", "seconds": 0.01, "pid": os.getpid()},
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def evaluate_by_rounding(layer, case):
    """As `evaluate`, whatever method and preset were asked for."""
    return evaluate(layer, case) | {"method": "rtn", "preset": None}
