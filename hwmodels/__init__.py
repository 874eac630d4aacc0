"""Accelerator descriptions and cost models: shapes and bits in, latency, energy and bytes out.

Nothing here knows array values, and nothing here imports `loraq_sim`. Exports load when first
used, so `import hwmodels` costs almost nothing.
"""

from importlib import import_module
from typing import Any

_EXPORTS = {
    "MEASURED_CSV": "validation",
    "Accelerator": "description",
    "AcceleratorError": "errors",
    "Cost": "cost",
    "GemmWorkload": "workload",
    "activation_bytes": "workload",
    "branch_overheads": "validation",
    "describe": "overrides",
    "describe_modes": "modes",
    "estimate_cost": "cost",
    "idle_keys": "overrides",
    "list_accelerators": "loader",
    "list_models": "inventory",
    "load_accelerator": "loader",
    "load_model": "inventory",
    "measured_rows": "validation",
    "parse_value": "overrides",
    "product_cost": "inventory",
    "sensitivity": "validation",
    "summarize": "validation",
    "tensor_bytes": "workload",
    "unreachable_modes": "modes",
    "validate": "validation",
    "with_overrides": "overrides",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'hwmodels' has no attribute {name!r}")
    value = getattr(import_module(f"hwmodels.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
