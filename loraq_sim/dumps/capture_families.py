"""How the denoisers of diffusers are called, class by class, for capture.

What a model is given besides the image (text, classes, pooled embeddings) is standard normal.
Transformers without an image size in their configuration denoise 512 pixels, Wan three frames of
256. The loop is that of `capture_diffusers`: Euler for models trained as flows, DDIM for those that
predict noise; classifier-free guidance in one batch where pipelines run it so, else the
conditional samples alone.

What an entry point gives to draw with (`drawing_calls`), or as a pipeline, is called here too.
"""

import inspect
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FAMILIES",
    "TRAINED_STEPS",
    "Family",
    "call_pipeline",
    "ddim_step",
    "drawing_calls",
    "family_calls",
    "is_draw",
]

TRAINED_STEPS = 1000
"""Time steps that diffusion models are trained on."""

_TEXT_TOKENS = 300


def ddim_step(
    x: "torch.Tensor", noise: "torch.Tensor", step: float, after: float
) -> "torch.Tensor":
    """One deterministic step from time `step` to `after`; below 0 the image is clean."""
    now, then = _kept_signal(step), _kept_signal(after)
    image = (x - (1 - now) ** 0.5 * noise) / now**0.5
    return then**0.5 * image + (1 - then) ** 0.5 * noise


def _kept_signal(step: float) -> float:
    """Product of 1 - beta up to a step, beta going from 0.0001 to 0.02 over 1000 steps."""
    import torch

    if step < 0:
        return 1.0
    betas = torch.linspace(1e-4, 0.02, TRAINED_STEPS, dtype=torch.float64)
    return float(torch.cumprod(1 - betas, dim=0)[round(step)])


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of a class are called.

    ``shape(config)`` is that of one latent image, ``inputs(config, x, time, rng)`` the keyword
    arguments of a call on x at a time from 1 (noise) to 0, without the time step; ``scale`` is the
    time step at time 1. ``is_guided``: conditional and unconditional samples are one batch;
    ``is_flow``: the output is a velocity, else noise.
    """

    shape: Callable[[Any], tuple[int, ...]]
    inputs: Callable[[Any, "torch.Tensor", "torch.Generator"], dict[str, Any]]
    image: str = "hidden_states"
    scale: float = 1000.0
    is_guided: bool = False
    is_flow: bool = True


_LATENT_EDGE = 64
_FRAMES = 3


def _normal(rng: "torch.Generator", *shape: int) -> "torch.Tensor":
    import torch

    return torch.randn(*shape, generator=rng)


def _edge(config: Any) -> int:
    size = getattr(config, "sample_size", None) or _LATENT_EDGE
    return int(size[0] if isinstance(size, list | tuple) else size)


def _flux_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    import torch

    n, side, axes = len(x), round(x.shape[1] ** 0.5), len(config.axes_dims_rope)
    places = torch.zeros(side, side, axes)
    places[..., -2] += torch.arange(side)[:, None]
    places[..., -1] += torch.arange(side)
    found = {
        "encoder_hidden_states": _normal(rng, n, _TEXT_TOKENS, config.joint_attention_dim),
        "pooled_projections": _normal(rng, n, config.pooled_projection_dim),
        "img_ids": places.reshape(-1, axes),
        "txt_ids": torch.zeros(_TEXT_TOKENS, axes),
    }
    return found | ({"guidance": torch.full((n,), 3.5)} if config.guidance_embeds else {})


def _qwen_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    n, side = len(x), round(x.shape[1] ** 0.5)
    text = _normal(rng, n, _TEXT_TOKENS, config.joint_attention_dim)
    return {"encoder_hidden_states": text, "img_shapes": [[(1, side, side)]] * n}


def _sd3_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    return {
        "encoder_hidden_states": _normal(rng, len(x), 333, config.joint_attention_dim),
        "pooled_projections": _normal(rng, len(x), config.pooled_projection_dim),
    }


def _wan_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    return {"encoder_hidden_states": _normal(rng, len(x), 512, config.text_dim)}


def _dit_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    import torch

    labels = torch.randint(config.num_embeds_ada_norm, (len(x),), generator=rng)
    labels[len(x) // 2 :] = config.num_embeds_ada_norm
    return {"class_labels": labels}


def _unet_inputs(config: Any, x: "torch.Tensor", rng: "torch.Generator") -> dict[str, Any]:
    import torch

    width = config.cross_attention_dim
    width = max(width) if isinstance(width, list | tuple) else width
    found: dict[str, Any] = {"encoder_hidden_states": _normal(rng, len(x), 77, width)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        sizes = torch.full((len(x), 6), 8.0 * x.shape[-1])
        found["added_cond_kwargs"] = {
            "text_embeds": _normal(rng, len(x), pooled),
            "time_ids": sizes,
        }
    return found


def _square(config: Any) -> tuple[int, ...]:
    return (config.in_channels, _edge(config), _edge(config))


def _tokens(config: Any) -> tuple[int, ...]:
    return ((_edge(config) // 2) ** 2, config.in_channels)


FAMILIES = {
    "FluxTransformer2DModel": Family(shape=_tokens, inputs=_flux_inputs, scale=1.0),
    "QwenImageTransformer2DModel": Family(shape=_tokens, inputs=_qwen_inputs, scale=1.0),
    "SD3Transformer2DModel": Family(shape=_square, inputs=_sd3_inputs, is_guided=True),
    "WanTransformer3DModel": Family(
        shape=lambda config: (config.in_channels, _FRAMES, _edge(config) // 2, _edge(config) // 2),
        inputs=_wan_inputs,
    ),
    "DiTTransformer2DModel": Family(
        shape=_square, inputs=_dit_inputs, is_guided=True, is_flow=False
    ),
    "UNet2DConditionModel": Family(
        shape=_square, inputs=_unet_inputs, image="sample", is_guided=True, is_flow=False
    ),
}
"""Classes that are captured with standard normal conditions, by name."""


def family_calls(
    model: "torch.nn.Module", family: Family, *, steps: int, images: int, guidance: float, seed: int
) -> "Generator[tuple[float, dict[str, Any]], Any, None]":
    """Yield (time step, keyword arguments) of each call of a model of a family, as above."""
    import torch

    config: Any = model.config
    first = next(model.parameters())
    rng = torch.Generator().manual_seed(seed)
    x = _normal(rng, images, *family.shape(config))
    passes = 2 if family.is_guided else 1
    inputs = family.inputs(config, torch.cat([x] * passes), rng)
    inputs = {name: _on(value, first) for name, value in inputs.items()}
    for i in range(steps):
        time, after = (steps - i) / steps, (steps - i - 1) / steps
        step = family.scale * time - (0 if family.is_flow else 1)
        batch = _on(torch.cat([x] * passes), first)
        call = {family.image: batch, **inputs, "return_dict": False}
        call["timestep"] = torch.full((len(batch),), step, device=first.device)
        output = (yield step, call)[0].cpu().float()
        channels = x.shape[-1] if x.ndim == 3 else x.shape[1]
        axis = -1 if x.ndim == 3 else 1
        output = output.narrow(axis, 0, min(channels, output.shape[axis]))
        if family.is_guided:
            conditional, unconditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        # Channels that the model only reads, such as those of a first frame, stay.
        changed = x.narrow(axis, 0, output.shape[axis])
        if family.is_flow:
            changed -= output / steps
        else:
            changed.copy_(ddim_step(changed, output, step, family.scale * after - 1))


def _on(value: Any, like: "torch.Tensor") -> Any:
    """`value` where the model is, in its dtype if it is a float."""
    if isinstance(value, dict):
        return {name: _on(part, like) for name, part in value.items()}
    if not hasattr(value, "to"):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def is_draw(function: Any) -> bool:
    """Whether it makes a generator, or wants to be told how to draw; a ``run`` needs no word."""
    if any(map(inspect.isgeneratorfunction, (function, function.__call__))):
        return True
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:  # Built in, so its arguments are not known.
        pass
    return False


def drawing_calls(
    draw: Callable[..., object],
    name: object,
    *,
    steps: int,
    images: int,
    guidance: float,
    seed: int,
    first: int = 0,
) -> "Generator[tuple[float, dict[str, Any]], Any, Any]":
    """The calls of a ``draw``, a generator; DumpError where it makes none, under its `name`."""
    if min(steps, images) < 1:
        raise InputError(f"steps and images must be at least 1, got {steps} and {images}")
    try:
        made = draw(steps=steps, images=images, guidance=guidance, seed=seed, first=first)
    except TypeError as error:
        raise DumpError(
            f"{name}: draw must take steps, images, guidance, seed and first: {first_line(error)}"
        ) from None
    if not isinstance(made, Generator):
        raise DumpError(
            f"{name}: draw must be a generator of (time step, inputs) that returns images, got a "
            f"{type(made).__name__}"
        )
    return made


def call_pipeline(pipe: Any, prompts: list[str], steps: int | None, seed: int) -> None:
    """Call a diffusers pipeline with each prompt; what it makes is not decoded, where it can be."""
    import torch

    quiet = getattr(pipe, "set_progress_bar_config", None)
    if quiet is not None:
        quiet(disable=True)
    known = inspect.signature(type(pipe).__call__).parameters
    options: dict[str, Any] = {"output_type": "latent", "num_inference_steps": steps}
    options = {name: x for name, x in options.items() if name in known and x is not None}
    for number, prompt in enumerate(prompts):
        if "generator" in known:
            options["generator"] = torch.Generator().manual_seed(seed + number)
        pipe(prompt, **options)
