"""Layer dumps in torch.save files (.pt).

Accepted layouts, tried in this order:

1. ``{"format": "layer-dump-v0", "meta": {...}, "layers": {name: entry}}``
2. ``{name: entry}``
3. a state dict ``{"<name>.weight": tensor, "<name>.bias": tensor, ...}``, read as layers
   without activations: 2-D weights and 1x1 convolutions become layers (an embedding table looks the
   same, so choose layers by pattern), everything else is listed in ``dump.skipped``. It may be
   nested by the parts of its names, and stand in a training checkpoint under one of `_HOLDERS`,
   averaged weights before others, as those who sample take them.

An entry holds ``weight`` (N, K) and optionally ``bias`` (N,), ``activations`` (T, K), ``kind``,
``group``, ``rows_per_call`` and ``calls_per_step``. Layers that share one activation tensor store
it once, as torch.save does by itself.

Safety: the pickle's instructions are scanned before torch sees them, and torch loads with
``weights_only=True``, which is unsafe before torch 2.6 (CVE-2025-32434) and refused there.

Checkpoints of trainers hold their arguments too (``argparse.Namespace``, OmegaConf, Lightning), and
torchao's tensors are objects of its own classes. Files with such names (a list in `file_kind`) are
read by an unpickler that looks nothing up (`load_records`): tensors are views of the file, and
everything else becomes a record of its arguments. torchao's plain int8, intx and float8 tensors are
decoded from those records; codes packed for a kernel are refused.
"""

import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from numpy.typing import NDArray

from loraq_sim.dumps.file_kind import (
    MAX_PICKLE_BYTES,
    Record,
    Wrapper,
    find_unsafe_name,
    load_records,
)
from loraq_sim.dumps.state_dict import layers_from_keys
from loraq_sim.dumps.stored import (
    DUMP_FORMAT,
    StoredDump,
    StoredLayer,
    StoredTensor,
    first_line,
    plain_meta,
    stated_fields,
)
from loraq_sim.dumps.stored_weights import affine
from loraq_sim.errors import DumpError

__all__ = ["import_torch", "load_object", "open_torch_file", "torch_tensors"]

_HOLDERS = (
    *("ema", "state_dict_ema", "model_ema", "ema_state_dict", "ema_model"),
    *("state_dict", "model_state_dict", "model", "module", "network", "net", "generator"),
    *("transformer", "unet", "weights", "params"),
)
"""Keys of training checkpoints that hold the weights, the first one before the others."""

_NO_WEIGHTS = re.compile(r"(?:\w*optim\w*|opt|\w*scheduler\w*|\w*scaler|callbacks|loops)s?")
_MAX_DEPTH = 12


def open_torch_file(path: Path) -> StoredDump:
    """Open a torch.save file memory-mapped; legacy files (before torch 1.6) are read whole.

    Raises
    ------
    DumpError
        If torch is missing or too old, the file wants to run code, or its layout is unknown.
    """
    return _read_root(path, load_object(path))


def load_object(path: Path) -> object:
    """What a torch.save file holds, memory-mapped where possible; none of its code runs.

    Raises
    ------
    DumpError
        If torch is missing or too old, or the file is damaged or wants to run code.
    """
    inert = _refuse_unsafe(path)
    torch = import_torch(path)
    if path.suffix == ".safetensors":
        # torch.load goes by this one suffix instead of the content.
        raise DumpError(f"{path}: this is a torch.save file; rename it to end in .pt")
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols other than its own, which it then reads or refuses.
            warnings.simplefilter("ignore")
            return load_records(path) if inert else _load(torch, path)
    except Exception as error:
        raise DumpError(f"{path}: torch cannot load it: {first_line(error)}") from error


def _load(torch: ModuleType, path: Path) -> object:
    if zipfile.is_zipfile(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def import_torch(path: Path) -> ModuleType:
    """Return the torch module; raise DumpError if it is missing or older than 2.6."""
    try:
        import torch
    except ImportError:
        raise DumpError(
            f"{path}: .pt files need torch; pip install 'torch>=2.6', or use .safetensors or .npz"
        ) from None
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < (2, 6):
        raise DumpError(
            f"{path}: torch {version} does not load untrusted files safely (CVE-2025-32434); "
            "pip install 'torch>=2.6', or use .safetensors or .npz"
        )
    return torch


def _refuse_unsafe(path: Path) -> bool:
    """Refuse a file that could run code; whether it holds objects to be read as records."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            # A legacy file is five pickles: magic number, protocol, system, content, storage keys.
            for _ in range(5):
                _scan(path, file)
        return False
    with zipfile.ZipFile(path) as archive:
        # torch finds its members whatever their case, so DATA.PKL beside data.pkl is a second one.
        members = [(i, i.filename.lower().rpartition("/")[2]) for i in archive.infolist()]
        pickles = [member for member, last in members if last == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
            raise DumpError(f"{path}: its directory of tensors is repeated or over 16 MiB")
        # Memory-mapped tensors are read in place, so compressed ones would come out as noise.
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise DumpError(
                f"{path}: a .pt file that was compressed again; save it with torch.save"
            )
        inert: set[str] = set()
        with archive.open(pickles[0]) as file:
            _scan(path, file, inert)
    return bool(inert)


def _scan(path: Path, file: IO[bytes], inert: set[str] | None = None) -> None:
    try:
        with warnings.catch_warnings():
            # Python's parser complains of a damaged text's backslashes.
            warnings.simplefilter("ignore")
            unsafe = find_unsafe_name(file, inert)
    except MemoryError:
        raise DumpError(
            f"{path}: damaged (its pickle holds a text longer than any memory)"
        ) from None
    except Exception as error:
        # pickletools raises half a dozen types on damaged bytes.
        raise DumpError(f"{path}: damaged or truncated ({first_line(error)})") from error
    if unsafe:
        raise DumpError(
            f"{path}: refused, nothing was run: its pickle asks for {unsafe!r}, which no dense "
            "tensor needs; save model.state_dict() and plain numbers and text, or use .safetensors"
        )


def _read_root(path: Path, root: object) -> StoredDump:
    if not isinstance(root, Mapping):
        raise DumpError(
            f"{path}: holds a {type(root).__name__}, expected a mapping of layer names to tensors"
        )
    file_bytes = path.stat().st_size
    if isinstance(root.get("layers"), Mapping):
        found = root.get("format", DUMP_FORMAT)
        if found != DUMP_FORMAT:
            shown = repr(found[:40]) if isinstance(found, str) else type(found).__name__
            raise DumpError(
                f"{path}: unknown dump format {shown}; this version reads {DUMP_FORMAT}"
            )
        meta = plain_meta(path, root.get("meta"))
        return _structured(root["layers"], meta, file_bytes)
    if any(isinstance(value, Mapping) and "weight" in value for value in root.values()):
        names = [key for key, value in root.items() if isinstance(value, Mapping)]
        # One entry under the name of a holder is the state dict of a bare layer.
        if len(root) == 1 and names[0] not in _HOLDERS or len(root) > 1 and not _is_wrapped(root):
            return _structured(root, {}, file_bytes)
    held, trail = _state_dict(root)
    tensors = {key: _stored_tensor(value, file_bytes) for key, value in _flat(held, "", _MAX_DEPTH)}
    stored = layers_from_keys(tensors, layers={}, meta={})
    beside = [key for key in _HOLDERS if trail and key in root and key != trail[0]]
    if beside:
        note = f"read is {'.'.join(trail)!r}, not {beside[0]!r} beside it"
        left_out = "; ".join(filter(None, (stored.left_out, note)))
        stored = replace(stored, left_out=left_out)
    return stored


def torch_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one shard of a checkpoint.

    Raises
    ------
    DumpError
        As `open_torch_file`.
    """
    root = load_object(path)
    if not isinstance(root, Mapping):
        raise DumpError(f"{path}: holds a {type(root).__name__}, expected a mapping of tensors")
    held, _ = _state_dict(root)
    size = path.stat().st_size
    return {key: _stored_tensor(value, size) for key, value in _flat(held, "", _MAX_DEPTH)}


def _is_wrapped(root: Mapping[object, object]) -> bool:
    """Whether a holder stands among things that are no layers, such as an epoch."""
    return any(key in root for key in _HOLDERS) and not all(
        isinstance(value, Mapping) and "weight" in value for value in root.values()
    )


def _state_dict(root: Mapping[object, object]) -> tuple[Mapping[object, object], list[str]]:
    """The mapping with the weights, and the holders that it was found under."""
    trail: list[str] = []
    while len(trail) < _MAX_DEPTH and not any(_is_weight(k, v) for k, v in root.items()):
        key = next((key for key in _HOLDERS if _holds_tensors(root.get(key), _MAX_DEPTH)), None)
        inner = None if key is None else root[key]
        if key is None or not isinstance(inner, Mapping):
            break
        root = inner
        trail.append(key)
    return root, trail


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and key.endswith("weight") and _is_tensor(value)


def _holds_tensors(value: object, depth: int) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(_is_tensor(x) for x in value.values()) or any(
        _holds_tensors(x, depth - 1) for x in islice(value.values(), 100)
    )


def _flat(held: Mapping[object, object], prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    """Tensors of nested mappings by dotted name; optimizers hold none of the model's."""
    for key, value in held.items():
        if not isinstance(key, str):
            continue
        if _is_tensor(value):
            yield prefix + key, value
        elif isinstance(value, Mapping) and depth and not _NO_WEIGHTS.fullmatch(key):
            yield from _flat(value, f"{prefix}{key}.", depth - 1)


def _structured(
    entries: Mapping[object, object], meta: dict[str, object], file_bytes: int
) -> StoredDump:
    layers = {}
    for position, (name, entry) in enumerate(entries.items()):
        if isinstance(name, str):
            layers[name] = _stored_layer(name, entry, file_bytes)
        else:
            label = f"entry {position}"
            problem = f"its name is a {type(name).__name__}, expected text"
            layers[label] = StoredLayer(name=label, problem=problem)
    return StoredDump(layers=layers, meta=meta)


def _stored_layer(name: str, entry: object, file_bytes: int) -> StoredLayer:
    if not isinstance(entry, Mapping):
        return StoredLayer(
            name=name, problem=f"is a {type(entry).__name__}, expected a mapping with 'weight'"
        )
    tensors: dict[str, StoredTensor] = {}
    for tensor in ("weight", "bias", "activations"):
        value = entry.get(tensor)
        if value is None:
            continue
        if not _is_tensor(value):
            return StoredLayer(
                name=name, problem=f"{tensor} is a {type(value).__name__}, expected a tensor"
            )
        tensors[tensor] = _stored_tensor(value, file_bytes)
    return StoredLayer(
        name=name,
        problem="" if "weight" in tensors else "has no weight",
        weight=tensors.get("weight"),
        bias=tensors.get("bias"),
        activations=tensors.get("activations"),
        **stated_fields(entry),
    )


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or _coded(value) is not None


_CODES = ("qdata", "int_data", "float8_data", "packed_weight")
_INNER = ("original_weight_tensor", "tensor_impl")


def _coded(value: object, depth: int = 4) -> dict[str, object] | None:
    """The parts of a tensor that wraps others, those of the tensor within it too."""
    if not isinstance(value, Wrapper):
        return None
    inner = next((value.facts[name] for name in _INNER if name in value.facts), None)
    found = _coded(inner, depth - 1) if inner is not None and depth else {}
    return value.facts | (found or {})


def _decoded(facts: dict[str, object], shape: tuple[int, ...], file_bytes: int) -> StoredTensor:
    """Values of a torchao tensor that keeps its codes one by one: (codes - zero) * scale."""
    parts: dict[str, StoredTensor | None] = {}
    for role, names in (("codes", _CODES), ("scale", ("scale",)), ("zero", ("zero_point",))):
        value = next((facts[name] for name in names if facts.get(name) is not None), None)
        is_plain = value is not None and _is_tensor(value) and not isinstance(value, Record)
        parts[role] = _stored_tensor(value, file_bytes) if is_plain else None
    domain = facts.get("zero_point_domain")
    of_floats = isinstance(domain, Record) and domain.args not in ((1,), (3,))
    stated = facts.get("block_size")
    sizes = tuple(stated) if isinstance(stated, tuple | list) else ()
    is_turned = bool(facts.get("transposed")) or of_floats or facts.get("act_pre_scale") is not None
    block = () if is_turned else sizes
    return affine(shape, parts["codes"], parts["scale"], parts["zero"], block)


def _stored_tensor(tensor: Any, file_bytes: int) -> StoredTensor:
    import torch

    facts = _coded(tensor)
    if facts is not None:
        return _decoded(facts, tensor.sizes, file_bytes)

    dtype = str(tensor.dtype).removeprefix("torch.")
    nbytes = tensor.numel() * tensor.element_size()
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    plain = plain and not tensor.is_quantized
    # torch.save never compresses: a tensor larger than its file repeats a few bytes by stride 0.
    if not plain or nbytes > file_bytes:
        dtype = f"{dtype} (sparse, quantized, without data, or repeated beyond the file's size)"

    narrow = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)

    def load() -> NDArray:
        values = tensor.detach()
        if values.dtype in narrow:
            values = values.to(torch.float32)  # NumPy has none of them; widening is exact.
        return values.numpy()

    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset()) if plain else id(tensor)
    return StoredTensor(
        key=f"{place}/{tuple(tensor.shape)}/{tensor.stride() if plain else ''}/{dtype}",
        shape=tuple(tensor.shape),
        dtype=dtype,
        nbytes=nbytes,
        load=load,
    )
