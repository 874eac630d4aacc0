"""Which numbers of an accelerator's file a cost depends on.

Every number is changed by the same fraction, one at a time, and the cost is estimated again:

    elasticity = (change of the cost, relative) / (change of the number, relative)

-1 for a clock that everything waits for, 0 for a number that does not matter here. Whole numbers
move by at least one; a change that breaks a rule of the file is left out.
"""

from collections.abc import Callable
from typing import Any

from hwmodels.cost import Cost, estimate_cost
from hwmodels.description import Accelerator
from hwmodels.errors import AcceleratorError
from hwmodels.overrides import keys_of, with_overrides
from hwmodels.workload import GemmWorkload

__all__ = ["sensitivity"]

_METRICS = ("latency_s", "energy_j", "dram_bytes")


def sensitivity(
    work: GemmWorkload,
    hw: Accelerator,
    *,
    step: float = 0.1,
    cost_of: Callable[[GemmWorkload, Accelerator], Cost] = estimate_cost,
) -> list[dict[str, Any]]:
    """Rows of key, value, elasticities of latency, energy and DRAM bytes, and `latency_range`.

    `latency_range` is what the block's own `uncertainty_percent` means for the latency, as a
    fraction; None where the block states none. Rows without any effect are left out; the largest
    effect on latency comes first.
    """
    content = hw.model_dump()
    base = cost_of(work, hw)
    rows = []
    for key, steps in keys_of(hw).items():
        block: Any = content
        for part in steps[:-1]:
            block = block[part]
        value = block[steps[-1]]
        if isinstance(value, bool) or not isinstance(value, int | float) or value == 0:
            continue
        moved = (
            value + max(1, round(value * step)) if isinstance(value, int) else value * (1 + step)
        )
        try:
            changed = cost_of(work, with_overrides(hw, {key: moved}))
        except AcceleratorError:
            continue
        relative = moved / value - 1
        row = {
            name: (getattr(changed, name) / getattr(base, name) - 1) / relative for name in _METRICS
        }
        # Sums in another order differ in the last bits.
        if all(abs(effect) < 1e-9 for effect in row.values()):
            continue
        percent = block.get("uncertainty_percent")
        spread = None if percent is None else abs(row["latency_s"]) * percent / 100
        names = {f"{name.rpartition('_')[0]}_elasticity": row[name] for name in _METRICS}
        rows.append({"key": key, "value": value} | names | {"latency_range": spread})
    return sorted(rows, key=lambda row: -abs(row["latency_elasticity"]))
