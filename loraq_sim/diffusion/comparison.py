"""Images of one transformer under several arithmetics, against full precision at the same noise.

`compare_images` says how far images are from reference images; `ImageStudy` draws both.

PSNR = 10 log10(range^2 / mean square difference), per image. SSIM is that of Wang et al. (IEEE
Trans. Image Processing 13, 2004): Gaussian window of 11 x 11 (sigma 1.5), K1 = 0.01, K2 = 0.03,
the mean over all pixels whose window lies inside the image, over channels, per image.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.diffusion.emulated_model import EmulatedModel, LayerSource, emulate_model
from loraq_sim.diffusion.sampling import Decoder, Transformer, sample_images
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.errors import InputError
from loraq_sim.layers import Layer

__all__ = [
    "HIGHEST_PSNR_DB",
    "ImageError",
    "ImageStudy",
    "ImageVariant",
    "VariantImages",
    "compare_images",
]

HIGHEST_PSNR_DB = 150.0
"""PSNR of equal images, so that means and spreads stay finite; about what float32 can resolve."""

_SIGMA = 1.5
_RADIUS = 5
_K1, _K2 = 0.01, 0.03
_PIXEL_RANGE = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageError:
    """PSNR in dB and SSIM of each image, (images,) float64; None where images are too small."""

    psnr_db: NDArray[np.float64]
    ssim: NDArray[np.float64] | None

    @property
    def mean_psnr_db(self) -> float:
        """Mean over images."""
        return float(self.psnr_db.mean())

    @property
    def psnr_std(self) -> float:
        """Standard deviation over images, in dB; NaN where an image is not finite."""
        return float(self.psnr_db.std()) if np.isfinite(self.psnr_db).all() else float("nan")

    @property
    def mean_ssim(self) -> float | None:
        """Mean over images."""
        return None if self.ssim is None else float(self.ssim.mean())


def compare_images(
    images: NDArray[np.floating],
    reference: NDArray[np.floating],
    *,
    data_range: float | None = None,
    allow_non_finite: bool = False,
) -> ImageError:
    """PSNR and SSIM of each image against its reference.

    Parameters
    ----------
    images, reference : ndarray of shape (images, channels, height, width), floating
    data_range : float, optional
        Largest possible difference of two values: 2 for pixels within -1..1. Default: the range of
        the reference, for latents.
    allow_non_finite : bool
        Take images with infinities or NaN, which have a PSNR of -inf and an SSIM of 0.

    Raises
    ------
    InputError
        If shapes differ or are not of this form, a value is not finite, or the range is 0.
    """
    _check(images, reference, allow_non_finite)
    finite = np.isfinite(images).all(axis=(1, 2, 3))
    kept = np.where(finite[:, None, None, None], images, 0.0)
    x, y = kept.astype(np.float64), reference.astype(np.float64)
    if data_range is None:
        data_range = float(y.max() - y.min())
    if not data_range > 0:
        raise InputError(f"data_range must be above 0, got {data_range}")
    square = ((x - y) ** 2).mean(axis=(1, 2, 3))
    floor = data_range**2 * 10 ** (-HIGHEST_PSNR_DB / 10)
    psnr = 10 * np.log10(data_range**2 / np.maximum(square, floor))
    psnr = np.where(finite, psnr, -np.inf)
    if min(x.shape[2:]) <= 2 * _RADIUS:
        return ImageError(psnr_db=psnr, ssim=None)
    return ImageError(psnr_db=psnr, ssim=np.where(finite, _ssim(x, y, data_range), 0.0))


def _check(
    images: NDArray[np.floating], reference: NDArray[np.floating], allow_non_finite: bool
) -> None:
    if images.shape != reference.shape or images.ndim != 4 or images.size == 0:
        raise InputError(
            "images and reference must both be (images, channels, height, width), got "
            f"{images.shape} and {reference.shape}"
        )
    checked = {"reference": reference} if allow_non_finite else {"images": images}
    for name, values in (checked | {"reference": reference}).items():
        if not np.isfinite(values).all():
            raise InputError(f"{name} hold NaN or Inf: the model has left its range")


def _ssim(x: NDArray[np.float64], y: NDArray[np.float64], data_range: float) -> NDArray[np.float64]:
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x = _smoothed(x * x) - mean_x**2
    variance_y = _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    inside = (..., slice(_RADIUS, -_RADIUS), slice(_RADIUS, -_RADIUS))
    return (luminance * structure)[inside].mean(axis=(1, 2, 3))


def _smoothed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, _SIGMA, axes=(2, 3), radius=_RADIUS)


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

    images: NDArray[np.float32]
    error: ImageError
    emulated: EmulatedModel
    row: dict[str, Any]


class ImageStudy:
    """Reference images of one transformer and one noise; `run` draws the same under a variant.

    Parameters
    ----------
    transformer : Transformer
    decoder : Decoder
        See `loraq_sim.diffusion.sampling.load_decoder`.
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

    def _draw(self, on_call: Callable[[], None] | None) -> NDArray[np.float32]:
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
