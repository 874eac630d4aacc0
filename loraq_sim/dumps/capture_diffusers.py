"""Denoise images with a diffusion transformer of a diffusers folder, one model call at a time.

The folder holds ``config.json`` and the weights as safetensors (pickled weights are not loaded), or
has them in ``transformer/`` or ``unet/``. Its class must be a key of `EXTRA_INPUTS`, or, to be
captured alone, of `loraq_sim.dumps.capture_families.FAMILIES`; nothing is downloaded and no code
from the folder runs. Needs the extra ``[diffusion]``.

A model of one's own comes from an entry point, with its own loop: see `Transformer`.

The denoising loop is plain Euler for models trained as flows, where the output is a velocity v and
x(t) = (1 - t) image + t noise, so x <- x - v / steps from t = 1 on, with time step 1000 t. For a
model that predicts noise and its variance (PixArt-Σ: twice as many output channels as input
channels) it is DDIM (arXiv 2010.02502) with the linear schedule of DiT. Both with classifier-free
guidance in one batch: conditional samples first, then unconditional ones.
"""

import json
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps.capture import CaptureSource, called_entry
from loraq_sim.dumps.capture_families import (
    FAMILIES,
    TRAINED_STEPS,
    ddim_step,
    drawing_calls,
    family_calls,
)
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, InputError, counted

if TYPE_CHECKING:
    import torch

__all__ = ["Transformer", "denoising_calls", "load_diffusers_folder", "load_transformer"]


def denoising_calls(
    transformer: "Transformer",
    *,
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
    transformer : Transformer
        Of its model only the configuration and the device are used.
    steps, images : int
    guidance : float
    seed : int
        Of the noise that the images start from.
    first : int
        How many images of the same seed were denoised before these; they get the noise and the
        captions that follow.
    """
    calls = transformer.calls or partial(_denoised_by_euler, transformer)
    made = drawing_calls(
        *(calls, transformer.folder),
        steps=steps,
        images=images,
        guidance=guidance,
        seed=seed,
        first=first,
    )
    return _checked(made, transformer.folder)


def _checked(
    made: "Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]", name: Path
) -> "Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]":
    import torch

    x: object = yield from made
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise DumpError(f"{name}: must return (images, channels, height, width), got {got}")
    return x.detach()


def _denoised_by_euler(
    transformer: "Transformer", *, steps: int, images: int, guidance: float, seed: int, first: int
) -> "Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]":
    import torch

    model, text = transformer.model, transformer.text
    # A mixin of diffusers, unknown to torch.
    config: Any = model.config
    device = next(model.parameters()).device
    channels, size = config.in_channels, config.sample_size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(first + images, channels, size, size, generator=generator)
    x = noise[first:].to(device)
    chosen = text[torch.arange(first, first + images) % (len(text) - 1)]
    both = torch.cat([chosen, text[-1:].expand(images, -1, -1)]).to(device)
    predicts_noise = config.out_channels == 2 * channels
    for i in range(steps):
        step = TRAINED_STEPS * (steps - i) / steps
        after = TRAINED_STEPS * (steps - i - 1) / steps
        if predicts_noise:
            step, after = step - 1, after - 1
        inputs = {
            "hidden_states": torch.cat([x, x]),
            "encoder_hidden_states": both,
            "timestep": torch.full((2 * images,), step, device=device),
            "return_dict": False,
            **EXTRA_INPUTS[transformer.class_name](config, x),
        }
        output = (yield step, inputs)[0]
        conditional, unconditional = output[:, :channels].chunk(2)
        guided = unconditional + guidance * (conditional - unconditional)
        x = ddim_step(x, guided, step, after) if predicts_noise else x - guided / steps
    return x


def _pixart_inputs(config: Any, x: "torch.Tensor") -> dict[str, Any]:
    conditions: dict[str, Any] = {"resolution": None, "aspect_ratio": None}
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


_MAX_CONFIG_BYTES = 2**20
_MAX_BLOCKS = 512
_MAX_POSITION_VALUES = 2**29
_TEXT_TOKENS = 300


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
    home = _home(folder)
    name = str(_read_config(home).get("_class_name"))
    if name in FAMILIES:
        if captions is not None:
            raise InputError(f"--captions are for {' and '.join(EXTRA_INPUTS)}, not for a {name}")
        _check_sizes(home, _read_config(home))
        model = _load_model(home, name, device)
        family = FAMILIES[name]
        meta = {
            "checkpoint": home.name,
            "diffusers": _diffusers().__version__,
            "captions": "standard normal values",
            "images": images,
            "guidance": guidance,
            "cfg_batch": 2 if family.is_guided else 1,
        }
        made = family_calls(model, family, steps=steps, images=images, guidance=guidance, seed=seed)
        return CaptureSource(name=str(home), model=model, calls=made, meta=meta, n_calls=steps)
    found = load_transformer(folder, captions=captions, seed=seed, device=device)
    calls = denoising_calls(found, steps=steps, images=images, guidance=guidance, seed=seed)
    meta = {
        "checkpoint": found.folder.name,
        "diffusers": _diffusers().__version__,
        "captions": found.captions,
        "images": images,
        "guidance": guidance,
        "cfg_batch": 2,
    }
    return CaptureSource(
        name=str(found.folder), model=found.model, calls=calls, meta=meta, n_calls=steps
    )


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A diffusion transformer and the text embeddings it is run with.

    ``text`` is (captions, tokens, channels), the last caption unconditional; ``captions`` says
    where it comes from. ``class_name`` is a key of `EXTRA_INPUTS`.

    That of an entry point has a loop of its own, ``calls``: called with the keywords of
    `denoising_calls`, it yields (time step, keyword arguments of the model), gets each output back
    and returns pixels within -1..1. ``folder`` is then the entry point's name.
    """

    folder: Path
    model: "torch.nn.Module"
    class_name: str
    text: "torch.Tensor"
    captions: str
    calls: "Callable[..., Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]] | None" = None


def load_transformer(
    folder: Path, *, captions: Path | None = None, seed: int = 0, device: str = "cpu"
) -> Transformer:
    """Load a transformer and its text embeddings; arguments and errors as above.

    In place of a folder there may be an entry point, ``file.py:function`` or ``module:function``:
    a function that returns (model, draw), see `Transformer.calls`.
    """
    if ":" in str(folder) and not folder.exists():
        return _own_model(str(folder), captions, seed, device)
    folder = _home(folder)
    config = _read_config(folder)
    name = str(config.get("_class_name"))
    if name not in EXTRA_INPUTS:
        raise DumpError(
            f"{folder}: holds a {name:.60}; supported are {', '.join(EXTRA_INPUTS)} (captured are "
            f"also {', '.join(FAMILIES)}); capture others through a Python entry point"
        )
    _check_sizes(folder, config)
    model = _load_model(folder, name, device)
    if captions is None and (folder / "captions.safetensors").is_file():
        captions = folder / "captions.safetensors"
    return Transformer(
        folder=folder,
        model=model,
        class_name=name,
        text=_text(model, captions, seed),
        captions=captions.name if captions else "standard normal values",
    )


def _own_model(entry: str, captions: Path | None, seed: int, device: str) -> Transformer:
    import torch

    if captions is not None:
        raise InputError(f"--captions are for a folder; {entry} draws with what it has")
    made = called_entry(entry, seed)
    model, draw = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module) or not callable(draw):
        raise DumpError(
            f"{entry}: the function must return (model, draw), a torch module and a generator "
            "function of steps, images, guidance, seed and first"
        )
    return Transformer(
        folder=Path(entry),
        model=_placed(model, device),
        class_name=type(model).__name__,
        text=torch.zeros(0),
        captions="of the entry point",
        calls=draw,
    )


def _home(folder: Path) -> Path:
    """The folder of the denoiser in a pipeline's, else `folder`."""
    parts = (folder / name for name in ("transformer", "unet"))
    return next((part for part in parts if (part / "config.json").exists()), folder)


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


def _check_sizes(folder: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that no weights in the folder could have, before a model of them is built."""

    def size(key: str) -> int:
        value = config.get(key, 1)
        if isinstance(value, list) and value and all(isinstance(x, int) for x in value):
            # Of a U-Net one a level.
            value = max(value)
        if value is None:
            return 1
        if not isinstance(value, int) or not 1 <= value < 2**31:
            raise DumpError(f"{folder}: config.json has no usable {key}: {value!r:.40}")
        return value

    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    width = size("num_attention_heads") * size("attention_head_dim")
    width = max(width, size("block_out_channels"))
    inputs = size("caption_channels") + size("cross_attention_dim") + size("in_channels")
    # A block holds far more than two square matrices, a value takes a byte at least.
    least = 2 * size("num_layers") * width**2 + width * inputs
    positions = size("sample_size") ** 2 * width
    if size("num_layers") > _MAX_BLOCKS or positions > _MAX_POSITION_VALUES or least > weights > 0:
        raise DumpError(
            f"{folder}: config.json describes {counted(size('num_layers'), 'block')} of width "
            f"{width}, which {weights} bytes of weights cannot hold; the folder is incomplete or "
            "forged"
        )


def _load_model(folder: Path, name: str, device: str) -> "torch.nn.Module":
    if not any(folder.glob("*.safetensors")):
        raise DumpError(f"{folder}: has no .safetensors weights; pickled ones are not loaded")
    logger = logging.getLogger("diffusers")
    model_class, level = getattr(_diffusers(), name), logger.level
    # What it would warn about, page after page, is checked below; shards come with a bar of theirs.
    logger.setLevel(logging.CRITICAL)
    bars = _diffusers().utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    # Parts that stay in float32 when others do not: nothing is narrowed here, and the loader would
    # want another package for them.
    kept = getattr(model_class, "_keep_in_fp32_modules", None)
    model_class._keep_in_fp32_modules = None
    try:
        model, loading = model_class.from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    # diffusers raises anything at all on a folder that does not fit its configuration.
    except Exception as error:
        raise DumpError(
            f"{folder}: diffusers cannot load it: {type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        logger.setLevel(level)
        if shown:
            bars.enable_progress_bar()
        model_class._keep_in_fp32_modules = kept
    missing = sorted(loading["missing_keys"])
    if missing:
        raise DumpError(
            f"{folder}: lacks {counted(len(missing), 'weight')} of its configuration, such as "
            f"{missing[0]}; the folder is incomplete"
        )
    return _placed(model, device)


def _placed(model: "torch.nn.Module", device: str) -> "torch.nn.Module":
    try:
        return model.to(device)
    # torch raises anything at all about devices that it does not have.
    except Exception as error:
        raise InputError(f"device {device!r} cannot be used: {first_line(error)}") from error


def _text(model: "torch.nn.Module", captions: Path | None, seed: int) -> "torch.Tensor":
    """Text embeddings of shape (captions, tokens, channels), the last one unconditional."""
    import torch

    config: Any = model.config
    channels: int = config.caption_channels
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
