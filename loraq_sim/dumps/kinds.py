"""What a plain checkpoint does not say of its layers: their kinds, and the rows M of one call.

Kinds are read off the names (`kinds_of`): those of diffusers, then those of the original releases
of DiT, PixArt, SANA, SD3, SDXL, FLUX, Wan and Z-Image. A wrapper before all of them, such as
``module.`` or ``transformer.``, is left out.

Inventories list every linear layer of the published diffusion transformers: shapes, rows and calls,
no values. They are those that `hwmodels` costs a step by (``hwmodels/models/``), one JSON file a
model; each names the source of its shapes. Layers of repeated blocks stand there once, with ``{}``
for the number of the block.

Rows come, in this order, from the file itself, from a diffusers ``config.json`` beside it, or,
where the user names the model, from its inventory (`rows_of_model`). Nothing is guessed: a layer
whose rows none of these tells has none, and no cost.

Rows of a kind of layer follow the image: rows = a * (image rows) + c, with a and c from the
inventory of the same class at both of its resolutions, and (image rows) = samples per call *
(sample_size / patch_size)^2.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from os.path import commonprefix
from pathlib import Path
from typing import Any

from loraq_sim.dumps.checkpoint_folder import (
    UNET,
    config_path,
    is_count,
    patches_of,
    read_config,
    rows_of_unet,
)
from loraq_sim.dumps.state_dict import common_wrapper
from loraq_sim.dumps.stored import StoredDump
from loraq_sim.dumps.stored_weights import groups_of
from loraq_sim.errors import InputError, counted, unknown_name

__all__ = [
    "InventoryLayer",
    "ModelInventory",
    "RESOLUTIONS",
    "kinds_of",
    "list_models",
    "load_inventory",
    "model_of_config",
    "rows_of_model",
    "with_roles",
]


# The first pattern found in a name decides; {} is what its group matched.
_PATTERNS = (
    (r"\b(?:attn1?|attention|self_attn)\.(?:to_)?([qkv])$", "self_{}"),
    (r"\b(?:attn1?|attention)\.(?:to_out(?:\.0)?|out)$|\bself_attn\.o$", "self_out"),
    (r"\b(?:attn2\.(?:to|add)|cross_attn\.(?=[qkv]$|k_img$|v_img$))_?([qkv])", "cross_{}"),
    (r"\b(?:attn2\.to_out(?:\.0)?|cross_attn\.(?:o|proj))$", "cross_out"),
    (r"\battn\.add_([qkv])_proj$", "text_{}"),
    (r"\battn\.to_add_out$|\btxt_attn\.proj$|\bcontext_block\.attn\.proj$", "text_out"),
    (r"\b(?:txt_attn|context_block\.attn)\.qkv$", "text_qkv"),
    (
        r"\b(?:ff_context|txt_mlp)\.net\.0\.proj$|\btxt_mlp\.0$|\bcontext_block\.mlp\.fc1$",
        "text_ffn_up",
    ),
    (
        r"\b(?:ff_context|txt_mlp)\.net\.2$|\btxt_mlp\.2$|\bcontext_block\.mlp\.fc2$",
        "text_ffn_down",
    ),
    (r"\bsingle_transformer_blocks\.\d+\.proj_out$|\bsingle_blocks\.\d+\.linear2$", "single_out"),
    (r"\bsingle_blocks\.\d+\.linear1$", "single_in"),
    (r"\bnorm1?(?:_context)?\.linear$", "adaln_block"),
    (r"^(?:adaln_single|time_embed)\.linear$", "adaln_shared"),
    (r"^condition_embedder\.(?:text|image)_embedder\.", "text_embed"),
    (
        r"\b(?:timestep|time|guidance|text|resolution|aspect_ratio|image)_embedder\.(?!.*attn)",
        "time_embed",
    ),
    (r"^(?:caption_projection|context_embedder)\b", "text_embed"),
    (r"^(?:x_embedder$|patch_embed\.|pos_embed\.)", "patch_embed"),
    (r"^norm_out\.linear$|^proj_out_1$", "norm_out"),
    (r"^proj_out(?:_2)?$", "proj_out"),
    # Diffusers: Qwen-Image, Wan, Z-Image
    (r"\b(?:img|txt)_mod\.(?:1|lin)$|\bmodulation\.lin$", "adaln_block"),
    (r"^condition_embedder\.time_proj$|^time_projection\.1$", "adaln_shared"),
    (r"^(?:patch_embedding|all_x_embedder\.[\w-]+)$", "patch_embed"),
    (r"^(?:cap_embedder|text_embedding|siglip_embedder)\.", "text_embed"),
    (r"^all_final_layer\.[\w-]+\.adaLN_modulation\.1$", "norm_out"),
    (r"^(?:all_final_layer\.[\w-]+\.linear|head\.head)$", "proj_out"),
    # U-Nets of diffusers, and as Stability AI released them
    (r"^(?:time|add|class)_embedding\.|\btime_emb_proj$|\bemb_layers\.1$", "time_embed"),
    (r"^(?:time_embed|label_emb|time_embedding|img_emb)\.", "time_embed"),
    (r"^encoder_hid_proj\b", "text_embed"),
    (r"\b(?:conv_shortcut|skip_connection)$", "resblock_shortcut"),
    (r"\bresnets\.\d+\.conv[12]$|\b(?:in_layers\.2|out_layers\.3)$", "resblock_conv"),
    (
        r"\b(?:up|down)samplers\.\d+\.conv$|\b(?:input|output)_blocks\.\d+\.\d+\.(?:op|conv)$",
        "sampler_conv",
    ),
    (
        r"\battentions\.\d+\.proj_(?:in|out)$|\b(?:input|output)_blocks\.\d+\.\d+\.proj_(?:in|out)$"
        r"|\bmiddle_block\.\d+\.proj_(?:in|out)$",
        "transformer_proj",
    ),
    (r"^conv_in$", "patch_embed"),
    (r"^conv_out$", "proj_out"),
    # Original names: DiT and PixArt, SANA, SD3, FLUX, Z-Image
    (r"^(?:t_embedder|t_conditioner|time_in|vector_in|guidance_in)\.", "time_embed"),
    (r"^(?:y_embedder|y_proj|txt_in)\b", "text_embed"),
    (r"^(?:img_in|x_embedder\.proj(?:\.\d+)?)$", "patch_embed"),
    (r"^final_layer\.adaLN_modulation\.1$", "norm_out"),
    (r"^final_layer\.linear$", "proj_out"),
    (r"\badaLN_modulation\.[01]$", "adaln_block"),
    (r"^t_block\.1$", "adaln_shared"),
    (r"\bcross_attn\.q_linear$", "cross_q"),
    (r"\bcross_attn\.kv_linear$", "cross_kv"),
    (r"\b(?:attn2?|attention|img_attn)\.qkv$", "self_qkv"),
    (r"\b(?:attn2?|img_attn)\.proj$", "self_out"),
    (r"\bff\.(?:net\.0\.proj|conv_inverted)$|\bproj_mlp$", "ffn_up"),
    (r"\bff\.(?:net\.2|conv_point)$", "ffn_down"),
    (r"\b(?:ffn|img_mlp)\.(?:net\.0\.proj|0)$|\bmlp\.(?:fc1|inverted_conv\.conv)$", "ffn_up"),
    (r"\b(?:ffn|img_mlp)\.(?:net\.2|2)$|\bmlp\.(?:fc2|point_conv\.conv)$", "ffn_down"),
    (r"\bfeed_forward\.(?:w|linear_)[13]$|\bff\.linear_[12]$", "ffn_up"),
    (r"\bfeed_forward\.(?:w|linear_)2$|\bff\.out_projection$", "ffn_down"),
    (r"\bff_context\.linear_[12]$", "text_ffn_up"),
    (r"\bff_context\.out_projection$", "text_ffn_down"),
    (r"^time_step_proj\.|^distilled_guidance_layer\.", "time_embed"),
    (r"\bcaption_embedder\.", "text_embed"),
    (r"^proj_in$", "patch_embed"),
    (r"^norm_out\.linear_1$", "norm_out"),
    (r"^norm_out\.linear_2$", "proj_out"),
    (r"\b(?:ff\.conv_depth|mlp\.depth_conv\.conv)$", "ffn_dwconv3x3"),
)


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """Map each layer name of one model to its kind, ``linear`` where the name says nothing.

    A model whose blocks have an ``attn`` with text projections (SD 3.5) attends to text there; a
    second attention ``attn2`` is self-attention then.
    """
    names = list(names)
    is_joint = any(name.endswith("attn.add_k_proj") for name in names)
    found: dict[str, str] = {}
    # A model within a class of the user's has that class's name for it in front of all.
    for wrapper in dict.fromkeys((common_wrapper(names), *_shared_starts(names))):
        kinds = {
            name: _kind(re.sub(r"\battn2\.", "attn1.", text) if is_joint else text)
            for name in names
            for text in (name.removeprefix(wrapper),)
        }
        if not found or _unnamed(kinds) < _unnamed(found):
            found = kinds
    return found


def _shared_starts(names: list[str]) -> list[str]:
    """Starts that all names share, such as ``net.model.``, at most three parts of them."""
    parts = [name.split(".")[:-1] for name in names]
    shared = commonprefix(parts)[:3] if len(names) > 1 else []
    return [".".join(shared[: i + 1]) + "." for i in range(len(shared))]


def _unnamed(kinds: Mapping[str, str]) -> int:
    return sum(kind == "linear" for kind in kinds.values())


def _kind(name: str) -> str:
    for pattern, kind in _PATTERNS:
        found = re.search(pattern, name)
        if found:
            return kind.format(*found.groups())
    return "linear"


RESOLUTIONS = (1024, 512)
"""Image sizes in pixels for which rows per call are known."""


@dataclass(frozen=True, kw_only=True)
class InventoryLayer:
    """One linear layer or convolution of a model.

    Attributes
    ----------
    name : str
        As in the diffusers state dict.
    kind : str
        Role: ``self_q self_k self_v self_out cross_q ... ffn_up ffn_down``, and so on.
    n, k : int
        Output and input features; a convolution's kernel counts as input features.
    has_bias : bool
    op : str
        ``linear``, ``conv1x1``, ``conv2x2`` (patches that do not overlap) or
        ``conv3x3_depthwise``.
    rows_per_call : int
        Rows M of one model call, all samples of the guidance batch together.
    calls_per_step : int
    is_quantized : bool
        Whether SVDQuant runs it as W4A4; it leaves the others at 16 bits (FLUX's adaLN: W4A16).
    group : str
        Equal for layers that read the same input.
    """

    name: str
    kind: str
    n: int
    k: int
    has_bias: bool
    op: str
    rows_per_call: int
    calls_per_step: int
    is_quantized: bool
    group: str

    @property
    def is_gemm(self) -> bool:
        """Whether it is one matrix product; a depthwise convolution is not."""
        return "depthwise" not in self.op


@dataclass(frozen=True, kw_only=True)
class ModelInventory:
    """All linear layers and convolutions of a model, in the order of its definition.

    `model_class` is its class in diffusers, `width` the features of the residual stream,
    `cfg_batch` the samples of a model call under guidance, `text_tokens` those of a sample, and
    `source` says where the shapes come from.
    """

    model: str
    model_class: str
    source: str
    width: int
    cfg_batch: int
    text_tokens: int
    resolution: int
    layers: tuple[InventoryLayer, ...]


def list_models() -> list[str]:
    """Names that `load_inventory` knows, sorted."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in _folder().iterdir()
        if entry.name.endswith(".json")
    )


@cache
def load_inventory(model: str, *, resolution: int = 1024) -> ModelInventory:
    """Return the layers of a model, with the rows per call at an image size.

    Parameters
    ----------
    model : str
        One of `list_models`.
    resolution : {1024, 512}
        Height and width of the image in pixels.

    Raises
    ------
    InputError
        If the model or the resolution is unknown.
    """
    known = list_models()
    if model not in known:
        raise InputError(unknown_name("model", str(model), known))
    if resolution not in RESOLUTIONS:
        raise InputError(f"resolution must be 512 or 1024 pixels, got {resolution}")
    record = json.loads((_folder() / f"{model}.json").read_text(encoding="utf-8"))
    return ModelInventory(
        model=model,
        model_class=record["class"],
        source=record["source"],
        width=record["width"],
        cfg_batch=record["cfg_batch"],
        text_tokens=record["text_tokens"],
        resolution=resolution,
        layers=tuple(
            _layer(row, block, RESOLUTIONS.index(resolution), record.get("guidance_calls", 1))
            for section in record["sections"]
            for block in range(*section.get("blocks", (0, 1)))
            for row in section["layers"]
        ),
    )


def _folder() -> resources.abc.Traversable:
    return resources.files("hwmodels") / "models"


def _layer(row: dict[str, Any], block: int, size: int, calls: int) -> InventoryLayer:
    name = row["name"].replace("{}", str(block))
    return InventoryLayer(
        name=name,
        kind=row["kind"],
        n=row["n"],
        k=row["k"],
        has_bias=row["bias"],
        op=row["op"],
        rows_per_call=row["rows"][size],
        calls_per_step=calls,
        is_quantized=row["quantized"],
        group=row.get("group", name).replace("{}", str(block)),
    )


_IMAGE_KIND = "patch_embed"


def with_roles(path: Path, stored: StoredDump) -> StoredDump:
    """`stored` with a kind for every layer, and the rows that a ``config.json`` tells.

    Of a file that says no kinds, layers that share an input are of one group.
    """
    named = kinds_of(stored.layers)
    silent_kinds = all(layer.kind is None for layer in stored.layers.values())
    groups = groups_of(named) if silent_kinds else {}
    layers = {
        name: layer
        if layer.kind is not None
        else dataclasses.replace(layer, kind=named[name], group=layer.group or groups.get(name, ""))
        for name, layer in stored.layers.items()
    }
    silent = {name: named[name] for name, layer in layers.items() if layer.rows_per_call is None}
    for name in layers.keys() - silent.keys():
        source = layers[name].rows_source or _recorded(stored.meta)
        layers[name] = dataclasses.replace(layers[name], rows_source=source)
    rows, source = _rows_of_config(config_path(path, stored.home), silent) if silent else ({}, "")
    for name, count in rows.items():
        layers[name] = dataclasses.replace(layers[name], rows_per_call=count, rows_source=source)
    stored = dataclasses.replace(stored, layers=layers)
    said = "; ".join(filter(None, (stored.left_out, _macs_left_out(path, stored) if rows else "")))
    return dataclasses.replace(stored, left_out=said)


def _macs_left_out(path: Path, stored: StoredDump) -> str:
    """Which share of the multiply-adds of a step the tensors left out have, where that is known."""
    config = read_config(config_path(path, stored.home))
    inventory, patches = _class_of(config), patches_of(config)
    if inventory is None or patches is None or not stored.left_out:
        return ""
    rows = _rows_at(inventory, inventory.cfg_batch * patches)
    absent = {key.removesuffix(".weight"): tensor.shape for key, tensor in stored.others.items()}
    left = sum(math.prod(shape) * rows.get(name, 0) for name, shape in absent.items())
    kept = sum(
        math.prod(layer.weight.shape) * rows.get(name, 0)
        for name, layer in stored.layers.items()
        if layer.weight is not None
    )
    return f"that is {100 * left / (left + kept):.2g} % of the multiply-adds" if left else ""


def rows_of_model(
    kinds: Mapping[str, str], model: str, resolution: int
) -> tuple[dict[str, int], str]:
    """Rows per call of the layers of a published model, and in words where they come from.

    Parameters
    ----------
    kinds : mapping of str to str
        Kind by layer name. A layer is found by its name, else by its kind.
    model : str
        One of `loraq_sim.dumps.kinds.list_models`.
    resolution : int
        Pixels, 1024 or 512.

    Raises
    ------
    InputError
        If the model or the resolution is unknown, or none of the layers is in the model.
    """
    inventory = load_inventory(model, resolution=resolution)
    known = {layer.name: layer.rows_per_call for layer in inventory.layers}
    rows = _of_unet(kinds, inventory, resolution // 8) or _found(kinds, known, inventory)
    if not rows:
        raise InputError(
            f"--model {model}: none of {counted(len(kinds), 'layer')}, such as "
            f"{next(iter(kinds), '')!r}, has a name or kind of that model; give --rows instead"
        )
    return rows, f"{model} at {resolution} px, {_samples(inventory.cfg_batch)}"


def model_of_config(path: Path) -> str:
    """The published model whose class the ``config.json`` at `path` names.

    Models of one class have equal rows; the first by name stands for all.

    Raises
    ------
    InputError
        If the file is not there, or names no class of `list_models`.
    """
    found = _class_of(read_config(path))
    if found is None:
        known = ", ".join(sorted({str(one.model_class) for one in _inventories().values()}))
        said = "names no known class of models" if path.is_file() else "is not there to name one of"
        raise InputError(f"resolution: {path} {said} ({known}); give --model or --rows")
    return found.model


def _class_of(config: Mapping[str, object]) -> ModelInventory | None:
    name = config.get("_class_name")
    return _inventories().get(name) if isinstance(name, str) else None


def _recorded(meta: Mapping[str, object]) -> str:
    """Source of rows that a dump states, with the samples of a call where it says them."""
    batch, images = meta.get("cfg_batch"), meta.get("images", 1)
    if not (is_count(batch) and is_count(images)):
        return "dump"
    of_images = f"{images} images, " if images > 1 else ""
    return f"dump, {of_images}{_samples(batch * images)}"


def _samples(count: int) -> str:
    return "1 sample per call" if count == 1 else f"{count} samples per call (guidance included)"


def _rows_of_config(path: Path, kinds: Mapping[str, str]) -> tuple[dict[str, int], str]:
    """Rows by layer name from the config at `path`; none where it does not tell the image."""
    config = read_config(path)
    patches = patches_of(config)
    if patches is None:
        return {}, ""
    inventory = _class_of(config)
    samples = inventory.cfg_batch if inventory is not None else 1
    if inventory is None:
        image = _image_kinds()
        rows = {layer: patches for layer, kind in kinds.items() if kind in image}
    else:
        rows = _of_unet(kinds, inventory, math.isqrt(patches))
        rows = rows or _found(kinds, _rows_at(inventory, samples * patches), inventory)
    return rows, f"config.json ({patches} patches an image), {_samples(samples)}"


def _of_unet(kinds: Mapping[str, str], inventory: ModelInventory, edge: int) -> dict[str, int]:
    if inventory.model_class != UNET:
        return {}
    return rows_of_unet(kinds, edge, inventory.cfg_batch, inventory.text_tokens)


@cache
def _inventories() -> dict[object, ModelInventory]:
    """The inventory of each class of models; models of one class agree in rows."""
    return {inventory.model_class: inventory for inventory in map(load_inventory, list_models())}


def _found(
    kinds: Mapping[str, str], rows: Mapping[str, int], inventory: ModelInventory
) -> dict[str, int]:
    """Rows of the layers whose name is in `rows`, or whose kind has one count there."""
    counts: dict[str, set[int]] = {}
    for layer in inventory.layers:
        if layer.name in rows:
            counts.setdefault(layer.kind, set()).add(rows[layer.name])
    by_kind = {kind: found.pop() for kind, found in counts.items() if len(found) == 1}
    found = {name: rows.get(name, by_kind.get(kind)) for name, kind in kinds.items()}
    return {name: count for name, count in found.items() if count is not None}


def _rows_at(inventory: ModelInventory, image: int) -> dict[str, int]:
    """Rows by layer name where all samples of a call have `image` patches together."""
    large, small = (
        {
            layer.name: layer.rows_per_call
            for layer in load_inventory(inventory.model, resolution=size).layers
        }
        for size in RESOLUTIONS
    )
    (first,) = (layer.name for layer in inventory.layers if layer.kind == _IMAGE_KIND)
    step = large[first] - small[first]
    rows = {}
    for name, count in large.items():
        added, rest = divmod((count - small[name]) * (image - large[first]), step)
        if rest == 0 and count + added > 0:
            rows[name] = count + added
    return rows


@cache
def _image_kinds() -> set[str]:
    """Kinds whose rows are those of the image in every model: for a class without an inventory."""
    kinds: dict[str, bool] = {}
    for inventory in _inventories().values():
        if len({x.rows_per_call for x in inventory.layers if x.kind == "ffn_down"}) > 1:
            # Blocks of a U-Net, and of Z-Image, run on parts of what a call works on.
            continue
        image = next(x.rows_per_call for x in inventory.layers if x.kind == _IMAGE_KIND)
        for layer in inventory.layers:
            kinds[layer.kind] = kinds.get(layer.kind, True) and layer.rows_per_call == image
    return {kind for kind, follows in kinds.items() if follows}
