"""What Sphinx does to the pages, which are committed whole (`fill_pages`), as it reads them.

Outputs get their style; pages of `benchmarks/`, to which the committed text links, come in as
sections; and the list of pages in `README.md` becomes the navigation.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from fill_pages import GENERATED_PLACE
from generated_tables import SITE
from sphinx.application import Sphinx

__all__ = ["setup"]

_OUTPUT = re.compile(r"(?<= -->\n)```text\n(.*?\n```\n<!-- end of output -->)", re.DOTALL)
_MARK = re.compile(r"^<!-- (?:end of )?(?:generated|output)\b[^\n]*-->\n?", re.MULTILINE)
_SECTION = re.compile(
    r"^## (?P<caption>[^\n]+)\n(?P<body>.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE
)
_PAGE = re.compile(r"^- \[[^\]]+\]\(([\w/]+)\.md\)", re.MULTILINE)

_TO_A_FILE = re.compile(
    r"(?<!!)\[([^\]]+)\]\((?:\.\./)+(?:reports|examples|notebooks|benchmarks)[^)]*\)"
)


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    text = _OUTPUT.sub(r"```{code-block} text\n:class: output\n\1", source[0])
    text = GENERATED_PLACE.sub(_for_the_site, text)
    # Files of the repository that are no page of the site.
    text = _TO_A_FILE.sub(r"\1", text)
    text = _MARK.sub("", text)
    source[0] = text + _navigation(text) if docname == app.config.root_doc else text


def _for_the_site(match: re.Match) -> str:
    name, argument = match[1], match[2]
    if name not in SITE:
        return match[0]
    return SITE[name]() if argument is None else SITE[name](argument)


def _navigation(text: str) -> str:
    trees = []
    for section in _SECTION.finditer(text):
        found = _PAGE.findall(section["body"])
        if found:
            head = ["", "```{toctree}", ":hidden:", f":caption: {section['caption']}", ""]
            trees.append("\n".join([*head, *found, "```", ""]))
    return "\n" + "\n".join(trees)


def _first_page(app: Sphinx, error: Exception | None) -> None:
    """Folders show README.md, sites index.html."""
    root = Path(app.outdir) / f"{app.config.root_doc}.html"
    if error is None and root.exists():
        shutil.copy(root, root.with_name("index.html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Prepare every page as it is read."""
    app.connect("source-read", _read)
    app.connect("build-finished", _first_page)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
