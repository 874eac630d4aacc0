"""Weights as checkpoints store them become one (N, K) ``<layer>.weight`` each.

**Codes** beside their scales are decoded when they are asked for (`decoded`):

- ComfyUI, modelopt, compressed-tensors: float8 or int8 ``W.weight`` (N, K) times ``scale_weight``
  or ``weight_scale``, which is one number, (N,), (N, 1) or one a group, (N, groups).
- DeepSeek: float8 (N, K) times ``weight_scale_inv`` of blocks of 128 x 128.
- bitsandbytes LLM.int8(): int8 (N, K) times ``SCB`` (N,) / 127.
- bitsandbytes nf4 and fp4: two codes a byte, the first in the high bits, into the 16 values of
  ``weight.quant_map``, times ``weight.absmax`` of blocks, which may be coded themselves.
- modelopt NVFP4: two e2m1 a byte, the first in the low bits, times float8 ``weight_scale``
  (N, K / 16), times float32 ``weight_scale_2``.

A float8 weight without a scale is what it says. What stands beside a weight for its kernels alone
(`input_scale`, `scale_input`, `comfy_quant`, zero points that are absent) is no tensor of a layer.

**Weights that are not kept one by one** (`unfused`):

- ``torch.nn.MultiheadAttention``: ``in_proj_weight`` (3 E, E) is the layer ``in_proj``, and its
  ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` are layers.
- transformers' ``Conv1D`` (GPT-2) stores (K, N). Its bias tells: it is as long as the second side.
  Square weights are turned where others of their name are, ``c_proj`` of an attention by that of
  the feed-forward part.
- Experts in one tensor (E, N, K) or (E, K, N) are E layers each. What the router beside them reads,
  (E, H), tells which side is the input; else the gate-and-up weight does, twice as wide as the
  down weight is deep.
- Convolutions are the GEMM that im2col makes of them, (N, C * kh * kw) with a row for each output
  position. A bias as long as the second side tells a transposed convolution, which is no single
  GEMM. Groups are not in a file: a weight with one input channel (depthwise) is no GEMM and left
  out, others are taken to have one group.

Layers that a file keeps apart but that read one input are a group, by their names and kinds
(`groups_of`).
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.stored import StoredTensor, first_line

__all__ = ["affine", "decoded", "groups_of", "is_convolution", "is_transposed", "unfused"]

_EIGHT_BIT = ("float8_e4m3fn", "float8_e5m2", "int8")
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
_FOR_KERNELS = (
    *("input_scale", "scale_input", "weight_format", "comfy_quant", "output_scale"),
    *("weight_scale_2", "pre_quant_scale"),
)
_BLOCK = 128
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_E2M1_VALUES = np.concatenate([_E2M1, -_E2M1])
_MAX_STATE_BYTES = 4096
_STATE = ".quant_state.bitsandbytes__"


def decoded(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`tensors` with every coded weight as the floats it stands for, and without its scales.

    A weight whose scales do not fit keeps its place with a dtype that says so; it is refused when
    it is asked for.
    """
    found = dict(tensors)
    for key in tensors:
        layer, dot, last = key.rpartition(".")
        if last == "weight" and dot:
            _decode(found, layer)
    return found


def _decode(found: dict[str, StoredTensor], layer: str) -> None:
    key = f"{layer}.weight"
    weight = found[key]
    if weight.dtype in ("uint8", "int8") and (state := _state_key(found, key)):
        found[key] = _block_coded(found, key, found[state])
        for part in [name for name in found if name.startswith(f"{key}.")]:
            del found[part]
        return
    scales = [name for name in _SCALES if f"{layer}.{name}" in found]
    if weight.dtype in _EIGHT_BIT and scales:
        found[key] = _scaled(weight, found.pop(f"{layer}.{scales[0]}"), 1.0)
    elif weight.dtype == "int8" and f"{layer}.SCB" in found:
        found[key] = _scaled(weight, found.pop(f"{layer}.SCB"), 1 / 127)
    elif weight.dtype == "uint8" and f"{layer}.weight_scale_2" in found and scales:
        parts = found.pop(f"{layer}.{scales[0]}"), found.pop(f"{layer}.weight_scale_2")
        found[key] = _nvfp4(weight, *parts)
    else:
        return
    for name in _FOR_KERNELS:
        found.pop(f"{layer}.{name}", None)


def _scaled(weight: StoredTensor, scale: StoredTensor, factor: float) -> StoredTensor:
    spread = _spread(weight.shape, scale.shape)
    if spread is None:
        return _refused(weight, f"with a scale of shape {scale.shape!r:.60}")

    def load() -> NDArray:
        steps = scale.load().astype(np.float32) * np.float32(factor)
        return weight.load().astype(np.float32) * spread(steps)

    return _floats(weight, weight.shape, f"{weight.dtype} x scale", load, scale.nbytes)


def affine(
    shape: tuple[int, ...],
    codes: StoredTensor | None,
    scale: StoredTensor | None,
    zero: StoredTensor | None,
    block: tuple[object, ...],
) -> StoredTensor:
    """The weight ``(codes - zero) * scale`` of a torchao tensor of that shape.

    Scale and zero are one for each `block` (rows, columns) of codes. Codes that are packed for a
    kernel, and parts that do not fit, are refused when the weight is asked for.
    """
    rows, columns = block if len(block) == 2 else (0, 0)
    has_block = isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0
    is_whole = codes is not None and codes.shape == shape and len(shape) == 2
    if not (has_block and is_whole and scale is not None and codes is not None):
        dtype = "codes" if codes is None else codes.dtype
        return StoredTensor(
            key=f"torchao {id(codes)}" if codes is None else codes.key,
            shape=shape,
            dtype=f"{dtype} of torchao, packed for a kernel; save {{k: v.dequantize() for k, v in "
            "model.state_dict().items()}, or give the model to 'dump capture'",
            nbytes=0 if codes is None else codes.nbytes,
            load=lambda: np.empty(0),
        )
    (n, k), sizes = shape, (int(rows), int(columns))  # type: ignore[call-overload]
    grid = -(-n // sizes[0]), -(-k // sizes[1])
    parts = [scale] if zero is None else [scale, zero]
    known = codes.dtype in (*_EIGHT_BIT, "uint8")
    if not known or any(math.prod(part.shape) != math.prod(grid) for part in parts):
        return _refused(codes, f"of torchao with a scale of shape {scale.shape!r:.60}")

    def spread(part: StoredTensor) -> NDArray[np.float32]:
        values = part.load().astype(np.float32).reshape(grid)
        return np.repeat(np.repeat(values, sizes[0], 0)[:n], sizes[1], 1)[:, :k]

    def load() -> NDArray:
        whole = codes.load().astype(np.float32)
        whole = whole if zero is None else whole - spread(zero)
        return whole * spread(scale)

    more = sum(part.nbytes for part in parts)
    return _floats(codes, shape, f"{codes.dtype} x scale", load, more)


def _spread(
    shape: tuple[int, ...], scale: tuple[int, ...]
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]] | None:
    """What makes a scale of that shape multiply a weight; None if the two do not fit."""
    if math.prod(scale) == 1:
        return lambda steps: steps.reshape(())
    if not shape or len(shape) < 2 or 0 in shape or 0 in scale:
        return None
    n, k = shape[0], shape[1]
    if scale[0] == n and math.prod(scale) == n:
        return lambda steps: steps.reshape(n, *[1] * (len(shape) - 1))
    if len(scale) != 2 or len(shape) != 2:
        return None
    if (-(-n // _BLOCK), -(-k // _BLOCK)) == scale:
        sizes = _BLOCK, _BLOCK
    elif n % scale[0] == 0 and k % scale[1] == 0:
        sizes = n // scale[0], k // scale[1]
    else:
        return None
    return lambda steps: np.repeat(np.repeat(steps, sizes[0], 0)[:n], sizes[1], 1)[:, :k]


def _nvfp4(weight: StoredTensor, scale: StoredTensor, second: StoredTensor) -> StoredTensor:
    n, half = weight.shape if len(weight.shape) == 2 else (0, 0)
    if not n or scale.shape != (n, half // 8) or half % 8 or math.prod(second.shape) != 1:
        return _refused(weight, f"as NVFP4 with scales of shape {scale.shape!r:.60}")

    def load() -> NDArray:
        bytes_ = weight.load()
        codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).reshape(n, half // 8, 16)
        steps = scale.load().astype(np.float32) * second.load().astype(np.float32).reshape(())
        return (_E2M1_VALUES[codes] * steps[:, :, None]).reshape(n, 2 * half)

    return _floats(weight, (n, 2 * half), "nvfp4", load, scale.nbytes + second.nbytes)


def _state_key(found: Mapping[str, StoredTensor], key: str) -> str:
    kinds = (f"{key}{_STATE}{kind}" for kind in ("nf4", "fp4"))
    return next((state for state in kinds if state in found), "")


def _block_coded(found: Mapping[str, StoredTensor], key: str, state: StoredTensor) -> StoredTensor:
    """A bitsandbytes weight; its true shape stands in the JSON of its quantization state."""
    weight, absmax = found[key], found.get(f"{key}.absmax")
    values = found.get(f"{key}.quant_map")
    try:
        facts = _facts(state)
        n, k = (int(size) for size in facts["shape"])
        block = int(facts["blocksize"])
        nested = None
        if "nested_blocksize" in facts:
            nested = int(facts["nested_blocksize"]), float(facts["nested_offset"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        return _refused(weight, f"whose quantization state is damaged ({first_line(error)})")
    coded = [found.get(f"{key}.{part}") for part in ("nested_absmax", "nested_quant_map")]
    fits = absmax is not None and values is not None and values.shape == (16,)
    fits = fits and min(n, k, block) > 0 and n * k == 2 * math.prod(weight.shape)
    fits = fits and absmax is not None and math.prod(absmax.shape) == -(-n * k // block)
    if not fits or absmax is None or values is None or (nested and None in coded):
        return _refused(weight, "whose scales or shape do not fit")

    def load() -> NDArray:
        bytes_ = weight.load().reshape(-1).view(np.uint8)
        codes = np.stack([bytes_ >> 4, bytes_ & 15], axis=-1).reshape(-1)
        steps = absmax.load().reshape(-1)
        if nested is not None and coded[0] is not None and coded[1] is not None:
            outer = np.repeat(coded[0].load().astype(np.float32).reshape(-1), nested[0])
            inner = coded[1].load().astype(np.float32)[steps]
            steps = inner * outer[: len(inner)] + np.float32(nested[1])
        steps = np.repeat(steps.astype(np.float32), block)[: n * k]
        return (values.load().astype(np.float32)[codes] * steps).reshape(n, k)

    return _floats(weight, (n, k), "4 bits, blocks", load, absmax.nbytes)


def _facts(state: StoredTensor) -> dict:
    if state.dtype != "uint8" or state.nbytes > _MAX_STATE_BYTES:
        raise ValueError("no JSON of a few bytes")
    facts = json.loads(state.load().tobytes())
    if not isinstance(facts, dict):
        raise ValueError("no JSON object")
    return facts


def _floats(
    weight: StoredTensor,
    shape: tuple[int, ...],
    stored_as: str,
    load: Callable[[], NDArray],
    more_bytes: int,
) -> StoredTensor:
    return StoredTensor(
        key=weight.key,
        shape=shape,
        dtype="float32",
        stored_as=stored_as,
        nbytes=weight.nbytes + more_bytes,
        load=load,
    )


def _refused(weight: StoredTensor, why: str) -> StoredTensor:
    return StoredTensor(
        key=weight.key,
        shape=weight.shape,
        dtype=f"{weight.dtype} {why}",
        nbytes=weight.nbytes,
        load=weight.load,
    )


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


def is_transposed(key: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the bias beside a convolution's weight says that it is a transposed one."""
    bias, (n, c) = tensors.get(f"{key.removesuffix('.weight')}.bias"), tensors[key].shape[:2]
    return bias is not None and bias.shape == (c,) and n != c


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
            found[key] = tensor if is_transposed(key, tensors) else _flat(tensor)
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
_GATED = re.compile(r"(.*\bfeed_forward)\.(?:w|linear_)[13]|(.*\bff(?:_context)?)\.linear_[12]")
# Wan's cross attention has keys and values of an image beside those of the text.
_OF_IMAGE = re.compile(r"\.(?:add_[kv]_proj|[kv]_img)$")


def groups_of(kinds: Mapping[str, str]) -> dict[str, str]:
    """Group of each layer that shares its input with another, by the names and kinds of layers."""
    members: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        parent, _, _ = name.rpartition(".")
        if found := _GATED.fullmatch(name):
            members.setdefault(f"{found[1] or found[2]}.up", []).append(name)
        for pattern, word in _ONE_INPUT:
            if pattern.fullmatch(kind):
                of_image = "_img" if kind[:5] == "cross" and _OF_IMAGE.search(name) else ""
                members.setdefault(f"{parent}.{word}{of_image}".lstrip("."), []).append(name)
    return {name: group for group, names in members.items() for name in names if len(names) > 1}
