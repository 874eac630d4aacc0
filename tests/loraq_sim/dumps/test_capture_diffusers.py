"""Diffusers folders: the bundled PixArt against the bundled dump of it, and random small models."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from loraq_sim.dumps.capture import capture_layers
from loraq_sim.dumps.capture_diffusers import load_diffusers_folder
from loraq_sim.dumps.layer_dump import read_layer_dump
from loraq_sim.dumps.steps import steps_of_layer
from loraq_sim.errors import DumpError, InputError

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs the extra [diffusion]")


@pytest.fixture(scope="module")
def tiny_pixart(diffusers):
    found = load_diffusers_folder(EXAMPLES / "tiny_pixart", steps=8, images=10, guidance=3.0)
    return capture_layers(found, tokens=512)


def channel_rms(rows):
    return np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=0))


def test_the_checkpoint_has_the_weights_of_the_bundled_dump(tiny_pixart):
    reference = read_layer_dump(EXAMPLES / "tiny_pixart.pt")
    for name in reference:
        expected, found = reference[name], tiny_pixart[name]
        assert found.kind == expected.kind
        half = found.weight.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(half, expected.weight)


def test_captured_inputs_have_the_statistics_of_the_bundled_dump(tiny_pixart):
    # That dump was recorded by other code, over 25 steps of other noise. The loudness of a channel
    # agrees if model, time steps, captions and guidance do.
    reference = read_layer_dump(EXAMPLES / "tiny_pixart.pt")
    for name in reference:
        ratio = channel_rms(tiny_pixart[name].activations) / channel_rms(
            reference[name].activations
        )
        assert 0.85 < np.median(ratio) < 1.15, name
        assert np.quantile(np.abs(np.log(ratio)), 0.9) < np.log(1.5), name


def test_layers_groups_and_steps_of_a_pixart(tiny_pixart):
    assert len(tiny_pixart) == 4 * 10 + 7
    infos = {name: tiny_pixart.info(name) for name in tiny_pixart}
    # q, k and v share an input in each block; all blocks' text keys and values share one.
    assert len({info.activation_key for info in infos.values()}) == 4 * 6 + 1 + 7
    query = infos["transformer_blocks.2.attn1.to_q"]
    assert (query.group, query.rows_per_call) == ("transformer_blocks.2.attn1", 20 * 16)
    assert infos["transformer_blocks.2.attn2.to_v"].group == "transformer_blocks"
    steps = steps_of_layer(tiny_pixart, "transformer_blocks.2.attn1.to_q")
    np.testing.assert_array_equal(np.unique(steps), np.arange(125, 1001, 125))
    assert tiny_pixart.meta["captions"] == "captions.safetensors"
    assert tiny_pixart.meta["checkpoint"] == "tiny_pixart"
    assert tiny_pixart.skipped == {}


def small_folder(diffusers, folder, name):
    """A randomly initialized model that predicts noise and variance (PixArt) or velocity."""
    import torch

    torch.manual_seed(0)
    shared = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 4}
    special = {
        "PixArtTransformer2DModel": {
            **{"in_channels": 4, "out_channels": 8, "patch_size": 2, "norm_num_groups": 4},
            **{"cross_attention_dim": 16, "caption_channels": 12, "sample_size": 8},
        },
        "SanaTransformer2DModel": {
            **{"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2},
            **{"cross_attention_head_dim": 8, "cross_attention_dim": 16, "caption_channels": 12},
        },
    }
    model = getattr(diffusers, name)(**{**shared, **special[name]})
    model.save_pretrained(folder / "transformer")
    return model


@pytest.mark.parametrize(
    ("name", "n_layers", "rows"),
    [
        # Per block 10 linear layers; outside them 6, and patches are a 2x2 convolution.
        ("PixArtTransformer2DModel", 2 * 10 + 7, 2 * 2 * 16),
        # Per block 8 linear layers and 2 of the 3 convolutions; the patch embedding is 1x1.
        ("SanaTransformer2DModel", 2 * 10 + 7, 2 * 2 * 16),
    ],
)
def test_random_models_are_captured_whole(diffusers, tmp_path, name, n_layers, rows):
    model = small_folder(diffusers, tmp_path, name)
    found = load_diffusers_folder(tmp_path, steps=3, images=2)
    dump = capture_layers(found, tokens=32)
    assert len(dump) == n_layers
    ffn = "ff.conv_inverted" if name.startswith("Sana") else "ff.net.0.proj"
    layer = dump[f"transformer_blocks.1.{ffn}"]
    assert (layer.kind, layer.rows_per_call) == ("ffn_up", rows)
    parameters = dict(model.named_parameters())
    weight = parameters[f"transformer_blocks.1.{ffn}.weight"].detach().numpy()
    np.testing.assert_array_equal(layer.weight, weight.reshape(layer.n, layer.k))
    assert dump.meta["captions"] == "standard normal values"
    assert len(dump.meta["time_steps"]["values"]) == 3


def test_a_missing_diffusers_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(DumpError, match="pip install 'loraq-sim\\[diffusion\\]'"):
        load_diffusers_folder(EXAMPLES / "tiny_pixart")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is no valid JSON"),
        ("[]", "must hold a JSON object, got a list"),
        ('{"_class_name": "os.system"}', "holds a os.system; supported are PixArtTransformer2D"),
        ('{"_class_name": "PixArtTransformer2DModel"}', "has no .safetensors weights"),
        (" " * (2**20 + 1), "over 1 MiB, so no model configuration"),
    ],
)
def test_folders_of_strangers_are_refused(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DumpError, match=message):
        load_diffusers_folder(tmp_path)


def test_other_folders_and_numbers_are_refused(tmp_path):
    with pytest.raises(DumpError, match="has no config.json"):
        load_diffusers_folder(tmp_path)
    with pytest.raises(InputError, match="must be at least 1, got 0 and 2"):
        load_diffusers_folder(EXAMPLES / "tiny_pixart", steps=0)


def test_weights_that_do_not_fit_are_told(diffusers, tmp_path):
    config = json.loads((EXAMPLES / "tiny_pixart" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights" * 100_000)
    with pytest.raises(DumpError, match="diffusers cannot load it"):
        load_diffusers_folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_layers", 10**9, "1,000,000,000 blocks of width 128, which 4954808 bytes"),
        ("num_layers", 400, "400 blocks of width 128"),
        ("attention_head_dim", 10**6, "4 blocks of width 4000000"),
        ("sample_size", 10**6, "cannot hold"),
        ("caption_channels", 10**8, "cannot hold"),
        ("num_layers", "many", "no usable num_layers: 'many'"),
        ("num_attention_heads", -1, "no usable num_attention_heads: -1"),
    ],
)
def test_absurd_sizes_are_refused_before_a_model_is_built(tmp_path, key, value, message):
    folder = EXAMPLES / "tiny_pixart"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(DumpError, match=message):
        load_diffusers_folder(tmp_path)


def test_missing_weights_are_not_made_up(diffusers, tmp_path, capfd):
    folder = EXAMPLES / "tiny_pixart"
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 5}))
    name = "diffusion_pytorch_model.safetensors"
    (tmp_path / name).symlink_to(folder / name)
    with pytest.raises(DumpError, match="lacks 21 weights .* such as transformer_blocks.4.attn1"):
        load_diffusers_folder(tmp_path)
    assert capfd.readouterr().err == ""


def test_loading_shards_is_quiet(diffusers, tmp_path, capfd):
    small_folder(diffusers, tmp_path, "SanaTransformer2DModel").save_pretrained(
        tmp_path / "transformer", max_shard_size="20KB"
    )
    (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    load_diffusers_folder(tmp_path, steps=1)
    assert capfd.readouterr() == ("", "")


def test_captions_must_fit_the_model(diffusers, tmp_path):
    folder = EXAMPLES / "tiny_pixart"
    with pytest.raises(DumpError, match="must hold one tensor of shape \\(captions, tokens, 64\\)"):
        load_diffusers_folder(folder, captions=folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(DumpError, match="no such file"):
        load_diffusers_folder(folder, captions=tmp_path / "none.safetensors")
    with pytest.raises(DumpError, match="no safetensors file"):
        load_diffusers_folder(folder, captions=folder / "config.json")


HEADS = {"num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
SMALL = {
    "FluxTransformer2DModel": {
        **{"in_channels": 8, "num_single_layers": 1, "joint_attention_dim": 16},
        **{"pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 4, 4)},
    },
    "QwenImageTransformer2DModel": {
        **{"in_channels": 8, "out_channels": 2, "joint_attention_dim": 16},
        "axes_dims_rope": (4, 4, 4),
    },
    "SD3Transformer2DModel": {
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 16},
        **{"caption_projection_dim": 24, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
    },
    "WanTransformer3DModel": {
        **{"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32},
    },
    "DiTTransformer2DModel": {
        **{"in_channels": 4, "out_channels": 8, "sample_size": 8, "num_embeds_ada_norm": 10},
    },
    "UNet2DConditionModel": {
        **{"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1},
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 16, "attention_head_dim": 8},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
        "projection_class_embeddings_input_dim": 64,
    },
}
# Rows M of the image: tokens of one call, guidance included where it is one batch.
ROWS = {
    "FluxTransformer2DModel": ("transformer_blocks.0.ff.net.2", 1024),
    "QwenImageTransformer2DModel": ("transformer_blocks.0.img_mlp.net.2", 1024),
    "SD3Transformer2DModel": ("transformer_blocks.0.attn.to_q", 2 * 16),
    "WanTransformer3DModel": ("blocks.0.ffn.net.2", 3 * 256),
    "DiTTransformer2DModel": ("transformer_blocks.0.ff.net.2", 2 * 16),
    "UNet2DConditionModel": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 2 * 64),
}


@pytest.mark.parametrize("name", SMALL)
def test_folders_of_other_families_are_denoised_and_captured(name, tmp_path, diffusers):
    small = SMALL[name] if name.startswith("UNet") else HEADS | SMALL[name]
    getattr(diffusers, name)(**small).save_pretrained(tmp_path / name)
    source = load_diffusers_folder(tmp_path / name, steps=2, images=1)
    dump = capture_layers(source, tokens=8)
    layer, rows = ROWS[name]
    assert dump.info(layer).rows_per_call == rows
    assert dump.skipped == {}
    assert "linear" not in {dump.info(one).kind for one in dump}
    values = dump.meta["time_steps"]["values"]
    assert len(values) == 2
    assert values == sorted(values, reverse=True)
    assert all(np.isfinite(dump[one].activations).all() for one in dump)
    if name.startswith("UNet"):
        assert dump.left_out == ""
        convolution = dump.info("down_blocks.0.resnets.0.conv1")
        assert (convolution.k, convolution.rows_per_call) == (32 * 9, 2 * 64)


def test_captions_of_another_family_are_refused(tmp_path, diffusers):
    small = HEADS | SMALL["DiTTransformer2DModel"]
    diffusers.DiTTransformer2DModel(**small).save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match="--captions are for PixArt.* and Sana.*, not for a DiT"):
        load_diffusers_folder(tmp_path / "dit", captions=tmp_path / "c.safetensors")
