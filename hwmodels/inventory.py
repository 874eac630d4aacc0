"""Layers of published diffusion transformers, as shapes: what one denoising step runs.

`models/*.json` hold, per kind of layer, the GEMM sizes at 512 and 1024 pixels with both guidance
branches in one call (`guidance_batch`), the calls per step, and the precision: ``split`` where
SVDQuant quantizes, else a fixed one. Attention products and depthwise convolutions are no layers
with weights to split; they run in 16 bits and are costed by `attention_cost.py`.
"""

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from hwmodels.errors import AcceleratorError, nearest

__all__ = ["RESOLUTIONS", "InventoryEntry", "ModelInventory", "list_models", "load_model"]

RESOLUTIONS = (512, 1024)
_MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True, kw_only=True)
class InventoryEntry:
    """Calls of one kind and shape in one denoising step.

    op : ``gemm``: y (m, n) from x (m, k); ``depthwise``: m rows of n channels with k taps each;
        ``attention`` and ``linear_attention``: `batch` heads of m queries, n keys, head size k.
    precision : ``split``, or the fixed precision of the kind such as ``W16A16``.
    """

    kind: str
    op: str
    m: int
    n: int
    k: int
    calls: int
    precision: str
    batch: int = 1

    def scaled(self, factor: Fraction) -> "InventoryEntry":
        """The same calls with `factor` times the images and guidance passes in each.

        Rows of a layer scale; queries and keys are of one image, so that the heads do.

        Raises
        ------
        AcceleratorError
            If the rows of one call do not divide so.
        """
        name = "m" if self.op in ("gemm", "depthwise") else "batch"
        count = getattr(self, name) * factor
        if count.denominator != 1:
            raise AcceleratorError(
                f"{self.kind}: {getattr(self, name)} rows do not divide by {1 / factor}; "
                "give a --guidance that the rows of one call allow"
            )
        return replace(self, **{name: int(count)})

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls."""
        per_call = {
            "gemm": self.m * self.n * self.k,
            "depthwise": self.m * self.n * self.k,
            "attention": 2 * self.batch * self.m * self.n * self.k,
            # Keys times values with a row of ones for the normalizer, then queries times that.
            "linear_attention": 2 * self.batch * self.m * self.k * (self.k + 1),
        }
        return per_call[self.op] * self.calls


@dataclass(frozen=True, kw_only=True)
class ModelInventory:
    """One model at one resolution."""

    name: str
    title: str
    source: str
    resolution: int
    guidance_batch: int
    entries: tuple[InventoryEntry, ...]


def list_models() -> list[str]:
    """Names of the models that ship with the package, sorted."""
    return sorted(path.name.removesuffix(".json") for path in _MODELS.glob("*.json"))


@lru_cache(maxsize=32)
def load_model(name: str, resolution: int = 1024) -> ModelInventory:
    """The inventory of a shipped model.

    Raises
    ------
    AcceleratorError
        If the model or the resolution is not there.
    """
    if name not in list_models():
        raise AcceleratorError(f"unknown model {name!r}; {nearest(name, list_models())}")
    if resolution not in RESOLUTIONS:
        known = " or ".join(map(str, RESOLUTIONS))
        raise AcceleratorError(f"resolution must be {known} pixels, got {resolution!r}")
    content = json.loads((_MODELS / f"{name}.json").read_text(encoding="utf-8"))
    size = str(resolution)
    layers = [InventoryEntry(**{**layer, "m": layer["m"][size]}) for layer in content["layers"]]
    products = [
        InventoryEntry(
            kind=part["kind"], op=part["op"], m=part["queries"][size], n=part["keys"][size],
            k=part["head_size"], calls=part["calls"], precision="W16A16", batch=part["batch"],
        )
        for part in content["attention"]
    ]  # fmt: skip
    return ModelInventory(
        name=name,
        title=content["title"],
        source=content["source"],
        resolution=resolution,
        guidance_batch=content["guidance_batch"],
        entries=(*layers, *products),
    )
