"""A torch model whose linear layers run on an accelerator's emulated data path, for a while.

`plan_layers` says which layers are emulated, in which split and with which solution; an
`EmulatedLayer` takes the place of one Linear or 1x1 convolution; `EmulatedModel` puts them in and
takes them out again.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, cast

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.dumps.capture_hooks import find_linear_layers
from loraq_sim.dumps.kinds import kinds_of
from loraq_sim.emulator.datapath import Datapath, StoredLayer
from loraq_sim.emulator.float_overflow import Clipping
from loraq_sim.emulator.scaled_gemm import GemmStatistics
from loraq_sim.emulator.walk import run_layer
from loraq_sim.errors import InputError, counted, unknown_name
from loraq_sim.evaluate import solve_split
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for, excluded_on, transforms_of
from loraq_sim.quantized_model import QuantizedModel
from loraq_sim.recipe import Recipe, split_of
from loraq_sim.settings import SIXTEEN_BIT_KINDS, skipped
from loraq_sim.solvers import Solution
from loraq_sim.solvers.solution import check_inputs, transforms_in_words
from loraq_sim.split import PrecisionSplit, parse_split

if TYPE_CHECKING:
    import torch

__all__ = [
    "EmulatedLayer",
    "EmulatedModel",
    "LayerPlan",
    "LayerSource",
    "emulate_model",
    "plan_layers",
]

LayerSource = str | PrecisionSplit | Recipe | QuantizedModel | Mapping[str, Any]
"""What names the split or the solution of every layer; see `plan_layers`."""

_Choice = tuple[PrecisionSplit, Solution | dict[str, Any]]
_SOLVER_SETTINGS = ("method", "preset", "seed", "smooth", "rotate", "condition", "finish")


class EmulatedLayer:
    """What a layer's forward pass becomes: rows to the data path, its output back as a tensor.

    Called with the layer's input, (..., K) of a Linear or (B, K, ...) of a 1x1 convolution, on any
    device; the data path itself runs on the CPU. The output has the dtype of the input. Nothing is
    differentiable.

    Attributes
    ----------
    name : str
    stored, split, datapath
        As `loraq_sim.emulator.walk.run_layer` takes them.
    gemms : dict of str to GemmStatistics
        What the accumulators of ``main``, ``down`` and ``up`` saw in all calls so far.
    clipped_count : int
        Values that left their float format, in all calls so far.
    first_clipped : Clipping or None
        The first tensor with one.
    n_wild_calls : int
        Calls whose input held infinities or NaN, which run on as such.
    n_calls, n_rows : int
    """

    def __init__(
        self,
        name: str,
        module: "torch.nn.Module",
        stored: StoredLayer,
        split: PrecisionSplit,
        datapath: Datapath,
    ) -> None:
        self.name = name
        self.stored = stored
        self.split = split
        self.datapath = datapath
        self.gemms: dict[str, GemmStatistics] = {}
        self.n_calls = self.n_rows = self.clipped_count = self.n_wild_calls = 0
        self.first_clipped: Clipping | None = None
        self._bias = _module_bias(module)
        # Axes of an image behind the channels of a convolution.
        self._image_axes = len(getattr(module, "kernel_size", ()))

    def __call__(self, x: "torch.Tensor") -> "torch.Tensor":
        """Run the layer on one input tensor."""
        import torch

        channels_last = x.detach().movedim(-1 - self._image_axes, -1)
        rows = channels_last.reshape(-1, channels_last.shape[-1]).to("cpu", torch.float32)
        y = torch.from_numpy(self.run(rows.numpy())).to(x.device, x.dtype)
        return y.reshape(*channels_last.shape[:-1], -1).movedim(-1, -1 - self._image_axes)

    def run(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Output (M, N) of input rows (M, K), float32; counted in the statistics."""
        try:
            out = run_layer(rows, self.stored, self.split, self.datapath, bias=self._bias)
        except InputError as error:
            raise InputError(f"layer {self.name!r}, call {self.n_calls + 1}: {error}") from error
        for part, seen in out.gemms.items():
            known = self.gemms.get(part)
            self.gemms[part] = seen if known is None else known.joined(seen)
        self.clipped_count += out.clipped_count
        self.n_wild_calls += not np.isfinite(rows).all()
        if out.clipped and self.first_clipped is None:
            self.first_clipped = out.clipped[0]
        self.n_calls += 1
        self.n_rows += len(rows)
        return out.y


def _module_weight(module: "torch.nn.Module") -> NDArray[np.float32]:
    """Weight of a Linear or 1x1 convolution as a matrix (N, K)."""
    weight = _stored(cast("torch.Tensor", module.weight))
    return weight.reshape(len(weight), -1)


def _module_bias(module: "torch.nn.Module") -> NDArray[np.float32] | None:
    # torch types attributes of a module as tensors or modules; a layer without bias has None.
    bias = cast("torch.Tensor | None", module.bias)
    return None if bias is None else _stored(bias)


def _stored(tensor: "torch.Tensor") -> NDArray[np.float32]:
    import torch

    return tensor.detach().to("cpu", torch.float32).numpy()


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """One layer to emulate."""

    name: str
    kind: str
    module: "torch.nn.Module"
    split: PrecisionSplit
    solution: Solution


class PlanOptions(TypedDict, total=False):
    """Keywords of `plan_layers`, which says what they mean."""

    splits: "str | PrecisionSplit | Mapping[str, str] | None"
    calibration: Mapping[str, Layer] | None
    skip: Iterable[str] | None
    method: str
    preset: str
    family: str
    group: int
    smooth: float | None
    rotate: str | None
    condition: str | None
    finish: str | None
    seed: int
    on_layer: Callable[[str], None] | None


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
    condition: str | None = None,
    finish: str | None = None,
    seed: int = 0,
    on_layer: Callable[[str], None] | None = None,
    accelerator: "hwmodels.Accelerator | None" = None,
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
        Input rows for smoothing, for residual inputs and for methods that use data, such as a
        captured dump.
    skip : iterable of str, optional
        Names, kinds or patterns left at 16 bits. Default: the kinds SVDQuant leaves where `source`
        is one split, else nothing.
    method, preset, family, group, smooth, rotate, condition, finish, seed
        As for `loraq_sim.evaluate_layer`, where `source` leaves them open.
    on_layer : callable, optional
        Called with each layer's name once it is solved.
    accelerator : Accelerator, optional
        Conditions choose nothing that it lacks.

    Raises
    ------
    InputError
        If a name or setting is unknown, or no layer is left.
    """
    modules = find_linear_layers(model)
    kinds = kinds_of(modules)
    options = {"method": method, "preset": preset, "family": family, "group": group, "seed": seed}
    options |= {"smooth": smooth, "rotate": rotate, "condition": condition, "finish": finish}
    if skip is None:
        skip = SIXTEEN_BIT_KINDS if isinstance(source, str | PrecisionSplit) else ()
    skip = tuple(skip)
    chosen = _choices(source, kinds, options, splits)
    plans = []
    for name, (split, found) in chosen.items():
        if skipped(name, kinds[name], skip):
            continue
        if isinstance(found, Solution):
            solution = found
        else:
            layer = _layer(name, kinds[name], modules[name], calibration)
            excluded = () if accelerator is None else excluded_on(accelerator, split)
            solution = solve_split(layer, split, **found, excluded=excluded)
        _check_fit(name, solution, split, _module_weight(modules[name]).shape)
        run_as = _layer(name, kinds[name], modules[name], None)
        plan = LayerPlan(
            name=name,
            kind=kinds[name],
            module=modules[name],
            split=split.for_layer(run_as, solution),
            solution=solution,
        )
        plans.append(plan)
        if on_layer is not None:
            on_layer(name)
    if not plans:
        raise InputError(
            f"no layer of the {type(model).__name__} is left to emulate: "
            f"{counted(len(modules), 'linear layer')}, {len(chosen)} of them named, the rest "
            "at 16 bits; see skip"
        )
    return plans


def _choices(
    source: LayerSource,
    kinds: Mapping[str, str],
    options: Mapping[str, Any],
    splits: "str | PrecisionSplit | Mapping[str, str] | None",
) -> dict[str, _Choice]:
    """Split of each named layer, with its solution or the settings to solve it with."""
    if isinstance(source, str | PrecisionSplit):
        return {name: _unsolved({"split": source}, options) for name in kinds}
    if isinstance(source, Recipe):
        settings = {name: source.settings(name, kind) for name, kind in kinds.items()}
        return {name: _unsolved(s, options) for name, s in settings.items() if s is not None}
    if splits is None and isinstance(source, QuantizedModel):
        splits = source.meta.get("splits")
    choices: dict[str, _Choice] = {}
    for name in source:
        if name not in kinds:
            raise InputError(unknown_name("layer of the model", name, tuple(kinds)))
        found = source[name]
        if isinstance(found, Solution):
            choices[name] = _split_for(name, splits, options), found
        else:
            choices[name] = _unsolved({"split": found}, options)
    return choices


def _unsolved(settings: Mapping[str, Any], options: Mapping[str, Any]) -> _Choice:
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
        weight=_module_weight(module),
        bias=_module_bias(module),
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
    check_inputs(solution, split, name)
    branch = solution.right
    if branch is not None and not split.has_branch:
        raise InputError(f"layer {name!r}: the solution has a branch, split {split} has none")
    if branch is not None and branch.format != split.branch_weight:
        raise InputError(
            f"layer {name!r}: the solution's branch is {branch.format}, "
            f"split {split} asks for {split.branch_weight}"
        )


def emulate_model(
    model: "torch.nn.Module",
    solution_or_recipe: LayerSource,
    accelerator: "str | hwmodels.Accelerator",
    *,
    datapath: Mapping[str, Any] | None = None,
    **planning: Unpack[PlanOptions],
) -> "EmulatedModel":
    """Solve a model's linear layers; inside ``with``, run them on the emulated data path.

        with lq.emulate_model(transformer, "W4A4+W8A8@fp16r4", "aie2") as emulated:
            images = pipeline(prompt)
        emulated.statistics.overflow_count

    Activations are rounded per token and group, both branches go through the accelerator's MAC
    array, P is stored as the data path says, and the output in its format: exactly what
    `loraq_sim.run_layer` does with each layer's input. The model is changed inside ``with`` alone,
    in place, and is itself again afterwards, also after an exception. Same inputs, same bits.

    Parameters
    ----------
    model : torch module
        Linear layers and 1x1 convolutions are emulated, the rest runs as it is, where it is (also
        on a GPU).
    solution_or_recipe : str, PrecisionSplit, Recipe, QuantizedModel or mapping
        One split for all layers, a recipe (`read_recipe`), solved layers (`read_quantized_model`),
        or a mapping of layer names to splits or to solutions (`solve`).
    accelerator : str or Accelerator
        Name, path of a YAML file, or a loaded description.
    datapath : mapping, optional
        Overrides of the accelerator's data path, of the keys in `loraq_sim.settings.DATAPATH_KEYS`.
    **planning
        ``splits``, ``calibration``, ``skip``, ``method``, ``preset``, ``family``, ``group``,
        ``smooth``, ``rotate``, ``condition``, ``finish``, ``seed`` and ``on_layer`` as for
        `loraq_sim.diffusion.plan_layers`.

    Raises
    ------
    InputError
        If an argument breaks a rule.
    hwmodels.AcceleratorError
        If the accelerator is unknown, its file is broken, or it lacks a transform of a layer.
    """
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, datapath)
    plans = plan_layers(model, solution_or_recipe, accelerator=accelerator, **planning)
    for plan in plans:
        asked = transforms_of(plan.solution, plan.split, path)
        hwmodels.check_transforms(accelerator, asked, feedback_rank=plan.solution.feedback_rank)
    return EmulatedModel(model, plans, path)


class EmulatedModel:
    """A model with solved layers; emulated inside ``with``, which may be entered again.

    Attributes
    ----------
    model : torch module
    plans : tuple of LayerPlan
        The emulated layers with their splits and solutions.
    datapath : Datapath
    layers : dict of str to EmulatedLayer
        What each layer's accumulators saw, over all calls inside ``with``.
    """

    def __init__(
        self, model: "torch.nn.Module", plans: Sequence[LayerPlan], datapath: Datapath
    ) -> None:
        self.model = model
        self.plans, self.datapath = tuple(plans), datapath
        self.layers = {
            plan.name: EmulatedLayer(plan.name, plan.module, plan.solution, plan.split, datapath)
            for plan in self.plans
        }
        self._hidden: list[tuple[Any, Any]] = []

    def __repr__(self) -> str:
        return f"EmulatedModel({type(self.model).__name__}, {len(self.plans)} layers)"

    def __enter__(self) -> Self:
        taken = [p.name for p in self.plans if _is_emulated(p.module)]
        if taken:
            raise InputError(f"layer {taken[0]!r} is emulated already; leave that `with` first")
        for plan in self.plans:
            # An own attribute hides the class's method; libraries may have put one there before.
            self._hidden.append((plan.module, plan.module.__dict__.get("forward")))
            plan.module.forward = functools.partial(_forward, self.layers[plan.name])
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._hidden:
            module, before = self._hidden.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before

    @property
    def statistics(self) -> GemmStatistics:
        """What the accumulators of all layers saw in all calls."""
        seen = [gemm for layer in self.layers.values() for gemm in layer.gemms.values()]
        return functools.reduce(GemmStatistics.joined, seen) if seen else GemmStatistics()

    @property
    def clipped_count(self) -> int:
        """Values of all layers, in all calls, that left their float format."""
        return sum(layer.clipped_count for layer in self.layers.values())

    def clipped_note(self) -> str:
        """Which layers have such values, in one sentence; empty without any.

        Inputs that were not finite from the start are named where no layer made them so.
        """
        named = {
            name: found for name, layer in self.layers.items() if (found := layer.first_clipped)
        }
        if not named:
            wild = [name for name, layer in self.layers.items() if layer.n_wild_calls]
            return f"the input of {wild[0]} holds NaN or infinities from elsewhere" if wild else ""
        name, first = next(iter(named.items()))
        its = "its" if self.clipped_count == 1 else "their"
        return (
            f"{counted(self.clipped_count, 'value')} beyond {its} float format in {len(named)} of "
            f"{len(self.layers)} layers, such as {first.tensor} of {name} in {first.format}"
        )

    def transforms_note(self) -> str:
        """In how many layers inputs are rotated, smoothed or rounded to a chosen grid."""
        words = [w for plan in self.plans for w in transforms_in_words(plan.solution, plan.split)]
        counts = ", ".join(f"{word} in {words.count(word)}" for word in sorted(set(words)))
        return f"of {counted(len(self.plans), 'layer')} {counts}" if words else ""

    @property
    def weight_bytes(self) -> int:
        """Stored bytes of all emulated layers."""
        return sum(plan.solution.nbytes for plan in self.plans)

    @property
    def bits_per_weight(self) -> float:
        """8 weight_bytes over the weights of the emulated layers."""
        n_weights = sum(n * k for n, k in (plan.solution.main.shape for plan in self.plans))
        return 8.0 * self.weight_bytes / n_weights


# diffusers hands some layers a scale for LoRA as a second argument, which a plain Linear ignores.
def _forward(layer: EmulatedLayer, x: "torch.Tensor", *_: Any) -> "torch.Tensor":
    return layer(x)


def _is_emulated(module: "torch.nn.Module") -> bool:
    return getattr(module.__dict__.get("forward"), "func", None) is _forward
