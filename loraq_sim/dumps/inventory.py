"""Every linear layer of the published diffusion transformers: shapes, rows and calls, no values.

One JSON file a model in ``inventories/``; each names the source of its shapes. Layers of repeated
blocks stand there once, with ``{}`` for the number of the block.
"""

import functools
import json
from dataclasses import dataclass
from importlib import resources

from loraq_sim.errors import InputError, unknown_name

__all__ = ["RESOLUTIONS", "InventoryLayer", "ModelInventory", "list_models", "load_inventory"]

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


@functools.cache
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
            _layer(row, block, RESOLUTIONS.index(resolution))
            for section in record["sections"]
            for block in range(*section.get("blocks", (0, 1)))
            for row in section["layers"]
        ),
    )


def _folder() -> resources.abc.Traversable:
    return resources.files("loraq_sim.dumps") / "inventories"


def _layer(row: dict, block: int, size: int) -> InventoryLayer:
    name = row["name"].replace("{}", str(block))
    return InventoryLayer(
        name=name,
        kind=row["kind"],
        n=row["n"],
        k=row["k"],
        has_bias=row["bias"],
        op=row["op"],
        rows_per_call=row["rows"][size],
        calls_per_step=row.get("calls", 1),
        is_quantized=row["quantized"],
        group=row.get("group", name).replace("{}", str(block)),
    )
