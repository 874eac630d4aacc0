"""Images of one transformer of a local diffusers folder: denoised, decoded, compared, studied.

`sample_images` denoises many images in batches that fit memory; a `Decoder` makes of them what is
compared, pixels where there is a VAE; `capture_transformer` keeps the input rows of the layers
while the transformer denoises other noise, for calibration. `compare_images` says how far images
are from reference images; an `ImageStudy` draws both, the reference in full precision, from the
same noise.

PSNR = 10 log10(range^2 / mean square difference), per image. SSIM is that of Wang et al. (IEEE
Trans. Image Processing 13, 2004): Gaussian window of 11 x 11 (sigma 1.5), K1 = 0.01, K2 = 0.03,
the mean over all pixels whose window lies inside the image, over channels, per image.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

import hwmodels
from loraq_sim.diffusion.emulated_model import EmulatedModel, LayerSource, emulate_model
from loraq_sim.dumps.capture import CaptureSource, capture_layers
from loraq_sim.dumps.capture_diffusers import Transformer, denoising_calls, load_transformer
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.stored import first_line
from loraq_sim.emulator.mac_array import describe_array
from loraq_sim.errors import DumpError, InputError, LoraqError
from loraq_sim.layers import Layer
from loraq_sim.recipe import Recipe

if TYPE_CHECKING:
    import torch

__all__ = [
    "HIGHEST_PSNR_DB",
    "Decoder",
    "ImageError",
    "ImageStudy",
    "ImageVariant",
    "Transformer",
    "VariantImages",
    "batch_sizes",
    "capture_transformer",
    "compare_images",
    "load_decoder",
    "load_transformer",
    "sample_images",
]

HIGHEST_PSNR_DB = 150.0
"""PSNR of equal images, so that means and spreads stay finite; about what float32 can resolve."""

_SIGMA, _RADIUS = 1.5, 5
_K1, _K2 = 0.01, 0.03
_PIXEL_RANGE = 2.0
# Image tokens denoised at once, the two halves of guidance apart: four images of 1024 pixels.
_TOKENS_AT_ONCE = 2**14
_OWN_IMAGES_AT_ONCE = 4
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
        Latents, or pixels of a model without a VAE.

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
            transformer, steps=steps, images=size, guidance=guidance, seed=seed, first=done
        )
        parts.append(_denoised(transformer, calls, on_call))
        done += size
    return np.concatenate(parts)


def batch_sizes(transformer: Transformer, *, images: int, batch: int | None = None) -> list[int]:
    """Images of each batch; a batch takes `steps` model calls."""
    size = batch or _OWN_IMAGES_AT_ONCE
    if batch is None and transformer.calls is None:
        config: Any = transformer.model.config
        size = max(1, _TOKENS_AT_ONCE // (config.sample_size // config.patch_size) ** 2)
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
    config: Any = transformer.model.config if transformer.calls is None else None
    channels = 3 if config is None else config.in_channels
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
    calls = denoising_calls(transformer, steps=steps, images=images, guidance=guidance, seed=seed)
    source = CaptureSource(
        name=str(transformer.folder), model=transformer.model, calls=calls, n_calls=steps
    )
    return capture_layers(source, tokens=tokens, seed=seed, on_call=on_call)


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

    def gain_over(self, other: "ImageError") -> tuple[float | None, float | None]:
        """Mean of the differences in PSNR, image by image, and its standard error, both in dB.

        Images of one noise come out well or badly together, so the error of the mean difference
        is smaller than the two spreads would say. None where an image is not finite, and for the
        standard error of a single image.
        """
        if not np.isfinite([self.psnr_db, other.psnr_db]).all():
            return None, None
        gains = self.psnr_db - other.psnr_db
        error = float(gains.std(ddof=1) / np.sqrt(len(gains))) if len(gains) > 1 else None
        return float(gains.mean()), error


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
        See `load_decoder`.
    accelerator : str or Accelerator
    images, steps, guidance, seed, batch, on_call
        As for `loraq_sim.diffusion.sample_images`.
    calibration : mapping of name to Layer, optional
        For smoothing, for residual inputs and for methods that use data.
    calibrated_on : str, optional
        What the calibration was made of, for the rows: not the images that are compared.

    Attributes
    ----------
    reference : ndarray of shape (images, channels, height, width), float32
        What the model draws as it is.

    Rows of all variants but the first say what they gain over the first, image by image.
    """

    def __init__(
        self,
        transformer: Transformer,
        decoder: Decoder,
        accelerator: "str | hwmodels.Accelerator",
        *,
        calibration: Mapping[str, Layer] | None = None,
        calibrated_on: str | None = None,
        on_call: Callable[[], None] | None = None,
        **sampling: Any,
    ) -> None:
        if isinstance(accelerator, str):
            accelerator = hwmodels.load_accelerator(accelerator)
        self.transformer, self.decoder, self.accelerator = transformer, decoder, accelerator
        self.calibration, self.sampling = calibration, sampling
        self.calibrated_on = calibrated_on
        self.reference = self._draw(on_call)
        # What gains are counted from: the first variant that was drawn.
        self._first: tuple[str, ImageError] | None = None

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
        method = "+".join(methods)
        first = self._first
        if first is None:
            self._first = f"{variant.label} {method}", error
        # Chosen layer by layer; else the columns say it.
        by_layer = variant.options.get("condition") or isinstance(variant.source, Recipe)
        chosen = emulated.transforms_note() if by_layer else ""
        gain, gain_error = (None, None) if first is None else error.gain_over(first[1])
        return {
            "split": variant.label,
            "method": method,
            "psnr_db": error.mean_psnr_db,
            "psnr_std": error.psnr_std,
            "psnr_gain_db": gain,
            "psnr_gain_se_db": gain_error,
            "gain_over": None if first is None else first[0],
            "ssim": error.mean_ssim,
            "rank": ranks.pop() if len(ranks) == 1 else None,
            "n_layers": len(emulated.plans),
            "weight_bytes": emulated.weight_bytes,
            "bits_per_weight": emulated.bits_per_weight,
            "smooth": variant.options.get("smooth"),
            "rotation": variant.options.get("rotate"),
            "feedback_rank": sum(plan.solution.feedback_rank for plan in emulated.plans),
            "calibration": self.calibrated_on,
            "condition": variant.options.get("condition"),
            "finish": variant.options.get("finish"),
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
            "message": emulated.clipped_note() or chosen,
        }
