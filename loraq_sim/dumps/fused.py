"""Weights that a state dict does not keep as one (N, K) ``<layer>.weight`` each.

- ``torch.nn.MultiheadAttention``: ``in_proj_weight`` (3 E, E) is the layer ``in_proj``, and its
  ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` are layers.
- transformers' ``Conv1D`` (GPT-2) stores (K, N). Its bias tells: it is as long as the second side.
  Square weights are turned where others of their name are, ``c_proj`` of an attention by that of
  the feed-forward part.
- Experts in one tensor (E, N, K) or (E, K, N) are E layers each. What the router beside them reads,
  (E, H), tells which side is the input; else the gate-and-up weight does, twice as wide as the
  down weight is deep.
- Convolutions are the GEMM that im2col makes of them, (N, C * kh * kw) with a row for each output
  position. Groups are not in a file: a weight with one input channel (depthwise) is no GEMM and
  left out, others are taken to have one group.

Layers that a file keeps apart but that read one input are a group, by their names and kinds
(`groups_of`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.stored import StoredTensor

__all__ = ["groups_of", "is_convolution", "unfused"]

_IN_PROJECTION = re.compile(r"(?P<layer>(?:.+\.)?(?:in|[qkv])_proj)_(?P<part>weight|bias)")
_EXPERTS = re.compile(
    r"(?P<home>(?:.+\.)?)experts\.(?P<what>\w*(?:gate|up|down|w[123])\w*?)(?:\.weight)?"
)
_READS_TOKENS = re.compile(r"gate|up|w1|w3")
_ROUTERS = ("gate.weight", "router.weight", "router.layer.weight", "gate.wg.weight")
_MAX_EXPERTS = 4096


def is_convolution(shape: tuple[int, ...]) -> bool:
    """Whether a weight of that shape is a convolution that im2col makes a GEMM of."""
    return len(shape) in (3, 4, 5) and shape[1] > 1 and math.prod(shape[2:]) > 1


def unfused(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` with each weight as one ``<layer>.weight`` of (N, K), in the order of the file."""
    turned = _stored_turned(tensors)
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        projection = _IN_PROJECTION.fullmatch(key)
        experts = _EXPERTS.fullmatch(key) if len(tensor.shape) == 3 else None
        if projection:
            found[f"{projection['layer']}.{projection['part']}"] = tensor
        elif key in turned:
            found[key] = _turned(tensor)
        elif experts and (is_turned := _inputs_first(experts, tensor, tensors)) is not None:
            found |= _each(key.removesuffix(".weight"), tensor, is_turned)
        elif key.endswith(".weight") and is_convolution(tensor.shape):
            found[key] = _flat(tensor)
        else:
            found[key] = tensor
    return found


def _stored_turned(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Keys of weights that are stored (K, N), by their biases and by their names."""
    square, found = set(), set()
    for key, tensor in tensors.items():
        bias = tensors.get(f"{key.removesuffix('.weight')}.bias")
        if not key.endswith(".weight") or len(tensor.shape) != 2 or bias is None:
            continue
        n, k = tensor.shape
        if n == k:
            square.add(key)
        elif bias.shape == (k,):
            found.add(key)
    names = {key.split(".")[-2] for key in found}
    return found | {key for key in square if key.split(".")[-2] in names}


def _inputs_first(
    experts: re.Match[str], tensor: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> bool | None:
    """Whether experts are stored (E, K, N); None where nothing in the file tells."""
    count, rows, columns = tensor.shape
    if count > _MAX_EXPERTS:
        return None
    reads_tokens = _READS_TOKENS.search(experts["what"]) is not None
    for name in _ROUTERS:
        router = tensors.get(experts["home"] + name)
        if router is not None and len(router.shape) == 2 and router.shape[0] == count:
            width = router.shape[1]
            if rows != columns and width in (rows, columns):
                return (width == rows) == reads_tokens
    home = f"{experts['home']}experts."
    for suffix in ("", ".weight"):
        up, down = (tensors.get(f"{home}{x}{suffix}") for x in ("gate_up_proj", "down_proj"))
        if up is not None and down is not None and len(up.shape) == len(down.shape) == 3:
            is_plain = up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]
            is_turned = up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
            if is_plain != is_turned:
                return is_turned
    return None


def _each(layer: str, tensor: StoredTensor, is_turned: bool) -> dict[str, StoredTensor]:
    """The experts of one tensor as layers ``<layer>.<number>``."""
    rows, columns = tensor.shape[1:]
    return {
        f"{layer}.{i}.weight": replace(
            tensor,
            key=f"{tensor.key}[{i}]",
            shape=(columns, rows) if is_turned else (rows, columns),
            nbytes=tensor.nbytes // tensor.shape[0],
            load=partial(_expert, tensor, i, is_turned),
        )
        for i in range(tensor.shape[0])
    }


def _expert(tensor: StoredTensor, number: int, is_turned: bool) -> NDArray:
    # A copy: what is read is this expert, and no mapping of the file stays open.
    one = np.array(tensor.load()[number])
    return one.T if is_turned else one


def _flat(tensor: StoredTensor) -> StoredTensor:
    shape = tensor.shape[0], math.prod(tensor.shape[1:])
    return replace(tensor, shape=shape, load=lambda: tensor.load().reshape(shape))


def _turned(tensor: StoredTensor) -> StoredTensor:
    return replace(tensor, shape=tensor.shape[::-1], load=lambda: tensor.load().T)


# Layers that read one input: queries, keys and values; the two halves of a gated feed-forward.
_ONE_INPUT = (
    (re.compile(r"self_[qkv]"), "qkv"),
    (re.compile(r"cross_[kv]"), "kv"),
    (re.compile(r"text_[qkv]"), "add_qkv"),
)
_GATED = re.compile(r"(.*\bfeed_forward)\.w[13]")
# Wan's cross attention has keys and values of an image beside those of the text.
_OF_IMAGE = re.compile(r"\.(?:add_[kv]_proj|[kv]_img)$")


def groups_of(kinds: Mapping[str, str]) -> dict[str, str]:
    """Group of each layer that shares its input with another, by the names and kinds of layers."""
    members: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        parent, _, _ = name.rpartition(".")
        if found := _GATED.fullmatch(name):
            members.setdefault(f"{found[1]}.up", []).append(name)
        for pattern, word in _ONE_INPUT:
            if pattern.fullmatch(kind):
                of_image = "_img" if kind[:5] == "cross" and _OF_IMAGE.search(name) else ""
                members.setdefault(f"{parent}.{word}{of_image}".lstrip("."), []).append(name)
    return {name: group for group, names in members.items() for name in names if len(names) > 1}
