"""One table of names: kinds of the layers of published models, of diffusers and as released."""

import pytest
import torch

from loraq_sim.dumps.kinds import kinds_of, list_models, load_inventory

TINY = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
JOINT = TINY | {"joint_attention_dim": 32}
# Class in diffusers, its configuration, and what some of its layers are.
MODELS = {
    "FluxTransformer2DModel": (
        JOINT | {"num_single_layers": 1, "pooled_projection_dim": 32, "guidance_embeds": True},
        {
            "transformer_blocks.0.attn.to_out.0": "self_out",
            "transformer_blocks.0.attn.add_k_proj": "text_k",
            "transformer_blocks.1.ff_context.net.2": "text_ffn_down",
            "transformer_blocks.1.norm1_context.linear": "adaln_block",
            "single_transformer_blocks.0.proj_mlp": "ffn_up",
            "single_transformer_blocks.0.proj_out": "single_out",
            "x_embedder": "patch_embed",
        },
    ),
    "SD3Transformer2DModel": (
        JOINT
        | {"caption_projection_dim": 32, "pooled_projection_dim": 32}
        | {"dual_attention_layers": (0,)},
        {
            "transformer_blocks.0.attn2.to_k": "self_k",
            "transformer_blocks.0.attn.to_add_out": "text_out",
            "time_text_embed.text_embedder.linear_1": "time_embed",
            "context_embedder": "text_embed",
        },
    ),
    "QwenImageTransformer2DModel": (
        JOINT,
        {
            "transformer_blocks.0.img_mlp.net.0.proj": "ffn_up",
            "transformer_blocks.0.txt_mlp.net.2": "text_ffn_down",
            "transformer_blocks.1.txt_mod.1": "adaln_block",
            "img_in": "patch_embed",
            "txt_in": "text_embed",
        },
    ),
    "WanTransformer3DModel": (
        TINY | {"text_dim": 32, "freq_dim": 32, "ffn_dim": 64, "image_dim": 32}
        | {"added_kv_proj_dim": 32},
        {
            "blocks.0.attn1.to_out.0": "self_out",
            "blocks.1.attn2.to_q": "cross_q",
            "blocks.1.attn2.add_k_proj": "cross_k",
            "blocks.0.ffn.net.2": "ffn_down",
            "condition_embedder.time_proj": "adaln_shared",
            "condition_embedder.text_embedder.linear_2": "text_embed",
            "patch_embedding": "patch_embed",
        },
    ),
    "ZImageTransformer2DModel": (
        {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
        | {"cap_feat_dim": 32, "axes_dims": [8, 12, 12]},
        {
            "layers.0.attention.to_q": "self_q",
            "layers.0.feed_forward.w2": "ffn_down",
            "context_refiner.0.feed_forward.w3": "ffn_up",
            "layers.0.adaLN_modulation.0": "adaln_block",
            "cap_embedder.1": "text_embed",
            "all_final_layer.2-1.linear": "proj_out",
        },
    ),
    "UNet2DConditionModel": (
        {"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True}
        | {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        | {"projection_class_embeddings_input_dim": 32},
        {
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v": "cross_v",
            "down_blocks.1.attentions.0.proj_in": "transformer_proj",
            "down_blocks.0.resnets.0.time_emb_proj": "time_embed",
            "down_blocks.1.resnets.0.conv_shortcut": "resblock_shortcut",
            "up_blocks.0.upsamplers.0.conv": "sampler_conv",
            "mid_block.resnets.1.conv2": "resblock_conv",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.2": "ffn_down",
        },
    ),
    "PixArtTransformer2DModel": (
        TINY | {"cross_attention_dim": 32, "caption_channels": 32, "sample_size": 8},
        {"transformer_blocks.0.attn2.to_q": "cross_q", "proj_out": "proj_out"},
    ),
    "SanaTransformer2DModel": (
        TINY | {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "sample_size": 8}
        | {"cross_attention_dim": 32, "caption_channels": 32},
        {
            "transformer_blocks.0.ff.conv_inverted": "ffn_up",
            "transformer_blocks.0.ff.conv_depth": "ffn_dwconv3x3",
            "transformer_blocks.0.ff.conv_point": "ffn_down",
        },
    ),
    "DiTTransformer2DModel": (
        TINY | {"sample_size": 8},
        {"proj_out_1": "norm_out", "proj_out_2": "proj_out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model_of_diffusers_has_a_kind(name):
    diffusers = pytest.importorskip("diffusers")
    options, expected = MODELS[name]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    types = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
    kinds = kinds_of([n for n, module in model.named_modules() if isinstance(module, types)])
    assert [n for n, kind in kinds.items() if kind == "linear"] == []
    assert {n: kinds[n] for n in expected} == expected


# As the authors released them: PixArt and SANA, FLUX, SD3.5, SDXL, Wan, Z-Image.
RELEASED = {
    "blocks.0.attn.qkv": "self_qkv",
    "blocks.0.attn.proj": "self_out",
    "blocks.0.cross_attn.q_linear": "cross_q",
    "blocks.0.cross_attn.kv_linear": "cross_kv",
    "blocks.0.cross_attn.proj": "cross_out",
    "blocks.0.mlp.fc1": "ffn_up",
    "blocks.0.mlp.fc2": "ffn_down",
    "blocks.0.mlp.inverted_conv.conv": "ffn_up",
    "blocks.0.mlp.depth_conv.conv": "ffn_dwconv3x3",
    "blocks.0.mlp.point_conv.conv": "ffn_down",
    "x_embedder.proj": "patch_embed",
    "y_embedder.y_proj.fc1": "text_embed",
    "t_embedder.mlp.2": "time_embed",
    "t_block.1": "adaln_shared",
    "final_layer.linear": "proj_out",
    "double_blocks.3.img_attn.qkv": "self_qkv",
    "double_blocks.3.img_attn.proj": "self_out",
    "double_blocks.3.txt_attn.qkv": "text_qkv",
    "double_blocks.3.txt_attn.proj": "text_out",
    "double_blocks.3.img_mlp.0": "ffn_up",
    "double_blocks.3.img_mlp.2": "ffn_down",
    "double_blocks.3.txt_mlp.0": "text_ffn_up",
    "double_blocks.3.txt_mlp.2": "text_ffn_down",
    "double_blocks.3.txt_mod.lin": "adaln_block",
    "single_blocks.3.linear1": "single_in",
    "single_blocks.3.linear2": "single_out",
    "single_blocks.3.modulation.lin": "adaln_block",
    "img_in": "patch_embed",
    "joint_blocks.0.x_block.attn.qkv": "self_qkv",
    "joint_blocks.0.x_block.attn2.proj": "self_out",
    "joint_blocks.0.context_block.attn.qkv": "text_qkv",
    "joint_blocks.0.context_block.attn.proj": "text_out",
    "joint_blocks.0.context_block.mlp.fc2": "text_ffn_down",
    "joint_blocks.0.x_block.mlp.fc1": "ffn_up",
    "joint_blocks.0.x_block.adaLN_modulation.1": "adaln_block",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": "cross_k",
    "input_blocks.4.1.proj_in": "transformer_proj",
    "middle_block.1.proj_out": "transformer_proj",
    "input_blocks.4.0.emb_layers.1": "time_embed",
    "input_blocks.4.0.skip_connection": "resblock_shortcut",
    "output_blocks.2.0.in_layers.2": "resblock_conv",
    "label_emb.0.0": "time_embed",
    "blocks.0.self_attn.q": "self_q",
    "blocks.0.self_attn.o": "self_out",
    "blocks.0.cross_attn.k": "cross_k",
    "blocks.0.cross_attn.k_img": "cross_k",
    "blocks.0.cross_attn.o": "cross_out",
    "blocks.0.ffn.0": "ffn_up",
    "blocks.0.ffn.2": "ffn_down",
    "text_embedding.0": "text_embed",
    "time_projection.1": "adaln_shared",
    "head.head": "proj_out",
    "layers.0.attention.qkv": "self_qkv",
    "layers.0.attention.out": "self_out",
}


def test_names_of_the_releases_have_their_kinds():
    assert {name: kinds_of([name])[name] for name in RELEASED} == RELEASED
    assert kinds_of(["fc", "encoder.layer.0.dense"]) == dict.fromkeys(
        ["fc", "encoder.layer.0.dense"], "linear"
    )


@pytest.mark.parametrize("model", list_models())
def test_the_table_agrees_with_the_inventory(model):
    layers = load_inventory(model).layers
    assert kinds_of([x.name for x in layers]) == {x.name: x.kind for x in layers}
