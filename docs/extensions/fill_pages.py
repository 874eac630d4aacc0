"""Renew what the program makes in the pages: generated tables, and the output of commands.

Fields that outputs have gained are recorded on the way (`recorded_fields`).

    python docs/extensions/fill_pages.py [PAGE...]    # all pages by default; `make pages`

Pages are committed as they are read, on GitHub too; `tests/docs/test_pages.py` holds them to what
the program says today.

    <!-- generated: NAME ARGUMENTS -->   Markdown that `generated_tables.GENERATED` makes ...
    <!-- end of generated -->            ... up to here
    <!-- output -->                      after a block of commands: what they print ...
    <!-- end of output -->               ... up to here; options are in `page_blocks`
"""

import argparse
import contextlib
import os
import re
import shutil
import sys
from pathlib import Path

from captured_output import PageFolder
from generated_tables import GENERATED
from page_blocks import Block, page_blocks, pages
from recorded_fields import record

__all__ = ["GENERATED_PLACE", "differences", "filled"]

DOCS = Path(__file__).resolve().parents[1]
MADE = DOCS / "images" / "made"
GENERATED_PLACE = re.compile(
    r"^<!-- generated: (\w+)(?: ([^\n]*?))? -->$"
    r"(?:\n(?:(?!^<!-- generated: ).)*?^<!-- end of generated -->$)?",
    re.DOTALL | re.MULTILINE,
)
_OLD_OUTPUT = re.compile(
    r"\n(?:```text\n.*?^```|!\[[^\n]*)\n<!-- end of output -->", re.DOTALL | re.MULTILINE
)
_NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")
_TIME = re.compile(r"\b(?:s|ms|us)\b")
# Solvers and kernels differ in the last digits between processors.
_SAME = 0.05
_TINY = 1e-6


def filled(path: Path, *, pictures: bool = False) -> str:
    """The text of the page at `path` with all that is made in it renewed.

    With `pictures` these are drawn anew, and blocks that are said to be slow are run, too.

    Raises
    ------
    CommandFailed
        If a command of the page fails.
    """
    text = _with_outputs(path, path.read_text(encoding="utf-8"), pictures=pictures)

    def renewed(match: re.Match) -> str:
        name, argument = match[1], match[2]
        if name not in GENERATED:
            raise ValueError(f"{path}: nothing is generated under the name {name!r}")
        found = GENERATED[name]() if argument is None else GENERATED[name](argument)
        head = match[0].split("\n", 1)[0]
        return f"{head}\n\n{found.strip()}\n\n<!-- end of generated -->"

    return GENERATED_PLACE.sub(renewed, text)


def differences(old: str, new: str) -> list[str]:
    """Lines in which a page is not what the program says; numbers may differ by a few percent."""
    before, after = (_compared(text) for text in (old, new))
    if len(before) != len(after):
        return [f"{len(before)} lines are {len(after)} now"]
    return [
        f"{one} | {other}"
        for one, other in zip(before, after, strict=True)
        if not _is_same(one, other)
    ]


def _compared(text: str) -> list[str]:
    # Widths of columns follow the digits.
    lines = (re.sub(r"[\u2500-]{3,}", "-", " ".join(line.split())) for line in text.splitlines())
    return [line for line in lines if line]


def _is_same(old: str, new: str) -> bool:
    if old == new:
        return True
    if _NUMBER.sub("#", old) != _NUMBER.sub("#", new):
        return False
    pairs = zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True)
    return all(_is_near(*(float(x.replace(",", "")) for x in pair)) for pair in pairs)


def _is_near(old: float, new: float) -> bool:
    return abs(old - new) <= max(_SAME * max(abs(old), abs(new)), _TINY)


def _with_outputs(path: Path, text: str, *, pictures: bool) -> str:
    blocks = [block for block in page_blocks(text) if block.language == "bash"]
    if not any(block.options is not None for block in blocks):
        return text
    with contextlib.closing(PageFolder()) as folder:
        return _with_printed(path, text, blocks, folder, pictures=pictures)


def _with_printed(
    path: Path, text: str, blocks: list[Block], folder: PageFolder, *, pictures: bool
) -> str:
    parts, position = [], 0
    for block in blocks:
        draws = pictures and block.note == "slow" and block.options is not None
        if not (folder.can_run(block) or draws):
            continue
        # Blocks that show nothing may still write what later ones read.
        printed, everything = folder.run(block)
        if block.options is None:
            continue
        old = _OLD_OUTPUT.match(text, block.end)
        shown = everything if "stderr" in block.options else printed
        before = text[block.end : old.end()] if old else ""
        made = _shown(path, folder.path, shown, block, pictures=pictures)
        new = f"\n{made}\n<!-- end of output -->"
        # Times differ with each run: what was printed once stays where only they do.
        keep = "timed" in block.options and before and _is_same_but_times(before, new)
        parts += [text[position : block.end], before if keep else new]
        position = old.end() if old else block.end
    return "".join(parts) + text[position:]


def _is_same_but_times(old: str, new: str) -> bool:
    """Whether lines are the same but for their last number, and its unit of time in a heading."""
    before, after = (
        [re.sub(rf"{_NUMBER.pattern}$", "#", _TIME.sub("t", line)) for line in _compared(text)]
        for text in (old, new)
    )
    return len(before) == len(after) and all(map(_is_same, before, after))


def _shown(path: Path, folder: Path, text: str, block: Block, *, pictures: bool) -> str:
    options = block.options or ()
    values = dict(option.split("=", 1) for option in options if "=" in option)
    if "picture" in values:
        target = MADE / f"{path.relative_to(DOCS).with_suffix('').as_posix().replace('/', '-')}"
        target = target.with_name(f"{target.name}-{Path(values['picture']).name}")
        if pictures or not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / values["picture"], target)
        words = " ".join(block.text.replace("\\\n", " ").split()[:3])
        return f"![{words}]({os.path.relpath(target, path.parent)})"
    # Where this checkout and its Python lie is nobody's business.
    text = text.replace(sys.executable, "python").replace(f"{DOCS.parent}/", "")
    lines = [line.rstrip() for line in text.strip("\n").splitlines()][int(values.get("skip", 0)) :]
    limit = int(values.get("lines", len(lines)))
    if len(lines) > limit:
        lines = [*lines[:limit], "..."]
    return "```text\n" + "\n".join(lines) + "\n```"


def main() -> None:
    """Renew the pages named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("pages", nargs="*", type=Path)
    parser.add_argument("--pictures", action="store_true", help="draw pictures anew, too")
    asked = parser.parse_args()
    for path in [page.resolve() for page in asked.pages] or pages(DOCS):
        old = path.read_text(encoding="utf-8")
        new = filled(path, pictures=asked.pictures)
        if new != old and (asked.pages or differences(old, new)):
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"renewed {path.relative_to(DOCS)}\n")
    if found := record():
        raise SystemExit("\n".join([*found, "such a change needs a higher SCHEMA_VERSION"]))


if __name__ == "__main__":
    main()
