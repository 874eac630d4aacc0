"""The text of a recipe file: TOML with one layer a line, columns aligned, comments for readers."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from loraq_sim.errors import InputError

__all__ = ["recipe_text"]

_HEAD = """\
# Precision recipe: which split each layer runs in. To solve a model with it:
#   loraq-sim solve --layer-dump DUMP --recipe THIS_FILE --save MODEL.safetensors
# Of several entries that match a layer by name or kind, the later one wins, key by key.
# Layers without an entry stay at 16 bits.
"""
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def recipe_text(content: Mapping[str, Any]) -> str:
    """TOML text of a recipe's plain values.

    Raises
    ------
    InputError
        If a value has no TOML form.
    """
    lines = [_HEAD, f"recipe = {content['recipe']}"]
    for table in ("provenance", "defaults"):
        if content.get(table):
            lines += ["", f"[{table}]"]
            # TOML has no null: what is not known is left out.
            known = {k: v for k, v in content[table].items() if v is not None}
            lines += [f"{_key(key)} = {_value(value)}" for key, value in known.items()]
    lines += ["", "[layers]"]
    keys = [_key(pattern) for pattern in content["layers"]]
    width = max(map(len, keys))
    for key, entry in zip(keys, content["layers"].values(), strict=True):
        lone = entry["split"] if entry.keys() == {"split"} else entry
        lines.append(f"{key:<{width}} = {_value(lone)}")
    return "\n".join(lines) + "\n"


def _key(key: Any) -> str:
    text = str(key)
    return text if _BARE_KEY.fullmatch(text) else _text(text)


def _text(text: str) -> str:
    # A TOML basic string is a JSON string but for DEL, and lone surrogates have no UTF-8 form.
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in text):
        raise InputError(f"recipe: {text!r} is not Unicode text")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        pairs = [f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise InputError(f"recipe: a {type(value).__name__} has no TOML form: {value!r:.80}")
