"""Time shift-round-saturate on its own: int32 accumulators to int8, every rounding mode."""

from typing import Any

import numpy as np

from loraq_sim.cli.bench_emulator import BENCH_COLUMNS, timed_medians
from loraq_sim.emulator.requantize import srs
from loraq_sim.formats import Rounding

__all__ = ["srs_rows"]

_MUST = 2.5
# Accumulators of a tile that is still in the second cache, and a shift that rounds.
_ELEMENTS = 2**17
_SHIFT = 10
_CALLS = 8


def srs_rows(repeats: int) -> list[dict[str, Any]]:
    """Return a row for each rounding mode; `ratio` is 10**9 elements per second."""
    rng = np.random.default_rng(0)
    acc = rng.integers(-(2**18), 2**18, (256, _ELEMENTS // 256)).astype(np.int32)

    def call(mode: str):
        def run() -> None:
            for _ in range(_CALLS):
                srs(acc, _SHIFT, rounding=mode)

        return run

    modes = [mode.value for mode in Rounding]
    seconds = timed_medians([call(mode) for mode in modes], repeats)
    rows = []
    for mode, taken in zip(modes, seconds, strict=True):
        rate = 1e-9 * _CALLS * acc.size / taken
        verdict = "missed" if rate < _MUST else "must"
        rows.append(
            dict.fromkeys(BENCH_COLUMNS)
            | {
                "shape": "x".join(map(str, acc.shape)),
                "what": f"srs int32 to int8, {mode}: 10^9 elements/s",
                "ratio": rate,
                "must": _MUST,
                "verdict": verdict,
                "ms": 1e3 * taken / _CALLS,
            }
        )
    return rows
