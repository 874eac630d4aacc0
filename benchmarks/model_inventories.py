"""Inventories of linear layers and convolutions, from diffusers on the meta device: no weights.

    python benchmarks/model_inventories.py sdxl wan2.1-1.3b   # into hwmodels/models

Shapes, rows and shared inputs are those that hooks see in one model call of each image size, on
tensors without values. Repeated blocks are written once. What else a file says (attention products,
elementwise work, what runs after what) is kept as it is. Needs `loraq-sim[diffusion]`.
"""

import argparse
import importlib
import json
import math
import re
from pathlib import Path

import torch

from loraq_sim.dumps.kinds import RESOLUTIONS, kinds_of
from loraq_sim.dumps.stored_weights import groups_of
from loraq_sim.settings import SIXTEEN_BIT_KINDS

FOLDER = Path(__file__).parent.parent / "hwmodels" / "models"
FRAMES = 21


def of_sdxl(pixels):
    """Inputs of a call at `pixels`, guidance as a batch of two."""
    return {
        "sample": torch.zeros(2, 4, pixels // 8, pixels // 8),
        "timestep": torch.zeros(()),
        "encoder_hidden_states": torch.zeros(2, 77, 2048),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, 1280), "time_ids": torch.zeros(2, 6)},
    }


def of_qwen(pixels):
    """Guidance is a second call."""
    edge = pixels // 16
    return {
        "hidden_states": torch.zeros(1, edge * edge, 64),
        "encoder_hidden_states": torch.zeros(1, 512, 3584),
        "timestep": torch.zeros(1),
        "img_shapes": [[(1, edge, edge)]],
    }


def of_wan(pixels):
    """81 frames, 21 of them in the latent space; guidance is a second call."""
    return {
        "hidden_states": torch.zeros(1, 16, FRAMES, pixels // 8, pixels // 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
    }


Z_IMAGE_TEXT = 512


def rows_of_z_image(name, pixels):
    """By the part of the model: its forward pass looks into values, which meta tensors lack."""
    image = (pixels // 16) ** 2
    if "adaLN_modulation" in name or name.startswith("t_embedder"):
        return 1
    if name.startswith(("context_refiner", "cap_embedder")):
        return Z_IMAGE_TEXT
    if name.startswith(("noise_refiner", "all_x_embedder")):
        return image
    return image + Z_IMAGE_TEXT


MODELS = {
    "sdxl": {
        "class": "UNet2DConditionModel",
        "config": {
            "sample_size": 128,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "block_out_channels": [320, 640, 1280],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "inputs": of_sdxl,
        "facts": {"width": 1280, "cfg_batch": 2, "text_tokens": 77},
        "said": "config: stable-diffusion-xl-base-1.0",
    },
    "qwen-image": {
        "class": "QwenImageTransformer2DModel",
        "config": {},
        "inputs": of_qwen,
        "facts": {"width": 3072, "cfg_batch": 1, "text_tokens": 512},
        "calls": 2,
        "said": "config: the class's own, which is Qwen-Image's; guidance in a second call",
    },
    "wan2.1-1.3b": {
        "class": "WanTransformer3DModel",
        "config": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "inputs": of_wan,
        "facts": {"width": 1536, "cfg_batch": 1, "text_tokens": 512},
        "calls": 2,
        "said": "config: Wan2.1-T2V-1.3B; 81 frames; guidance in a second call",
    },
    "wan2.1-14b": {
        "class": "WanTransformer3DModel",
        "config": {},
        "inputs": of_wan,
        "facts": {"width": 5120, "cfg_batch": 1, "text_tokens": 512},
        "calls": 2,
        "said": "config: Wan2.1-T2V-14B; 81 frames; guidance in a second call",
    },
    "z-image": {
        "class": "ZImageTransformer2DModel",
        "config": {},
        "rows": rows_of_z_image,
        "facts": {"width": 3840, "cfg_batch": 1, "text_tokens": Z_IMAGE_TEXT},
        "said": "config: the class's own, which is Z-Image-Turbo's, without guidance; rows by part",
    },
}
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def seen_in_call(model, inputs):
    """Rows of the output and identity of the input of each layer, by name."""
    seen, kept = {}, []

    def hook(name):
        def on_call(layer, given, output):
            kept.append(given[0])
            channels = layer.weight.shape[0]
            seen[name] = (output.numel() // channels, id(given[0]))

        return on_call

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


def op_of(layer):
    """``linear``, or the convolution by its kernel."""
    if isinstance(layer, torch.nn.Linear):
        return "linear"
    edges = [size for size in layer.kernel_size if size > 1] or [1]
    grouped = "_depthwise" if layer.groups > 1 else ""
    return f"conv{edges[0]}x{edges[-1]}{grouped}"


def inventory_of(model):
    """The record of a model, blocks not yet folded."""
    described = MODELS[model]
    with torch.device("meta"):
        kind_of_model = getattr(importlib.import_module("diffusers"), described["class"])
        built = kind_of_model(**described["config"]).eval()
        modules = {n: m for n, m in built.named_modules() if isinstance(m, LAYERS)}
        if "rows" in described:
            calls = [{n: (described["rows"](n, px), n) for n in modules} for px in RESOLUTIONS]
        else:
            calls = [seen_in_call(built, described["inputs"](px)) for px in RESOLUTIONS]
    kinds = kinds_of(modules)
    groups = groups_of(kinds)
    layers = []
    for name, module in modules.items():
        if name not in calls[0]:
            continue
        n, *rest = module.weight.shape
        row = {
            "name": name,
            "kind": kinds[name],
            "n": n,
            "k": math.prod(rest),
            "bias": module.bias is not None,
            "op": op_of(module),
            "rows": [call[name][0] for call in calls],
            "quantized": kinds[name] not in (*SIXTEEN_BIT_KINDS, "linear"),
        }
        if name in groups:
            row["group"] = groups[name]
        layers.append(row)
    check_groups(groups, calls[0] if "rows" not in described else {})
    return {
        "model": model,
        "class": described["class"],
        "source": f"diffusers {importlib.import_module('diffusers').__version__} on the meta "
        f"device; {described['said']}; quantized: by kind, inferred",
        **described["facts"],
        "parameters": sum(parameter.numel() for parameter in built.parameters()),
        **({"guidance_calls": described["calls"]} if "calls" in described else {}),
        "sections": folded(layers),
    }


def check_groups(groups, call):
    """Raise ValueError where layers of one group, by their names, read different tensors."""
    inputs = {}
    for name, group in groups.items():
        if name in call and inputs.setdefault(group, call[name][1]) != call[name][1]:
            raise ValueError(f"{name} reads another tensor than the rest of {group}")


def folded(layers):
    """Sections: runs of blocks that differ in their number alone are one."""
    blocks = []
    for row in layers:
        found = None
        # The innermost number that counts repeated blocks, not a part of a layer's own name.
        for match in re.finditer(r"\.(\d+)\.", row["name"]):
            if re.search(r"(?:blocks|layers|refiner)$", row["name"][: match.start()]):
                found = match
        place = (row["name"][: found.start()], int(found[1])) if found else None
        if not blocks or blocks[-1][0] != place or place is None:
            blocks.append((place, []))
        blocks[-1][1].append(row)
    sections = []
    for place, rows in blocks:
        template = None
        if place is not None:
            text = json.dumps(rows).replace(f"{place[0]}.{place[1]}.", f"{place[0]}.{{}}.")
            template = json.loads(text)
        last = sections[-1] if sections else None
        if last and place and last.get("template") == template:
            last["blocks"][1] += 1
        elif last and place is None and "template" not in last:
            last["layers"] += rows
        elif place is None:
            sections.append({"layers": rows})
        else:
            sections.append(
                {"blocks": [place[1], place[1] + 1], "layers": template, "template": template}
            )
    for section in sections:
        section.pop("template", None)
    return sections


def written(record):
    """The record as text, one layer or product a line."""

    def lines(rows, indent):
        return ",\n".join(f"{indent}{json.dumps(row)}" for row in rows)

    parts = []
    for key, value in record.items():
        if key == "sections":
            rows = [(_blocks(section), lines(section["layers"], "      ")) for section in value]
            text = ",\n".join(f'    {{{blocks}"layers": [\n{row}\n    ]}}' for blocks, row in rows)
            parts.append(f'  "sections": [\n{text}\n  ]')
        elif key in ("attention", "elementwise"):
            parts.append(f'  "{key}": [\n{lines(value, "    ")}\n  ]')
        elif key == "schedule":
            first, last = (json.dumps(value[name]) for name in ("first", "last"))
            blocks = lines(value["blocks"], "      ")
            inner = f'    "first": {first},\n    "blocks": [\n{blocks}\n    ],\n    "last": {last}'
            parts.append(f'  "schedule": {{\n{inner}\n  }}')
        else:
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _blocks(section):
    return f'"blocks": {json.dumps(section["blocks"])}, ' if "blocks" in section else ""


def main():
    """Write the inventories that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    for model in parser.parse_args().models or MODELS:
        path = FOLDER / f"{model}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        record = before | inventory_of(model)
        path.write_text(written(record))
        print(model, record["parameters"], len(record["sections"]), "sections", flush=True)


if __name__ == "__main__":
    main()
