"""The command reference, from the commands themselves."""

import enum
import re
from typing import Any

from markdown_table import cell, table

__all__ = ["command_pages", "output_fields"]

_MARKUP = re.compile(r"\[/?bold\]")


def command_pages() -> str:
    """A section for each command: what it does, its arguments and options, examples."""
    import typer

    from loraq_sim.cli.app import app

    return "\n\n".join(_sections(typer.main.get_command(app), ("loraq-sim",)))


def output_fields() -> str:
    """A section for each command with JSON output: the fields of its rows and beside them."""
    from loraq_sim.cli.schema import json_schema, schema_names

    parts = []
    for name in schema_names():
        schema = json_schema(name)
        parts.append(f"## {name}")
        for mode in schema.get("anyOf", [schema]):
            if "anyOf" in schema:
                parts.append(f"*{mode['title']}*")
            fields = mode["properties"]
            rows = fields.get("rows", {}).get("items", {"properties": fields})
            parts.append(_field_table(rows["properties"], rows.get("required", [])))
            beside = {k: v for k, v in fields.items() if k not in ("schema", "rows")}
            if beside and "rows" in fields:
                parts += ["beside `rows`:", _field_table(beside, mode["required"])]
    return "\n\n".join(parts)


def _field_table(fields: dict[str, Any], required: list[str]) -> str:
    from loraq_sim.results.rows import COLUMN_NAMES

    columns = [name for name in fields if name in COLUMN_NAMES]
    whole = len(columns) == len(COLUMN_NAMES)
    rows = [
        (f"`{name}`", _kind(field), field.get("unit", "-"), _words(field["description"]))
        for name, field in fields.items()
        if not (whole and name in COLUMN_NAMES)
    ]
    said = "All [columns of a result row](row_columns.md)." if whole else ""
    shown = table(("field", "type", "unit", "meaning"), rows) if rows else ""
    return "\n\n".join(part for part in (said, shown) if part)


def _kind(field: dict[str, Any]) -> str:
    kind = field["type"]
    kinds = [k for k in (kind if isinstance(kind, list) else [kind]) if k != "null"]
    inner = field.get("items", {}).get("type")
    text = "list of objects" if inner == "object" else f"list of {inner}s" if inner else None
    optional = " or null" if isinstance(kind, list) and "null" in kind else ""
    return (text or " or ".join(kinds)) + optional


def _sections(command: Any, words: tuple[str, ...]) -> list[str]:
    if hasattr(command, "commands"):
        parts = []
        for name, inner in command.commands.items():
            parts += _sections(inner, (*words, name))
        return parts
    return [_section(command, words)]


def _section(command: Any, words: tuple[str, ...]) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    usage = " ".join([*words, *(_usage(p) for p in arguments), "[OPTIONS]"])
    parts = [f"## {' '.join(words[1:])}", _prose(command.help), f"```text\n{usage}\n```"]
    if arguments:
        rows = [(f"`{p.metavar or p.name.upper()}`", _words(p.help)) for p in arguments]
        parts.append(table(("argument", "meaning"), rows))
    if options:
        rows = [(_flags(p), _words(p.help), _default(p)) for p in options if p.name != "help"]
        parts.append(table(("option", "meaning", "default"), rows))
    after = [line for line in _MARKUP.sub("", command.epilog or "").split("\n\n") if line]
    examples = [line for line in after if line.startswith("loraq-sim")]
    if examples:
        parts.append("```text\n" + "\n".join(examples) + "\n```")
    parts += [_words(line) for line in after[1:] if line not in examples]
    return "\n\n".join(part for part in parts if part)


def _usage(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    name += "..." if parameter.nargs == -1 or parameter.multiple else ""
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
    if parameter.is_flag:
        return names
    annotation = parameter.type_descriptor.annotation
    value = parameter.metavar
    if value is None and isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        value = "|".join(str(choice.value) for choice in annotation)
    return f"{names} {cell(value or 'VALUE')}"


def _words(text: str | None) -> str:
    # Names such as <dump> would be taken for tags.
    return (text or "").replace("<", "&lt;").replace("*", "\\*")


def _prose(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in _words(text).split("\n\n"))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if value is None or value is False or value == () or callable(value):
        return "-"
    shown = ",".join(map(str, value)) if isinstance(value, tuple | list) else value
    return f"`{getattr(value, 'value', shown)}`" if shown != "" else "-"
