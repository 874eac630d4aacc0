"""PSNR and SSIM against their definitions and against values of scikit-image."""

import statistics

import numpy as np
import pytest

from loraq_sim.diffusion.images import HIGHEST_PSNR_DB, ImageError, compare_images
from loraq_sim.errors import InputError

SSIM = (0.8632234335399955, 0.7950114553748486)
PSNR = (20.62415164267804, 20.685009857447373)


def noisy_pair():
    rng = np.random.default_rng(7)
    reference = np.tanh(rng.standard_normal((2, 3, 16, 20)))
    return np.clip(reference + 0.2 * rng.standard_normal(reference.shape), -1, 1), reference


def test_values_are_those_of_scikit_image():
    # scikit-image 0.26.0: structural_similarity(a, b, data_range=2, channel_axis=0,
    # gaussian_weights=True, sigma=1.5, use_sample_covariance=False); peak_signal_noise_ratio.
    error = compare_images(*noisy_pair(), data_range=2.0)
    np.testing.assert_allclose(error.ssim, SSIM, rtol=1e-9)
    np.testing.assert_allclose(error.psnr_db, PSNR, rtol=1e-12)
    assert error.mean_psnr_db == pytest.approx(np.mean(PSNR))
    assert error.psnr_std == pytest.approx(abs(PSNR[0] - PSNR[1]) / 2)
    assert error.mean_ssim == pytest.approx(np.mean(SSIM))


def test_a_gain_is_the_mean_of_differences_image_by_image():
    base, better = np.array([20.0, 30.0, 25.0]), np.array([21.0, 30.5, 27.0])
    errors = [ImageError(psnr_db=psnr, ssim=None) for psnr in (better, base)]
    gain, error = errors[0].gain_over(errors[1])
    differences = [1.0, 0.5, 2.0]
    assert gain == pytest.approx(statistics.mean(differences))
    assert error == pytest.approx(statistics.stdev(differences) / 3**0.5)
    # Of images this uneven the spreads alone would say six times as much.
    assert error < 0.2 * statistics.stdev(base) / 3**0.5
    alone = [ImageError(psnr_db=psnr[:1], ssim=None) for psnr in (better, base)]
    assert alone[0].gain_over(alone[1]) == (pytest.approx(1.0), None)
    wild = ImageError(psnr_db=np.array([20.0, -np.inf, 25.0]), ssim=None)
    assert errors[0].gain_over(wild) == (None, None)


def test_equal_images_have_the_highest_psnr_and_ssim_one():
    _, reference = noisy_pair()
    error = compare_images(reference, reference, data_range=2.0)
    np.testing.assert_allclose(error.psnr_db, HIGHEST_PSNR_DB)
    np.testing.assert_allclose(error.ssim, 1.0)


def test_a_constant_offset_has_the_psnr_of_its_square():
    reference = np.zeros((3, 1, 12, 12))
    reference[:, :, 0] = 1
    error = compare_images(reference + 0.1, reference, data_range=1.0)
    np.testing.assert_allclose(error.psnr_db, 20.0)


def test_latents_are_measured_against_the_range_of_the_reference():
    reference = np.linspace(-3, 5, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4)
    error = compare_images(reference + 0.8, reference)
    np.testing.assert_allclose(error.psnr_db, 20.0)
    # The window of SSIM does not fit into 4 x 4.
    assert error.ssim is None
    assert error.mean_ssim is None


def test_images_that_cannot_be_compared_are_refused():
    images, reference = noisy_pair()
    for wrong in (images[:1], images[0]):
        with pytest.raises(InputError, match="shape|must both be"):
            compare_images(wrong, reference)
    with pytest.raises(InputError, match="NaN"):
        compare_images(images * np.nan, reference)
    with pytest.raises(InputError, match="data_range"):
        compare_images(np.ones((1, 1, 12, 12)), np.zeros((1, 1, 12, 12)))


def test_an_image_that_is_not_finite_has_no_psnr_and_leaves_the_others_alone():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((2, 3, 16, 16)).astype(np.float32)
    images = reference + np.float32(0.1)
    images[1, 0, 2, 2] = np.nan
    found = compare_images(images, reference, data_range=2, allow_non_finite=True)
    alone = compare_images(images[:1], reference[:1], data_range=2)
    assert found.psnr_db.tolist() == [alone.psnr_db[0], -np.inf]
    assert found.ssim.tolist() == [alone.ssim[0], 0.0]
    assert found.mean_psnr_db == -np.inf
    assert np.isnan(found.psnr_std)
    reference[0, 0, 0, 0] = np.inf
    with pytest.raises(InputError, match="reference hold NaN or Inf"):
        compare_images(images, reference, data_range=2, allow_non_finite=True)
