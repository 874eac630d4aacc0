"""What a plain checkpoint does not say of its layers: their kinds, and the rows M of one call.

Kinds are read off the names, by the table that `capture` uses. Rows come, in this order, from the
file itself, from a diffusers ``config.json`` beside it, or, where the user names the model, from an
inventory of a published model (`rows_of_model`). Nothing is guessed: a layer whose rows none of
these tells has none, and no cost.

Rows of a kind of layer follow the image: rows = a * (image rows) + c, with a and c from the
inventory of the same class at both of its resolutions, and (image rows) = samples per call *
(sample_size / patch_size)^2.
"""

import dataclasses
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from loraq_sim.dumps.capture_kinds import kinds_of
from loraq_sim.dumps.inventory import RESOLUTIONS, ModelInventory, list_models, load_inventory
from loraq_sim.dumps.stored import StoredDump
from loraq_sim.errors import InputError
from loraq_sim.layers import SAMPLED_ROWS

__all__ = ["config_path", "rows_notes", "rows_of_model", "with_roles"]

_MAX_CONFIG_BYTES = 1 << 20
_IMAGE_KIND = "patch_embed"


def config_path(path: Path) -> Path:
    """Where the configuration of a checkpoint at `path` stands, if there is one."""
    return path.parent / "config.json"


def with_roles(path: Path, stored: StoredDump) -> StoredDump:
    """`stored` with a kind for every layer, and the rows that a ``config.json`` tells."""
    named = kinds_of(stored.layers)
    layers = {
        name: layer if layer.kind is not None else dataclasses.replace(layer, kind=named[name])
        for name, layer in stored.layers.items()
    }
    silent = {name: named[name] for name, layer in layers.items() if layer.rows_per_call is None}
    for name in layers.keys() - silent.keys():
        layers[name] = dataclasses.replace(layers[name], rows_source=_recorded(stored.meta))
    rows, source = _rows_of_config(path, silent) if silent else ({}, "")
    for name, count in rows.items():
        layers[name] = dataclasses.replace(layers[name], rows_per_call=count, rows_source=source)
    return dataclasses.replace(stored, layers=layers)


def rows_of_model(
    kinds: Mapping[str, str], model: str, resolution: int
) -> tuple[dict[str, int], str]:
    """Rows per call of the layers of a published model, and in words where they come from.

    Parameters
    ----------
    kinds : mapping of str to str
        Kind by layer name. A layer is found by its name, else by its kind.
    model : str
        One of `loraq_sim.dumps.inventory.list_models`.
    resolution : int
        Pixels, 1024 or 512.

    Raises
    ------
    InputError
        If the model or the resolution is unknown, or none of the layers is in the model.
    """
    inventory = load_inventory(model, resolution=resolution)
    rows = _found(kinds, {layer.name: layer.rows_per_call for layer in inventory.layers}, inventory)
    if not rows:
        raise InputError(
            f"--model {model}: none of the {len(kinds)} layers, such as {next(iter(kinds), '')!r}, "
            "has a name or kind of that model; give --rows instead"
        )
    return rows, f"{model} at {resolution} px, {_samples(inventory.cfg_batch)}"


def rows_notes(rows: Mapping[str, tuple[int | None, str]]) -> list[str]:
    """Sentences for the user on rows per call, given with their source by layer name."""
    by_source: dict[str, list[str]] = {}
    for name, (count, source) in rows.items():
        by_source.setdefault("" if count is None else source, []).append(name)
    notes = []
    for source, names in by_source.items():
        where = f"{len(names)} of {len(rows)} layers, such as {names[0]}"
        if not source:
            notes.append(
                f"rows per call (M) are not known for {where}: no latency, energy or traffic for "
                "them; give --rows M (samples x tokens of one call, guidance included), "
                "--rows 'PATTERN=M' or --model NAME"
            )
        elif source == SAMPLED_ROWS:
            notes.append(
                f"rows per call (M) are taken to be the {source} for {where} "
                f"(M = {rows[names[0]][0]}); give --rows M if a call has others"
            )
        elif source not in ("given", "dump"):
            notes.append(f"rows per call (M) from {source}: {where} (M = {rows[names[0]][0]})")
    return notes


def _recorded(meta: Mapping[str, object]) -> str:
    """Source of rows that a dump states, with the samples of a call where it says them."""
    batch, images = (meta.get(key, 1) for key in ("cfg_batch", "images"))
    if "cfg_batch" not in meta or not all(type(n) is int and n > 0 for n in (batch, images)):
        return "dump"
    of_images = f"{images} images, " if images > 1 else ""
    return f"dump, {of_images}{_samples(batch * images)}"


def _samples(count: int) -> str:
    return "1 sample per call" if count == 1 else f"{count} samples per call (guidance included)"


def _rows_of_config(path: Path, kinds: Mapping[str, str]) -> tuple[dict[str, int], str]:
    """Rows by layer name from the config beside `path`; none where it does not tell the image."""
    config = _config(config_path(path))
    patches = _patches(config)
    if patches is None:
        return {}, ""
    name = config.get("_class_name")
    inventory = _inventories().get(name) if isinstance(name, str) else None
    samples = inventory.cfg_batch if inventory is not None else 1
    if inventory is None:
        image = _image_kinds()
        rows = {layer: patches for layer, kind in kinds.items() if kind in image}
    else:
        rows = _found(kinds, _rows_at(inventory, samples * patches), inventory)
    return rows, f"config.json ({patches} patches an image), {_samples(samples)}"


def _config(path: Path) -> dict[str, object]:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CONFIG_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _patches(config: Mapping[str, object]) -> int | None:
    """Patches of one image, None if the config does not say both sizes."""
    patch, size = config.get("patch_size"), config.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    for number in (patch, *sides):
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 2**16:
            return None
    return (sides[0] // patch) * (sides[1] // patch) or None


@lru_cache(maxsize=1)
def _inventories() -> dict[object, ModelInventory]:
    """The inventory of each class of models; models of one class agree in rows."""
    return {inventory.model_class: inventory for inventory in map(load_inventory, list_models())}


def _found(
    kinds: Mapping[str, str], rows: Mapping[str, int], inventory: ModelInventory
) -> dict[str, int]:
    """Rows of the layers whose name is in `rows`, or whose kind has one count there."""
    counts: dict[str, set[int]] = {}
    for layer in inventory.layers:
        if layer.name in rows:
            counts.setdefault(layer.kind, set()).add(rows[layer.name])
    by_kind = {kind: found.pop() for kind, found in counts.items() if len(found) == 1}
    found = {name: rows.get(name, by_kind.get(kind)) for name, kind in kinds.items()}
    return {name: count for name, count in found.items() if count is not None}


def _rows_at(inventory: ModelInventory, image: int) -> dict[str, int]:
    """Rows by layer name where all samples of a call have `image` patches together."""
    large, small = (
        {
            layer.name: layer.rows_per_call
            for layer in load_inventory(inventory.model, resolution=size).layers
        }
        for size in RESOLUTIONS
    )
    (first,) = (layer.name for layer in inventory.layers if layer.kind == _IMAGE_KIND)
    step = large[first] - small[first]
    rows = {}
    for name, count in large.items():
        added, rest = divmod((count - small[name]) * (image - large[first]), step)
        if rest == 0 and count + added > 0:
            rows[name] = count + added
    return rows


@lru_cache(maxsize=1)
def _image_kinds() -> set[str]:
    """Kinds whose rows are those of the image in every model: for a class without an inventory."""
    kinds: dict[str, bool] = {}
    for inventory in _inventories().values():
        image = next(x.rows_per_call for x in inventory.layers if x.kind == _IMAGE_KIND)
        for layer in inventory.layers:
            kinds[layer.kind] = kinds.get(layer.kind, True) and layer.rows_per_call == image
    return {kind for kind, follows in kinds.items() if follows}
