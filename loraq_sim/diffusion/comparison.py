"""Images of one transformer under several arithmetics, against full precision at the same noise."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import hwmodels
from loraq_sim.diffusion.emulated_model import EmulatedModel, emulate_model
from loraq_sim.diffusion.image_metrics import ImageError, compare_images
from loraq_sim.diffusion.layer_plan import LayerSource
from loraq_sim.diffusion.sampling import sample_images
from loraq_sim.diffusion.transformer import Decoder, Transformer
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.layers import Layer

__all__ = ["ImageStudy", "ImageVariant", "VariantImages"]

_PIXEL_RANGE = 2.0


@dataclass(frozen=True, kw_only=True)
class ImageVariant:
    """One arithmetic to draw images with.

    ``label`` names it (a split, or a recipe's file), ``source`` is what `emulate_model` takes, and
    ``options`` are further arguments of it.
    """

    label: str
    source: LayerSource
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class VariantImages:
    """Decoded images of a variant, how far they are from the reference, and the result row."""

    images: np.ndarray
    error: ImageError
    emulated: EmulatedModel
    row: dict[str, Any]


class ImageStudy:
    """Reference images of one transformer and one noise; `run` draws the same under a variant.

    Parameters
    ----------
    transformer : Transformer
    decoder : Decoder
        See `loraq_sim.diffusion.transformer.load_decoder`.
    accelerator : str or Accelerator
    images, steps, guidance, seed, batch, on_call
        As for `loraq_sim.diffusion.sample_images`.
    calibration : mapping of name to Layer, optional
        For smoothing and for methods that use data.

    Attributes
    ----------
    reference : ndarray of shape (images, channels, height, width), float32
        What the model draws as it is.
    """

    def __init__(
        self,
        transformer: Transformer,
        decoder: Decoder,
        accelerator: "str | hwmodels.Accelerator",
        *,
        calibration: Mapping[str, Layer] | None = None,
        on_call: Callable[[], None] | None = None,
        **sampling: Any,
    ) -> None:
        if isinstance(accelerator, str):
            accelerator = hwmodels.load_accelerator(accelerator)
        self.transformer, self.decoder, self.accelerator = transformer, decoder, accelerator
        self.calibration, self.sampling = calibration, sampling
        self.reference = self._draw(on_call)

    def run(
        self,
        variant: ImageVariant,
        *,
        on_layer: Callable[[str], None] | None = None,
        on_call: Callable[[], None] | None = None,
    ) -> VariantImages:
        """Draw the reference's images with the linear layers of `variant`."""
        started = time.perf_counter()
        emulated = emulate_model(
            self.transformer.model,
            variant.source,
            self.accelerator,
            calibration=self.calibration,
            on_layer=on_layer,
            **variant.options,
        )
        with emulated:
            images = self._draw(on_call)
        data_range = _PIXEL_RANGE if self.decoder.space == "pixels" else None
        error = compare_images(images, self.reference, data_range=data_range, allow_non_finite=True)
        row = self._row(variant, emulated, error) | {"seconds": time.perf_counter() - started}
        return VariantImages(images=images, error=error, emulated=emulated, row=row)

    def _draw(self, on_call: Callable[[], None] | None) -> np.ndarray:
        return self.decoder.decode(
            sample_images(self.transformer, on_call=on_call, **self.sampling)
        )

    def _row(
        self, variant: ImageVariant, emulated: EmulatedModel, error: ImageError
    ) -> dict[str, Any]:
        """Columns of the ``images`` command."""
        methods = sorted({plan.solution.method for plan in emulated.plans})
        ranks = {plan.solution.rank for plan in emulated.plans}
        seen = emulated.statistics
        return {
            "split": variant.label,
            "method": "+".join(methods),
            "psnr_db": error.mean_psnr_db,
            "psnr_std": error.psnr_std,
            "ssim": error.mean_ssim,
            "rank": ranks.pop() if len(ranks) == 1 else None,
            "n_layers": len(emulated.plans),
            "weight_bytes": emulated.weight_bytes,
            "bits_per_weight": emulated.bits_per_weight,
            "smooth": variant.options.get("smooth"),
            "accelerator": self.accelerator.name,
            **describe_array(emulated.datapath.mac),
            "rounding": emulated.datapath.rounding,
            "overflow_count": seen.overflow_count,
            "safe_acc_bits": seen.safe_acc_bits,
            "arithmetic": seen.arithmetic,
            "space": self.decoder.space,
            "images": self.sampling["images"],
            "steps": self.sampling["steps"],
            "guidance": self.sampling.get("guidance"),
            "seed": self.sampling.get("seed", 0),
            "clipped_count": emulated.clipped_count,
            "status": "ok" if np.isfinite(error.psnr_db).all() else "overflow",
            "message": emulated.clipped_note(),
        }
