"""What a format reader hands over: where each tensor lies, with nothing loaded and little judged.

Readers fill these records from a file's directory alone. A layer that cannot be used still gets a
record, with `problem` saying why, so that one bad layer never hides the others.

`loraq_sim.dumps.state_dict` groups the tensors of a flat file into layers by their names.
"""

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from loraq_sim.errors import DumpError, InputError

__all__ = [
    "DUMP_FORMAT",
    "StoredDump",
    "StoredLayer",
    "StoredTensor",
    "check_fits_memory",
    "first_line",
    "parse_json_object",
    "plain_meta",
    "stated_fields",
    "step_record",
]


DUMP_FORMAT = "layer-dump-v0"

MAX_META_VALUES = 100_000
"""Values kept in `meta`; nested shared lists in a hostile file could otherwise expand for ever."""


# Half of a pair: JSON can spell it, no output can be encoded with it.
_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file.

    Attributes
    ----------
    key : str
        Identity of the bytes within the file: equal keys mean one shared tensor.
    shape : tuple of int
    dtype : str
        As in `loraq_sim.layers.STORAGE_DTYPES`, or the file's own name for any other dtype.
    stored_as : str
        How the values are coded in the file where `load` decodes them to `dtype`; else empty.
    nbytes : int
        Bytes of the values as stored (before compression).
    load : callable
        Reads the tensor as an array of `shape`; called at most once per layer access.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load: Callable[[], NDArray]
    stored_as: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """One layer in a file; every field but `name` is as found, unchecked.

    Where the file says no `kind` or `rows_per_call`, `loraq_sim.dumps.kinds` finds what it can;
    `rows_source` then says where the rows come from. `inputs_source` says what the activations are
    where nobody captured them.
    """

    name: str
    weight: StoredTensor | None = None
    bias: StoredTensor | None = None
    activations: StoredTensor | None = None
    kind: object = None
    group: object = ""
    rows_per_call: object = None
    rows_source: str = ""
    inputs_source: object = ""
    calls_per_step: object = 1
    problem: str = ""

    def usable_weight(self) -> StoredTensor:
        """The weight, or an InputError that says why the layer cannot be used."""
        if self.weight is None or self.problem:
            raise InputError(f"layer {self.name!r}: {self.problem or 'has no weight'}")
        return self.weight


class StatedFields(TypedDict, total=False):
    """The fields of a `StoredLayer` that a file may state, unchecked."""

    kind: object
    group: object
    rows_per_call: object
    calls_per_step: object
    inputs_source: object


@dataclass(frozen=True, kw_only=True)
class StoredDump:
    """A file's layers in order, its metadata, and the tensors left out with the reason.

    `left_out` is one sentence on those that may be weights; vectors such as norms are none.
    `others` are all of them, vectors too, where they can be read.
    `aliases` maps whole names, wrappers included, to those of layers. `files` are those that hold
    the tensors, and `home` is the folder whose ``config.json`` describes the model, where that is
    not the file asked for and its folder.
    """

    layers: dict[str, StoredLayer]
    meta: dict[str, object]
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: str = ""
    others: dict[str, StoredTensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    home: Path | None = None


def first_line(error: BaseException) -> str:
    """First line of an exception's message, at most 200 characters, or its type's name.

    Names from the file may be part of the message; nothing that a terminal would obey is left.
    """
    lines = str(error).strip().splitlines()
    line = lines[0].strip()[:200] if lines else type(error).__name__
    return line if line.isprintable() else repr(line)[1:-1]


def check_fits_memory(path: Path, what: str, shape: tuple[int, ...]) -> None:
    """Raise DumpError if the float32 copy of a tensor would take over half of physical memory."""
    values = 1
    for size in shape:
        values *= size
    limit = physical_memory_bytes() // 2
    if 4 * values > limit:
        raise DumpError(
            f"{path}: {what} would take {4 * values / 2**30:.4g} GiB as float32, more than half of "
            f"this machine's memory ({limit / 2**30:.4g} GiB); use a smaller layer or more memory"
        )


def physical_memory_bytes() -> int:
    """Installed memory, or 16 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 16 * 2**30


def plain_meta(path: Path, meta: object) -> dict[str, object]:
    """Copy of a dump's metadata, made of dict, list, str, int, float, bool and None alone.

    Raises
    ------
    DumpError
        If `meta` is no mapping with string keys, holds another type, or more than
        `MAX_META_VALUES` values (shared nested lists count once per appearance).
    """
    if meta is None:
        return {}
    if not isinstance(meta, Mapping):
        raise DumpError(f"{path}: meta must be a mapping, got {type(meta).__name__}")
    left = MAX_META_VALUES

    def copy(value: object, depth: int) -> object:
        nonlocal left
        left -= 1
        if left < 0 or depth > 20:
            raise DumpError(
                f"{path}: meta is too large or too deeply nested; keep it to a few facts"
            )
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            if any(_SURROGATE.search(key) for key in value):
                raise DumpError(f"{path}: meta holds a key that is no Unicode text")
            return {str(key): copy(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [copy(item, depth + 1) for item in value]
        if isinstance(value, str) and _SURROGATE.search(value):
            raise DumpError(f"{path}: meta holds a string that is no Unicode text: {value!r:.60}")
        if value is None or isinstance(value, bool | float | str):
            return value
        # Python refuses to print integers of thousands of digits, and JSON would need to.
        if isinstance(value, int) and value.bit_length() <= 64:
            return value
        raise DumpError(f"{path}: meta holds a {type(value).__name__}; use plain numbers and text")

    copied = copy(meta, 0)
    # A copy of a mapping is a dict: one with keys that are not text was refused.
    return copied if isinstance(copied, dict) else {}


def parse_json_object(path: Path, what: str, text: str | None) -> dict[str, object]:
    """Parse a JSON object from a dump's metadata; None gives {}."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DumpError(
            f"{path}: metadata {what!r} is no valid JSON: {first_line(error)}"
        ) from None
    if not isinstance(value, dict):
        raise DumpError(
            f"{path}: metadata {what!r} must be a JSON object, got {type(value).__name__}"
        )
    return value


def stated_fields(record: Mapping[Any, object]) -> StatedFields:
    """What the record of a layer says of its role and its calls, as found."""
    found: StatedFields = {}
    if record.get("kind") is not None:
        found["kind"] = record["kind"]
    if record.get("group") is not None:
        found["group"] = record["group"]
    if record.get("rows_per_call") is not None:
        found["rows_per_call"] = record["rows_per_call"]
    if record.get("calls_per_step") is not None:
        found["calls_per_step"] = record["calls_per_step"]
    if record.get("inputs_source") is not None:
        found["inputs_source"] = record["inputs_source"]
    return found


def step_record(
    values: list[float], steps_of_rows: Mapping[str, NDArray[np.integer]]
) -> dict[str, object]:
    """What goes into ``meta["time_steps"]``.

    Parameters
    ----------
    values : list of float
        Time step values, in the order they were run.
    steps_of_rows : mapping of group to ndarray of shape (T,), integer
        For each row the index into `values`; sorted.
    """
    rows = {
        group: np.bincount(steps, minlength=len(values)).tolist()
        for group, steps in steps_of_rows.items()
    }
    return {"values": list(values), "rows": rows}
