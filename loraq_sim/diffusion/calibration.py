"""Input rows of a transformer's layers, captured while it denoises other noise."""

from collections.abc import Callable

from loraq_sim.dumps.capture import CaptureSource, capture_layers
from loraq_sim.dumps.capture_denoising import denoising_calls
from loraq_sim.dumps.capture_diffusers import Transformer
from loraq_sim.dumps.layer_dump import LayerDump

__all__ = ["capture_transformer"]


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
