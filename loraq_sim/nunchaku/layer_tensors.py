"""One solved layer as the tensors of a nunchaku W4A4 linear layer, and back.

    qweight    (N', K'/2) int8     codes, two a byte
    wscales    (K'/64, N') fp16    one scale per 64 weights along K
    bias       (N',) fp16          zeros where the layer has none
    smooth, smooth_orig (K',) fp16 the activations are divided by it; ones without smoothing
    lora_down  (K', r') fp16       R, applied to the activations as they come
    lora_up    (N', r') fp16       L

N' and K' are N and K rounded up to 128, r' is the rank rounded up to 16 (scales are filled with
ones, all else with zeros). Everything survives the way there and back bit by bit but one thing:
with smoothing, nunchaku's R acts on activations that are not divided yet, so R / smooth is stored
in fp16, and R comes back within 2^-10 of what it was (two roundings to 11 bits).
"""

from collections.abc import Mapping

import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.nunchaku.fragments import (
    COLUMN_TILE,
    RANK_TILE,
    ROW_TILE,
    pack_codes,
    pack_low_rank,
    pack_scales,
    padded,
    unpack_codes,
    unpack_low_rank,
    unpack_scales,
)
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution

__all__ = ["BRANCH_FORMAT", "GROUP", "MAIN_FORMAT", "check_fits", "layer_tensors", "read_layer"]

GROUP = 64
MAIN_FORMAT = "int4/g64/fp16"
BRANCH_FORMAT = "fp16"
_KEYS = ("qweight", "wscales", "bias", "smooth", "lora_down", "lora_up")


def check_fits(name: str, solution: Solution) -> None:
    """Raise InputError unless the kernels can run `solution`: W4A4 g64 with a 16-bit branch."""
    main, right = str(solution.main.format), solution.right
    if parse_format(main) != parse_format(MAIN_FORMAT):
        raise InputError(
            f"layer {name!r}: the main branch is {main}; nunchaku runs {MAIN_FORMAT} only: solve "
            "with --split W4A4+W16A16r32 and --group 64"
        )
    if right is not None and str(right.format) != BRANCH_FORMAT:
        raise InputError(
            f"layer {name!r}: the branch is {right.format}; nunchaku runs 16-bit branches only: "
            "solve with --split W4A4+W16A16r32"
        )
    if solution.rotation is not None:
        raise InputError(
            f"layer {name!r}: nunchaku has no rotation of the input (block {solution.rotation}); "
            "solve without it"
        )


def layer_tensors(
    name: str, solution: Solution, bias: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Tensors of one layer without its name; see the module.

    Parameters
    ----------
    name : str
        For messages.
    solution : Solution
    bias : ndarray of shape (N,), optional

    Raises
    ------
    InputError
        If the formats are others than those of the kernels, or a value leaves the range of fp16.
    """
    check_fits(name, solution)
    n, k = solution.main.shape
    codes = padded(solution.main.codes, (ROW_TILE, COLUMN_TILE))
    # A short last group becomes a full one of zero codes; groups come in pairs.
    scales = _half(name, "a scale", solution.main.scales.reshape(n, -1))
    smooth = np.ones(k, np.float32) if solution.smooth is None else solution.smooth
    bias = np.zeros(n, np.float32) if bias is None else bias
    tensors = {
        "qweight": pack_codes(codes),
        "wscales": pack_scales(padded(scales, (ROW_TILE, COLUMN_TILE // GROUP), fill=1)),
        "bias": _column(_half(name, "the bias", bias), ROW_TILE, 0),
        "smooth": _column(_half(name, "the smoothing", smooth), COLUMN_TILE, 1),
    }
    tensors["smooth_orig"] = tensors["smooth"].copy()
    if solution.right is not None:
        down = solution.right.dequantize() / smooth
        up = solution.left.dequantize()
        down = padded(_half(name, "R / smooth", down), (RANK_TILE, COLUMN_TILE))
        up = padded(_half(name, "L", up), (ROW_TILE, RANK_TILE))
        tensors["lora_down"] = pack_low_rank(down, is_down=True)
        tensors["lora_up"] = pack_low_rank(up, is_down=False)
    return tensors


def read_layer(
    name: str,
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, int] | None = None,
    rank: int | None = None,
) -> tuple[dict[str, QuantizedTensor | np.ndarray | None], np.ndarray]:
    """Parts (``main left right smooth``) of one layer, and its bias (N,) float32.

    Parameters
    ----------
    name : str
        For messages.
    tensors : mapping
        Tensors of the layer without its name.
    shape : (N, K), optional
        What is not padding; all of it by default.
    rank : int, optional
        Likewise of the branch.

    Raises
    ------
    InputError
        If a tensor is missing or of another shape or dtype than the layout says.
    """
    missing = [key for key in _KEYS[:4] if key not in tensors]
    if missing or ("lora_down" in tensors) != ("lora_up" in tensors):
        raise InputError(f"layer {name!r}: {', '.join(missing) or 'a low-rank factor'} is missing")
    full_n, full_k = tensors["qweight"].shape[0], 2 * tensors["qweight"].shape[1]
    n, k = shape or (full_n, full_k)
    if not (0 < n <= full_n and 0 < k <= full_k):
        raise InputError(f"layer {name!r}: shape {n}x{k} does not lie in {full_n}x{full_k}")
    full_rank = tensors["lora_down"].shape[-1] if "lora_down" in tensors else 0
    _check(name, tensors, full_n, full_k, full_rank)
    scales = unpack_scales(tensors["wscales"])[:n, : -(-k // GROUP)].astype(np.float32)
    main = QuantizedTensor(
        codes=np.ascontiguousarray(unpack_codes(tensors["qweight"])[:n, :k]),
        scales=np.ascontiguousarray(scales),
        format=parse_format(MAIN_FORMAT),
    )
    smooth = unpack_scales(tensors["smooth"][None])[:k, 0].astype(np.float32)
    smooth = None if (smooth == 1).all() else smooth
    parts: dict[str, QuantizedTensor | np.ndarray | None]
    parts = {"main": main, "left": None, "right": None, "smooth": smooth}
    if full_rank:
        rank = full_rank if rank is None else rank
        down = unpack_low_rank(tensors["lora_down"], is_down=True)[:rank, :k].astype(np.float32)
        up = unpack_low_rank(tensors["lora_up"], is_down=False)[:n, :rank]
        parts["left"] = _plain(up)
        parts["right"] = _plain(down if smooth is None else down * smooth)
    bias = unpack_scales(tensors["bias"][None])[:n, 0].astype(np.float32)
    return parts, bias


def _check(name: str, tensors: Mapping[str, np.ndarray], n: int, k: int, rank: int) -> None:
    wanted = {
        "qweight": ((n, k // 2), np.int8),
        "wscales": ((k // GROUP, n), np.float16),
        "bias": ((n,), np.float16),
        "smooth": ((k,), np.float16),
        "lora_down": ((k, rank), np.float16),
        "lora_up": ((n, rank), np.float16),
    }
    if n % ROW_TILE or k % COLUMN_TILE or rank % RANK_TILE:
        raise InputError(
            f"layer {name!r}: {n}x{k} with rank {rank} is not padded to {ROW_TILE}, {COLUMN_TILE} "
            f"and {RANK_TILE}"
        )
    for key, (shape, dtype) in wanted.items():
        found = tensors.get(key)
        if found is not None and (found.shape != shape or found.dtype != dtype):
            raise InputError(
                f"layer {name!r}: {key} is {found.dtype} of shape {found.shape}; expected "
                f"{np.dtype(dtype)} of shape {shape}"
            )
        if found is not None and found.dtype == np.float16 and not np.isfinite(found).all():
            raise InputError(f"layer {name!r}: {key} holds values that are NaN or Inf")


def _half(name: str, what: str, values: np.ndarray) -> np.ndarray:
    largest = float(np.abs(values).max())
    if largest > float(np.finfo(np.float16).max):
        raise InputError(f"layer {name!r}: {what} reaches {largest:.4g}, beyond fp16 (65504)")
    return values.astype(np.float16)


def _column(values: np.ndarray, tile: int, fill: float) -> np.ndarray:
    return pack_scales(padded(values, (tile,), fill)[:, None]).reshape(-1)


def _plain(values: np.ndarray) -> QuantizedTensor:
    codes = np.ascontiguousarray(values, dtype=np.float16)
    return QuantizedTensor(codes=codes, scales=None, format=parse_format(BRANCH_FORMAT))
