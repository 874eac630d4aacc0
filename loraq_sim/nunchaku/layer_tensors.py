"""One solved layer as the tensors of a nunchaku W4A4 linear layer, and back.

    qweight    (N', K'/2) int8     codes, two a byte
    wscales    (K'/64, N') fp16    one scale per 64 weights along K
    bias       (N',) fp16          zeros where the layer has none
    smooth, smooth_orig (K',) fp16 the activations are divided by it; ones without smoothing
    lora_down  (K', r') fp16       R, applied to the activations as they come
    lora_up    (N', r') fp16       L

A layer in NVFP4 has codes of e2m1 (sign in the high bit), ``wscales`` (K'/16, N') of e4m3, one for
16 weights, and the scale of the whole tensor as ``wtscale`` (1,), or as ``wcscales`` (N',), a row
each, where several layers are in one. That scale is fp32 in a solution and 16 bits here, within
2^-11 (fp16) or 2^-8 (bf16) of it: weights come back so much larger or smaller.

What the kernels read behind GELU they shift by 0.171875 and round without a sign (int4 alone). The
bias takes it back: bias - Q (shift / smooth), with Q the 4-bit part.

N' and K' are N and K rounded up to 128, r' is the rank rounded up to 16 (scales are filled with
ones, all else with zeros). Several layers in one (q, k and v) are rounded up each on its own, as
the loader allocates them. A file is in fp16, or in bf16 where the scales are.

Everything survives the way there and back bit by bit but one thing:
with smoothing, nunchaku's R acts on activations that are not divided yet, so R / smooth is stored
in fp16, and R comes back within 2^-10 of what it was (two roundings to 11 bits).

The order of the elements is that of the kernels. A warp multiplies with ``mma.m16n8k64`` (4-bit)
and ``mma.m16n8k16`` (16-bit); every lane finds what it multiplies in consecutive bytes. Lane l of
32 is (row l // 4, column l % 4) of a fragment:

- **weights**, tiles of 128 rows by 64 columns, row tiles outermost. In a tile: fragments of 16
  rows, then lanes, then the two halves of 8 rows, then the two halves of 32 columns, then 8 codes
  in one 32-bit word, the first in its lowest bits;
- **scales** (also bias and smoothing, as one column), blocks of 128 rows; in a block group by
  group: 8 runs of 16 rows, where lane column c takes rows 2c, 2c + 1, 8 + 2c and 9 + 2c;
- **scales of NVFP4**, blocks of 128 rows by 4 scales: 8 lanes, then 4, each with the scales of rows
  32 apart;
- **low-rank factors** (16 bit), tiles of 16 by 16: lanes, then halves of 8 rows, then halves of 8
  columns, then two elements. The down projection (r, K) is tiled along K first, the up projection
  (N, r) along N first.

The tests follow every element to its place by index arithmetic of their own.
"""

import json
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import InputError
from loraq_sim.formats import parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.solvers.problem import Branches

__all__ = [
    "BRANCH_FORMAT",
    "GELU_SHIFT",
    "GROUP",
    "MAIN_FORMAT",
    "check_fits",
    "described",
    "layer_tensors",
    "pack_codes",
    "pack_low_rank",
    "pack_micro_scales",
    "pack_scales",
    "plain_factor",
    "read_layer",
    "stored_scales",
    "unpack_codes",
    "unpack_low_rank",
    "unpack_micro_scales",
    "unpack_scales",
]


ROW_TILE = 128
COLUMN_TILE = 128
RANK_TILE = 16

_WEIGHT_AXES = (0, 4, 1, 3, 6, 2, 5, 7)
_SCALE_AXES = (0, 5, 1, 3, 2, 4)
_FACTOR_AXES = (0, 1, 3, 5, 2, 4, 6)
_MICRO_AXES = (0, 4, 3, 2, 1, 5)
_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)


def padded(values: np.ndarray, multiples: tuple[int, ...], fill: float = 0) -> np.ndarray:
    """`values` with each axis filled up to a multiple, behind what is there."""
    pads = [(0, -size % multiple) for size, multiple in zip(values.shape, multiples, strict=True)]
    return np.pad(values, pads, constant_values=fill)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Codes of -8 to 7, (N, K) int8 with N and K multiples of 128 -> (N, K / 2) int8."""
    n, k = codes.shape
    parts = codes.reshape(n // 128, 8, 2, 8, k // 64, 2, 4, 8).transpose(_WEIGHT_AXES)
    nibbles = (parts & 0xF).astype(np.uint32) << _NIBBLES
    words = np.bitwise_or.reduce(nibbles, axis=-1)
    return words.astype("<u4").reshape(-1).view(np.int8).reshape(n, k // 2)


def unpack_codes(packed: np.ndarray) -> np.ndarray:
    """What `pack_codes` was given: (N, K / 2) int8 -> (N, K) int8."""
    n, half = packed.shape
    k = 2 * half
    words = np.ascontiguousarray(packed).view("<u4").reshape(n // 128, k // 64, 8, 8, 4, 2, 2, 1)
    nibbles = (words >> _NIBBLES & np.uint32(0xF)).astype(np.int8)
    codes = np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8)
    return codes.transpose(np.argsort(_WEIGHT_AXES)).reshape(n, k)


def pack_scales(scales: np.ndarray) -> np.ndarray:
    """Scales (N, groups) of any 16-bit dtype, N a multiple of 128 -> (groups, N)."""
    n, groups = scales.shape
    parts = scales.reshape(n // 128, 8, 2, 4, 2, groups).transpose(_SCALE_AXES)
    return np.ascontiguousarray(parts).reshape(groups, n)


def unpack_scales(packed: np.ndarray) -> np.ndarray:
    """What `pack_scales` was given: (groups, N) -> (N, groups)."""
    groups, n = packed.shape
    parts = np.ascontiguousarray(packed).reshape(n // 128, groups, 8, 4, 2, 2)
    return np.ascontiguousarray(parts.transpose(np.argsort(_SCALE_AXES))).reshape(n, groups)


def pack_micro_scales(scales: np.ndarray) -> np.ndarray:
    """Scales (N, groups) of 8 bits, multiples of 128 and 4 -> (groups, N)."""
    n, groups = scales.shape
    parts = scales.reshape(n // 128, 4, 4, 8, groups // 4, 4).transpose(_MICRO_AXES)
    return np.ascontiguousarray(parts).reshape(groups, n)


def unpack_micro_scales(packed: np.ndarray) -> np.ndarray:
    """What `pack_micro_scales` was given: (groups, N) -> (N, groups)."""
    groups, n = packed.shape
    parts = np.ascontiguousarray(packed).reshape(n // 128, groups // 4, 8, 4, 4, 4)
    return np.ascontiguousarray(parts.transpose(np.argsort(_MICRO_AXES))).reshape(n, groups)


def pack_low_rank(factor: np.ndarray, *, is_down: bool) -> np.ndarray:
    """A 16-bit factor with sides of multiples of 16: down (r, K) -> (K, r), up (N, r) -> (N, r)."""
    rows, columns = factor.shape
    tiles = factor.reshape(rows // 16, 16, columns // 16, 16)
    tiles = tiles.transpose((2, 0, 1, 3) if is_down else (0, 2, 1, 3))
    outer, inner = tiles.shape[:2]
    lanes = tiles.reshape(outer, inner, 2, 8, 2, 4, 2).transpose(_FACTOR_AXES)
    return np.ascontiguousarray(lanes).reshape((columns, rows) if is_down else (rows, columns))


def unpack_low_rank(packed: np.ndarray, *, is_down: bool) -> np.ndarray:
    """What `pack_low_rank` was given."""
    outer, inner = packed.shape[0] // 16, packed.shape[1] // 16
    lanes = np.ascontiguousarray(packed).reshape(outer, inner, 8, 4, 2, 2, 2)
    tiles = lanes.transpose(np.argsort(_FACTOR_AXES)).reshape(outer, inner, 16, 16)
    tiles = tiles.transpose((1, 2, 0, 3) if is_down else (0, 2, 1, 3))
    shape = packed.shape[::-1] if is_down else packed.shape
    return np.ascontiguousarray(tiles).reshape(shape)


GROUP = 64
MICRO_GROUP = 16
MAIN_FORMAT = "int4/g64/fp16"
FLOAT_FORMAT = "nvfp4"
GELU_SHIFT = 0.171875
_MICRO = np.dtype(ml_dtypes.float8_e4m3fn)
_E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
BRANCH_FORMAT = "fp16"
# Names of nunchaku since 1.0 and those of its files before.
_OTHER_NAMES = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}
_HALVES: dict[np.dtype, str] = {
    np.dtype(np.float16): "fp16",
    np.dtype(ml_dtypes.bfloat16): "bf16",
}
_KEYS = ("qweight", "wscales", "bias", "smooth", "lora_down", "lora_up")


def check_fits(name: str, solution: Solution, halves: Sequence[str] = ("fp16", "bf16")) -> None:
    """Raise InputError unless the kernels can run `solution`: W4A4 g64 with a 16-bit branch.

    Scales and branch are all of one of `halves`.
    """
    main, right = str(solution.main.format), solution.right
    known = {parse_format(f"int4/g{GROUP}/{half}"): half for half in halves}
    if main == FLOAT_FORMAT and len(halves) > 1:
        known[solution.main.format] = _HALVES[_half_of(solution)]
    if parse_format(main) not in known:
        raise InputError(
            f"layer {name!r}: the main branch is {main}; nunchaku runs {MAIN_FORMAT} and "
            f"{FLOAT_FORMAT} only: solve with --split W4A4+W16A16r32 and --group 64, or with "
            "--family nvfp"
        )
    half = known[parse_format(main)]
    if right is not None and str(right.format) != half and str(right.format) in _HALVES.values():
        raise InputError(
            f"layer {name!r}: the branch is {right.format} and the scales are {half}; nunchaku "
            "keeps all of a file in one of them"
        )
    if right is not None and str(right.format) != half:
        raise InputError(
            f"layer {name!r}: the branch is {right.format}; nunchaku runs 16-bit branches only: "
            "solve with --split W4A4+W16A16r32"
        )
    if solution.rotation is not None:
        raise InputError(
            f"layer {name!r}: nunchaku has no rotation of the input (block {solution.rotation}); "
            "solve without it"
        )


def described(
    ranks: Sequence[int], config: Mapping[str, object], *, is_float: bool = False
) -> dict[str, str]:
    """What nunchaku's own files say of themselves: how they are quantized, and the model."""
    operand: dict[str, object] = {"dtype": "int4", "scale_dtype": None, "group_size": GROUP}
    weight = operand
    if is_float:
        operand = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan"}
        operand["group_size"] = MICRO_GROUP
        weight = operand | {"scale_dtype": [None, "fp8_e4m3_nan"]}
    how = {"method": "svdquant", "weight": weight, "activation": operand, "rank": max(ranks)}
    said = {"quantization_config": json.dumps(how)}
    if config:
        said["config"] = json.dumps(dict(config))
        said["model_class"] = str(config.get("_class_name", ""))
    return said


def _places(rows: Sequence[int]) -> NDArray[np.int64]:
    """Where the rows of members lie that are each rounded up to a tile."""
    found, start = [], 0
    for count in rows:
        found.append(np.arange(start, start + count, dtype=np.int64))
        start += -(-count // ROW_TILE) * ROW_TILE
    return np.concatenate(found)


def _spread(values: np.ndarray, rows: Sequence[int], fill: float = 0) -> np.ndarray:
    """`values` (N, ...) with each member's rows filled up to whole tiles."""
    full = sum(-(-count // ROW_TILE) * ROW_TILE for count in rows)
    out = np.full((full, *values.shape[1:]), fill, dtype=values.dtype)
    out[_places(rows)] = values
    return out


def layer_tensors(
    name: str,
    solution: Solution,
    bias: np.ndarray | None = None,
    rows: Sequence[int] = (),
    units: Sequence[float] = (),
) -> dict[str, np.ndarray]:
    """Tensors of one layer without its name; see the module.

    Parameters
    ----------
    name : str
        For messages.
    solution : Solution
    bias : ndarray of shape (N,), optional
    rows : sequence of int
        Rows of the layers that are in it, in order; N alone by default.
    units : sequence of float
        Of several layers in NVFP4, the scale of each.

    Raises
    ------
    InputError
        If the formats are others than those of the kernels, or a value leaves the range of fp16.
    """
    check_fits(name, solution)
    n, k = solution.main.shape
    half = _half_of(solution)
    rows = rows or (n,)
    smooth = np.ones(k, np.float32) if solution.smooth is None else solution.smooth
    bias = np.zeros(n, np.float32) if bias is None else bias
    tensors = _main_tensors(name, solution.main, half, rows, units) | {
        "bias": _column(_spread(_half(name, "the bias", bias, half), rows), ROW_TILE, 0),
        "smooth": _column(_half(name, "the smoothing", smooth, half), COLUMN_TILE, 1),
    }
    tensors["smooth_orig"] = tensors["smooth"].copy()
    if solution.left is not None and solution.right is not None:
        down = solution.right.dequantize() / smooth
        up = solution.left.dequantize()
        down = padded(_half(name, "R / smooth", down, half), (RANK_TILE, COLUMN_TILE))
        up = padded(_spread(_half(name, "L", up, half), rows), (ROW_TILE, RANK_TILE))
        tensors["lora_down"] = pack_low_rank(down, is_down=True)
        tensors["lora_up"] = pack_low_rank(up, is_down=False)
    return tensors


def _main_tensors(
    name: str, main: QuantizedTensor, half: np.dtype, rows: Sequence[int], units: Sequence[float]
) -> dict[str, np.ndarray]:
    """Codes and scales of the 4-bit part."""
    if str(main.format) != FLOAT_FORMAT:
        codes = padded(_spread(main.codes, rows), (ROW_TILE, COLUMN_TILE))
        # A short last group becomes a full one of zero codes; groups come in pairs.
        scales = _spread(_half(name, "a scale", stored_scales(main), half), rows, 1)
        scales = padded(scales, (ROW_TILE, COLUMN_TILE // GROUP), fill=1)
        return {"qweight": pack_codes(codes), "wscales": pack_scales(scales)}
    bits = np.ascontiguousarray(main.codes).view(np.uint8) & 15
    # A zero has no sign in the files of others.
    bits = np.where(bits == 8, 0, bits).astype(np.int8)
    found = {"qweight": pack_codes(padded(_spread(bits, rows), (ROW_TILE, COLUMN_TILE)))}
    of_rows = np.repeat(np.asarray(units or [float(main.tensor_scale or 1)], np.float32), rows)
    micro = _spread((stored_scales(main) / of_rows[:, None]).astype(_MICRO), rows, 1)
    micro = padded(micro, (ROW_TILE, COLUMN_TILE // MICRO_GROUP), fill=1)
    found["wscales"] = pack_micro_scales(micro)
    whole = _half(name, "the scale of the tensor", of_rows, half)
    off = np.abs(whole.astype(np.float32) / of_rows - 1).max()
    if not off <= 2.0**-8:
        raise InputError(
            f"layer {name!r}: the scale of the tensor, {of_rows.min():.4g}, is too small for fp16; "
            "solve with a bf16 branch (--split 'W4A4+W16[bf16]A16[bf16]r32')"
        )
    if len(rows) == 1:
        return found | {"wtscale": whole[:1].copy()}
    return found | {"wcscales": _column(_spread(whole, rows, 1), ROW_TILE, 1)}


def read_layer(
    name: str,
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, int] | None = None,
    rank: int | None = None,
    rows: Sequence[int] = (),
) -> tuple[Branches, np.ndarray, tuple[float, ...]]:
    """The stored parts of one layer, its bias (N,) float32, and the units of its members in NVFP4.

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
    rows : sequence of int
        Rows of the layers that are in it, each rounded up on its own.

    Raises
    ------
    InputError
        If a tensor is missing or of another shape or dtype than the layout says.
    """
    tensors = {_OTHER_NAMES.get(key, key): values for key, values in tensors.items()}
    missing = [key for key in _KEYS[:4] if key not in tensors]
    if missing or ("lora_down" in tensors) != ("lora_up" in tensors):
        raise InputError(f"layer {name!r}: {', '.join(missing) or 'a low-rank factor'} is missing")
    full_n, full_k = tensors["qweight"].shape[0], 2 * tensors["qweight"].shape[1]
    n, k = shape or (full_n, full_k)
    if not (0 < n <= full_n and 0 < k <= full_k):
        raise InputError(f"layer {name!r}: shape {n}x{k} does not lie in {full_n}x{full_k}")
    places = _places(rows or (n,))
    if len(places) != n or places[-1] >= full_n:
        raise InputError(f"layer {name!r}: members of {tuple(rows)} rows do not lie in {full_n}")
    full_rank = tensors["lora_down"].shape[-1] if "lora_down" in tensors else 0
    _check(name, tensors, full_n, full_k, full_rank)
    main, units = _read_main(name, tensors, places, k, rows or (n,))
    factors = unpack_scales(tensors["smooth"][None])[:k, 0].astype(np.float32)
    if factors.min() <= 0:
        raise InputError(
            f"layer {name!r}: smooth must be positive, for inputs are divided by it; got "
            f"{factors.min():.6g}"
        )
    smooth = None if (factors == 1).all() else factors
    left = right = None
    if full_rank:
        rank = full_rank if rank is None else rank
        down = unpack_low_rank(tensors["lora_down"], is_down=True)[:rank, :k].astype(np.float32)
        up = unpack_low_rank(tensors["lora_up"], is_down=False)[places, :rank]
        half = _HALVES[tensors["lora_down"].dtype]
        left = plain_factor(up, half)
        right = plain_factor(down if smooth is None else down * smooth, half)
    bias = unpack_scales(tensors["bias"][None])[places, 0].astype(np.float32)
    return Branches(main=main, left=left, right=right, smooth=smooth), bias, units


def _read_main(
    name: str,
    tensors: Mapping[str, np.ndarray],
    places: NDArray[np.int64],
    k: int,
    rows: Sequence[int],
) -> tuple[QuantizedTensor, tuple[float, ...]]:
    codes = np.ascontiguousarray(unpack_codes(tensors["qweight"])[places, :k])
    if tensors["wscales"].dtype != _MICRO:
        scales = unpack_scales(tensors["wscales"])[places, : -(-k // GROUP)].astype(np.float32)
        fmt = parse_format(f"int4/g{GROUP}/{_HALVES[tensors['wscales'].dtype]}")
        return QuantizedTensor(codes=codes, scales=np.ascontiguousarray(scales), format=fmt), ()
    micro = unpack_micro_scales(tensors["wscales"])[places, : -(-k // MICRO_GROUP)]
    whole = np.ones(len(places), np.float32)
    if "wcscales" in tensors:
        whole *= unpack_scales(tensors["wcscales"][None])[places, 0].astype(np.float32)
    if "wtscale" in tensors:
        whole *= tensors["wtscale"].astype(np.float32).reshape(())
    starts = np.cumsum([0, *rows])
    units = tuple(float(x) for x in whole[starts[:-1]])
    # Rows of zeros are padding: what scales them is nobody's.
    is_used = (codes & 7).any(axis=1)
    if not (whole[is_used] == np.repeat(np.array(units, np.float32), rows)[is_used]).all():
        raise InputError(
            f"layer {name!r}: wcscales differ among the rows of one layer; NVFP4 has one scale for "
            "a tensor here"
        )
    if not (np.isfinite(whole).all() and min(units) > 0):
        raise InputError(f"layer {name!r}: the scale of the tensor must be positive, got {units}")
    return QuantizedTensor(
        codes=np.ascontiguousarray(codes.view(np.uint8) & 15).view(_E2M1),
        scales=micro.astype(np.float32) * whole[:, None],
        format=parse_format(FLOAT_FORMAT),
        tensor_scale=np.float32(units[0]),
    ), units


def _check(name: str, tensors: Mapping[str, np.ndarray], n: int, k: int, rank: int) -> None:
    # A file is in fp16 or in bf16: its scales say which, or its biases where those are of 8 bits.
    is_micro = tensors["wscales"].dtype == _MICRO
    half = tensors["bias" if is_micro else "wscales"].dtype
    half = half if half in _HALVES else np.dtype(np.float16)
    wanted = {
        "qweight": ((n, k // 2), np.dtype(np.int8)),
        "wscales": ((k // MICRO_GROUP, n), _MICRO) if is_micro else ((k // GROUP, n), half),
        "wcscales": ((n,), half),
        "bias": ((n,), half),
        "smooth": ((k,), half),
        "lora_down": ((k, rank), half),
        "lora_up": ((n, rank), half),
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
                f"{dtype} of shape {shape}"
            )
        if found is not None and found.dtype.itemsize < 4 and not _is_finite(found):
            raise InputError(f"layer {name!r}: {key} holds values that are NaN or Inf")
    unit = tensors.get("wtscale")
    if unit is not None and (unit.size != 1 or unit.dtype not in (*_HALVES, np.float32)):
        raise InputError(f"layer {name!r}: wtscale is {unit.dtype} of shape {unit.shape}, not one")


def stored_scales(main: QuantizedTensor) -> np.ndarray:
    """Scales (N, groups) of a main branch that `check_fits`."""
    if main.scales is None:
        raise InputError(f"a main branch of {main.format} has no scales; needs {MAIN_FORMAT}")
    return main.scales.reshape(main.shape[0], -1)


def _half_of(solution: Solution) -> np.dtype:
    """The 16-bit type of a layer's tensors: that of its scales, else of its branch, else bf16."""
    scale = solution.main.format.scale
    name = BRANCH_FORMAT if scale is None else scale.name
    if str(solution.main.format) == FLOAT_FORMAT:
        right = "" if solution.right is None else str(solution.right.format)
        name = right if right in _HALVES.values() else "bf16"
    return next(dtype for dtype, known in _HALVES.items() if known == name)


def _half(name: str, what: str, values: np.ndarray, half: np.dtype) -> np.ndarray:
    largest = float(np.abs(values).max())
    if half == np.float16 and largest > float(np.finfo(np.float16).max):
        raise InputError(f"layer {name!r}: {what} reaches {largest:.4g}, beyond fp16 (65504)")
    return values.astype(half)


def _column(values: np.ndarray, tile: int, fill: float) -> np.ndarray:
    return pack_scales(padded(values, (tile,), fill)[:, None]).reshape(-1)


def plain_factor(values: np.ndarray, half: str = BRANCH_FORMAT) -> QuantizedTensor:
    """A factor (N, r) or (r, K) stored as fp16, or as bf16."""
    dtype = next(dtype for dtype, name in _HALVES.items() if name == half)
    codes = np.ascontiguousarray(values, dtype=dtype)
    return QuantizedTensor(codes=codes, scales=None, format=parse_format(half))


def _is_finite(values: np.ndarray) -> bool:
    # NumPy warns of a signaling NaN in bfloat16.
    with np.errstate(invalid="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())
