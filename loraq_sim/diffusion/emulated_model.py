"""A torch model whose linear layers run on an accelerator's emulated data path, for a while."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import hwmodels
from loraq_sim.diffusion.emulated_layer import EmulatedLayer
from loraq_sim.diffusion.layer_plan import LayerPlan, LayerSource, plan_layers
from loraq_sim.emulator.datapath import Datapath
from loraq_sim.emulator.scaled_gemm import GemmStatistics
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer
from loraq_sim.machine import datapath_for

if TYPE_CHECKING:
    import torch

    from loraq_sim.split import PrecisionSplit

__all__ = ["EmulatedModel", "emulate_model"]


def emulate_model(
    model: "torch.nn.Module",
    solution_or_recipe: LayerSource,
    accelerator: "str | hwmodels.Accelerator",
    *,
    splits: "str | PrecisionSplit | Mapping[str, str] | None" = None,
    calibration: Mapping[str, Layer] | None = None,
    skip: Iterable[str] | None = None,
    method: str = "loraq",
    preset: str = "balanced",
    family: str = "int",
    group: int = 64,
    smooth: float | None = None,
    seed: int = 0,
    datapath: Mapping[str, Any] | None = None,
    on_layer: Callable[[str], None] | None = None,
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
    splits, calibration, skip, method, preset, family, group, smooth, seed, on_layer
        See `loraq_sim.diffusion.plan_layers`.
    datapath : mapping, optional
        Overrides of the accelerator's data path, of the keys in `loraq_sim.machine.DATAPATH_KEYS`.

    Raises
    ------
    InputError
        If an argument breaks a rule.
    hwmodels.AcceleratorError
        If the accelerator is unknown or its file is broken.
    """
    if isinstance(accelerator, str):
        accelerator = hwmodels.load_accelerator(accelerator)
    path = datapath_for(accelerator, datapath)
    plans = plan_layers(
        model,
        solution_or_recipe,
        splits=splits,
        calibration=calibration,
        skip=skip,
        method=method,
        preset=preset,
        family=family,
        group=group,
        smooth=smooth,
        seed=seed,
        on_layer=on_layer,
    )
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
        return (
            f"{self.clipped_count:,} values beyond their float format in {len(named)} of "
            f"{len(self.layers)} layers, such as {first.tensor} of {name} in {first.format}"
        )

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
