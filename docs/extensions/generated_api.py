"""The Python reference as Markdown: signatures with their types, and what docstrings say."""

import importlib
import inspect
import re
import textwrap
from typing import Any

__all__ = ["api", "api_more", "module_text"]

_SECTION = re.compile(r"^(?P<head>[A-Z][A-Za-z ]+)\n-{3,}$", re.MULTILINE)
_LISTS = ("Parameters", "Returns", "Yields", "Raises", "Attributes")
_WIDTH = 96
_ITEM = re.compile(r"\s*(\.\. \[\d+\]|[-*]|\d+\.) +")


def api(names: str) -> str:
    """A section for each name, such as ``loraq_sim.solve`` or ``loraq_sim.Format[n_groups]``.

    In brackets are the members of a class to show; ``*``: all public ones.
    """
    parts = []
    for name, members in re.findall(r"([\w.]+)(?:\[([^\]]*)\])?", names):
        value = _value(name)
        parts.append(_entry(name, value, level=3))
        for member in _members(value, members):
            found = inspect.getattr_static(value, member)
            parts.append(_entry(f"{name.rpartition('.')[2]}.{member}", found, level=4))
    return "\n\n".join(parts)


def api_more(argument: str) -> str:
    """Public names of a package that the other pages do not place: so the reference is whole."""
    package, *placed = argument.split()
    module = importlib.import_module(package)
    missing = [n for n in module.__all__ if n not in placed and not n.startswith("_")]
    found = api(" ".join(f"{package}.{name}" for name in missing))
    return f"## More\n\n{found}" if found else ""


def module_text(name: str) -> str:
    """The docstring of a module."""
    return _prose(inspect.getdoc(importlib.import_module(name)) or "")


def _value(name: str) -> Any:
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            value = getattr(value, part)
        return value
    raise ValueError(f"no module holds {name}")


def _members(value: Any, asked: str) -> list[str]:
    if asked != "*":
        return [member.strip() for member in asked.split(",") if member.strip()]
    fields = set(getattr(value, "__dataclass_fields__", ()))
    own = [n for n in vars(value) if not n.startswith("_") and n not in fields]
    return [n for n in own if inspect.getdoc(inspect.getattr_static(value, n))]


def _entry(name: str, value: Any, *, level: int) -> str:
    doc = inspect.getdoc(value) or ""
    parts = [f"{'#' * level} {name}"]
    signature = _signature(name, value)
    if signature:
        parts.append(f"```python\n{signature}\n```")
    parts.append(_prose(doc))
    return "\n\n".join(part for part in parts if part)


def _signature(name: str, value: Any) -> str:
    if isinstance(value, property):
        returns = getattr(value.fget, "__annotations__", {}).get("return")
        return f"{name}{_typed(returns)}"
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if not callable(value):
        return f"{name} = {value!r}" if isinstance(value, str | int | float) else ""
    if inspect.isclass(value) and issubclass(value, BaseException):
        return f"class {name}({value.__bases__[0].__name__})"
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parameters = [str(p) for p in _quiet(found) if p.name not in ("self", "cls")]
    kinds = [p.kind for p in _quiet(found) if p.name not in ("self", "cls")]
    for place, kind in enumerate(kinds):
        if kind is inspect.Parameter.KEYWORD_ONLY:
            if inspect.Parameter.VAR_POSITIONAL not in kinds[:place]:
                parameters.insert(place, "*")
            break
    returns = "" if inspect.isclass(value) else _typed(found.return_annotation)
    head = f"class {name}" if inspect.isclass(value) else f"{name}"
    line = f"{head}({', '.join(parameters)}){returns}"
    if len(line) <= _WIDTH:
        return _plain(line)
    inside = ",\n    ".join(parameters)
    return _plain(f"{head}(\n    {inside},\n){returns}")


def _quiet(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Parameters whose defaults read well."""
    quiet = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not inspect.Parameter.empty and re.search(r" at 0x|factory", repr(default)):
            parameter = parameter.replace(default=inspect.Parameter.empty)
        quiet.append(parameter)
    return quiet


def _typed(annotation: Any) -> str:
    if annotation in (None, inspect.Signature.empty):
        return ""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return f" -> {text}"


def _plain(text: str) -> str:
    """Types as they are written: without modules and quotes."""
    text = re.sub(r"PosixPath\('[^']*?/(hwmodels|loraq_sim)/([^']*)'\)", r"Path('\1/\2')", text)
    text = re.sub(r"ForwardRef\('([^']*)'\)", r"\1", text)
    array = r"numpy\.ndarray\[tuple\[(?:typing\.)?Any, \.\.\.\], numpy\.dtype\[(?:\w+\.)?(\w+)\]\]"
    text = re.sub(array, r"NDArray[\1]", text)
    text = re.sub(r"\*<class '([\w.]+)'>", r"Unpack[\1]", text)
    text = re.sub(r"\b(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", text)
    text = re.sub(r"<(\w+)\.\w+: ('[^']*')>", r"\2", text)
    return re.sub(r": '([^']*)'(?=[,)\n =])", r": \1", text).replace("-> '", "-> ").rstrip("'")


def _prose(doc: str) -> str:
    places = list(_SECTION.finditer(doc))
    text = doc[: places[0].start()] if places else doc
    parts = [_markdown(text)]
    for number, place in enumerate(places):
        after = places[number + 1] if number + 1 < len(places) else None
        body = doc[place.end() : after.start() if after else None].strip("\n")
        head = place["head"]
        said = _listed(body) if head in _LISTS else _markdown(body)
        parts.append(f"**{head}**\n\n{said}")
    return "\n\n".join(part for part in parts if part)


def _listed(body: str) -> str:
    items: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.strip() and not line.startswith(" "):
            items.append((line.strip(), []))
        elif line.strip() and items:
            items[-1][1].append(line.strip())
    told = []
    for head, lines in items:
        name, colon, kind = head.partition(" : ")
        named = f"`{name}`" + (f" ({_words(kind)})" if colon else "")
        told.append(f"- {named}" + (f": {_words(' '.join(lines))}" if lines else ""))
    return "\n".join(told)


def _markdown(text: str) -> str:
    """Paragraphs, and indented blocks (formulas, examples) as code."""
    parts = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.splitlines()
        if not lines:
            continue
        if all(line.startswith("    ") for line in lines):
            parts.append(f"```text\n{textwrap.dedent(block)}\n```")
        elif lines[0].startswith(">>>"):
            parts.append(f"```python\n{block}\n```")
        elif _ITEM.match(block):
            items = re.split(r"\n(?=\s*(?:\.\. \[|[-*] |\d+\. ))", block)
            parts.append("\n".join(_item(item) for item in items))
        else:
            parts.append(_words(block))
    merged = "\n\n".join(parts)
    return merged.replace("\n```\n\n```text\n", "\n\n")


def _item(item: str) -> str:
    """One item of a list; numbered references are a list, too."""
    head = _ITEM.match(item)
    mark, text = (head[1], item[head.end() :]) if head else ("-", item)
    if mark.startswith(".."):
        return f"- {mark[3:]} {_words(text)}"
    return f"{mark} {_words(text)}"


def _words(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"``([^`]+)``", r"`\1`", text).replace("::", ":")
    # Outside code, what would be taken for tags and cells.
    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(
        p if p.startswith("`") else re.sub(r"([<|])", r"\\\1", p).replace("]_", "]") for p in pieces
    )
