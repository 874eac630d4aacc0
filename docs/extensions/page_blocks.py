"""Code blocks of the Markdown pages, and what the comments around them ask for.

    <!-- slow: why -->          before a block: run by `make test-slow` only
    <!-- not run: why -->       before a block: run by nobody, with the reason
    <!-- needs: PROGRAM -->     before a block: left out where the program is not installed
    <!-- output -->             after a block: what it prints follows, see `fill_pages`
    <!-- output: stderr -->     the same with the notes on stderr
    <!-- output: lines=12 -->   the same, cut after 12 lines; skip=3 leaves out the first 3
    <!-- output: picture=F -->  the picture F that the commands wrote
    <!-- output: timed -->      it holds times, which differ from run to run

Pages are plain Markdown, and one text is what readers see and what tests run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "commands_of", "page_blocks", "pages"]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<note>slow|not run|needs): (?P<why>[^\n]*?) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```\n"
    r"(?:^<!-- output(?:: (?P<options>[^\n]*?))? -->$)?",
    re.DOTALL | re.MULTILINE,
)

_GENERATED = re.compile(
    r"^<!-- generated: .*?^<!-- end of generated -->$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its text, the note before it, and the output options after it or None."""

    language: str
    text: str
    note: str | None
    why: str | None
    options: tuple[str, ...] | None
    start: int
    end: int


def page_blocks(page: str) -> Iterator[Block]:
    """Every fenced block of a page, in order; those of generated parts are not to be run."""
    generated = [match.span() for match in _GENERATED.finditer(page)]
    for match in _BLOCK.finditer(page):
        if any(start < match.start() < end for start, end in generated):
            continue
        asked = match[0].rstrip().endswith("-->")
        yield Block(
            language=match["language"],
            text=match["text"],
            note=match["note"],
            why=match["why"],
            options=tuple((match["options"] or "").split()) if asked else None,
            start=match.start(),
            end=match.end(),
        )


def commands_of(text: str) -> list[str]:
    """Every command of a bash block, continued lines joined and comments left out."""
    lines = (line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def pages(docs: Path) -> list[Path]:
    """All pages of the documentation."""
    return sorted(path for path in docs.rglob("*.md") if "_build" not in path.parts)
