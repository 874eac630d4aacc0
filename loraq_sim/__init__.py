"""loraq-sim: error against cost of 4-bit + low-rank diffusion transformers on real accelerators.

    import loraq_sim as lq

    dump = lq.read_layer_dump("examples/tiny_pixart.pt")
    row = lq.evaluate_layer(dump["transformer_blocks.0.attn1.to_q"], "W4A4+W8A8r16", "aie2")

Every public name is loaded when first used, so that importing the package costs nothing.
"""

import importlib
from typing import Any

from loraq_sim.version import __version__

_HOMES = {
    "Allocation": "loraq_sim.allocation",
    "Datapath": "loraq_sim.emulator.datapath",
    "DumpError": "loraq_sim.errors",
    "Format": "loraq_sim.formats",
    "InputError": "loraq_sim.errors",
    "Layer": "loraq_sim.layers",
    "LoraqError": "loraq_sim.errors",
    "MacArray": "loraq_sim.emulator.mac_array",
    "PrecisionSplit": "loraq_sim.split",
    "QuantizedTensor": "loraq_sim.quantizers",
    "Recipe": "loraq_sim.recipe",
    "ResultStore": "loraq_sim.results.store",
    "Solution": "loraq_sim.solvers",
    "Study": "loraq_sim.study",
    "StoreError": "loraq_sim.errors",
    "TwoLevelArray": "loraq_sim.emulator.mac_array",
    "best_under": "loraq_sim.results.front",
    "emulate_two_level": "loraq_sim.emulator.two_level",
    "emulate_two_level_report": "loraq_sim.emulator.two_level",
    "allocate": "loraq_sim.allocation",
    "allocate_each": "loraq_sim.allocation",
    "array_preset": "loraq_sim.emulator.presets",
    "float_requantize": "loraq_sim.emulator.requantize",
    "gemmlowp_requantize": "loraq_sim.emulator.requantize",
    "explain_case": "loraq_sim.explain",
    "hypervolume": "loraq_sim.results.front",
    "knee_point": "loraq_sim.results.front",
    "list_array_presets": "loraq_sim.emulator.presets",
    "pack_weight": "loraq_sim.emulator.packed_weight",
    "quantize_multiplier": "loraq_sim.emulator.requantize",
    "single_rounding_requantize": "loraq_sim.emulator.requantize",
    "srs_report": "loraq_sim.emulator.requantize",
    "ups": "loraq_sim.emulator.requantize",
    "emulate_gemm": "loraq_sim.emulator.gemm",
    "emulate_model": "loraq_sim.diffusion.emulated_model",
    "emulate_gemm_srs": "loraq_sim.emulator.gemm",
    "emulate_gemm_report": "loraq_sim.emulator.gemm",
    "evaluate_layer": "loraq_sim.evaluate",
    "evaluate_steps": "loraq_sim.time_steps",
    "model_totals": "loraq_sim.results.totals",
    "output_error": "loraq_sim.metrics",
    "pareto_front": "loraq_sim.results.front",
    "open_study": "loraq_sim.study",
    "parse_format": "loraq_sim.formats",
    "parse_split": "loraq_sim.split",
    "quantize": "loraq_sim.quantizers",
    "read_quantized_model": "loraq_sim.quantized_model",
    "read_recipe": "loraq_sim.recipe",
    "write_quantized_model": "loraq_sim.quantized_model",
    "write_recipe": "loraq_sim.recipe",
    "read_layer_dump": "loraq_sim.dumps",
    "run_layer": "loraq_sim.emulator.datapath",
    "solve": "loraq_sim.solvers",
    "solve_group": "loraq_sim.solvers",
    "step_report": "loraq_sim.time_steps",
    "step_statistics": "loraq_sim.dumps.steps",
    "steps_of_layer": "loraq_sim.dumps.steps",
    "sweep": "loraq_sim.study",
    "srs": "loraq_sim.emulator.requantize",
    "verdict_of": "loraq_sim.results.verdict",
    "write_layer_dump": "loraq_sim.dumps",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loraq_sim' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
