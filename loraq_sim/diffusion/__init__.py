"""Whole diffusion transformers on an accelerator's data path: emulate, sample, compare images.

`emulate_model` runs the linear layers of a torch model through the emulated data path;
`load_transformer` and `sample_images` denoise images with it, `compare_images` measures what the
arithmetic did to them.
"""

from loraq_sim.diffusion.calibration import capture_transformer
from loraq_sim.diffusion.comparison import ImageStudy, ImageVariant, VariantImages
from loraq_sim.diffusion.emulated_layer import EmulatedLayer
from loraq_sim.diffusion.emulated_model import EmulatedModel, emulate_model
from loraq_sim.diffusion.image_metrics import ImageError, compare_images
from loraq_sim.diffusion.layer_plan import LayerPlan, plan_layers
from loraq_sim.diffusion.sampling import sample_images
from loraq_sim.diffusion.transformer import Decoder, Transformer, load_decoder, load_transformer

__all__ = [
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
