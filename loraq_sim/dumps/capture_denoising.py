"""Denoise images with a diffusion transformer, one model call at a time.

The denoising loop is plain Euler for models trained as flows, where the output is a velocity v and
x(t) = (1 - t) image + t noise, so x <- x - v / steps from t = 1 on, with time step 1000 t. For a
model that predicts noise and its variance (PixArt-Σ: twice as many output channels as input
channels) it is DDIM (arXiv 2010.02502) with the linear schedule of DiT. Both with classifier-free
guidance in one batch: conditional samples first, then unconditional ones.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["EXTRA_INPUTS", "denoising_calls"]

_TRAINED_STEPS = 1000


def denoising_calls(
    model: "torch.nn.Module",
    text: "torch.Tensor",
    *,
    class_name: str,
    steps: int,
    images: int,
    guidance: float,
    seed: int,
    first: int = 0,
) -> "Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]":
    """Yield (time step, keyword arguments) of each call; the model's output is to be sent back.

    The generator returns what it has denoised, of shape (images, channels, size, size).

    Parameters
    ----------
    model : torch module
        Only its configuration and device are used.
    text : tensor of shape (captions, tokens, channels)
        The last caption is the unconditional one.
    class_name : str
        A key of `EXTRA_INPUTS`.
    steps, images : int
    guidance : float
    seed : int
        Of the noise that the images start from.
    first : int
        How many images of the same seed were denoised before these; they get the noise and the
        captions that follow.
    """
    import torch

    config, device = model.config, next(model.parameters()).device
    channels, size = config.in_channels, config.sample_size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(first + images, channels, size, size, generator=generator)
    x = noise[first:].to(device)
    chosen = text[torch.arange(first, first + images) % (len(text) - 1)]
    both = torch.cat([chosen, text[-1:].expand(images, -1, -1)]).to(device)
    predicts_noise = config.out_channels == 2 * channels
    for i in range(steps):
        step = _TRAINED_STEPS * (steps - i) / steps
        after = _TRAINED_STEPS * (steps - i - 1) / steps
        if predicts_noise:
            step, after = step - 1, after - 1
        inputs = {
            "hidden_states": torch.cat([x, x]),
            "encoder_hidden_states": both,
            "timestep": torch.full((2 * images,), step, device=device),
            "return_dict": False,
            **EXTRA_INPUTS[class_name](config, x),
        }
        output = (yield step, inputs)[0]
        conditional, unconditional = output[:, :channels].chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        x = _ddim(x, guided, step, after) if predicts_noise else x - guided / steps
    return x


def _ddim(x: "torch.Tensor", noise: "torch.Tensor", step: float, after: float) -> "torch.Tensor":
    """One deterministic step from time `step` to `after`; below 0 the image is clean."""
    now, then = _kept_signal(step), _kept_signal(after)
    image = (x - (1 - now) ** 0.5 * noise) / now**0.5
    return then**0.5 * image + (1 - then) ** 0.5 * noise


def _kept_signal(step: float) -> float:
    """Product of 1 - beta up to a step, beta going from 0.0001 to 0.02 over 1000 steps."""
    import torch

    if step < 0:
        return 1.0
    betas = torch.linspace(1e-4, 0.02, _TRAINED_STEPS, dtype=torch.float64)
    return float(torch.cumprod(1 - betas, dim=0)[round(step)])


def _pixart_inputs(config: Any, x: "torch.Tensor") -> dict[str, Any]:
    conditions = {"resolution": None, "aspect_ratio": None}
    if config.use_additional_conditions:
        import torch

        pixels = float(8 * x.shape[-1])
        conditions = {
            "resolution": torch.full((2 * len(x), 2), pixels, device=x.device),
            "aspect_ratio": torch.ones(2 * len(x), 1, device=x.device),
        }
    return {"added_cond_kwargs": conditions}


def _sana_inputs(config: Any, x: "torch.Tensor") -> dict[str, Any]:
    return {}


EXTRA_INPUTS = {
    "PixArtTransformer2DModel": _pixart_inputs,
    "SanaTransformer2DModel": _sana_inputs,
}
"""Supported classes, and what they want besides image, text and time step."""
