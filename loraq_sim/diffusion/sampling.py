"""Denoise images with a transformer of a local diffusers folder: in batches, decoded, captured.

`sample_images` denoises many images in batches that fit memory; a `Decoder` makes of them what is
compared, pixels where there is a VAE; `capture_transformer` keeps the input rows of the layers
while the transformer denoises other noise, for calibration.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.capture import CaptureSource, capture_layers
from loraq_sim.dumps.capture_diffusers import Transformer, denoising_calls, load_transformer
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, InputError, LoraqError

if TYPE_CHECKING:
    import torch

__all__ = [
    "Decoder",
    "Transformer",
    "batch_sizes",
    "capture_transformer",
    "load_decoder",
    "load_transformer",
    "sample_images",
]

# Image tokens denoised at once, the two halves of guidance apart: four images of 1024 pixels.
_TOKENS_AT_ONCE = 2**14
_IMAGE_CHANNELS = (1, 3)


def sample_images(
    transformer: Transformer,
    *,
    images: int,
    steps: int,
    guidance: float = 4.5,
    seed: int = 0,
    batch: int | None = None,
    on_call: Callable[[], None] | None = None,
) -> NDArray[np.float32]:
    """Denoise noise of one seed, with classifier-free guidance, captions in turn.

    Parameters
    ----------
    transformer : Transformer
        Its model may be inside ``with emulate_model(...)``.
    images, steps : int
    guidance : float
        Scale of classifier-free guidance.
    seed : int
        Of the noise. Image i starts from the same noise whatever `images` and `batch` are.
    batch : int, optional
        Images denoised at once; all that fit by default. Formats with a scale per tensor (NVFP4)
        see the batch as one tensor, for the others it only moves the last bits of float parts.
    on_call : callable, optional
        Called after each model call.

    Returns
    -------
    x : ndarray of shape (images, channels, size, size), float32
        Latents, or pixels of a model without a VAE; see `loraq_sim.diffusion.sampling`.

    Raises
    ------
    InputError
        If a number is below 1, or a layer's input cannot be quantized.
    DumpError
        If the model itself fails.
    """
    if min(images, steps, 1 if batch is None else batch) < 1:
        raise InputError(
            f"images, steps and batch must be 1 or more, got {images}, {steps}, {batch}"
        )
    done, parts = 0, []
    for size in batch_sizes(transformer, images=images, batch=batch):
        calls = denoising_calls(
            transformer.model,
            transformer.text,
            class_name=transformer.class_name,
            steps=steps,
            images=size,
            guidance=guidance,
            seed=seed,
            first=done,
        )
        parts.append(_denoised(transformer, calls, on_call))
        done += size
    return np.concatenate(parts)


def batch_sizes(transformer: Transformer, *, images: int, batch: int | None = None) -> list[int]:
    """Images of each batch; a batch takes `steps` model calls."""
    config: Any = transformer.model.config
    tokens = (config.sample_size // config.patch_size) ** 2
    size = batch or max(1, _TOKENS_AT_ONCE // tokens)
    return [min(size, images - start) for start in range(0, images, size)]


def _denoised(
    transformer: Transformer,
    calls: "Generator[tuple[float, dict[str, Any]], Any, torch.Tensor]",
    on_call: Callable[[], None] | None,
) -> NDArray[np.float32]:
    import torch

    output = None
    transformer.model.eval()
    with torch.no_grad():
        while True:
            try:
                _, inputs = calls.send(output)
                output = transformer.model(**inputs)
            except StopIteration as end:
                return end.value.to("cpu", torch.float32).numpy()
            except (LoraqError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                text = f"{type(error).__name__}: {first_line(error)}"
                raise DumpError(f"{transformer.folder}: the model fails: {text}") from error
            if on_call is not None:
                on_call()


class _Vae(Protocol):
    """What a diffusers autoencoder is used for here; its configuration is not typed."""

    config: Any

    def parameters(self) -> "Iterator[torch.nn.Parameter]": ...

    def decode(self, z: "torch.Tensor", *, return_dict: bool) -> "tuple[torch.Tensor, ...]": ...


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What turns denoised tensors into what is compared.

    ``space`` is ``pixels`` or ``latents``; pixels lie within -1..1. ``vae`` is None where the
    transformer denoises pixels itself, or where there is no VAE and latents are compared.
    """

    space: str
    vae: _Vae | None = None

    def decode(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images (images, channels, height, width) float32 of denoised tensors, one at a time."""
        if self.space == "latents":
            return x
        if self.vae is None:
            return np.clip(x, -1.0, 1.0)
        import torch

        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        device = next(self.vae.parameters()).device
        images = []
        with torch.no_grad():
            for latent in torch.from_numpy(x):
                scaled = latent[None].to(device) / self.vae.config.scaling_factor + shift
                images.append(self.vae.decode(scaled, return_dict=False)[0].clamp(-1, 1).cpu())
        return torch.cat(images).numpy()


def load_decoder(folder: Path, transformer: Transformer) -> Decoder:
    """Find what decodes the transformer's output, in the folder of its pipeline.

    A transformer of 1 or 3 channels denoises pixels. Else the VAE in ``vae/`` decodes its latents;
    without one the latents themselves are compared.

    Raises
    ------
    DumpError
        If there is a VAE that cannot be loaded, or that does not fit the transformer.
    """
    config: Any = transformer.model.config
    channels = config.in_channels
    if channels in _IMAGE_CHANNELS:
        return Decoder(space="pixels")
    place = folder / "vae"
    if not (place / "config.json").is_file():
        return Decoder(space="latents")
    from diffusers import AutoModel

    try:
        vae = AutoModel.from_pretrained(str(place), use_safetensors=True, local_files_only=True)
    # diffusers raises anything at all on a folder that does not fit its configuration.
    except Exception as error:
        raise DumpError(
            f"{place}: diffusers cannot load it: {type(error).__name__}: {first_line(error)}"
        ) from error
    if getattr(vae.config, "latent_channels", None) != channels:
        raise DumpError(
            f"{place}: decodes {getattr(vae.config, 'latent_channels', 'no')} latent channels, "
            f"the transformer has {channels}; remove it to compare latents"
        )
    return Decoder(space="pixels", vae=vae.eval().to(next(transformer.model.parameters()).device))


def capture_transformer(
    transformer: Transformer,
    *,
    images: int,
    steps: int,
    guidance: float,
    seed: int,
    tokens: int = 256,
    on_call: Callable[[], None] | None = None,
) -> LayerDump:
    """Dump of a transformer's layers with `tokens` rows of each input, over all denoising steps.

    What `load_diffusers_folder` and `capture_layers` give together, without loading the model a
    second time. For calibration take a `seed` whose images are not the ones to be compared.
    """
    calls = denoising_calls(
        transformer.model,
        transformer.text,
        class_name=transformer.class_name,
        steps=steps,
        images=images,
        guidance=guidance,
        seed=seed,
    )
    source = CaptureSource(
        name=str(transformer.folder), model=transformer.model, calls=calls, n_calls=steps
    )
    return capture_layers(source, tokens=tokens, seed=seed, on_call=on_call)
