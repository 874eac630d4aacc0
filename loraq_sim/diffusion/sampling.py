"""Denoise many images with a transformer, in batches that fit memory."""

from collections.abc import Callable

import numpy as np

from loraq_sim.dumps.capture_denoising import denoising_calls
from loraq_sim.dumps.capture_diffusers import Transformer
from loraq_sim.dumps.stored import first_line
from loraq_sim.errors import DumpError, InputError, LoraqError

__all__ = ["batch_sizes", "sample_images"]

# Image tokens denoised at once, the two halves of guidance apart: four images of 1024 pixels.
_TOKENS_AT_ONCE = 2**14


def sample_images(
    transformer: Transformer,
    *,
    images: int,
    steps: int,
    guidance: float = 4.5,
    seed: int = 0,
    batch: int | None = None,
    on_call: Callable[[], None] | None = None,
) -> np.ndarray:
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
        Latents, or pixels of a model without a VAE; see `loraq_sim.diffusion.transformer`.

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
    config = transformer.model.config
    tokens = (config.sample_size // config.patch_size) ** 2
    size = batch or max(1, _TOKENS_AT_ONCE // tokens)
    return [min(size, images - start) for start in range(0, images, size)]


def _denoised(transformer: Transformer, calls, on_call: Callable[[], None] | None) -> np.ndarray:
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
