"""How far images are from reference images: PSNR and SSIM.

PSNR = 10 log10(range^2 / mean square difference), per image. SSIM is that of Wang et al. (IEEE
Trans. Image Processing 13, 2004): Gaussian window of 11 x 11 (sigma 1.5), K1 = 0.01, K2 = 0.03,
the mean over all pixels whose window lies inside the image, over channels, per image.
"""

from dataclasses import dataclass

import numpy as np

from loraq_sim.errors import InputError

__all__ = ["HIGHEST_PSNR_DB", "ImageError", "compare_images"]

HIGHEST_PSNR_DB = 150.0
"""PSNR of equal images, so that means and spreads stay finite; about what float32 can resolve."""

_SIGMA = 1.5
_RADIUS = 5
_K1, _K2 = 0.01, 0.03


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageError:
    """PSNR in dB and SSIM of each image, (images,) float64; None where images are too small."""

    psnr_db: np.ndarray
    ssim: np.ndarray | None

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
    images: np.ndarray,
    reference: np.ndarray,
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


def _check(images: np.ndarray, reference: np.ndarray, allow_non_finite: bool) -> None:
    if images.shape != reference.shape or images.ndim != 4 or images.size == 0:
        raise InputError(
            "images and reference must both be (images, channels, height, width), got "
            f"{images.shape} and {reference.shape}"
        )
    checked = {"reference": reference} if allow_non_finite else {"images": images}
    for name, values in (checked | {"reference": reference}).items():
        if not np.isfinite(values).all():
            raise InputError(f"{name} hold NaN or Inf: the model has left its range")


def _ssim(x: np.ndarray, y: np.ndarray, data_range: float) -> np.ndarray:
    mean_x, mean_y = _smoothed(x), _smoothed(y)
    variance_x = _smoothed(x * x) - mean_x**2
    variance_y = _smoothed(y * y) - mean_y**2
    covariance = _smoothed(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    inside = (..., slice(_RADIUS, -_RADIUS), slice(_RADIUS, -_RADIUS))
    return (luminance * structure)[inside].mean(axis=(1, 2, 3))


def _smoothed(x: np.ndarray) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, _SIGMA, axes=(2, 3), radius=_RADIUS)
