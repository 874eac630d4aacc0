"""Kinds and rows per call of plain checkpoints: from names and configs, never guessed."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import loraq_sim as lq
from loraq_sim.dumps.checkpoint_folder import rows_of_unet
from loraq_sim.dumps.kinds import list_models, load_inventory, rows_of_model
from loraq_sim.errors import InputError
from loraq_sim.layers import rows_notes
from loraq_sim.settings import SIXTEEN_BIT_KINDS, skipped

PIXART = {
    "pos_embed.proj": "patch_embed",
    "adaln_single.emb.timestep_embedder.linear_1": "time_embed",
    "adaln_single.linear": "adaln_shared",
    "caption_projection.linear_1": "text_embed",
    "transformer_blocks.0.attn1.to_q": "self_q",
    "transformer_blocks.0.attn2.to_k": "cross_k",
    "transformer_blocks.0.ff.net.2": "ffn_down",
    "proj_out": "proj_out",
}
KEPT = {"transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"}


def save_as(suffix, path, names):
    weights = {f"{name}.weight": np.ones((4, 8), np.float32) for name in names}
    if suffix == "safetensors":
        save_file(weights, path)
    elif suffix == "npz":
        np.savez(path, **weights)
    else:
        torch = pytest.importorskip("torch")
        torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt"])
def test_a_plain_checkpoint_has_the_kinds_of_its_names(tmp_path, suffix, prefix):
    path = save_as(suffix, tmp_path / f"plain.{suffix}", [prefix + name for name in PIXART])
    dump = lq.read_layer_dump(path)
    assert {name: dump.info(name).kind for name in dump} == PIXART
    left = {n for n in dump if not skipped(n, dump.info(n).kind, SIXTEEN_BIT_KINDS)}
    assert left == KEPT
    assert set(dump.select("self_*")) == {"transformer_blocks.0.attn1.to_q"}
    # Whole names still say what they mean.
    assert dump[f"{prefix}proj_out"].name == "proj_out"
    assert f"{prefix}proj_out" in dump
    assert set(dump.select(f"{prefix}caption_*")) == {"caption_projection.linear_1"}


def test_a_kind_that_the_file_says_stays(tmp_path):
    layer = lq.Layer(name="proj_out", weight=np.ones((4, 8), np.float32), kind="linear")
    lq.write_layer_dump(tmp_path / "dump.npz", [layer])
    assert lq.read_layer_dump(tmp_path / "dump.npz").info("proj_out").kind == "linear"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("blocks.3.cross_attn.kv_linear", "cross_kv"),
        ("final_layer.linear", "proj_out"),
        ("blocks.3.adaLN_modulation.1", "adaln_block"),
        ("double_blocks.0.img_mod.lin", "adaln_block"),
        ("t_embedder.mlp.0", "time_embed"),
        ("time_embedding.linear_1", "time_embed"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "cross_v"),
    ],
)
def test_original_names_and_unets_keep_their_sixteen_bit_layers(tmp_path, name, kind):
    path = save_as("npz", tmp_path / "plain.npz", [name])
    assert lq.read_layer_dump(path).info(name).kind == kind
    assert kind in SIXTEEN_BIT_KINDS


def test_without_a_source_the_rows_are_not_known(tmp_path):
    dump = lq.read_layer_dump(save_as("npz", tmp_path / "plain.npz", PIXART))
    assert {dump.info(name).m for name in dump} == {None}
    assert {layer.m for layer in dump.values()} == {None}


@pytest.mark.parametrize(
    ("name", "config", "patch", "size"),
    [
        ("pixart-sigma", "PixArtTransformer2DModel", 2, 128),
        ("sana-1.6b", "SanaTransformer2DModel", 1, 32),
        ("sd3.5-medium", "SD3Transformer2DModel", 2, 128),
    ],
)
@pytest.mark.parametrize("resolution", [1024, 512])
def test_a_config_gives_the_rows_of_the_inventory(tmp_path, name, config, patch, size, resolution):
    layers = [layer for layer in load_inventory(name, resolution=resolution).layers][:40]
    facts = {"_class_name": config, "patch_size": patch, "sample_size": size * resolution // 1024}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    dump = lq.read_layer_dump(save_as("npz", tmp_path / "plain.npz", [x.name for x in layers]))
    assert {n: dump.info(n).m for n in dump} == {x.name: x.rows_per_call for x in layers}
    assert "2 samples per call (guidance included)" in dump.info(layers[0].name).m_source


def test_a_config_of_a_smaller_model_of_the_class_gives_its_own_rows(tmp_path):
    facts = {"_class_name": "PixArtTransformer2DModel", "patch_size": 2, "sample_size": [32, 64]}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    dump = lq.read_layer_dump(save_as("npz", tmp_path / "plain.npz", PIXART))
    rows = {name: dump.info(name).m for name in PIXART}
    assert rows["transformer_blocks.0.ff.net.2"] == 2 * 16 * 32
    assert rows["transformer_blocks.0.attn2.to_k"] == 600
    assert rows["adaln_single.linear"] == 2


def test_of_an_unknown_class_only_the_rows_of_the_image_are_known(tmp_path):
    facts = {"_class_name": "MyTransformer", "patch_size": 2, "sample_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    dump = lq.read_layer_dump(save_as("npz", tmp_path / "plain.npz", PIXART))
    rows = {name: dump.info(name).m for name in PIXART}
    assert rows["transformer_blocks.0.ff.net.2"] == 256
    assert rows["transformer_blocks.0.attn2.to_k"] is None
    assert "1 sample per call" in dump.info("transformer_blocks.0.ff.net.2").m_source


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 5000,
        '{"sample_size": 128}',
        '{"patch_size": 2, "sample_size": "big"}',
        '{"patch_size": true, "sample_size": 128}',
        '{"patch_size": 0, "sample_size": 128}',
        '{"patch_size": 2, "sample_size": 1e9}',
        '{"_class_name": ["x"], "patch_size": 2, "sample_size": 32}',
    ],
)
def test_a_config_that_says_nothing_is_no_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    dump = lq.read_layer_dump(save_as("npz", tmp_path / "plain.npz", ["fc"]))
    assert dump.info("fc").m is None


@pytest.mark.parametrize("model", list_models())
def test_a_named_model_gives_the_rows_of_its_inventory(model):
    layers = load_inventory(model, resolution=512).layers
    rows, source = rows_of_model({x.name: x.kind for x in layers}, model, 512)
    assert rows == {x.name: x.rows_per_call for x in layers}
    assert source.startswith(f"{model} at 512 px, ")


def test_a_model_without_any_of_the_layers_is_refused():
    with pytest.raises(InputError, match=r"--model sana-0.6b: none of 1 layer, such as 'fc'"):
        rows_of_model({"fc": "linear"}, "sana-0.6b", 1024)


def test_notes_say_what_is_not_known_what_is_sampled_and_whence_the_rest():
    notes = rows_notes(
        {
            "a": (None, ""),
            "b": (64, "activation rows of the dump"),
            "c": (8192, "pixart-sigma at 1024 px, 2 samples per call (guidance included)"),
            "d": (5, "given"),
            "e": (7, "dump"),
        }
    )
    assert len(notes) == 3
    assert notes[0].startswith("rows per call (M) are not known for 1 of 5 layers, such as a")
    assert "give --rows M" in notes[0]
    assert notes[1].startswith("rows per call (M) are taken to be the activation rows of the dump ")
    assert "1 of 5 layers, such as b (M = 64); give --rows M if a call has others" in notes[1]
    assert "from pixart-sigma at 1024 px, 2 samples per call" in notes[2]


@pytest.mark.parametrize("resolution", [1024, 512])
def test_rows_of_a_unet_follow_from_its_blocks(resolution):
    """As hooks saw them in SDXL; a U-Net of more levels has others in blocks of the same names."""
    inventory = load_inventory("sdxl", resolution=resolution)
    kinds = {layer.name: layer.kind for layer in inventory.layers}
    expected = {layer.name: layer.rows_per_call for layer in inventory.layers}
    assert rows_of_unet(kinds, resolution // 8, 2, 77) == expected
    # SD 1.5 has four levels: attention in its second up block works where SDXL has none.
    deeper = {
        "down_blocks.3.resnets.0.conv1": "resblock_conv",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "self_q",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "self_q",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "cross_k",
        "up_blocks.1.upsamplers.0.conv": "sampler_conv",
        "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q": "self_q",
    }
    rows, _ = rows_of_model(deeper, "sdxl", resolution)
    edge = resolution // 8
    squares = [(edge // 8) ** 2, (edge // 8) ** 2, (edge // 4) ** 2, 77, (edge // 2) ** 2, edge**2]
    assert list(rows.values()) == [2 * square for square in squares]
