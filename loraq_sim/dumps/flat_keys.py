"""Group tensors named ``<layer>.weight``, ``.bias`` and ``.activations`` into layers.

This naming is shared by .safetensors, .npz and flat state dicts. What names cannot carry stands in
a JSON metadata record, one object per layer:

    {"<layer>": {"kind": "self_q", "group": "block0.attn1", "rows_per_call": 8192,
                 "calls_per_step": 1, "activations": "block0.attn1.to_q.activations"}}

every field optional. ``activations`` names the tensor that holds the layer's inputs, so layers of
one group point to one tensor. Without the record every pair of names still is a layer.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, first_line
from loraq_sim.errors import DumpError

__all__ = ["layers_from_keys", "parse_json_object"]

_FIELDS = ("kind", "group", "rows_per_call", "calls_per_step")


def layers_from_keys(
    tensors: Mapping[str, StoredTensor], layers: Mapping[str, object], meta: dict[str, object]
) -> StoredDump:
    """Group tensors into layers.

    Parameters
    ----------
    tensors : mapping of key to StoredTensor
        In file order.
    layers : mapping of layer name to its metadata record
        Its order comes first; layers known by tensor names alone follow.
    meta : dict
        Passed on.

    Returns
    -------
    stored : StoredDump
        `skipped` lists tensors that are no 2-D weight or 1x1 convolution, nor belong to one.
    """
    names = dict.fromkeys(layers)
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight")
        if name and name != key and (name in layers or _is_linear(tensor.shape)):
            names[name] = None
    found = {name: _one_layer(name, tensors, layers.get(name, {})) for name in names}
    used = {
        tensor.key
        for layer in found.values()
        for tensor in (layer.weight, layer.bias, layer.activations)
        if tensor is not None
    }
    skipped = {
        key: f"shape {tensor.shape} is no linear or 1x1 convolution weight"
        for key, tensor in tensors.items()
        if tensor.key not in used
    }
    return StoredDump(layers=found, meta=meta, skipped=skipped)


def parse_json_object(path: Path, what: str, text: str | None) -> dict[str, object]:
    """Parse a JSON object from a dump's metadata; None gives {}."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DumpError(
            f"{path}: metadata {what!r} is no valid JSON: {first_line(error)}"
        ) from None
    if not isinstance(value, dict):
        raise DumpError(
            f"{path}: metadata {what!r} must be a JSON object, got {type(value).__name__}"
        )
    return value


def _is_linear(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 or (len(shape) in (3, 4) and set(shape[2:]) == {1})


def _one_layer(name: str, tensors: Mapping[str, StoredTensor], record: object) -> StoredLayer:
    if not isinstance(record, Mapping):
        return StoredLayer(
            name=name, problem=f"its metadata is a {type(record).__name__}, expected an object"
        )
    problem = "" if f"{name}.weight" in tensors else f"has no tensor {name + '.weight'!r}"
    key = record.get("activations", f"{name}.activations")
    activations = tensors.get(key) if isinstance(key, str) else None
    if "activations" in record and activations is None:
        shown = repr(key[:200]) if isinstance(key, str) else f"a {type(key).__name__}"
        problem = problem or f"its activations refer to {shown}, which the file does not hold"
    fields = {field: record[field] for field in _FIELDS if record.get(field) is not None}
    return StoredLayer(
        name=name,
        weight=tensors.get(f"{name}.weight"),
        bias=tensors.get(f"{name}.bias"),
        activations=activations,
        problem=problem,
        **fields,
    )
