"""GGUF files of llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF.

The directory is read here, by the published layout: magic, version 2 or 3, counts, metadata, then
name, sizes (innermost first), type and offset of each tensor. Blocks of codes (Q8_0, Q4_K and their
kind) are decoded by the gguf package, tensor by tensor; float tensors need no package. The layout
is that of ggml's docs/gguf.md.
"""

import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.state_dict import layers_from_keys
from loraq_sim.dumps.stored import StoredDump, StoredTensor, plain_meta
from loraq_sim.errors import DumpError

__all__ = ["open_gguf_file"]

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_FLOATS = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    28: np.dtype("<f8"),
    30: np.dtype(ml_dtypes.bfloat16),
}
_SHAPE_BEFORE = "comfy.gguf.orig_shape."
_MAX_TEXT = 2**20
_MAX_SHOWN = 500
_MAX_DIMENSIONS = 8


def open_gguf_file(path: Path) -> StoredDump:
    """Read the directory of a GGUF file.

    Raises
    ------
    DumpError
        If it is damaged, of an unknown version, or its codes need the `gguf` package.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path.stat().st_size)
        version, n_tensors, n_facts = reader.take("<4xIQQ")
        if version not in (2, 3):
            raise DumpError(f"{path}: GGUF version {version}, expected 2 or 3; convert it again")
        facts = dict(reader.fact() for _ in reader.counted(n_facts, 12))
        entries = [reader.tensor() for _ in reader.counted(n_tensors, 24)]
        end = file.tell()
    align = facts.get("general.alignment", 32)
    if not isinstance(align, int) or not 0 < align <= 2**20:
        raise DumpError(f"{path}: general.alignment is {align!r:.40}; damaged")
    start = -(-end // align) * align
    tensors = {}
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise DumpError(f"{path}: tensor {name!r:.80} is there twice in its directory")
        before = facts.get(_SHAPE_BEFORE + name)
        if isinstance(before, list) and math.prod(before) == math.prod(shape):
            shape = tuple(before)
        tensors[name] = _stored(path, name, shape, kind, start + offset)
    meta = {k: v for k, v in facts.items() if isinstance(v, int | float | bool) or _is_short(v)}
    return layers_from_keys(tensors, layers={}, meta=plain_meta(path, meta))


def _is_short(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_SHOWN


class _Reader:
    """Takes what a GGUF directory is made of; a count that the file cannot hold is damage."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def take(self, layout: str) -> tuple[Any, ...]:
        wanted = struct.calcsize(layout)
        found = self.file.read(wanted)
        if len(found) != wanted:
            raise ValueError("its directory ends early; truncated")
        return struct.unpack(layout, found)

    def counted(self, count: int, least: int) -> range:
        """`count` things of at least `least` bytes each, if the file has room for them."""
        if count * least > self.size - self.file.tell():
            raise ValueError(f"it counts {count} things, more than the file has room for")
        return range(count)

    def text(self) -> str:
        (length,) = self.take("<Q")
        if length > _MAX_TEXT:
            raise ValueError(f"a text of {length} bytes")
        return self.take(f"<{length}s")[0].decode("utf-8", errors="replace")

    def fact(self) -> tuple[str, object]:
        key = self.text()
        return key, self.value(self.take("<I")[0])

    def value(self, kind: int, depth: int = 0) -> object:
        if kind in _NUMBERS:
            return self.take("<" + _NUMBERS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 2:
            raise ValueError(f"a value of type {kind}")
        of, count = self.take("<IQ")
        if of in _NUMBERS:
            self.counted(count, struct.calcsize(_NUMBERS[of]))
            return list(self.take(f"<{count}{_NUMBERS[of]}"))
        return [self.value(of, depth + 1) for _ in self.counted(count, 8)]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text()
        (n_dimensions,) = self.take("<I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {n_dimensions} dimensions")
        sizes = self.take(f"<{n_dimensions}Q")
        kind, offset = self.take("<IQ")
        return name, tuple(reversed(sizes)), kind, offset


def _stored(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> StoredTensor:
    count = math.prod(shape)
    if kind in _FLOATS:
        dtype = _FLOATS[kind]
        nbytes, stored_as, decode = count * dtype.itemsize, "", None
    else:
        dtype = np.dtype(np.float32)
        nbytes, stored_as, decode = _coded(path, kind, shape)
    if offset + nbytes > path.stat().st_size:
        raise DumpError(f"{path}: {name!r:.80} ends beyond the file; truncated")
    return StoredTensor(
        key=name,
        shape=shape,
        dtype=dtype.name,
        stored_as=stored_as,
        nbytes=nbytes,
        load=partial(_load, path, offset, nbytes, shape, dtype, decode),
    )


def _coded(
    path: Path, kind: int, shape: tuple[int, ...]
) -> tuple[int, str, Callable[[NDArray], NDArray]]:
    """Bytes of a tensor of blocks, the name of their type, and what decodes them."""
    try:
        import gguf
    except ImportError:
        raise DumpError(
            f"{path}: this is a GGUF model with coded blocks; pip install 'loraq-sim[gguf]'"
        ) from None
    try:
        known = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise DumpError(f"{path}: holds a tensor of the unknown type {kind}; damaged") from None
    block, block_bytes = gguf.GGML_QUANT_SIZES[known]
    if math.prod(shape) % block:
        raise DumpError(f"{path}: {math.prod(shape)} values are no whole {known.name} blocks")
    nbytes = math.prod(shape) // block * block_bytes

    def decode(stored: NDArray) -> NDArray:
        try:
            return gguf.quants.dequantize(stored.reshape(-1, block_bytes), known)
        except NotImplementedError:
            raise DumpError(f"{path}: blocks of {known.name} are not decoded; use Q8_0") from None

    return nbytes, known.name, decode


def _load(
    path: Path,
    offset: int,
    nbytes: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    decode: Callable[[NDArray], NDArray] | None,
) -> NDArray:
    stored = np.fromfile(path, dtype=np.uint8, count=nbytes, offset=offset)
    if stored.size != nbytes:
        raise DumpError(f"{path}: ended before byte {offset + nbytes}; truncated")
    values = stored.view(dtype) if decode is None else decode(stored)
    return values.reshape(shape)
