"""A Markdown table of rows of values."""

from collections.abc import Iterable, Sequence

__all__ = ["cell", "table"]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A pipe table; numbers are set to the right."""
    rows = [[cell(value) for value in row] for row in rows]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(heads))]
    rule = ["---:" if numeric else "---" for numeric in right]
    lines = [heads, rule, *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(value: object) -> str:
    """Text of one cell: no line break, no bar that would end it."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "").removesuffix("%").strip())
    except ValueError:
        return text == "-"
    return True
