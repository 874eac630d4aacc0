"""Docstrings as they are written in this project, made fit for the reference pages."""

import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

__all__ = ["setup"]

_PACKAGES = ("loraq_sim", "hwmodels")


def _prepare(
    _app: Sphinx, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    lines[:] = [_plain_reference(line) for line in lines]
    prose = next(
        (i - 1 for i, line in enumerate(lines) if i and re.fullmatch("-{3,}", line.strip())),
        len(lines),
    )
    lines[:prose] = _with_literal_blocks(lines[:prose])


def _plain_reference(line: str) -> str:
    """Numbered references as a list: each docstring counts from 1, and many share a page."""
    line = re.sub(r"^\.\. \[(\d+)\] ", r"*  [\1] ", line)
    return re.sub(r"\[(\d+)\]_", r"[\1]", line)


def _with_literal_blocks(lines: list[str]) -> list[str]:
    """Indented blocks before the sections (formulas, examples) are kept as they stand."""
    marked, last = [], ""
    for line in lines:
        is_start = line.startswith("    ") and marked and not marked[-1].strip()
        is_in_text = last and not last.startswith((" ", "- ", "* ", ".. ")) and last[-2:] != "::"
        if is_start and is_in_text and not last[0].isdigit():
            marked += ["::", ""]
        marked.append(line)
        last = line if line.strip() else last
    return marked


def _unlink_words(_app: Sphinx, doctree: nodes.document) -> None:
    """Types such as "ndarray of shape (M, K)" are words; ``shape`` there is no attribute."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        target = reference.get("reftarget", "")
        is_word = target.islower() and not target.startswith(_PACKAGES)
        if reference.get("refdomain") == "py" and reference.get("reftype") == "class" and is_word:
            reference.replace_self(reference.children)


def setup(app: Sphinx) -> dict[str, Any]:
    """Prepare docstrings before napoleon, and types after it."""
    app.connect("autodoc-process-docstring", _prepare, priority=400)
    app.connect("doctree-read", _unlink_words)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
