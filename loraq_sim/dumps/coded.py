"""Weights that a checkpoint stores as codes beside their scales, decoded when they are asked for.

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
"""

import json
import math
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.stored import StoredTensor, first_line

__all__ = ["decoded"]

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
