"""How far the cost model may be off on an accelerator, from the measured table it is checked on.

The error of a measured GEMM is predicted / measured - 1. With w the worst absolute one of a device,
the true latency is taken to lie between predicted / (1 + w) and predicted / (1 - w). A device with
fewer than `FEWEST_ROWS` measured GEMMs gets the worst of all devices: few rows say little. What the
model gets wrong for all splits alike cancels between them, so that differences of splits may be
known better than the bounds suggest.
Energies have no measured table, so they have no bounds.
"""

import functools
from collections.abc import Sequence
from typing import Any

import hwmodels

__all__ = ["FEWEST_ROWS", "latency_accuracy", "with_latency_bounds"]

FEWEST_ROWS = 3


@functools.lru_cache(maxsize=64)
def latency_accuracy(accelerator: str) -> tuple[float, str]:
    """Worst relative error of the latency model, and what it was seen on.

    An accelerator that is not shipped has the worst error of all that are.
    """
    summaries = _summaries()
    own = summaries.get(accelerator)
    if own is not None and own["rows"] >= FEWEST_ROWS:
        return own["worst_error"], f"worst of {own['rows']} GEMMs measured on {accelerator}"
    rows = sum(summary["rows"] for summary in summaries.values())
    worst = max(summary["worst_error"] for summary in summaries.values())
    seen = own["rows"] if own is not None else 0
    return worst, f"worst of {rows} GEMMs of {len(summaries)} devices, {seen} of them {accelerator}"


@functools.lru_cache(maxsize=1)
def _summaries() -> dict[str, dict[str, Any]]:
    table = hwmodels.measured_rows()
    found: dict[str, dict[str, Any]] = {}
    for name in hwmodels.list_accelerators():
        results = hwmodels.validate(hwmodels.load_accelerator(name), table)
        if results:
            errors = [abs(row["error"]) for row in results]
            found[name] = {"rows": len(errors), "worst_error": max(errors)}
    return found


def with_latency_bounds(
    rows: Sequence[dict[str, Any]], *, by: Sequence[str] = ("accelerator",)
) -> list[dict[str, Any]]:
    """Copies of `rows` with ``latency_lo_s``, ``latency_hi_s`` and ``within_uncertainty``.

    The last counts the other rows with the same values in `by` whose latency differs by no more
    than the model's error: the verdict takes them as equal. None where the latency is not known.
    """
    bounded = [dict(row) | _bounds(row) for row in rows]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in bounded:
        if row["latency_lo_s"] is not None:
            groups.setdefault(tuple(row.get(name) for name in by), []).append(row)
    for members in groups.values():
        for row in members:
            far = 1 + latency_accuracy(row["accelerator"])[0]
            latency = row["latency_s"]
            alike = [
                max(latency, other["latency_s"]) <= far * min(latency, other["latency_s"])
                for other in members
            ]
            row["within_uncertainty"] = sum(alike) - 1
    return bounded


def _bounds(row: dict[str, Any]) -> dict[str, Any]:
    latency = row.get("latency_s")
    if latency is None or not row.get("accelerator"):
        return dict.fromkeys(("latency_lo_s", "latency_hi_s", "within_uncertainty"))
    worst, _ = latency_accuracy(row["accelerator"])
    return {"latency_lo_s": latency / (1 + worst), "latency_hi_s": latency / max(1 - worst, 1e-9)}
