"""Short names of cases: the split, what is done to its inputs, and what tells cases apart.

Rotation and smoothing are named always, for a label says what runs; other settings are named where
cases of one split differ in them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["context_of", "labelled", "labels_of", "split_label", "transform_words"]

# Word before a value that does not say by itself what it is.
_SETTINGS = {
    "method": "",
    "preset": "",
    "family": "",
    "group_size": "group",
    "acc_bits": "acc",
    "overflow": "",
    "products_per_add": "products",
    "accumulators": "accumulators",
    "seed": "seed",
    "token_limit": "tokens",
    "options": "",
}

Row = Mapping[str, Any]


def labelled(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows with a ``label``: unique among the cases of one layer on one accelerator.

    A setting is named where two rows of the same split, layer, dump and accelerator differ in it.
    """
    return [{**row, "label": label} for row, label in zip(rows, labels_of(rows), strict=True)]


def labels_of(rows: Sequence[Row]) -> list[str]:
    """The labels of `labelled`."""
    first: dict[tuple, tuple] = {}
    named: dict[str, set[str]] = {}
    for row in rows:
        own = tuple(map(row.get, _SETTINGS))
        known = first.setdefault(_case(row), own)
        differing = named.setdefault(str(row.get("split")), set())
        if own != known:
            both = zip(_SETTINGS, own, known, strict=True)
            differing.update(key for key, one, other in both if one != other)
    return [_label(row, named[str(row.get("split"))]) for row in rows]


def split_label(row: Row) -> str:
    """The split with what is done to its inputs, such as ``W4A4+W8A8r8 (rotated, smooth 0.3)``."""
    words = ", ".join(transform_words(row))
    return f"{row.get('split')} ({words})" if words else str(row.get("split"))


def transform_words(row: Row) -> list[str]:
    """What is done to the inputs of a case before they are rounded; empty for nothing."""
    words = []
    rotation, smooth = row.get("rotation"), row.get("smooth")
    if isinstance(rotation, str) and rotation:
        _, _, block = rotation.partition(":")
        words.append(f"rotated {block}".strip())
    if isinstance(smooth, int | float) and not isinstance(smooth, bool) and smooth == smooth:
        words.append(f"smooth {smooth:g}")
    return words


def context_of(row: Row, *, several_dumps: bool) -> str:
    """Where a row's numbers compare with others: its accelerator, of its dump if there are more."""
    name = str(row.get("accelerator") or "")
    return f"{row.get('dump')} on {name}" if several_dumps else name


def _case(row: Row) -> tuple:
    return (row.get("dump"), row.get("accelerator"), row.get("layer"), str(row.get("split")))


def _label(row: Row, keys: Iterable[str]) -> str:
    words: list[str] = []
    for key, word in _SETTINGS.items():
        if key not in keys:
            continue
        value = row.get(key)
        if key == "options":
            words.append(_options(value))
        elif value is None or value == "":
            words.append(f"all {word}" if key == "token_limit" else "")
        else:
            words.append(f"{word} {value}".strip())
    told = ", ".join(word for word in (*transform_words(row), *words) if word)
    return f"{row.get('split')} ({told})" if told else str(row.get("split"))


def _options(text: Any) -> str:
    """``{"datapath": {"array": "imma"}, "fused": false}`` as ``array imma, not fused``."""
    try:
        options = json.loads(text or "{}")
    except (TypeError, ValueError):
        return str(text)
    if not isinstance(options, dict):
        return str(text)
    inner = options.pop("datapath", None)
    settings = {**options, **(inner if isinstance(inner, dict) else {})}
    parts = [
        f"not {name}" if value is False else f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
    ]
    return ", ".join(parts)
