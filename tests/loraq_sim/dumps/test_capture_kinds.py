import pytest

from loraq_sim.dumps.kinds import kinds_of, list_models, load_inventory
from loraq_sim.dumps.stored_weights import groups_of


@pytest.mark.parametrize("model", list_models())
def test_names_of_published_models_give_the_inventory_s_kinds(model):
    layers = [layer for layer in load_inventory(model).layers if layer.is_gemm]
    assert kinds_of(layer.name for layer in layers) == {x.name: x.kind for x in layers}


def test_other_names_are_plain_linear_layers():
    assert kinds_of(["encoder.layer.0.dense", "my_attn1.to_q", "model"]) == {
        "encoder.layer.0.dense": "linear",
        "my_attn1.to_q": "linear",
        "model": "linear",
    }


def test_names_of_other_families_of_diffusers_have_kinds():
    """Lumina 2, AuraFlow, Chroma and LTX: gated feed-forwards, and what is around the blocks."""
    expected = {
        "layers.0.feed_forward.linear_1": "ffn_up",
        "layers.0.feed_forward.linear_3": "ffn_up",
        "layers.0.feed_forward.linear_2": "ffn_down",
        "time_caption_embed.caption_embedder.1": "text_embed",
        "norm_out.linear_1": "norm_out",
        "joint_transformer_blocks.0.ff.linear_2": "ffn_up",
        "joint_transformer_blocks.0.ff.out_projection": "ffn_down",
        "joint_transformer_blocks.0.ff_context.linear_1": "text_ffn_up",
        "joint_transformer_blocks.0.ff_context.out_projection": "text_ffn_down",
        "time_step_proj.linear_1": "time_embed",
        "distilled_guidance_layer.layers.0.linear_1": "time_embed",
        "proj_in": "patch_embed",
    }
    kinds = kinds_of(expected)
    assert kinds == expected
    assert groups_of(kinds)["layers.0.feed_forward.linear_3"] == "layers.0.feed_forward.up"


def test_a_class_around_the_model_hides_no_kinds():
    names = ["adaln_single.linear", "proj_out", "transformer_blocks.0.attn1.to_q"]
    expected = ["adaln_shared", "proj_out", "self_q"]
    for wrapper in ("m.", "my.inner.net.", "module.my."):
        assert list(kinds_of(f"{wrapper}{name}" for name in names).values()) == expected
    # What tells the kinds is no wrapper.
    assert list(kinds_of(["attn1.to_q", "attn1.to_k"]).values()) == ["self_q", "self_k"]
    assert kinds_of(["norm1.linear"]) == {"norm1.linear": "adaln_block"}
