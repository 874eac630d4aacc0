"""Layer dumps in NumPy .npz archives and in safetensors files, and GGUF models.

In the first two, tensors are named ``<layer>.weight`` (N, K), ``<layer>.bias`` (N,) and
``<layer>.activations`` (T, K), and metadata holds what names cannot carry (see `stored`).

**.npz**: NumPy appends ``.npy`` to the names; float16, float32 or float64. An optional member
``__metadata__`` (a 0-d string, or the UTF-8 bytes as uint8) holds JSON:

    {"format": "layer-dump-v0", "meta": {...}, "layers": {"<layer>": {...}}}

so ``np.savez("dump.npz", **{"fc1.weight": w, "fc1.activations": x})`` is a valid dump. Pickled
object arrays are refused, and so is a member whose declared size does not follow from its own
header, or that unpacks to more than 100 times its size (over 64 MiB): a zip bomb. The same holds
for all members together, and for metadata, which is text, from 1 MiB on.

**.safetensors**: F16, BF16, F32, F64, F8_E4M3 or F8_E5M2. The file's string metadata holds

- ``format``: ``layer-dump-v0``
- ``meta``: a JSON object about the model
- ``layers``: a JSON object of per-layer records; its order is the layers' order

All three are optional: any safetensors checkpoint is a dump without activations. The safetensors
library checks the directory (sizes, overlaps, holes); values are then read with one plain read per
tensor, so no mapping stays open and a layer is private to its reader.

**GGUF** files are of llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF. The directory is read here,
by the published layout: magic, version 2 or 3, counts, metadata, then name, sizes (innermost
first), type and offset of each tensor. Blocks of codes (Q8_0, Q4_K and their kind) are decoded by
the gguf package, tensor by tensor; float tensors need no package. The layout is that of ggml's
docs/gguf.md.
"""

import json
import math
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.state_dict import layers_from_keys
from loraq_sim.dumps.stored import (
    DUMP_FORMAT,
    StoredDump,
    StoredTensor,
    first_line,
    parse_json_object,
    plain_meta,
)
from loraq_sim.errors import DumpError

__all__ = [
    "MAX_COMPRESSION",
    "METADATA_KEY",
    "open_gguf_file",
    "open_npz_file",
    "open_safetensors_file",
    "safetensors_tensors",
]

METADATA_KEY = "__metadata__"

MAX_COMPRESSION = 100
"""Trained weights compress to half at best; deflate can reach 1000 on zeros."""

_SMALL_BYTES = 64 * 2**20
_SMALL_METADATA_BYTES = 2**20
_MAX_METADATA_BYTES = 64 * 2**20


def open_npz_file(path: Path) -> StoredDump:
    """Read the headers of all members; raises DumpError for an unknown or damaged archive."""
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            key = member.filename.removesuffix(".npy")
            if key != member.filename:
                tensors[key] = _directory_entry(path, archive, member, key)
    unpacked = sum(tensor.nbytes for tensor in tensors.values())
    if unpacked > max(_SMALL_BYTES, MAX_COMPRESSION * path.stat().st_size):
        raise DumpError(
            f"{path}: its members unpack to {unpacked} bytes, more than {MAX_COMPRESSION} times "
            "the file: a zip bomb; save it with numpy.savez (uncompressed)"
        )
    record = _metadata(path, tensors.pop(METADATA_KEY, None))
    found = record.get("format", DUMP_FORMAT)
    if found != DUMP_FORMAT:
        raise DumpError(f"{path}: unknown dump format {found!r:.60}; expected {DUMP_FORMAT}")
    layers = record.get("layers", {})
    if not isinstance(layers, dict):
        raise DumpError(f"{path}: metadata 'layers' must be a JSON object")
    return layers_from_keys(tensors, layers, plain_meta(path, record.get("meta")))


def _directory_entry(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str
) -> StoredTensor:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # NumPy writes no other; LZMA lets a file of a few bytes ask for gigabytes of dictionary.
        raise DumpError(
            f"{path}: member {key!r:.80} is compressed in a way NumPy does not use; "
            "save it with numpy.savez or numpy.savez_compressed"
        )
    try:
        with archive.open(member) as file:
            shape, dtype = _read_header(file)
            data_offset = file.tell()
    except Exception as error:
        # zipfile, zlib and NumPy raise many types on damaged members.
        raise DumpError(f"{path}: member {key!r} is damaged ({first_line(error)})") from error
    if dtype.hasobject:
        raise DumpError(
            f"{path}: member {key!r} holds pickled objects, which could run code, so it was not "
            "loaded; save numeric arrays only"
        )
    nbytes = math.prod(shape) * dtype.itemsize
    if member.file_size != data_offset + nbytes:
        raise DumpError(
            f"{path}: member {key!r} declares {member.file_size} bytes but its header "
            f"(shape {shape!r:.60}, {dtype.name}) needs {data_offset + nbytes}; damaged or forged"
        )
    small = _SMALL_METADATA_BYTES if key == METADATA_KEY else _SMALL_BYTES
    if nbytes > max(small, MAX_COMPRESSION * member.compress_size):
        raise DumpError(
            f"{path}: member {key!r} unpacks {member.compress_size} bytes to {nbytes}, more than "
            f"{MAX_COMPRESSION}-fold: a zip bomb; save it with numpy.savez (uncompressed)"
        )
    return StoredTensor(
        key=key,
        shape=shape,
        dtype=dtype.name,
        nbytes=nbytes,
        load=partial(_load_npz, path, member.filename),
    )


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f".npy version {version} is not used for plain arrays")
    with _quiet():
        shape, _, dtype = read(file)
    if any(size < 0 for size in shape):
        raise ValueError("negative size in shape")
    return shape, dtype


@contextmanager
def _quiet() -> Iterator[None]:
    # Headers of Python 2 cost NumPy a second parse, damaged ones make Python's parser complain.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _load_npz(path: Path, filename: str) -> NDArray:
    with zipfile.ZipFile(path) as archive, archive.open(filename) as file, _quiet():
        return np.lib.format.read_array(file, allow_pickle=False)


def _metadata(path: Path, stored: StoredTensor | None) -> dict[str, object]:
    if stored is None:
        return {}
    if stored.nbytes > _MAX_METADATA_BYTES:
        raise DumpError(f"{path}: {METADATA_KEY} takes {stored.nbytes} bytes; at most 64 MiB")
    array = stored.load()
    if array.dtype == np.uint8:
        text = array.tobytes().decode("utf-8")
    elif array.shape == () and array.dtype.kind in "US":
        value = array.item()
        text = value if isinstance(value, str) else value.decode("utf-8")
    else:
        raise DumpError(
            f"{path}: {METADATA_KEY} must be a 0-d string or uint8 array, got {array.dtype.name} "
            f"of shape {array.shape}"
        )
    return parse_json_object(path, METADATA_KEY, text)


_SAFETENSORS_DTYPES = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    # Of codes and their states, never of a layer's own values.
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
}


def open_safetensors_file(path: Path) -> StoredDump:
    """Read the directory of a safetensors file; raises DumpError if it is damaged or unknown."""
    metadata = _checked_metadata(path)
    if "layers" in metadata and metadata.get("format") != DUMP_FORMAT:
        raise DumpError(
            f"{path}: unknown dump format {metadata.get('format')!r:.60}; "
            f"this version reads {DUMP_FORMAT}"
        )
    tensors = _tensors(path)
    layers = parse_json_object(path, "layers", metadata.get("layers"))
    meta = plain_meta(path, _meta(path, metadata))
    return layers_from_keys(tensors, layers, meta)


def safetensors_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard of a checkpoint; raises DumpError if it is damaged."""
    _checked_metadata(path)
    return _tensors(path)


def _checked_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise DumpError(
            f"{path}: a damaged or truncated safetensors file ({first_line(error)}); "
            "copy or export it again"
        ) from error


def _meta(path: Path, metadata: dict[str, str]) -> dict[str, object]:
    if metadata.get("format") == DUMP_FORMAT:
        return parse_json_object(path, "meta", metadata.get("meta"))
    return dict(metadata)


def _tensors(path: Path) -> dict[str, StoredTensor]:
    """Directory of the file in order of offset; the library has checked it before."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size), object_pairs_hook=_without_repeats)
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES.get(entry["dtype"])
        shape = tuple(entry["shape"])
        tensors[key] = StoredTensor(
            key=key,
            shape=shape,
            dtype=dtype.name if dtype else entry["dtype"],
            nbytes=end - begin,
            load=partial(_load_safetensors, path, 8 + size + begin, shape, dtype),
        )
    return tensors


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # The library checked one of two entries of a name; which one, this reader cannot know.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that is there twice in its directory")
    return found


def _load_safetensors(
    path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype | None
) -> NDArray:
    if dtype is None:
        raise DumpError(f"{path}: holds a tensor of a dtype that layers do not have")
    count = int(np.prod(shape, dtype=np.int64))
    if len(shape) == 3 and shape[2] > 1 and offset + count * dtype.itemsize <= path.stat().st_size:
        # Experts: whoever asks for one copies it, and the others are not read.
        return np.memmap(path, dtype, mode="r", offset=offset, shape=shape)
    values = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if values.size != count:
        raise DumpError(f"{path}: ended before byte {offset + count * dtype.itemsize}; truncated")
    return values.reshape(shape)


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
