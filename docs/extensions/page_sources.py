"""Fill the pages before they are read: generated tables, and the output of their commands.

``<!-- generated: NAME -->`` on a line of its own becomes the Markdown that
`generated_tables.GENERATED` makes for NAME, and ``<!-- unplaced names of PACKAGE -->`` the public
names the page does not describe itself. How a block asks for its output is said in `page_blocks`.
"""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from captured_output import CommandFailed, PageFolder
from generated_names import unplaced_names
from generated_tables import GENERATED
from page_blocks import Block, page_blocks
from sphinx.application import Sphinx
from sphinx.util import logging

__all__ = ["setup"]

_LOG = logging.getLogger(__name__)
_UNPLACED = re.compile(r"^<!-- unplaced names of (\w+) -->$", re.MULTILINE)
_GENERATED = re.compile(r"^<!-- generated: (\w+)(?: ([^\n]*?))? -->$", re.MULTILINE)


def _fill(app: Sphinx, docname: str, source: list[str]) -> None:
    text = _with_outputs(app, docname, source[0])
    text = _GENERATED.sub(lambda match: _generated(docname, match), text)
    source[0] = _UNPLACED.sub(lambda match: unplaced_names(match[1], text), text)


def _generated(docname: str, match: re.Match) -> str:
    name, argument = match[1], match[2]
    if name not in GENERATED:
        _LOG.warning("nothing is generated under the name %r", name, location=docname)
        return ""
    return GENERATED[name]() if argument is None else GENERATED[name](argument)


def _with_outputs(app: Sphinx, docname: str, text: str) -> str:
    blocks = [block for block in page_blocks(text) if block.language == "bash"]
    if not any(block.options is not None for block in blocks):
        return text
    folder = PageFolder()
    filled, position = [], 0
    for block in blocks:
        if not folder.can_run(block):
            continue
        # Blocks that show nothing may still write what later ones read.
        try:
            printed, everything = folder.run(block)
        except CommandFailed as error:
            _LOG.warning("a command of this page failed: %s", error, location=docname)
            continue
        if block.options is None:
            continue
        filled.append(text[position : text.rindex("<!-- output", block.start, block.end)])
        shown = everything if "stderr" in block.options else printed
        filled.append(_shown(app, docname, folder.path, shown, block))
        position = block.end
    return "".join(filled) + text[position:]


def _shown(app: Sphinx, docname: str, folder: Path, text: str, block: Block) -> str:
    values = dict(option.split("=", 1) for option in block.options if "=" in option)
    if "picture" in values:
        return _picture(app, docname, folder / values["picture"], block.text.split()[1])
    lines = [line.rstrip() for line in text.strip("\n").splitlines()][int(values.get("skip", 0)) :]
    limit = int(values.get("lines", len(lines)))
    if len(lines) > limit:
        lines = [*lines[:limit], "..."]
    return "```{code-block} text\n:class: output\n" + "\n".join(lines) + "\n```"


def _picture(app: Sphinx, docname: str, path: Path, caption: str) -> str:
    folder = Path(app.doctreedir) / "captured"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{docname.replace('/', '-')}-{path.name}"
    shutil.copy(path, target)
    page = (Path(app.srcdir) / docname).parent
    return f"![{caption}]({os.path.relpath(target, page)})"


def setup(app: Sphinx) -> dict[str, Any]:
    """Fill every page as it is read."""
    app.connect("source-read", _fill)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
