"""The keys of an accelerator file, from the schema its reader checks."""

from typing import Any

from markdown_table import table

__all__ = ["accelerator_schema"]

_HIDDEN = ("source", "confidence", "uncertainty_percent")


def accelerator_schema() -> str:
    """A section for each block: what it is, and its keys with rule and default."""
    from hwmodels import Accelerator

    schema = Accelerator.model_json_schema()
    blocks = schema["$defs"]
    parts = ["## The file", _keys(schema, blocks)]
    for name, block in blocks.items():
        parts += [f"## {name}", block.get("description", ""), _keys(block, blocks)]
    return "\n\n".join(parts)


def _keys(block: dict[str, Any], blocks: dict[str, Any]) -> str:
    required = block.get("required", ())
    rows = [
        (
            f"`{key}`",
            value["description"],
            f"{_rule(value, blocks)}{_unit(key)}",
            "required" if key in required else _default(value),
        )
        for key, value in block["properties"].items()
        if key not in _HIDDEN
    ]
    return table(("key", "meaning", "holds", "default"), rows)


def _unit(key: str) -> str:
    from hwmodels.errors import unit_of, written_units

    return f", in {unit_of(key)}" if written_units(key) else ""


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if isinstance(default, dict):
        return "its block's defaults"
    return f"`{default}`" if default or default == 0 else "-"


def _rule(value: dict[str, Any], blocks: dict[str, Any]) -> str:
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in value:
        kinds = [_rule(one, blocks) for one in value["anyOf"] if one.get("type") != "null"]
        return f"{' or '.join(kinds)}, or nothing"
    if "enum" in value:
        return " or ".join(f"`{choice}`" for choice in value["enum"])
    if "const" in value:
        return f"`{value['const']}`"
    if "prefixItems" in value:
        kinds = [_rule(one, blocks) for one in value["prefixItems"]]
        return f"list of {len(kinds)}: {'; '.join(kinds)}"
    if value.get("type") == "array":
        return f"list of {_rule(value['items'], blocks)}"
    if value.get("type") == "object":
        return "table of key paths and values"
    base = value.get("type")
    if isinstance(base, list):  # A number, or a text with its unit.
        value = {**value, "type": base[0]}
    kind = {"integer": "whole number", "number": "number", "string": "text"}.get(value.get("type"))
    return f"{kind or value.get('type')}{_range(value)}"


def _range(value: dict[str, Any]) -> str:
    low, above = value.get("minimum"), value.get("exclusiveMinimum")
    high, below = value.get("maximum"), value.get("exclusiveMaximum")
    parts = []
    if low is not None:
        parts.append(f"from {low:g}")
    if above is not None:
        parts.append(f"above {above:g}")
    # Upper ends such as 2**40 only keep typing errors out.
    if high is not None and high < 1e9:
        parts.append(f"to {high:g}")
    if below is not None and below < 1e9:
        parts.append(f"below {below:g}")
    return f", {' '.join(parts)}" if parts else ""
