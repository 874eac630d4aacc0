"""Short names of cases: the split, and only those settings in which cases of that split differ."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["context_of", "labelled"]

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
    different: dict[tuple, dict[str, set[Any]]] = {}
    for row in rows:
        seen = different.setdefault(_case(row), {key: set() for key in _SETTINGS})
        for key, values in seen.items():
            values.add(row.get(key))
    named: dict[str, set[str]] = {}
    for case, seen in different.items():
        keys = {key for key, values in seen.items() if len(values) > 1}
        named.setdefault(case[-1], set()).update(keys)
    return [{**row, "label": _label(row, named[str(row.get("split"))])} for row in rows]


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
    told = ", ".join(word for word in words if word)
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
