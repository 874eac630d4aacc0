"""Which layers of a model are emulated, in which split, with which solution."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraq_sim.diffusion.emulated_layer import module_bias, module_weight
from loraq_sim.dumps.capture_hooks import find_linear_layers
from loraq_sim.dumps.capture_kinds import kinds_of
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.evaluate import solve_split
from loraq_sim.layer_settings import SIXTEEN_BIT_KINDS, skipped
from loraq_sim.layers import Layer
from loraq_sim.quantized_model import QuantizedModel
from loraq_sim.recipe import Recipe, split_of
from loraq_sim.solvers import Solution
from loraq_sim.split import PrecisionSplit, parse_split

if TYPE_CHECKING:
    import torch

__all__ = ["LayerPlan", "LayerSource", "plan_layers"]

LayerSource = str | PrecisionSplit | Recipe | QuantizedModel | Mapping[str, Any]
"""What names the split or the solution of every layer; see `plan_layers`."""

_SOLVER_SETTINGS = ("method", "preset", "seed", "smooth", "rotate")


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer to emulate."""

    name: str
    kind: str
    module: "torch.nn.Module"
    split: PrecisionSplit
    solution: Solution


def plan_layers(
    model: "torch.nn.Module",
    source: LayerSource,
    *,
    splits: "str | PrecisionSplit | Mapping[str, str] | None" = None,
    calibration: Mapping[str, Layer] | None = None,
    skip: Iterable[str] | None = None,
    method: str = "loraq",
    preset: str = "balanced",
    family: str = "int",
    group: int = 64,
    smooth: float | None = None,
    rotate: str | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] | None = None,
) -> list[LayerPlan]:
    """Choose and solve the layers of a model.

    Parameters
    ----------
    model : torch module
        Its Linear layers and 1x1 convolutions are what can be chosen.
    source : str, PrecisionSplit, Recipe, QuantizedModel or mapping
        One split for every layer; a recipe; solved layers as `read_quantized_model` gives them; or
        a mapping of layer names to splits or to solutions.
    splits : str, PrecisionSplit or mapping of name to str, optional
        What solutions run in (they hold no format of the activations). A quantized model that
        ``loraq-sim solve --save`` wrote brings its own.
    calibration : mapping of name to Layer, optional
        Input rows for smoothing and for methods that use data, such as a captured dump.
    skip : iterable of str, optional
        Names, kinds or patterns left at 16 bits. Default: the kinds SVDQuant leaves where `source`
        is one split, else nothing.
    method, preset, family, group, smooth, rotate, seed
        As for `loraq_sim.evaluate_layer`, where `source` leaves them open.
    on_layer : callable, optional
        Called with each layer's name once it is solved.

    Raises
    ------
    InputError
        If a name or setting is unknown, or no layer is left.
    """
    modules = find_linear_layers(model)
    kinds = kinds_of(modules)
    options = {"method": method, "preset": preset, "family": family, "group": group, "seed": seed}
    options |= {"smooth": smooth, "rotate": rotate}
    if skip is None:
        skip = SIXTEEN_BIT_KINDS if isinstance(source, str | PrecisionSplit) else ()
    skip = tuple(skip)
    chosen = _choices(source, kinds, options, splits)
    plans = []
    for name, (split, found) in chosen.items():
        if skipped(name, kinds[name], skip):
            continue
        solution = found
        if not isinstance(solution, Solution):
            layer = _layer(name, kinds[name], modules[name], calibration)
            solution = solve_split(layer, split, **found)
        _check_fit(name, solution, split, module_weight(modules[name]).shape)
        plan = LayerPlan(
            name=name, kind=kinds[name], module=modules[name], split=split, solution=solution
        )
        plans.append(plan)
        if on_layer is not None:
            on_layer(name)
    if not plans:
        raise InputError(
            f"no layer of the {type(model).__name__} is left to emulate: {len(modules)} linear "
            f"layers, {len(chosen)} of them named, the rest at 16 bits; see skip"
        )
    return plans


def _choices(
    source: LayerSource,
    kinds: Mapping[str, str],
    options: Mapping[str, Any],
    splits: "str | PrecisionSplit | Mapping[str, str] | None",
) -> dict[str, tuple[PrecisionSplit, "Solution | dict[str, Any]"]]:
    """Split of each named layer, with its solution or the settings to solve it with."""
    if isinstance(source, str | PrecisionSplit):
        return {name: _unsolved({"split": source}, options) for name in kinds}
    if isinstance(source, Recipe):
        settings = {name: source.settings(name, kind) for name, kind in kinds.items()}
        return {name: _unsolved(s, options) for name, s in settings.items() if s is not None}
    if splits is None and isinstance(source, QuantizedModel):
        splits = source.meta.get("splits")
    choices = {}
    for name in source:
        if name not in kinds:
            raise InputError(unknown_name("layer of the model", name, tuple(kinds)))
        found = source[name]
        if isinstance(found, Solution):
            choices[name] = _split_for(name, splits, options), found
        else:
            choices[name] = _unsolved({"split": found}, options)
    return choices


def _unsolved(
    settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[PrecisionSplit, dict[str, Any]]:
    merged = {**options, **settings}
    return split_of(merged), {key: merged[key] for key in _SOLVER_SETTINGS}


def _split_for(
    name: str,
    splits: "str | PrecisionSplit | Mapping[str, str] | None",
    options: Mapping[str, Any],
) -> PrecisionSplit:
    found = splits.get(name) if isinstance(splits, Mapping) else splits
    if found is None:
        raise InputError(
            f"layer {name!r}: a solution does not say how activations are rounded; give splits, "
            "such as splits='W4A4+W8A8r16'"
        )
    return parse_split(found, family=options["family"], group=options["group"])


def _layer(
    name: str,
    kind: str,
    module: "torch.nn.Module",
    calibration: Mapping[str, Layer] | None,
) -> Layer:
    rows = None
    if calibration is not None and name in calibration:
        rows = calibration[name].activations
    return Layer(
        name=name,
        kind=kind,
        weight=module_weight(module),
        bias=module_bias(module),
        activations=rows,
    )


def _check_fit(
    name: str, solution: Solution, split: PrecisionSplit, shape: tuple[int, int]
) -> None:
    if solution.main.shape != shape:
        raise InputError(
            f"layer {name!r}: the solution is of shape {solution.main.shape}, the weight {shape}"
        )
    if solution.main.format != split.main_weight:
        raise InputError(
            f"layer {name!r}: the solution's main branch is {solution.main.format}, "
            f"split {split} asks for {split.main_weight}"
        )
    if solution.rank and not split.has_branch:
        raise InputError(f"layer {name!r}: the solution has a branch, split {split} has none")
    if solution.rank and solution.right.format != split.branch_weight:
        raise InputError(
            f"layer {name!r}: the solution's branch is {solution.right.format}, "
            f"split {split} asks for {split.branch_weight}"
        )
