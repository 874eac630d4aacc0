"""Take a diffusion transformer from a local diffusers folder, and denoise images with it.

The folder holds ``config.json`` and the weights as safetensors (pickled weights are not loaded), or
has them in ``transformer/``. Its class must be in the table at the end of this module; nothing is
downloaded and no code from the folder runs. Needs the extra ``[diffusion]``.

The denoising loop is plain Euler for models trained as flows, where the output is a velocity v and
x(t) = (1 - t) image + t noise, so x <- x - v / steps from t = 1 on, with time step 1000 t. For a
model that predicts noise and its variance (PixArt-Σ: twice as many output channels as input
channels) it is DDIM (arXiv 2010.02502) with the linear schedule of DiT. Both with classifier-free
guidance in one batch: conditional samples first, then unconditional ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps.capture import CaptureSource
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, InputError

if TYPE_CHECKING:
    import torch

__all__ = ["load_diffusers_folder"]

_MAX_CONFIG_BYTES = 2**20
_TEXT_TOKENS = 300
_TRAINED_STEPS = 1000


def load_diffusers_folder(
    folder: Path,
    *,
    steps: int = 20,
    images: int = 2,
    guidance: float = 4.5,
    captions: Path | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> CaptureSource:
    """Load a transformer and make a denoising loop for it.

    Parameters
    ----------
    folder : Path
        Of the transformer, or of a pipeline that has it in ``transformer/``.
    steps : int
        Denoising steps, at least 1.
    images : int
        Samples denoised together; a model call has twice as many rows of samples.
    guidance : float
        Scale of classifier-free guidance.
    captions : Path, optional
        A safetensors file with one tensor of shape (captions, tokens, channels), text embeddings of
        which the last is the unconditional one. Default: ``captions.safetensors`` in the folder if
        it is there, else standard normal values.
    seed : int
        Of the noise that the images start from.
    device : str
        Where torch runs the model.

    Raises
    ------
    InputError
        If `steps` or `images` is below 1.
    DumpError
        If diffusers is missing, the folder or the captions cannot be used, or the model's class is
        not supported.
    """
    if steps < 1 or images < 1:
        raise InputError(f"steps and images must be at least 1, got {steps} and {images}")
    folder = folder / "transformer" if (folder / "transformer" / "config.json").exists() else folder
    config = _read_config(folder)
    name = str(config.get("_class_name"))
    if name not in _EXTRA_INPUTS:
        raise DumpError(
            f"{folder}: holds a {name:.60}; supported are {', '.join(_EXTRA_INPUTS)}; "
            "capture others through a Python entry point"
        )
    model = _load_model(folder, name, device)
    if captions is None and (folder / "captions.safetensors").is_file():
        captions = folder / "captions.safetensors"
    loop = _Denoising(model, name, steps, images, guidance, _text(model, captions, seed), seed)
    meta = {
        "checkpoint": folder.name,
        "diffusers": _diffusers().__version__,
        "captions": captions.name if captions else "standard normal values",
        "images": images,
        "guidance": guidance,
        "cfg_batch": 2,
    }
    return CaptureSource(
        name=str(folder), model=model, calls=loop.calls(), meta=meta, n_calls=steps
    )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise DumpError(
            "a diffusers folder needs diffusers; pip install 'loraq-sim[diffusion]'"
        ) from None
    return diffusers


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise DumpError(f"{folder}: has no config.json; give the folder of a diffusers transformer")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise DumpError(f"{path}: over 1 MiB, so no model configuration")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DumpError(f"{path}: is no valid JSON: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise DumpError(f"{path}: must hold a JSON object, got a {type(config).__name__}")
    return config


def _load_model(folder: Path, name: str, device: str) -> "torch.nn.Module":
    if not any(folder.glob("*.safetensors")):
        raise DumpError(f"{folder}: has no .safetensors weights; pickled ones are not loaded")
    model_class = getattr(_diffusers(), name)
    try:
        model = model_class.from_pretrained(
            str(folder), use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
        return model.to(device)
    # diffusers raises anything at all on a folder that does not fit its configuration.
    except Exception as error:
        raise DumpError(
            f"{folder}: diffusers cannot load it: {type(error).__name__}: {first_line(error)}"
        ) from error


def _text(model: "torch.nn.Module", captions: Path | None, seed: int) -> "torch.Tensor":
    """Text embeddings of shape (captions, tokens, channels), the last one unconditional."""
    import torch

    channels = model.config.caption_channels
    if captions is None:
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randn(2, _TEXT_TOKENS, channels, generator=generator)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(captions)
    except FileNotFoundError:
        raise DumpError(f"{captions}: no such file; check the path") from None
    except (SafetensorError, OSError) as error:
        raise DumpError(f"{captions}: no safetensors file: {first_line(error)}") from None
    fits = [x for x in tensors.values() if x.ndim == 3 and len(x) > 1 and x.shape[2] == channels]
    if len(fits) != 1:
        raise DumpError(
            f"{captions}: must hold one tensor of shape (captions, tokens, {channels}), with 2 "
            f"captions or more; found {[tuple(x.shape) for x in tensors.values()][:4]}"
        )
    return fits[0].float()


class _Denoising:
    """The calls of one denoising run."""

    def __init__(
        self,
        model: "torch.nn.Module",
        name: str,
        steps: int,
        images: int,
        guidance: float,
        text: "torch.Tensor",
        seed: int,
    ) -> None:
        self.config = model.config
        self.extra = _EXTRA_INPUTS[name]
        self.steps = steps
        self.images = images
        self.guidance = guidance
        self.text = text
        self.seed = seed
        self.device = next(model.parameters()).device

    def calls(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yield (time step, inputs); takes the model's output back."""
        import torch

        channels, size = self.config.in_channels, self.config.sample_size
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.images, channels, size, size, generator=generator).to(self.device)
        chosen = torch.arange(self.images) % (len(self.text) - 1)
        text = torch.cat([self.text[chosen], self.text[-1:].expand(self.images, -1, -1)])
        text = text.to(self.device)
        predicts_noise = self.config.out_channels == 2 * channels
        for i in range(self.steps):
            step = _TRAINED_STEPS * (self.steps - i) / self.steps
            after = _TRAINED_STEPS * (self.steps - i - 1) / self.steps
            if predicts_noise:
                step, after = step - 1, after - 1
            inputs = {
                "hidden_states": torch.cat([x, x]),
                "encoder_hidden_states": text,
                "timestep": torch.full((2 * self.images,), step, device=self.device),
                "return_dict": False,
                **self.extra(self.config, x),
            }
            output = (yield step, inputs)[0]
            conditional, unconditional = output[:, :channels].chunk(2)
            guided = unconditional + self.guidance * (conditional - unconditional)
            x = _ddim(x, guided, step, after) if predicts_noise else x - guided / self.steps


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


_EXTRA_INPUTS = {
    "PixArtTransformer2DModel": _pixart_inputs,
    "SanaTransformer2DModel": _sana_inputs,
}
"""Supported classes, and what they want besides image, text and time step."""
