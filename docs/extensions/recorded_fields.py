"""Fields of JSON outputs as they were recorded, so that none goes or changes without a new version.

    python docs/extensions/recorded_fields.py    # `make pages` does it, too

`tests/golden/outputs/fields.json` has every field of every output: its path, type and unit, and
whether it is always there. Programs read them. A field may come at any time, and this records it.
One that goes, changes its type or unit, or may be missing from now on, needs a higher
`SCHEMA_VERSION` (`loraq_sim/cli/output.py`) and a changelog line; then this records all again.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["RECORD", "breaks", "fields_of", "fields_today", "record"]

RECORD = Path(__file__).resolve().parents[2] / "tests" / "golden" / "outputs" / "fields.json"
_OF_JSON = {"string": "text", "boolean": "flag"}


def fields_today() -> dict[str, Any]:
    """The version of the schema, and the fields of each output."""
    from loraq_sim.cli.output import SCHEMA_VERSION
    from loraq_sim.cli.schema import json_schema, schema_names

    outputs = {name: dict(sorted(fields_of(json_schema(name)))) for name in schema_names()}
    return {"version": SCHEMA_VERSION, "outputs": outputs}


def fields_of(schema: Mapping[str, Any], path: str = "", *, always: bool = True) -> Iterator[tuple]:
    """(path, what it holds) of each field in a JSON Schema: type, unit, whether it may lack."""
    for mode in schema.get("anyOf", ()):
        # What tells the outputs of one command apart stands behind its name.
        name = mode["properties"]["schema"]["properties"]["name"]["const"]
        kind = mode["title"].removeprefix(f"loraq-sim {name}").strip()
        yield from fields_of(mode, f"{kind}: " if kind else "")
    required = schema.get("required", ())
    for name, field in schema.get("properties", {}).items():
        yield from _field(f"{path}{name}", field, always=always and name in required)
    for pattern, field in schema.get("patternProperties", {}).items():
        yield from _field(f"{path}{pattern}", field, always=False)


def _field(path: str, field: Mapping[str, Any], *, always: bool) -> Iterator[tuple]:
    items, inner = field.get("items"), field.get("additionalProperties")
    word = _kinds(field)
    for held in (items, inner):
        if isinstance(held, Mapping) and held.get("type", "object") != "object":
            word += f" of {_kinds(held)}"
    unit = f" in {field['unit']}" if field.get("unit") else ""
    yield path, f"{word}{unit}{'' if always else ', may be missing'}"
    yield from fields_of(field, f"{path}.")
    if isinstance(items, Mapping):
        yield from fields_of(items, f"{path}[].")
    if isinstance(inner, Mapping):
        yield from fields_of(inner, f"{path}.*.")


def _kinds(field: Mapping[str, Any]) -> str:
    kinds = field.get("type", "any")
    names = [kinds] if isinstance(kinds, str) else sorted(kinds)
    return " or ".join(_OF_JSON.get(name, name) for name in names)


def breaks(recorded: Mapping[str, Any], today: Mapping[str, Any]) -> list[str]:
    """What a program that reads the recorded fields would stumble over today."""
    found = []
    for output, fields in recorded["outputs"].items():
        now = today["outputs"].get(output)
        if now is None:
            found.append(f"{output}: has no JSON output any more")
            continue
        for path, told in fields.items():
            if path not in now:
                found.append(f"{output}: {path} is gone (was {told})")
            elif now[path] != told and f"{now[path]}, may be missing" != told:
                found.append(f"{output}: {path} was {told}, is {now[path]}")
    return found


def record(path: Path = RECORD) -> list[str]:
    """Write what is new at `path`; what breaks under an unchanged version is returned instead."""
    today = fields_today()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["version"] == today["version"] and (found := breaks(before, today)):
            return found
    path.write_text(json.dumps(today, indent=1) + "\n", encoding="utf-8")
    return []


if __name__ == "__main__":
    raise SystemExit("\n".join(record()) or None)
