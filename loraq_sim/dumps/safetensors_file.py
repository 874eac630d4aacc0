"""Layer dumps in safetensors files.

Tensors are named as in `flat_keys`: ``<layer>.weight`` (N, K), ``<layer>.bias`` (N,) and
``<layer>.activations`` (T, K), in F16, BF16, F32 or F64. The file's string metadata holds

- ``format``: ``layer-dump-v0``
- ``meta``: a JSON object about the model
- ``layers``: a JSON object of per-layer records (see `flat_keys`); its order is the layers' order

All three are optional: any safetensors checkpoint is a dump without activations.

The safetensors library checks the directory (sizes, overlaps, holes); values are then read with one
plain read per tensor, so no mapping stays open and a layer is private to its reader.
"""

import json
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.flat_keys import layers_from_keys, parse_json_object
from loraq_sim.dumps.stored import DUMP_FORMAT, StoredDump, StoredTensor, first_line, plain_meta
from loraq_sim.errors import DumpError

__all__ = ["SAFETENSORS_DTYPES", "open_safetensors_file"]

SAFETENSORS_DTYPES = {
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


def open_safetensors_file(path: Path) -> StoredDump:
    """Read the directory of a safetensors file; raises DumpError if it is damaged or unknown."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise DumpError(
            f"{path}: a damaged or truncated safetensors file ({first_line(error)}); "
            "copy or export it again"
        ) from error
    if "layers" in metadata and metadata.get("format") != DUMP_FORMAT:
        raise DumpError(
            f"{path}: unknown dump format {metadata.get('format')!r:.60}; "
            f"this version reads {DUMP_FORMAT}"
        )
    tensors = _tensors(path)
    layers = parse_json_object(path, "layers", metadata.get("layers"))
    meta = plain_meta(path, _meta(path, metadata))
    return layers_from_keys(tensors, layers, meta)


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
        dtype = SAFETENSORS_DTYPES.get(entry["dtype"])
        shape = tuple(entry["shape"])
        tensors[key] = StoredTensor(
            key=key,
            shape=shape,
            dtype=dtype.name if dtype else entry["dtype"],
            nbytes=end - begin,
            load=partial(_load, path, 8 + size + begin, shape, dtype),
        )
    return tensors


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # The library checked one of two entries of a name; which one, this reader cannot know.
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that is there twice in its directory")
    return found


def _load(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray:
    count = int(np.prod(shape, dtype=np.int64))
    values = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if values.size != count:
        raise DumpError(f"{path}: ended before byte {offset + count * dtype.itemsize}; truncated")
    return values.reshape(shape)
