"""A whole model's denoising step as rows: one per kind of layer, then the total."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from loraq_sim.cli.failures import case_failure
from loraq_sim.split import PrecisionSplit, parse_split

if TYPE_CHECKING:
    from hwmodels import Accelerator, Cost, GemmWorkload
    from hwmodels.inventory import InventoryEntry

__all__ = ["MODEL_COLUMNS", "CostOf", "model_rows"]

MODEL_COLUMNS = (
    *("model", "accelerator", "split", "kind", "precision", "calls", "macs", "weight_bytes"),
    *("latency_s", "share", "energy_j", "dram_bytes", "bound", "peak_activation_bytes"),
    *("batch", "guidance"),
)
_SUMS = ("calls", "macs", "weight_bytes", "latency_s", "energy_j", "dram_bytes")
CostOf = Callable[
    [tuple[int, int, int], PrecisionSplit, "Accelerator", str], "tuple[GemmWorkload, Cost]"
]


def model_rows(
    model: str,
    resolution: int,
    split: PrecisionSplit,
    accelerator: "Accelerator",
    schedule: str,
    cost_of: CostOf,
    batch: int = 1,
    guidance: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of every kind of layer of one step, in order of the model, and their total.

    All calls of a step count; `batch` images and `guidance` passes (by default the model's) are in
    one call. `cost_of` costs one GEMM in a split. `share` is the part of the step's latency, and
    the peak of activations is the largest of one call.
    """
    import hwmodels

    inventory = hwmodels.load_model(model, resolution)
    passes = guidance or inventory.guidance_batch
    scale = Fraction(batch * passes, inventory.guidance_batch)
    entries = [entry.scaled(scale) for entry in inventory.entries]
    where = {"batch": batch, "guidance": passes}
    where |= {"model": model, "resolution": resolution, "split": split.text}
    where |= {"accelerator": accelerator.name, "schedule": schedule}
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        try:
            costed = _entry_row(entry, split, accelerator, schedule, cost_of)
        except Exception as error:
            message = f"{model}, {entry.kind}: {case_failure(error)}"
            return [where | {"kind": entry.kind, "status": "failed", "message": message}]
        by_kind.setdefault((entry.kind, costed["precision"]), []).append(costed)
    rows = [_summed(parts) for parts in by_kind.values()]
    total = _summed(rows) | {"kind": "total", "precision": "all"}
    rows.append(total)
    for row in rows:
        row["share"] = row["latency_s"] / total["latency_s"]
    return [where | row | {"status": "ok", "message": ""} for row in rows]


def _entry_row(
    entry: "InventoryEntry",
    split: PrecisionSplit,
    accelerator: "Accelerator",
    schedule: str,
    cost_of: CostOf,
) -> dict[str, Any]:
    import hwmodels

    precision = entry.precision
    if entry.op == "gemm":
        used = split
        if precision != "split":
            used = parse_split(precision, family="int", group=split.group)
        precision = used.text
        _, cost = cost_of((entry.m, entry.k, entry.n), used, accelerator, schedule)
    else:
        cost = hwmodels.product_cost(entry, accelerator)
    each = {name: getattr(cost, name) for name in _SUMS[2:]}
    peak = {"peak_activation_bytes": cost.peak_activation_bytes}
    row = peak | {name: value * entry.calls for name, value in each.items()}
    row |= {"kind": entry.kind, "precision": precision, "calls": entry.calls, "macs": entry.macs}
    return row | {"bound": cost.bound}


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of rows; the bound is what paces most of their time."""
    row = {name: parts[0][name] for name in ("kind", "precision")}
    row |= {name: sum(part[name] for part in parts) for name in _SUMS}
    row["peak_activation_bytes"] = max(part["peak_activation_bytes"] for part in parts)
    paced: Counter[str] = Counter()
    for part in parts:
        paced[part["bound"]] += part["latency_s"]
    return row | {"bound": paced.most_common(1)[0][0]}
