"""loraq-sim: error against cost of 4-bit + low-rank diffusion transformers on real accelerators.

    import loraq_sim as lq

    dump = lq.read_layer_dump("examples/tiny_pixart.pt")
    row = lq.evaluate_layer(dump["transformer_blocks.0.attn1.to_q"], "W4A4+W8A8r16", "aie2")

The names here are the front door; everything else is documented and imported under its module.
Each name is loaded when first used, so that importing the package costs nothing.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from loraq_sim.version import __version__

if TYPE_CHECKING:  # What an editor and a type checker see; _HOMES is the same.
    from loraq_sim.allocation import allocate
    from loraq_sim.diffusion.emulated_model import emulate_model
    from loraq_sim.dumps import read_layer_dump, write_layer_dump
    from loraq_sim.emulator.datapath import Datapath
    from loraq_sim.emulator.gemm import (
        emulate_gemm,
        emulate_gemm_report,
        emulate_gemm_requantize,
    )
    from loraq_sim.emulator.mac_array import MacArray
    from loraq_sim.emulator.requantize import srs
    from loraq_sim.emulator.runtimes import runtime_requantizer
    from loraq_sim.emulator.walk import run_layer
    from loraq_sim.errors import InputError, LoraqError
    from loraq_sim.evaluate import evaluate_layer
    from loraq_sim.explain import explain_case
    from loraq_sim.formats import Format, parse_format
    from loraq_sim.layers import Layer
    from loraq_sim.quantized_model import read_quantized_model, write_quantized_model
    from loraq_sim.quantizers import QuantizedTensor, quantize
    from loraq_sim.results.front import pareto_front
    from loraq_sim.results.store import ResultStore
    from loraq_sim.results.verdict import verdict_of
    from loraq_sim.solvers import Solution, solve
    from loraq_sim.split import PrecisionSplit, parse_split
    from loraq_sim.study import Study, open_study, sweep

__all__ = [
    "Datapath",
    "Format",
    "InputError",
    "Layer",
    "LoraqError",
    "MacArray",
    "PrecisionSplit",
    "QuantizedTensor",
    "ResultStore",
    "Solution",
    "Study",
    "__version__",
    "allocate",
    "emulate_gemm",
    "emulate_gemm_report",
    "emulate_gemm_requantize",
    "emulate_model",
    "evaluate_layer",
    "explain_case",
    "open_study",
    "pareto_front",
    "parse_format",
    "parse_split",
    "quantize",
    "read_layer_dump",
    "read_quantized_model",
    "run_layer",
    "runtime_requantizer",
    "solve",
    "srs",
    "sweep",
    "verdict_of",
    "write_layer_dump",
    "write_quantized_model",
]

_FRONT_DOOR = {
    "loraq_sim.allocation": ("allocate",),
    "loraq_sim.diffusion.emulated_model": ("emulate_model",),
    "loraq_sim.dumps": ("read_layer_dump", "write_layer_dump"),
    "loraq_sim.emulator.datapath": ("Datapath",),
    "loraq_sim.emulator.walk": ("run_layer",),
    "loraq_sim.emulator.gemm": (
        "emulate_gemm",
        "emulate_gemm_report",
        "emulate_gemm_requantize",
    ),
    "loraq_sim.emulator.mac_array": ("MacArray",),
    "loraq_sim.emulator.requantize": ("srs",),
    "loraq_sim.emulator.runtimes": ("runtime_requantizer",),
    "loraq_sim.errors": ("InputError", "LoraqError"),
    "loraq_sim.evaluate": ("evaluate_layer",),
    "loraq_sim.explain": ("explain_case",),
    "loraq_sim.formats": ("Format", "parse_format"),
    "loraq_sim.layers": ("Layer",),
    "loraq_sim.quantized_model": ("read_quantized_model", "write_quantized_model"),
    "loraq_sim.quantizers": ("QuantizedTensor", "quantize"),
    "loraq_sim.results.front": ("pareto_front",),
    "loraq_sim.results.store": ("ResultStore",),
    "loraq_sim.results.verdict": ("verdict_of",),
    "loraq_sim.solvers": ("Solution", "solve"),
    "loraq_sim.split": ("PrecisionSplit", "parse_split"),
    "loraq_sim.study": ("Study", "open_study", "sweep"),
}
# Names that earlier versions had here: they still load, with a warning that says where they live.
_MOVED = {
    "loraq_sim.allocation": ("Allocation", "allocate_each"),
    "loraq_sim.dumps.steps": ("step_statistics", "steps_of_layer"),
    "loraq_sim.emulator.gemm": ("emulate_gemm_srs",),
    "loraq_sim.emulator.mac_array": ("TwoLevelArray",),
    "loraq_sim.emulator.packed_weight": ("pack_weight",),
    "loraq_sim.emulator.presets": ("array_preset", "list_array_presets"),
    "loraq_sim.emulator.requantize": (
        "float_requantize",
        "gemmlowp_requantize",
        "quantize_multiplier",
        "single_rounding_requantize",
        "srs_report",
        "ups",
    ),
    "loraq_sim.emulator.two_level": ("emulate_two_level", "emulate_two_level_report"),
    "loraq_sim.errors": ("DumpError", "StoreError"),
    "loraq_sim.metrics": ("output_error",),
    "loraq_sim.recipe": ("Recipe", "read_recipe", "write_recipe"),
    "loraq_sim.results.front": ("best_under", "hypervolume", "knee_point"),
    "loraq_sim.results.totals": ("model_totals",),
    "loraq_sim.solvers": ("solve_group",),
    "loraq_sim.time_steps": ("evaluate_steps", "step_report"),
}
_HOMES = {name: home for home, names in _FRONT_DOOR.items() for name in names}
_FORMER = {name: home for home, names in _MOVED.items() for name in names}


# Hidden from type checkers, for which a misspelled name would else be anything.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        home = _HOMES.get(name) or _FORMER.get(name)
        if home is None:
            raise AttributeError(f"module 'loraq_sim' has no attribute {name!r}")
        if name in _FORMER:
            message = f"loraq_sim.{name} has moved: from {home} import {name}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
        value = getattr(importlib.import_module(home), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
