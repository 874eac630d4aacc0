"""``loraq-sim schema``: the JSON Schema of what commands print and of the rows in a store.

`outputs.toml` beside this file says which fields each output has, and what they are; the columns of
result rows come from `results.rows`, with the types of `ResultRow`.
"""

import tomllib
import types
import typing
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from loraq_sim.cli.output import SCHEMA_VERSION, one_line_failures, say
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.reporting.tables import json_text
from loraq_sim.results.rows import COLUMN_NAMES, COLUMNS, ResultRow

__all__ = ["EXAMPLES", "json_schema", "schema_command", "schema_names"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim schema\n\n"
    "loraq-sim schema sweep\n\n"
    "loraq-sim schema hw show\n\n"
    "loraq-sim schema store > row.schema.json"
)
STORE = "store"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SCALARS = {"text": "string", "number": "number", "integer": "integer", "flag": "boolean"}
_ANY = ["string", "number", "boolean"]
_NUMBERS = {"type": "object", "additionalProperties": {"type": ["number", "null"]}}
_TYPES: dict[str, dict[str, Any]] = {
    **{name: {"type": kind} for name, kind in _SCALARS.items()},
    "any": {"type": [*_ANY, "null"]},
    "texts": {"type": "array", "items": {"type": "string"}},
    "integers": {"type": "array", "items": {"type": "integer"}},
    "numbers": _NUMBERS,
    "nested": {"type": "object", "additionalProperties": _NUMBERS},
    "object": {"type": "object"},
}
_OF_PYTHON = {str: "string", int: "integer", float: "number", bool: "boolean"}
Field = tuple[str, str, str]


@one_line_failures
def schema_command(
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMMAND]",
            help="Command such as sweep or hw show, or store for the rows of a result store. "
            "Default: all of them in one schema.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of what a command prints with --format json, units and meanings too."""

    # A document of a standard of its own, no rows.
    say(json_text(json_schema(" ".join(command) if command else None)), nl=False)


def schema_names() -> list[str]:
    """What has a schema: every command with ``--format``, and the rows of a store."""
    return [*_catalog()["outputs"], STORE]


def json_schema(name: str | None = None) -> dict[str, Any]:
    """JSON Schema (2020-12) of the output `name`; None: of any output, each under ``$defs``.

    Fields carry their meaning as ``description`` and, where they have one, their ``unit``.

    Raises
    ------
    InputError
        If no command of this name prints JSON.
    """
    names = schema_names()
    if name is None:
        return {
            "$schema": _DIALECT,
            "$id": f"loraq-sim/{SCHEMA_VERSION}",
            "title": "what loraq-sim prints with --format json",
            "anyOf": [
                {"$ref": f"#/$defs/{one.replace(' ', '_')}"} for one in names if one != STORE
            ],
            "$defs": {one.replace(" ", "_"): _document(one) for one in names},
        }
    if name not in names:
        raise InputError(unknown_name("command with JSON output", name, names))
    return {"$schema": _DIALECT, "$id": f"loraq-sim/{SCHEMA_VERSION}/{name}"} | _document(name)


def _document(name: str) -> dict[str, Any]:
    if name == STORE:
        return _store_row()
    modes = [_mode(name, mode) for mode in _catalog()["outputs"][name]]
    return modes[0] if len(modes) == 1 else {"title": f"loraq-sim {name}", "anyOf": modes}


def _store_row() -> dict[str, Any]:
    """A row as SQLite has it: flags are 0 and 1."""
    properties = {c.name: _column(c.name) | {"sql_type": c.sql_type} for c in COLUMNS}
    properties["pareto"]["type"] = ["boolean", "integer", "null"]
    for name in ("case_id", "extra", "checksum"):
        properties[name] = _shown({}, "", _catalog()["fields"][name]) | {"sql_type": "TEXT"}
    return {
        "title": "a row of the table `rows` in results.sqlite",
        "type": "object",
        "properties": properties,
        "required": list(properties),
    }


def _mode(name: str, mode: Mapping[str, Any]) -> dict[str, Any]:
    head = {
        "type": "object",
        "description": "name and version of this schema",
        "properties": {"name": {"const": name}, "version": {"const": SCHEMA_VERSION}},
        "required": ["name", "version"],
    }
    rows = _object(mode, "rows", mode["rows"])
    patterns = {key: _shown(mode, "", field) for key, field in mode.get("patterns", {}).items()}
    rows["additionalProperties"] = patterns.pop("others", False)
    rows["patternProperties"] = patterns
    beside = _object(mode, "", mode.get("also", ""))
    return {
        "title": f"loraq-sim {name} {mode.get('of', '')}".strip(),
        "type": "object",
        "properties": {"schema": head, "rows": {"type": "array", "items": rows}}
        | beside["properties"],
        "required": ["schema", "rows", *beside["required"]],
        "additionalProperties": False,
    }


def _object(mode: Mapping[str, Any], place: str, text: str) -> dict[str, Any]:
    names = _names(text)
    return {
        "type": "object",
        "properties": {
            name: _shown(mode, place, _field(mode, place, name), name) for name, _ in names
        },
        "required": [name for name, is_required in names if is_required],
        "additionalProperties": False,
    }


def _names(text: str) -> list[tuple[str, bool]]:
    """(name, whether it must be there) of a list of names; what is said last of a name holds."""
    found: dict[str, bool] = {}
    for word in text.split():
        name, is_required = word.rstrip("?"), not word.endswith("?")
        if name == "@row":
            found |= dict.fromkeys(COLUMN_NAMES, is_required)
        elif name.startswith("@"):
            inner = _names(_catalog()["sets"][name[1:]])
            found |= {one: needed and is_required for one, needed in inner}
        else:
            found[name] = is_required
    return list(found.items())


def _field(mode: Mapping[str, Any], place: str, name: str) -> Field | None:
    """Type, unit and meaning of `name` in `place`; None for a column of result rows."""
    own, shared = mode.get("fields", {}), _catalog()["fields"]
    for fields in (own, shared):
        if place and f"{place}.{name}" in fields:
            return fields[f"{place}.{name}"]
    if name in own:
        return own[name]
    return None if name in COLUMN_NAMES else shared[name]


def _shown(
    mode: Mapping[str, Any], place: str, field: Field | None, name: str = ""
) -> dict[str, Any]:
    if field is None:
        return _column(name)
    kind, unit, meaning = field
    shown = _type(mode, name, kind.rstrip("?"))
    if kind.endswith("?"):
        shown = {**shown, "type": [shown["type"], "null"]}
    return shown | {"description": meaning} | ({"unit": unit} if unit else {})


def _type(mode: Mapping[str, Any], place: str, kind: str) -> dict[str, Any]:
    word, _, inside = kind.partition(" ")
    if not inside:
        return dict(_TYPES[kind])
    inner = _type(mode, place, inside) if inside.startswith("list ") else None
    if inner is None and place == "on":
        # A verdict of several machines holds those of each, which hold none.
        inside = inside.replace("@verdict", _catalog()["sets"]["verdict"].removesuffix(" on?"))
    inner = inner or _object(mode, place, inside)
    if word == "list":
        return {"type": "array", "items": inner}
    return {"type": "object", "additionalProperties": inner} if word == "map" else inner


@cache
def _row_types() -> dict[str, Any]:
    return typing.get_type_hints(ResultRow)


def _column(name: str) -> dict[str, Any]:
    column = next(column for column in COLUMNS if column.name == name)
    hint = _row_types()[name]
    shown: dict[str, Any]
    if typing.get_origin(hint) is typing.Literal:
        shown = {"type": "string", "enum": list(typing.get_args(hint))}
    else:
        members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = [_OF_PYTHON[member] for member in members if member is not types.NoneType]
        kinds += ["null"] * (types.NoneType in members)
        shown = {"type": kinds if len(kinds) > 1 else kinds[0]}
    shown["description"] = column.meaning
    return shown | ({"unit": column.unit} if column.unit else {})


@cache
def _catalog() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("outputs.toml").read_text(encoding="utf-8"))
