"""The role of a layer, read off its name in a diffusion transformer or U-Net.

Names are those of diffusers first, then those of the original releases of DiT, PixArt, SD3 and
FLUX. A wrapper before all of them, such as ``module.`` or ``transformer.``, is left out.
"""

import re
from collections.abc import Iterable

__all__ = ["kinds_of"]

# The first pattern found in a name decides; {} is what its group matched.
_PATTERNS = (
    (r"\battn1?\.to_([qkv])$", "self_{}"),
    (r"\battn1?\.to_out(?:\.0)?$", "self_out"),
    (r"\battn2\.to_([qkv])$", "cross_{}"),
    (r"\battn2\.to_out(?:\.0)?$", "cross_out"),
    (r"\battn\.add_([qkv])_proj$", "text_{}"),
    (r"\battn\.to_add_out$", "text_out"),
    (r"\bff_context\.net\.0\.proj$", "text_ffn_up"),
    (r"\bff_context\.net\.2$", "text_ffn_down"),
    (r"\bff\.(?:net\.0\.proj|conv_inverted)$|\bproj_mlp$", "ffn_up"),
    (r"\bff\.(?:net\.2|conv_point)$", "ffn_down"),
    (r"\bsingle_transformer_blocks\.\d+\.proj_out$", "single_out"),
    (r"\bnorm1?(?:_context)?\.linear$", "adaln_block"),
    (r"^(?:adaln_single|time_embed)\.linear$", "adaln_shared"),
    (r"\b(?:timestep|guidance|text|resolution|aspect_ratio)_embedder\.", "time_embed"),
    (r"^(?:caption_projection|context_embedder)\b", "text_embed"),
    (r"^(?:x_embedder$|patch_embed\.|pos_embed\.)", "patch_embed"),
    (r"^norm_out\.linear$", "norm_out"),
    (r"^proj_out$", "proj_out"),
    # U-Nets of diffusers
    (r"^(?:time|add|class)_embedding\.|\btime_emb_proj$", "time_embed"),
    (r"^encoder_hid_proj\b", "text_embed"),
    # Original names: DiT and PixArt, SD3, FLUX
    (r"^(?:t_embedder|t_conditioner|time_in|vector_in|guidance_in)\.", "time_embed"),
    (r"^(?:y_embedder|y_proj|txt_in)\b", "text_embed"),
    (r"^img_in$", "patch_embed"),
    (r"^final_layer\.adaLN_modulation\.1$", "norm_out"),
    (r"^final_layer\.linear$", "proj_out"),
    (r"\badaLN_modulation\.1$|\b(?:img|txt)_mod\.lin$|\bmodulation\.lin$", "adaln_block"),
    (r"^t_block\.1$", "adaln_shared"),
    (r"\bcross_attn\.q_linear$", "cross_q"),
    (r"\bcross_attn\.kv_linear$", "cross_kv"),
    (r"\bcross_attn\.proj$", "cross_out"),
)
_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|model|transformer|unet|diffusion_model|net|ema)\.)+"
)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Map each layer name of one model to its kind, ``linear`` where the name says nothing.

    A model whose blocks have an ``attn`` with text projections (SD 3.5) attends to text there; a
    second attention ``attn2`` is self-attention then.
    """
    names = list(names)
    bare = dict(zip(names, _without_wrapper(names), strict=True))
    is_joint = any(name.endswith("attn.add_k_proj") for name in names)
    return {
        name: _kind(re.sub(r"\battn2\.", "attn1.", text) if is_joint else text)
        for name, text in bare.items()
    }


def _without_wrapper(names: list[str]) -> list[str]:
    """Names without the wrapper that all of them begin with."""
    found = _WRAPPERS.match(names[0]) if names else None
    prefix = found.group() if found else ""
    if not all(name.startswith(prefix) for name in names):
        return names
    return [name.removeprefix(prefix) for name in names]


def _kind(name: str) -> str:
    for pattern, kind in _PATTERNS:
        found = re.search(pattern, name)
        if found:
            return kind.format(*found.groups())
    return "linear"
