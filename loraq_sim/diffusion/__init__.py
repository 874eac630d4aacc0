"""Whole diffusion transformers on an accelerator's data path: emulate, sample, compare images.

`emulate_model` runs the linear layers of a torch model through the emulated data path;
`load_transformer` and `sample_images` denoise images with it, `compare_images` measures what the
arithmetic did to them.
"""

from loraq_sim.diffusion.emulated_model import (
    EmulatedLayer,
    EmulatedModel,
    LayerPlan,
    emulate_model,
    plan_layers,
)
from loraq_sim.diffusion.images import (
    Decoder,
    ImageError,
    ImageStudy,
    ImageVariant,
    Transformer,
    VariantImages,
    capture_transformer,
    compare_images,
    load_decoder,
    load_transformer,
    sample_images,
)

__all__ = [
    "CALIBRATION_IMAGES",
    "CALIBRATION_ROWS",
    "CALIBRATION_SEED",
    "Decoder",
    "EmulatedLayer",
    "EmulatedModel",
    "ImageError",
    "ImageStudy",
    "ImageVariant",
    "LayerPlan",
    "Transformer",
    "VariantImages",
    "capture_transformer",
    "compare_images",
    "emulate_model",
    "load_decoder",
    "load_transformer",
    "plan_layers",
    "sample_images",
]

# What solvers that read inputs see of a model whose images are compared: so many images, and rows
# of each input over all steps (with 256 the residual input gains about half a dB less).
CALIBRATION_IMAGES = 8
CALIBRATION_ROWS = 1024
# Added to the seed of the images, so that no noise of calibration is that of one compared.
CALIBRATION_SEED = 1_000_003
