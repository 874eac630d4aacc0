"""What a format reader hands over: where each tensor lies, with nothing loaded and little judged.

Readers fill these records from a file's directory alone. A layer that cannot be used still gets a
record, with `problem` saying why, so that one bad layer never hides the others.

In .safetensors, .npz and flat state dicts, tensors are grouped into layers by their names,
``<layer>.weight``, ``.bias`` and ``.activations`` (`layers_from_keys`). What names cannot carry
stands in a JSON metadata record, one object per layer:

    {"<layer>": {"kind": "self_q", "group": "block0.attn1", "rows_per_call": 8192,
                 "calls_per_step": 1, "activations": "block0.attn1.to_q.activations"}}

every field optional. ``activations`` names the tensor that holds the layer's inputs, so layers of
one group point to one tensor. Without the record every pair of names still is a layer.

The factors of an adapter (LoRA) are no layers, and a weight whose adapter is not merged is not the
weight that runs: `without_adapters` takes the former out and marks the latter.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

from numpy.typing import NDArray

from loraq_sim.errors import DumpError, InputError, counted

__all__ = [
    "DUMP_FORMAT",
    "StoredDump",
    "StoredLayer",
    "StoredTensor",
    "check_fits_memory",
    "first_line",
    "layers_from_keys",
    "parse_json_object",
    "plain_meta",
    "stated_fields",
    "without_adapters",
]


DUMP_FORMAT = "layer-dump-v0"

MAX_META_VALUES = 100_000
"""Values kept in `meta`; nested shared lists in a hostile file could otherwise expand for ever."""


# Half of a pair: JSON can spell it, no output can be encoded with it.
_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file.

    Attributes
    ----------
    key : str
        Identity of the bytes within the file: equal keys mean one shared tensor.
    shape : tuple of int
    dtype : str
        As in `loraq_sim.layers.STORAGE_DTYPES`, or the file's own name for any other dtype.
    nbytes : int
        Bytes of the values as stored (before compression).
    load : callable
        Reads the tensor as an array of `shape`; called at most once per layer access.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load: Callable[[], NDArray]


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One layer in a file; every field but `name` is as found, unchecked.

    Where the file says no `kind` or `rows_per_call`, `loraq_sim.dumps.kinds` finds what it can;
    `rows_source` then says where the rows come from.
    """

    name: str
    weight: StoredTensor | None = None
    bias: StoredTensor | None = None
    activations: StoredTensor | None = None
    kind: object = None
    group: object = ""
    rows_per_call: object = None
    rows_source: str = ""
    calls_per_step: object = 1
    problem: str = ""

    def usable_weight(self) -> StoredTensor:
        """The weight, or an InputError that says why the layer cannot be used."""
        if self.weight is None or self.problem:
            raise InputError(f"layer {self.name!r}: {self.problem or 'has no weight'}")
        return self.weight


class StatedFields(TypedDict, total=False):
    """The fields of a `StoredLayer` that a file may state, unchecked."""

    kind: object
    group: object
    rows_per_call: object
    calls_per_step: object


@dataclass(frozen=True, kw_only=True)
class StoredDump:
    """A file's layers in order, its metadata, and the tensors left out with the reason.

    `left_out` is one sentence on those that may be weights; vectors such as norms are none.
    """

    layers: dict[str, StoredLayer]
    meta: dict[str, object]
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: str = ""


def first_line(error: BaseException) -> str:
    """First line of an exception's message, at most 200 characters, or its type's name.

    Names from the file may be part of the message; nothing that a terminal would obey is left.
    """
    lines = str(error).strip().splitlines()
    line = lines[0].strip()[:200] if lines else type(error).__name__
    return line if line.isprintable() else repr(line)[1:-1]


def check_fits_memory(path: Path, what: str, shape: tuple[int, ...]) -> None:
    """Raise DumpError if the float32 copy of a tensor would take over half of physical memory."""
    values = 1
    for size in shape:
        values *= size
    limit = physical_memory_bytes() // 2
    if 4 * values > limit:
        raise DumpError(
            f"{path}: {what} would take {4 * values / 2**30:.4g} GiB as float32, more than half of "
            f"this machine's memory ({limit / 2**30:.4g} GiB); use a smaller layer or more memory"
        )


def physical_memory_bytes() -> int:
    """Installed memory, or 16 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 16 * 2**30


def plain_meta(path: Path, meta: object) -> dict[str, object]:
    """Copy of a dump's metadata, made of dict, list, str, int, float, bool and None alone.

    Raises
    ------
    DumpError
        If `meta` is no mapping with string keys, holds another type, or more than
        `MAX_META_VALUES` values (shared nested lists count once per appearance).
    """
    if meta is None:
        return {}
    if not isinstance(meta, Mapping):
        raise DumpError(f"{path}: meta must be a mapping, got {type(meta).__name__}")
    left = MAX_META_VALUES

    def copy(value: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if left < 0 or depth > 20:
            raise DumpError(
                f"{path}: meta is too large or too deeply nested; keep it to a few facts"
            )
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            if any(_SURROGATE.search(key) for key in value):
                raise DumpError(f"{path}: meta holds a key that is no Unicode text")
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        if isinstance(value, str) and _SURROGATE.search(value):
            raise DumpError(f"{path}: meta holds a string that is no Unicode text: {value!r:.60}")
        if value is None or isinstance(value, bool | float | str):
            return value
        # Python refuses to print integers of thousands of digits, and JSON would need to.
        if isinstance(value, int) and value.bit_length() <= 64:
            return value
        raise DumpError(f"{path}: meta holds a {type(value).__name__}; use plain numbers and text")

    copied = copy(meta, 0)
    # A copy of a mapping is a dict: one with keys that are not text was refused.
    return copied if isinstance(copied, dict) else {}


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
        `skipped` lists tensors that are no 2-D weight or 1x1 convolution, nor belong to one;
        `left_out` says how much of the file's weights they are.
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
    unused = {key: tensor for key, tensor in tensors.items() if tensor.key not in used}
    skipped = {
        key: f"shape {tensor.shape} is no linear or 1x1 convolution weight"
        if len(tensor.shape) != 2 or key.endswith(".weight")
        else f"shape {tensor.shape}, but not named <layer>.weight"
        for key, tensor in unused.items()
    }
    return StoredDump(
        layers=found, meta=meta, skipped=skipped, left_out=_left_out(found, unused, skipped)
    )


def _left_out(
    found: Mapping[str, StoredLayer], unused: Mapping[str, StoredTensor], skipped: Mapping[str, str]
) -> str:
    sizes = {key: math.prod(t.shape) for key, t in unused.items() if len(t.shape) > 1}
    if not sizes:
        return ""
    kept = sum(math.prod(one.weight.shape) for one in found.values() if one.weight is not None)
    share = 100 * sum(sizes.values()) / max(1, kept + sum(sizes.values()))
    largest = max(sizes, key=lambda key: sizes[key])
    tensors = counted(len(sizes), "tensor")
    return (
        f"left out: {tensors} with {share:.3g} % of the weights, such as {largest}: "
        f"{skipped[largest]}"
    )


# PEFT, diffusers (also of old) and kohya name the factors of LoRA so.
_FACTOR = re.compile(
    r"(?P<base>.+?)(?:\.processor)?(?:\.(?P<member>\w+)_lora\.(?:down|up)|\.lora_(?:[AB]|down|up)"
    r"|\.lora(?:_linear_layer)?\.(?:down|up))(?:\.[^.]+)??"
)
# Tensors of other adapters (PEFT, LyCORIS); a base whose name ends so is none of theirs.
_TENSOR = re.compile(
    r"(?P<base>.+?)\.(?:hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|lora_mid"
    r"|lora_magnitude_vector|dora_scale|b?oft_(?:blocks|diag|R|S|s)|vera_lambda_[bd]|ia3_l|on_input|diff|diff_b)"
    r"(?:\.[^.]+)*"
)
_GLORA = ("a1", "a2", "b1", "b2")
# Trainers that flatten names with underscores put one of these in front.
_FLAT = re.compile(r"(?:lora|lycoris)_(?:unet_|transformer_|te\d?_)?")
_UNMERGED = "holds the weight without its adapter (LoRA); merge the adapter into it and save again"


def without_adapters(stored: StoredDump) -> StoredDump:
    """`stored` without layers that are factors of an adapter; a layer that has one cannot be used.

    Adapters are LoRA, DoRA, LoHa, LoKr, GLoRA, OFT, VeRA, IA3 and stored differences. Merging is
    not done here: how strongly an adapter counts is not in the tensors.
    """
    bases: set[str] = set()
    factors: list[str] = []
    for name in (*stored.layers, *stored.skipped):
        if match := _FACTOR.fullmatch(name):
            bases.add(".".join(filter(None, (match["base"], match["member"]))))
        elif match := _TENSOR.fullmatch(name):
            bases.add(match["base"])
        else:
            base, _, last = name.rpartition(".")
            if last not in _GLORA or not all(f"{base}.{one}" in stored.layers for one in _GLORA):
                continue
            bases.add(base)
        if name in stored.layers:
            factors.append(name)
    if not bases:
        return stored
    flat = {_FLAT.sub("", base, count=1) for base in bases if _FLAT.match(base)}
    layers = {
        name: replace(layer, problem=layer.problem or _UNMERGED)
        if (own := name.removesuffix(".base_layer")) in bases or own.replace(".", "_") in flat
        else layer
        for name, layer in stored.layers.items()
        if name not in factors
    }
    skipped = stored.skipped | dict.fromkeys(factors, "a factor of an adapter (LoRA)")
    told = ""
    if factors:
        told = f"{len(factors)} factors of adapters (LoRA) are no layers, such as {factors[0]}"
    said = "; ".join(filter(None, (stored.left_out, told)))
    return replace(stored, layers=layers, skipped=skipped, left_out=said)


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
    return StoredLayer(
        name=name,
        weight=tensors.get(f"{name}.weight"),
        bias=tensors.get(f"{name}.bias"),
        activations=activations,
        problem=problem,
        **stated_fields(record),
    )


def stated_fields(record: Mapping[Any, object]) -> StatedFields:
    """What the record of a layer says of its role and its calls, as found."""
    found: StatedFields = {}
    if record.get("kind") is not None:
        found["kind"] = record["kind"]
    if record.get("group") is not None:
        found["group"] = record["group"]
    if record.get("rows_per_call") is not None:
        found["rows_per_call"] = record["rows_per_call"]
    if record.get("calls_per_step") is not None:
        found["calls_per_step"] = record["calls_per_step"]
    return found
