"""Which files of a folder are a model's checkpoint.

A folder may be

- a checkpoint: one weight file, or shards that an ``.index.json`` lists, or shards without it;
- a diffusers pipeline (``model_index.json``) or a repository with a folder a part: its denoiser is
  read (`DENOISERS`), the first one where it has two;
- neither, and is then refused with what it holds.

An ``.index.json`` alone stands for its folder, and one shard for itself, with a word on the rest.
Files of the names that libraries save (`_USUAL`) come before others, ``.safetensors`` before
pickles. Two files that hold the same tensor, such as a variant in fp16, are no checkpoint: the
message asks for one of them.

What the ``config.json`` beside the weights says of the model, `read_config` reads. `open_stored`
hands each file to the reader of its format.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import loraq_sim.dumps.array_files as array_files
import loraq_sim.dumps.onnx_file as onnx_file
import loraq_sim.dumps.torch_file as torch_file
from loraq_sim.dumps.file_kind import file_kind
from loraq_sim.dumps.state_dict import layers_from_keys
from loraq_sim.dumps.stored import StoredDump, StoredTensor, first_line
from loraq_sim.errors import DumpError, counted

__all__ = [
    "Checkpoint",
    "DENOISERS",
    "UNET",
    "config_path",
    "find_checkpoint",
    "is_count",
    "open_stored",
    "patches_of",
    "read_config",
    "rows_of_unet",
    "tensors_in",
]

DENOISERS = ("transformer", "unet", "prior", "decoder", "model")
"""Parts of a pipeline that denoise, as diffusers names them; the first that is there is meant."""

_USUAL = ("diffusion_pytorch_model", "model", "pytorch_model", "consolidated")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".onnx")
_INDEX = ".index.json"
_DEEPCOMPRESSOR = {"model.pt", "scale.pt", "branch.pt"}
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_CONFIG_BYTES = 2**20
UNET = "UNet2DConditionModel"
"""Class of diffusers whose layers work on images of several sizes."""

_OF_UNET = re.compile(r"(?:(?P<side>down|up)_blocks\.(?P<number>\d+)|(?P<mid>mid_block))\.")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The files of a checkpoint in order, the folder of its ``config.json``, a word for the user.

    `wanted` maps the tensors that an index lists to their files; empty without an index.
    """

    files: tuple[Path, ...]
    home: Path
    wanted: dict[str, str]
    note: str = ""

    def tensors(self, read: Callable[[Path], dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
        """All tensors of the shards, each file opened by `read`.

        Raises
        ------
        DumpError
            If two files hold one tensor, or an index lists one that its file lacks.
        """
        found: dict[str, StoredTensor] = {}
        holder: dict[str, Path] = {}
        for path in self.files:
            for key, tensor in read(path).items():
                if key in found:
                    raise DumpError(
                        f"{path}: {key!r:.100} is in {holder[key].name} too: these are two "
                        "checkpoints, not shards of one; give one of the files"
                    )
                found[key], holder[key] = tensor, path
        for key, name in self.wanted.items():
            if key not in found or holder[key].name != name:
                raise DumpError(
                    f"{self.home / name}: lacks {key!r:.100}, which the index lists there; "
                    "download the shards again"
                )
        return found


def find_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint of a folder, an index or one shard; None if `path` is any other file.

    Raises
    ------
    DumpError
        If the folder holds none or several, an index is damaged, or shards are missing.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:
        # No name of a file; the reader of files says so.
        return None
    if path.name.endswith(_INDEX) and is_file:
        return _of_index(path)
    if is_folder:
        home, note = _home(path)
        found = _of_folder(home)
        said = "; ".join(filter(None, (note, found.note)))
        return Checkpoint(files=found.files, home=home, wanted=found.wanted, note=said)
    shard = _SHARD.fullmatch(path.name)
    if shard and int(shard["count"]) > 1:
        note = f"one of {int(shard['count'])} shards; give the folder for the whole model"
        return Checkpoint(files=(path,), home=path.parent, wanted={}, note=note)
    return None


def _home(folder: Path) -> tuple[Path, str]:
    """The folder of the weights within `folder`, and which part of a pipeline that is."""
    is_pipeline = (folder / "model_index.json").is_file()
    if not is_pipeline and _weight_files(folder):
        return folder, ""
    parts = [name for name in DENOISERS if _weight_files(folder / name)]
    if parts:
        beside = [n for n in (f"{parts[0]}_2", *parts[1:]) if _weight_files(folder / n)]
        others = f", not its {beside[0]!r}" if beside else ""
        return folder / parts[0], f"of the pipeline, its {parts[0]!r} is read{others}"
    if is_pipeline:
        raise DumpError(
            f"{folder}: the pipeline's folder has weights in none of {', '.join(DENOISERS)}; "
            "download its transformer or unet"
        )
    return folder, ""


def _weight_files(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
    except OSError:
        return []


def _of_folder(folder: Path) -> Checkpoint:
    files = _weight_files(folder)
    if not files:
        raise DumpError(_nothing_in(folder))
    if {path.name for path in files} >= _DEEPCOMPRESSOR:
        raise DumpError(
            f"{folder}: is a model quantized by deepcompressor, whose model.pt lacks what the "
            "branch carries; give the original model, or read it with `loraq-sim model convert "
            f"{folder} FILE.safetensors --from deepcompressor --to layers`"
        )
    for suffix in _SUFFIXES:
        of_suffix = [path for path in files if path.suffix == suffix]
        index = _index_of(folder, suffix)
        if index is not None:
            return _of_index(index)
        usual = [p for name in _USUAL for p in of_suffix if p.name == f"{name}{suffix}"]
        if usual:
            return Checkpoint(files=(usual[0],), home=folder, wanted={})
        if of_suffix:
            return _of_files(folder, of_suffix)
    raise DumpError(_nothing_in(folder))


def _index_of(folder: Path, suffix: str) -> Path | None:
    """The index of files of a suffix; without a variant where there are several."""
    found = sorted(folder.glob(f"*{suffix}{_INDEX}"), key=lambda path: (len(path.name), path.name))
    return found[0] if found else None


def _of_files(folder: Path, files: list[Path]) -> Checkpoint:
    """Files without an index: shards of one checkpoint, all of them there, or a single file."""
    shards = [shard for path in files if (shard := _SHARD.fullmatch(path.name))]
    if not shards:
        if len(files) > 1 and files[0].suffix != ".safetensors":
            names = ", ".join(path.name for path in files[:4])
            raise DumpError(f"{folder}: holds several checkpoints ({names}); give one of the files")
        return Checkpoint(files=tuple(files), home=folder, wanted={})
    first = shards[0]
    mine = [s for s in shards if (s["stem"], s["count"]) == (first["stem"], first["count"])]
    _refuse_missing(
        folder,
        [
            f"{first['stem']}-{number:05d}-of-{first['count']}{first['suffix']}"
            for number in range(1, min(int(first["count"]), 9999) + 1)
        ],
    )
    return Checkpoint(files=tuple(folder / shard.group() for shard in mine), home=folder, wanted={})


def _of_index(path: Path) -> Checkpoint:
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise DumpError(f"{path}: an index over 64 MiB; download it again")
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = content["weight_map"]
        shards = list(dict.fromkeys(wanted.values()))
        names = [*wanted, *shards]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DumpError(f"{path}: no index of shards ({first_line(error)})") from None
    if not shards or not all(isinstance(name, str) for name in names):
        raise DumpError(f"{path}: its weight_map must map names of tensors to names of files")
    for name in shards:
        # Shards lie beside their index: no index reads elsewhere.
        if Path(name).name != name or name in ("", ".", ".."):
            raise DumpError(f"{path}: shard {name!r:.100} is no file beside the index")
    _refuse_missing(path.parent, shards)
    files = tuple(path.parent / name for name in shards)
    return Checkpoint(files=files, home=path.parent, wanted=dict(wanted))


def _refuse_missing(folder: Path, names: list[str]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DumpError(
            f"{folder}: {len(missing)} of {counted(len(names), 'shard')} missing, such as "
            f"{missing[0]!r:.100}; download the rest"
        )


def _nothing_in(folder: Path) -> str:
    try:
        held = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    except OSError as error:
        return f"{folder}: a directory that cannot be read ({first_line(error)})"
    shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "") if held else "nothing"
    return (
        f"{folder}: is a directory without a checkpoint (it holds {shown!r:.150}); give a dump "
        f"file, or a folder with {', '.join(_SUFFIXES[:3])} weights"
    )


def config_path(path: Path, home: Path | None = None) -> Path:
    """Where the configuration of a checkpoint at `path` stands, if there is one."""
    return (home or path.parent) / "config.json"


def read_config(path: Path) -> dict[str, object]:
    """What the ``config.json`` at `path` says; empty where there is none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def patches_of(config: Mapping[str, object]) -> int | None:
    """Patches of one image, None if the config does not say both sizes."""
    patch, size = config.get("patch_size"), config.get("sample_size")
    if config.get("_class_name") == UNET:
        # It works on the pixels of the latent image.
        patch = 1
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    numbers = [n for n in (patch, *sides) if is_count(n) and n <= 2**16]
    if len(numbers) < 3:
        return None
    edge, height, width = numbers
    return (height // edge) * (width // edge) or None


def rows_of_unet(
    kinds: Mapping[str, str], edge: int, samples: int, text_tokens: int
) -> dict[str, int]:
    """Rows by layer name of a U-Net on latent images of `edge` pixels; none for other names.

    Each level halves the sides; the block below the last down block is the first up block's level.
    """
    places = {name: _OF_UNET.search(name) for name in kinds}
    levels = [int(place["number"]) for place in places.values() if place and place["number"]]
    if not levels:
        return {}
    found = {}
    for name, kind in kinds.items():
        place, level = places[name], 0
        if place and place["mid"]:
            level = max(levels)
        elif place and place["side"] == "down":
            level = int(place["number"]) + ("downsamplers" in name)
        elif place:
            level = max(levels) - int(place["number"]) - ("upsamplers" in name)
        side = -(-edge // 2 ** max(level, 0))
        is_text = kind in ("cross_k", "cross_v", "text_embed")
        rows = text_tokens if is_text else 1 if kind == "time_embed" else side * side
        found[name] = samples * rows
    return found


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value from a file is a whole number from 1."""
    return type(value) is int and value > 0


def open_stored(path: Path) -> StoredDump:
    """What a file or a checkpoint of several files holds, by the reader of its format."""
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return _not_packed(path, _open_file(path, file_kind(path)))
    files = checkpoint.files
    if len(files) == 1:
        stored = _open_file(files[0], file_kind(files[0]))
    else:
        stored = layers_from_keys(checkpoint.tensors(_tensors_of), layers={}, meta={})
    said = "; ".join(filter(None, (stored.left_out, checkpoint.note)))
    stored = _not_packed(path, stored)
    return replace(stored, files=files, home=checkpoint.home, left_out=said)


def _not_packed(path: Path, stored: StoredDump) -> StoredDump:
    """Refuse a model in the layout of nunchaku's kernels: the layers beside are not the model."""
    packed = [
        key
        for key in stored.skipped
        if key.endswith(".qweight") and f"{key.removesuffix('.qweight')}.wscales" in stored.skipped
    ]
    if packed:
        raise DumpError(
            f"{path}: is a model quantized for nunchaku ({counted(len(packed), 'layer')}); give "
            f"the original model, or read it with `loraq-sim model convert {path} "
            "FILE.safetensors --from nunchaku --to layers`"
        )
    return stored


def _open_file(path: Path, kind: str) -> StoredDump:
    if kind == "torch":
        return torch_file.open_torch_file(path)
    if kind == "safetensors":
        return array_files.open_safetensors_file(path)
    if kind == "gguf":
        return array_files.open_gguf_file(path)
    if kind == "onnx":
        return onnx_file.open_onnx_file(path)
    return array_files.open_npz_file(path)


def tensors_in(path: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """Tensors of a file or folder of an adapter, and the files that hold them."""
    found = find_checkpoint(path)
    files = (path,) if found is None else found.files
    return {key: x for file in files for key, x in _tensors_of(file).items()}, files


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one shard."""
    kind = file_kind(path)
    if kind == "torch":
        return torch_file.torch_tensors(path)
    if kind == "safetensors":
        return array_files.safetensors_tensors(path)
    raise DumpError(f"{path}: a shard of a checkpoint is .safetensors or .bin, not {kind}")
