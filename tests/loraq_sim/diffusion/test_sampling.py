"""Denoising in batches, decoding, and studies of variants, on small random transformers."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from loraq_sim.diffusion import (
    ImageStudy,
    ImageVariant,
    capture_transformer,
    load_decoder,
    load_transformer,
    sample_images,
)
from loraq_sim.diffusion.images import batch_sizes
from loraq_sim.dumps.capture_diffusers import denoising_calls
from loraq_sim.errors import DumpError, InputError
from loraq_sim.recipe import Recipe

TINY = Path(__file__).parents[3] / "examples" / "tiny_pixart"
KEYWORDS = {"images": 3, "steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs the extra [diffusion]")


@pytest.fixture(scope="module")
def tiny(diffusers):
    return load_transformer(TINY)


def latent_folder(diffusers, folder, *, layers=1, heads=2, width=8, size=8):
    """A random PixArt that predicts noise and variance of 4 latent channels."""
    torch.manual_seed(0)
    model = diffusers.PixArtTransformer2DModel(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=width, in_channels=4,
        out_channels=8, patch_size=2, sample_size=size, cross_attention_dim=heads * width,
        caption_channels=12, norm_num_groups=4, use_additional_conditions=False,
    )  # fmt: skip
    model.save_pretrained(folder / "transformer")


def test_images_are_those_of_the_denoising_loop_written_out(tiny):
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    text = tiny.text
    x = noise
    extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}, "return_dict": False}
    with torch.no_grad():
        for t in (1000.0, 500.0):
            times = torch.full((3,), t)
            caption, empty = text[:3], text[-1:].expand(3, -1, -1)
            v1 = tiny.model(x, encoder_hidden_states=caption, timestep=times, **extra)[0]
            v0 = tiny.model(x, encoder_hidden_states=empty, timestep=times, **extra)[0]
            x = x - (v0 + 3.0 * (v1 - v0)) / 2
    found = sample_images(tiny, seed=5, **KEYWORDS)
    # Float32 sums of other lengths (one batch or two) differ in the last bits; values reach 3.
    np.testing.assert_allclose(found, x.numpy(), atol=1e-4)


def test_an_image_has_the_same_noise_and_caption_in_every_batch(tiny):
    whole = sample_images(tiny, **KEYWORDS)
    for batch in (1, 2):
        parts = sample_images(tiny, **KEYWORDS, batch=batch)
        np.testing.assert_allclose(parts, whole, atol=1e-4)
    more = sample_images(tiny, images=5, steps=2, guidance=3.0)
    np.testing.assert_allclose(more[:3], whole, atol=1e-4)
    again = sample_images(tiny, **KEYWORDS)
    np.testing.assert_array_equal(again, whole)


def test_batches_hold_what_fits_in_memory(tiny):
    assert batch_sizes(tiny, images=80) == [80]
    assert batch_sizes(tiny, images=7, batch=3) == [3, 3, 1]
    tiny_config = tiny.model.config
    assert (tiny_config.sample_size // tiny_config.patch_size) ** 2 * 1024 == 2**14
    assert batch_sizes(tiny, images=1025) == [1024, 1]


def test_every_model_call_is_reported(tiny):
    calls = []
    sample_images(tiny, images=3, steps=4, batch=2, on_call=lambda: calls.append(1))
    assert len(calls) == 2 * 4


def test_numbers_below_one_are_refused(tiny):
    for bad in ({"images": 0, "steps": 1}, {"images": 1, "steps": 0}):
        with pytest.raises(InputError, match="1 or more"):
            sample_images(tiny, **bad)
    with pytest.raises(InputError, match="1 or more"):
        sample_images(tiny, images=1, steps=1, batch=0)


def test_a_model_that_fails_is_named(tiny):
    def broken(*args, **kwargs):
        raise RuntimeError("no such thing")

    hook = tiny.model.register_forward_pre_hook(broken)
    try:
        with pytest.raises(DumpError, match="tiny_pixart: the model fails: RuntimeError: no such"):
            sample_images(tiny, images=1, steps=1)
    finally:
        hook.remove()


def test_a_model_of_pixels_is_decoded_by_clipping(tiny):
    decoder = load_decoder(TINY, tiny)
    assert (decoder.space, decoder.vae) == ("pixels", None)
    x = np.array([[[[-3.0, 0.5]]]], np.float32)
    np.testing.assert_array_equal(decoder.decode(x), [[[[-1.0, 0.5]]]])


def test_latents_are_compared_without_a_vae(diffusers, tmp_path):
    latent_folder(diffusers, tmp_path)
    transformer = load_transformer(tmp_path)
    decoder = load_decoder(tmp_path, transformer)
    assert decoder.space == "latents"
    study = ImageStudy(transformer, decoder, "aie2", images=2, steps=2)
    assert study.reference.shape == (2, 4, 8, 8)
    coarse = study.run(ImageVariant(label="W4A4", source="W4A4"))
    fine = study.run(ImageVariant(label="W8A8", source="W8A8"))
    assert coarse.row["space"] == "latents"
    assert coarse.row["psnr_db"] < fine.row["psnr_db"]
    assert coarse.row["ssim"] is None


def test_latents_are_decoded_by_the_vae_of_the_pipeline(diffusers, tmp_path):
    latent_folder(diffusers, tmp_path)
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=4, norm_num_groups=4, sample_size=8,
        scaling_factor=0.5,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    transformer = load_transformer(tmp_path)
    decoder = load_decoder(tmp_path, transformer)
    x = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = vae.eval().decode(torch.from_numpy(x) / 0.5).sample.clamp(-1, 1)
    # The same float32 kernels, one image at a time instead of two.
    np.testing.assert_allclose(decoder.decode(x), expected, atol=1e-5)
    assert decoder.space == "pixels"
    for place, text in ((tmp_path / "vae" / "config.json", "{"),):
        place.write_text(text)
        with pytest.raises(DumpError, match="vae: diffusers cannot load it"):
            load_decoder(tmp_path, transformer)


def test_a_vae_of_other_latents_is_refused(diffusers, tmp_path):
    latent_folder(diffusers, tmp_path)
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), latent_channels=2, norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(DumpError, match="decodes 2 latent channels, the transformer has 4"):
        load_decoder(tmp_path, load_transformer(tmp_path))


def test_a_study_draws_each_variant_at_the_noise_of_its_reference(tiny):
    study = ImageStudy(tiny, load_decoder(TINY, tiny), "aie2", seed=2, **KEYWORDS)
    variants = [ImageVariant(label=split, source=split) for split in ("W4A4", "W4A8", "W8A8")]
    found = [study.run(variant) for variant in variants]
    psnr = [images.row["psnr_db"] for images in found]
    assert psnr == sorted(psnr)
    np.testing.assert_array_equal(found[0].images, study.run(variants[0]).images)
    row = found[0].row
    error = study.reference.clip(-1, 1) - found[0].images
    by_hand = 10 * np.log10(4 / np.mean(error.astype(np.float64) ** 2, axis=(1, 2, 3)))
    assert row["psnr_db"] == pytest.approx(by_hand.mean())
    assert row["psnr_std"] == pytest.approx(by_hand.std())
    assert row["n_layers"] == 32
    assert row["bits_per_weight"] == pytest.approx(4.25)
    assert row["arithmetic"] == "bit exact"


def test_narrow_accumulators_ruin_images_and_say_so(tiny):
    study = ImageStudy(tiny, load_decoder(TINY, tiny), "aie2", **KEYWORDS)
    wide = study.run(ImageVariant(label="W8A8", source="W8A8"))
    narrow = study.run(
        ImageVariant(
            label="W8A8",
            source="W8A8",
            options={"datapath": {"acc_bits": 15, "overflow": "wrap"}},
        )
    )
    assert wide.row["overflow_count"] == 0
    assert narrow.row["overflow_count"] > 0
    assert narrow.row["psnr_db"] < wide.row["psnr_db"] - 10
    assert narrow.row["safe_acc_bits"] > 15


def test_calibration_rows_are_those_of_a_capture(tiny):
    dump = capture_transformer(tiny, images=2, steps=2, guidance=3.0, seed=9, tokens=16)
    layer = dump["transformer_blocks.0.attn1.to_q"]
    assert layer.activations.shape == (16, 128)
    study = ImageStudy(tiny, load_decoder(TINY, tiny), "aie2", calibration=dump, **KEYWORDS)
    smooth = study.run(ImageVariant(label="W4A4", source="W4A4", options={"smooth": 0.5}))
    plain = study.run(ImageVariant(label="W4A4", source="W4A4"))
    assert smooth.row["smooth"] == 0.5
    assert smooth.row["weight_bytes"] > plain.row["weight_bytes"]
    assert not np.array_equal(smooth.images, plain.images)


def test_a_transformer_of_the_width_of_pixart_runs(diffusers, tmp_path):
    latent_folder(diffusers, tmp_path, layers=1, heads=16, width=72, size=8)
    transformer = load_transformer(tmp_path)
    transformer = type(transformer)(**{**vars(transformer), "text": transformer.text[:, :20]})
    assert transformer.model.transformer_blocks[0].attn1.to_q.weight.shape == (1152, 1152)
    study = ImageStudy(transformer, load_decoder(tmp_path, transformer), "aie2", images=1, steps=1)
    layers = {"transformer_blocks.*": "W4A4", "self_q": "W4A4+W8A8r32", "cross_*": {"skip": True}}
    recipe = Recipe.model_validate({"defaults": {"method": "lqer"}, "layers": layers})
    row = study.run(ImageVariant(label="recipe", source=recipe)).row
    assert row["n_layers"] == 6
    assert 20 < row["psnr_db"] < 80


def test_the_denoising_loop_hands_back_its_images(tiny):
    calls = denoising_calls(tiny, steps=1, images=1, guidance=1.0, seed=0)
    _, inputs = next(calls)
    with pytest.raises(StopIteration) as end:
        calls.send((torch.zeros_like(inputs["hidden_states"]),))
    assert re.match(r"torch.Size\(\[1, 1, 16, 16\]\)", str(end.value.value.shape))
