"""A local diffusers folder as something to denoise images with: transformer, captions, decoder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraq_sim.dumps.capture_diffusers import Transformer, load_transformer
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError

if TYPE_CHECKING:
    import torch

__all__ = ["Decoder", "Transformer", "load_decoder", "load_transformer"]

_IMAGE_CHANNELS = (1, 3)


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What turns denoised tensors into what is compared.

    ``space`` is ``pixels`` or ``latents``; pixels lie within -1..1. ``vae`` is None where the
    transformer denoises pixels itself, or where there is no VAE and latents are compared.
    """

    space: str
    vae: "torch.nn.Module | None" = None

    def decode(self, x: np.ndarray) -> np.ndarray:
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
    channels = transformer.model.config.in_channels
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
