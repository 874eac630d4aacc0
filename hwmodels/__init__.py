"""Accelerator descriptions and cost models: shapes and bits in, latency, energy and bytes out.

Nothing here knows array values, and nothing here imports `loraq_sim`. Exports load when first
used, so `import hwmodels` costs almost nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # What an editor and a type checker see; _HOMES is the same.
    from hwmodels.cost import (
        ArrayCost,
        Cost,
        array_of,
        chip_area,
        estimate_cost,
        machine_with_array,
    )
    from hwmodels.description import Accelerator
    from hwmodels.errors import AcceleratorError
    from hwmodels.fitting import (
        FamilyFit,
        cross_validate,
        family_text,
        fit_family,
        fitted_family,
    )
    from hwmodels.foreign import ForeignMachine, read_foreign
    from hwmodels.inventory import list_models, load_model, product_cost
    from hwmodels.loader import implausible, list_accelerators, load_accelerator
    from hwmodels.measured import MEASURED_CSV, measured_rows
    from hwmodels.modes import check_transforms, describe_modes, lacking_modes, unreachable_modes
    from hwmodels.operands import tensor_bytes
    from hwmodels.overrides import (
        assumed_keys,
        describe,
        idle_keys,
        overview,
        parse_value,
        with_overrides,
    )
    from hwmodels.schedule import schedule_step
    from hwmodels.sketching import shipped_text, sketch, sketch_text
    from hwmodels.synthesis import (
        ProcessNode,
        SynthesizedArray,
        load_node,
        node_names,
        synthesized_array,
    )
    from hwmodels.validation import (
        branch_overheads,
        resting,
        resting_text,
        rests_on,
        sensitivity,
        summarize,
        validate,
        validate_attention,
        validate_elementwise,
    )
    from hwmodels.workload import GemmWorkload, activation_bytes

__all__ = [
    "Accelerator",
    "AcceleratorError",
    "ArrayCost",
    "Cost",
    "FamilyFit",
    "ForeignMachine",
    "GemmWorkload",
    "MEASURED_CSV",
    "ProcessNode",
    "SynthesizedArray",
    "activation_bytes",
    "array_of",
    "assumed_keys",
    "branch_overheads",
    "check_transforms",
    "chip_area",
    "cross_validate",
    "describe",
    "describe_modes",
    "estimate_cost",
    "family_text",
    "fit_family",
    "fitted_family",
    "idle_keys",
    "implausible",
    "lacking_modes",
    "list_accelerators",
    "list_models",
    "load_accelerator",
    "load_model",
    "load_node",
    "machine_with_array",
    "measured_rows",
    "node_names",
    "overview",
    "parse_value",
    "product_cost",
    "read_foreign",
    "resting",
    "resting_text",
    "rests_on",
    "schedule_step",
    "sensitivity",
    "shipped_text",
    "sketch",
    "sketch_text",
    "summarize",
    "synthesized_array",
    "tensor_bytes",
    "unreachable_modes",
    "validate",
    "validate_attention",
    "validate_elementwise",
    "with_overrides",
]

_HOMES = {
    "Accelerator": "description",
    "AcceleratorError": "errors",
    "ArrayCost": "cost",
    "Cost": "cost",
    "FamilyFit": "fitting",
    "ForeignMachine": "foreign",
    "GemmWorkload": "workload",
    "MEASURED_CSV": "measured",
    "ProcessNode": "synthesis",
    "SynthesizedArray": "synthesis",
    "activation_bytes": "workload",
    "array_of": "cost",
    "assumed_keys": "overrides",
    "branch_overheads": "validation",
    "check_transforms": "modes",
    "chip_area": "cost",
    "cross_validate": "fitting",
    "describe": "overrides",
    "describe_modes": "modes",
    "lacking_modes": "modes",
    "estimate_cost": "cost",
    "family_text": "fitting",
    "fit_family": "fitting",
    "fitted_family": "fitting",
    "idle_keys": "overrides",
    "implausible": "loader",
    "list_accelerators": "loader",
    "list_models": "inventory",
    "load_accelerator": "loader",
    "load_model": "inventory",
    "load_node": "synthesis",
    "machine_with_array": "cost",
    "measured_rows": "measured",
    "node_names": "synthesis",
    "overview": "overrides",
    "parse_value": "overrides",
    "product_cost": "inventory",
    "read_foreign": "foreign",
    "resting": "validation",
    "resting_text": "validation",
    "rests_on": "validation",
    "schedule_step": "schedule",
    "sensitivity": "validation",
    "shipped_text": "sketching",
    "sketch": "sketching",
    "sketch_text": "sketching",
    "summarize": "validation",
    "synthesized_array": "synthesis",
    "tensor_bytes": "operands",
    "unreachable_modes": "modes",
    "validate": "validation",
    "validate_attention": "validation",
    "validate_elementwise": "validation",
    "with_overrides": "overrides",
}


# Hidden from type checkers, for which a misspelled name would else be anything.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'hwmodels' has no attribute {name!r}")
        value = getattr(import_module(f"hwmodels.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__
