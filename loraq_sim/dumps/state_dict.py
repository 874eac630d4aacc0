"""A flat mapping of tensor names, as checkpoints are, becomes layers.

Tensors ``<layer>.weight``, ``.bias`` and ``.activations`` are one layer (`layers_from_keys`). What
names cannot carry stands in a JSON metadata record of our own dumps, one object per layer:

    {"<layer>": {"kind": "self_q", "group": "block0.attn1", "rows_per_call": 8192,
                 "calls_per_step": 1, "inputs_source": "synthetic",
                 "activations": "block0.attn1.to_q.activations"}}

every field optional. ``activations`` names the tensor that holds the layer's inputs, so layers of
one group point to one tensor.

Without the record the file is somebody's checkpoint. Then

- wrappers around all names (``module.``, ``model.diffusion_model.``) and within them
  (``_orig_mod.``) are taken off; layers still answer to their whole names;
- of a file that holds a diffusion model beside encoders, the diffusion model is read;
- of a file that holds one model under two wrappers, its averaged weights (``ema``) are read;
- weights stored as codes become the floats they stand for, and those that several layers share, or
  that stand on their side, become one each (`loraq_sim.dumps.stored_weights`).
"""

import math
import re
from collections.abc import Iterable, Mapping

from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, stated_fields
from loraq_sim.dumps.stored_weights import decoded, is_convolution, is_transposed, unfused
from loraq_sim.errors import counted

__all__ = ["common_wrapper", "layers_from_keys"]

_WRAPPERS = re.compile(
    r"(?:(?:module|_orig_mod|_fsdp_wrapped_module|model|transformer|unet|diffusion_model|net|ema)"
    r"\.)+"
)
_INNER = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_DIFFUSION_MODEL = "model.diffusion_model."
_BARE = "linear"
# Tables that are looked up, as libraries name them; a table has no bias.
_TABLE = re.compile(
    r"(?:.*\.)?(?:embedding_table|embed_tokens|(?:word|position|token|token_type)_embeddings?"
    r"|relative_attention_bias|wte|wpe|shared)"
)


def common_wrapper(names: Iterable[str]) -> str:
    """The wrapper, such as ``module.``, that all names begin with; empty if there is none."""
    names = list(names)
    found = _WRAPPERS.match(names[0]) if names else None
    prefix = found.group() if found else ""
    while prefix and not all(name.startswith(prefix) for name in names):
        prefix = prefix[: prefix.rstrip(".").rfind(".") + 1]
    return prefix


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
        `skipped` lists tensors that are no 2-D weight or convolution, nor belong to one;
        `left_out` says how much of the file's weights they are.
    """
    names = dict.fromkeys(layers)
    aliases: dict[str, str] = {}
    others: dict[str, str] = {}
    convolutions = ""
    if not layers:
        tensors, aliases, others = _plain(tensors)
        convolutions = _convolutions(tensors)
        tensors = unfused(decoded(tensors))
    for key, tensor in tensors.items():
        name = key.removesuffix(".weight")
        is_table = _TABLE.fullmatch(name) and f"{name}.bias" not in tensors
        if name and name != key and (name in layers or _is_linear(tensor.shape) and not is_table):
            names[name] = None
    found = {name: _one_layer(name, tensors, layers.get(name, {})) for name in names}
    used = {
        tensor.key
        for layer in found.values()
        for tensor in (layer.weight, layer.bias, layer.activations)
        if tensor is not None
    }
    unused = {key: tensor for key, tensor in tensors.items() if tensor.key not in used}
    skipped = {key: _why(key, tensor.shape) for key, tensor in unused.items()}
    said = [_left_out(found, unused, skipped), convolutions]
    if others:
        parts = ", ".join(dict.fromkeys(key.partition(".")[0] for key in others))
        is_twin = "the same model" in next(iter(others.values()))
        what = "one of two copies of the model" if is_twin else "the diffusion model"
        said.append(f"read is {what}, not what is beside it ({parts:.100})")
    return StoredDump(
        layers=found,
        meta=meta,
        skipped=skipped | others,
        left_out="; ".join(filter(None, said)),
        others=unused,
        aliases={key: name for key, name in aliases.items() if name in found},
    )


def _why(key: str, shape: tuple[int, ...]) -> str:
    """Why a tensor is no layer."""
    if len(shape) == 2 and _TABLE.fullmatch(key.removesuffix(".weight")):
        return "a table that is looked up, not multiplied with"
    if len(shape) != 2 or key.endswith(".weight"):
        return f"shape {shape!r:.80} is no linear or convolution weight"
    return f"shape {shape!r:.80}, but not named <layer>.weight"


def _convolutions(tensors: Mapping[str, StoredTensor]) -> str:
    found = [
        key
        for key, tensor in tensors.items()
        if key.endswith(".weight")
        and is_convolution(tensor.shape)
        and not is_transposed(key, tensors)
    ]
    if not found:
        return ""
    return (
        f"{counted(len(found), 'convolution')}, such as {found[0].removesuffix('.weight'):.100}, "
        "run as GEMMs of im2col: K = channels x kernel, a row for each output position, one group"
    )


def _plain(
    tensors: Mapping[str, StoredTensor],
) -> tuple[dict[str, StoredTensor], dict[str, str], dict[str, str]]:
    """Tensors by name without wrappers; whole names of layers; tensors of other models."""
    weights = [key for key, tensor in tensors.items() if len(tensor.shape) > 1]
    prefix, others = common_wrapper(weights), {}
    if not prefix and any(key.startswith(_DIFFUSION_MODEL) for key in weights):
        prefix = _DIFFUSION_MODEL
        reason = "is of another model in the file than the diffusion model"
        others = {key: reason for key in tensors if not key.startswith(prefix)}
    elif not prefix and (prefix := _of_twins(weights)):
        reason = "is of the same model under another wrapper"
        others = {key: reason for key in tensors if not key.startswith(prefix)}
    kept: dict[str, StoredTensor] = {}
    aliases: dict[str, str] = {}
    for key, tensor in tensors.items():
        if key in others:
            continue
        name = _INNER.sub("", key.removeprefix(prefix))
        if name in ("weight", "bias"):
            name = f"{_BARE}.{name}"
        if name in kept or name in ("", key):
            name = key
        kept[name] = tensor
        if name != key:
            aliases[key.removesuffix(".weight")] = name.removesuffix(".weight")
    return kept, aliases, others


def _of_twins(weights: list[str]) -> str:
    """The wrapper to read where all weights are there under each of several; empty otherwise."""
    names: dict[str, set[str]] = {}
    for key in weights:
        found = _WRAPPERS.match(key)
        if found is None:
            return ""
        names.setdefault(found.group(), set()).add(key[found.end() :])
    twins = [prefix for prefix, held in names.items() if held == next(iter(names.values()))]
    if len(twins) < 2 or len(twins) < len(names):
        return ""
    return next((prefix for prefix in twins if "ema" in prefix), twins[0])


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
        f"left out: {tensors} with {share:.3g} % of the weights, such as {largest:.100}: "
        f"{skipped[largest]}"
    )


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
