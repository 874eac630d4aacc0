"""Write layers to a .pt, .safetensors or .npz dump, or copy a dump into another of them.

The layouts are those that the readers document. Activations that layers share are stored once. The
.safetensors and .npz writers hold one layer at a time, so a dump may be larger than memory; torch
writes a .pt from tensors that are all there.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.array_files import METADATA_KEY
from loraq_sim.dumps.layer_dump import LayerDump, LayerInfo, read_layer_dump
from loraq_sim.dumps.stored import DUMP_FORMAT, plain_meta
from loraq_sim.dumps.torch_file import import_torch
from loraq_sim.errors import DumpError, named_options, unknown_name
from loraq_sim.files import make_folder, refuse_existing, replaced_file
from loraq_sim.layers import Layer, check_name

__all__ = [
    "convert_dump",
    "stream_dump",
    "write_layer_dump",
]


_DTYPES = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype("<f4"),
}
_SAFETENSORS_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, kw_only=True)
class _Source:
    """Layers to write: their sizes up front, their values one layer at a time.

    `dtypes` maps each tensor key to its storage dtype; `owned` maps a layer to the keys it writes,
    by tensor; `records` is the per-layer metadata.
    """

    infos: dict[str, LayerInfo]
    load: Callable[[str], Layer]
    owned: dict[str, dict[str, str]]
    dtypes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    records: dict[str, dict[str, object]]
    meta: dict[str, object]

    def tensors(self, path: Path) -> Iterator[tuple[str, NDArray]]:
        """Yield key and stored array in the order of `dtypes`."""
        for name, keys in self.owned.items():
            layer = self.load(name)
            for tensor, key in keys.items():
                yield key, _narrow(path, key, getattr(layer, tensor), self.dtypes[key])


@named_options
def write_layer_dump(
    path: str | os.PathLike[str],
    layers: Mapping[str, Layer] | Iterable[Layer],
    *,
    meta: Mapping[str, object] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a layer dump and return its path; the suffix chooses the format.

    The file is written under a temporary name beside the target and renamed when complete, so a
    reader never sees half a dump.

    Parameters
    ----------
    path : str or path-like
        Ends in ``.pt``, ``.safetensors`` or ``.npz``. A ``.pt`` is gathered in memory first.
    layers : mapping of name to Layer, or iterable of Layer
        A mapping's keys become the names.
    meta : mapping, optional
        Plain facts about the model; default: the meta of `layers` if that is a `LayerDump`.
    dtype : {"float16", "bfloat16", "float32"}, optional
        Storage of all tensors. Default: as stored in a `LayerDump`, else float32. float64 becomes
        float32, which is all a `Layer` holds; .npz, which has no bfloat16, keeps it as float32.
    overwrite : bool
        Replace an existing file.

    Raises
    ------
    DumpError
        If the target exists, cannot be written or has another suffix, no layer is given, a name
        repeats, or a value does not fit `dtype`.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise DumpError(f"{path}: {unknown_name('dump suffix', path.suffix, _WRITERS)}")
    if dtype is not None and dtype not in _DTYPES:
        raise DumpError(f"{path}: {unknown_name('storage dtype', str(dtype), _DTYPES)}")
    if dtype == "bfloat16" and path.suffix == ".npz":
        raise DumpError(f"{path}: .npz has no bfloat16; use .safetensors, .pt, or another dtype")
    refuse_existing(path, overwrite=overwrite, error=DumpError)
    if meta is None and isinstance(layers, LayerDump):
        meta = layers.meta
    source = _source(path, layers, plain_meta(path, meta), dtype)
    with replaced_file(path, error=DumpError) as file:
        _WRITERS[path.suffix](path, file, source)
    return path


def _source(
    path: Path,
    layers: Mapping[str, Layer] | Iterable[Layer],
    meta: dict[str, object],
    dtype: str | None,
) -> _Source:
    if isinstance(layers, LayerDump):
        infos, load = {name: layers.info(name) for name in layers}, layers.__getitem__
    else:
        held = _by_name(path, layers)
        infos, load = {name: _info(name, layer) for name, layer in held.items()}, held.__getitem__
    if not infos:
        raise DumpError(f"{path}: no layers to write")
    source = _Source(infos=infos, load=load, owned={}, dtypes={}, shapes={}, records={}, meta=meta)
    first_with: dict[str, str] = {}
    for name, info in infos.items():
        _plan_layer(source, name, info, first_with)
    for key, stored in source.dtypes.items():
        widened = stored not in _DTYPES or (stored == "bfloat16" and path.suffix == ".npz")
        source.dtypes[key] = dtype or ("float32" if widened else stored)
    return source


def _plan_layer(source: _Source, name: str, info: LayerInfo, first_with: dict[str, str]) -> None:
    record: dict[str, object] = {"kind": info.kind, "group": info.group}
    if info.rows_per_call is not None:
        record["rows_per_call"] = info.rows_per_call
    record["calls_per_step"] = info.calls_per_step
    if info.inputs_source:
        record["inputs_source"] = info.inputs_source
    parts: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "weight": (info.dtype, (info.n, info.k)),
        "bias": (info.bias_dtype, (info.n,)),
    }
    if info.activation_key is not None and info.tokens is not None:
        key = first_with.setdefault(info.activation_key, f"{name}.activations")
        record["activations"] = key
        if key not in source.dtypes:
            parts["activations"] = (info.activation_dtype, (info.tokens, info.k))
    source.records[name] = record
    source.owned[name] = {}
    for tensor, (stored, shape) in parts.items():
        if stored is not None:
            key = f"{name}.{tensor}"
            source.owned[name][tensor] = key
            source.dtypes[key] = stored
            source.shapes[key] = shape


def _by_name(path: Path, layers: Mapping[str, Layer] | Iterable[Layer]) -> dict[str, Layer]:
    pairs = layers.items() if isinstance(layers, Mapping) else [(x.name, x) for x in layers]
    held: dict[str, Layer] = {}
    for name, layer in pairs:
        check_name(name)
        if name in held:
            raise DumpError(f"{path}: two layers are named {name!r}; names must differ")
        held[name] = layer
    return held


def _info(name: str, layer: Layer) -> LayerInfo:
    x = layer.activations
    return LayerInfo(
        name=name,
        n=layer.n,
        k=layer.k,
        tokens=None if x is None else len(x),
        kind=layer.kind,
        group=layer.group,
        has_bias=layer.bias is not None,
        rows_per_call=layer.rows_per_call,
        calls_per_step=layer.calls_per_step,
        inputs_source=layer.inputs_source,
        dtype="float32",
        bias_dtype=None if layer.bias is None else "float32",
        activation_dtype=None if x is None else "float32",
        nbytes=layer.weight.nbytes + (0 if layer.bias is None else layer.bias.nbytes),
        # Equal content counts as shared, whether or not it is the same object.
        activation_key=None if x is None else f"{x.shape} {hashlib.sha256(x.data).hexdigest()}",
    )


def _narrow(path: Path, key: str, array: NDArray[np.float32], dtype: str) -> NDArray:
    with np.errstate(over="ignore"):
        out = array.astype(_DTYPES[dtype], copy=False)
    if not np.isfinite(out).all():
        raise DumpError(
            f"{path}: {key} reaches {float(np.abs(array).max()):.6g}, beyond {dtype}; "
            "store it as bfloat16 or float32"
        )
    return out


def _write_safetensors(path: Path, file: BinaryIO, source: _Source) -> None:
    header: dict[str, object] = {
        "__metadata__": {
            "format": DUMP_FORMAT,
            "meta": json.dumps(source.meta),
            "layers": json.dumps(source.records),
        }
    }
    offset = 0
    for key, dtype in source.dtypes.items():
        end = offset + _DTYPES[dtype].itemsize * int(np.prod(source.shapes[key], dtype=np.int64))
        header[key] = {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": source.shapes[key],
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # The format aligns the data to 8 bytes.
    file.write(len(text).to_bytes(8, "little") + text)
    for _, array in source.tensors(path):
        file.write(np.ascontiguousarray(array).view(np.uint8).data)


def _write_npz(path: Path, file: BinaryIO, source: _Source) -> None:
    record = {"format": DUMP_FORMAT, "meta": source.meta, "layers": source.records}
    text = np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _add_member(archive, METADATA_KEY, text)
        for key, array in source.tensors(path):
            _add_member(archive, key, array)


def _add_member(archive: zipfile.ZipFile, key: str, array: NDArray) -> None:
    # Members of 4 GiB and more need the zip64 form, which has to be announced beforehand.
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _write_torch(path: Path, file: BinaryIO, source: _Source) -> None:
    torch = import_torch(path)
    values = {}
    for key, array in source.tensors(path):
        bits = array.view(np.int16) if array.dtype == ml_dtypes.bfloat16 else array
        tensor = torch.tensor(bits)
        values[key] = tensor.view(torch.bfloat16) if bits is not array else tensor
    entries = {}
    for name, record in source.records.items():
        rows = record.get("activations")
        entries[name] = {
            "weight": values[f"{name}.weight"],
            "bias": values.get(f"{name}.bias"),
            **record,
            "activations": values[rows] if isinstance(rows, str) else None,
        }
    torch.save({"format": DUMP_FORMAT, "meta": source.meta, "layers": entries}, file)


_WRITERS = {".pt": _write_torch, ".safetensors": _write_safetensors, ".npz": _write_npz}


def convert_dump(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    patterns: Iterable[str] = (),
    synthesize_inputs: bool | int = False,
    lora: Iterable[str] = (),
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Path:
    """Write the layers of `source` to `target`, whose suffix chooses the format.

    Names, kinds, groups, counts, metadata and shared inputs are kept. Without `dtype` every value
    is kept too: tensors stay as stored, except that float64, which a `Layer` does not hold, is
    rounded to float32, and that .npz keeps bfloat16 values as float32.

    Parameters
    ----------
    source, target : str or path-like
        Each .pt, .safetensors or .npz.
    dtype : {"float16", "bfloat16", "float32"}, optional
        Storage of all tensors.
    patterns : iterable of str
        Shell patterns over layer names and kinds; none means all layers.
    synthesize_inputs : bool or int
        Rows of inputs to draw for layers without, as in `read_layer_dump`; they are marked so.
    lora : iterable of str
        Adapters to merge into the weights, as in `read_layer_dump`.
    overwrite : bool
        Replace an existing target.
    on_layer : callable, optional
        Called with the name of each layer when its values have been read.

    Raises
    ------
    DumpError
        If the source cannot be read, a pattern matches nothing, the target exists, has an unknown
        suffix or is the source, or a value does not fit `dtype`.
    """
    source, target = Path(source), Path(target)
    dump = read_layer_dump(source, synthesize_inputs=synthesize_inputs, lora=lora)
    patterns = list(patterns)
    if patterns:
        dump = dump.select(patterns)
    if target.exists() and target.samefile(source):
        raise DumpError(f"{target}: is the file to convert; give the copy another name")
    return stream_dump(target, dump, dtype=dtype, overwrite=overwrite, on_layer=on_layer)


def stream_dump(
    path: str | os.PathLike[str],
    dump: LayerDump,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> Path:
    """`write_layer_dump` of a `LayerDump` into a folder that need not exist.

    `on_layer` is called with the name of each layer when its values have been read.
    """
    path = Path(path)
    make_folder(path.parent, error=DumpError)
    if on_layer is not None:
        dump = _Watched(dump, on_layer)
    return write_layer_dump(path, dump, dtype=dtype, overwrite=overwrite)


class _Watched(LayerDump):
    """A dump that tells which of its layers has been read."""

    def __init__(self, dump: LayerDump, on_layer: Callable[[str], None]) -> None:
        super().__init__(dump.path, dump._stored, drawn_rows=dump.drawn_rows, lora=dump.lora)
        self._on_layer = on_layer

    def __getitem__(self, name: str) -> Layer:
        layer = super().__getitem__(name)
        self._on_layer(name)
        return layer
