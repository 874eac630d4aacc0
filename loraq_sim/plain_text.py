"""Text from files of strangers, made harmless for where it is shown: one rule for each place.

Names of layers, messages, provenance and whatever else a file holds may carry characters that a
terminal obeys, that Markdown reads as markup, or that a spreadsheet runs. Values themselves stay as
they are; these functions stand where text leaves the program.
"""

import re
from collections.abc import Iterable
from typing import Any

from hwmodels.text_file import UNSAFE_CHARACTER

__all__ = ["csv_cell", "json_escaped", "markdown_line", "markdown_text", "shown", "shown_line"]

_UNSAFE_IN_JSON = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Sources: OWASP, "CSV Injection": = + - @, tab, carriage return, line feed, and full-width forms.
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
# An underscore inside a word is no emphasis in GitHub's Markdown, and layer names are full of them.
_MARKUP = re.compile(r"^#|[\\|`*\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|&(?=[#\w])")


def shown(text: str) -> str:
    """`text` with nothing a terminal would obey but newlines and tabs: ESC becomes ``\\x1b``."""
    if text.isprintable():
        return text
    return UNSAFE_CHARACTER.sub(lambda found: repr(found[0])[1:-1], text.replace("\r\n", "\n"))


def shown_line(text: str) -> str:
    """`shown` on one line: what breaks lines becomes a space."""
    return shown(text if text.isprintable() else " ".join(re.split(r"[\t\r\n\v\f\x85]+", text)))


def json_escaped(text: str) -> str:
    """JSON text in which a terminal finds nothing to obey; it means exactly the same."""
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def csv_cell(value: Any) -> Any:
    """A value for a CSV file: numbers as they are, text that no spreadsheet takes for a formula.

    A text that begins like a formula gets a ``'`` in front, which spreadsheets read as "text".
    """
    if not isinstance(value, str):
        return value
    return shown("'" + value if _FORMULA.match(value) else value)


def markdown_line(texts: Iterable[str]) -> str:
    """A line of a Markdown table with these cells, whatever they hold."""
    # A star alone marks a row and is no emphasis.
    cells = (text if text == "*" else markdown_text(text) for text in texts)
    return "| " + " | ".join(cells) + " |"


def markdown_text(text: str) -> str:
    """Words as one line of Markdown: nothing in them is a tag, a link, emphasis or a new cell."""
    escaped = _MARKUP.sub(lambda found: "\\" + found[0], " ".join(shown_line(text).split()))
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
