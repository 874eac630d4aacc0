"""Text that goes in and out: the one error this package raises on purpose, and what is around it.

How an unknown name is reported; how text of strangers is shown on one line, and facts as HTML; how
a small file that may come from anywhere is read: regular, of bounded size, UTF-8.
"""

import difflib
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

__all__ = [
    "AcceleratorError",
    "UNSAFE_CHARACTER",
    "bar_text",
    "html_card",
    "nearest",
    "printable",
    "read_text",
    "require_regular",
]


class AcceleratorError(ValueError):
    """An accelerator file, its name, or a workload breaks a stated rule."""


def nearest(value: object, valid: Iterable[str]) -> str:
    """Advice for a wrong name: the closest valid names, then all of them.

    >>> nearest("capacity_byte", ["capacity_bytes", "reserved_bytes"])
    "did you mean 'capacity_bytes'? Known: capacity_bytes, reserved_bytes"
    """
    names = list(valid)
    near = difflib.get_close_matches(str(value)[:100].lower(), names, n=1, cutoff=0.55)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}Known: {', '.join(names)}"


UNSAFE_CHARACTER = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and newline, marks that reverse the text, halves of surrogate pairs:
a terminal obeys the first, people misread the second, and no output can be encoded with the third.
"""


def read_text(path: Path, what: str, max_bytes: int) -> str:
    """Text of the file at `path`, without a byte order mark.

    Parameters
    ----------
    path : Path
    what : str
        What the file is to be, for messages: ``"accelerator file"``.
    max_bytes : int
        Longer files are refused after that many bytes.

    Raises
    ------
    AcceleratorError
        If `path` is no regular file that can be read, is too long, or holds no UTF-8 text.
    """
    shown = printable(str(path))
    try:
        require_regular(path, what)
        with path.open("rb") as file:
            raw = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, AcceleratorError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise AcceleratorError(f"cannot read {what} {shown}: {reason}") from None
    if len(raw) > max_bytes:
        raise AcceleratorError(f"{shown}: the {what} is too large; it may have {max_bytes} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise AcceleratorError(f"{shown}: not UTF-8 text (byte {error.start})") from None


def require_regular(path: Path, what: str) -> None:
    """Raise AcceleratorError if `path` is a folder, a pipe or a device; OSError if it is missing.

    Reading a pipe could wait for ever, and a device need not end.
    """
    kind = path.stat().st_mode
    if stat.S_ISREG(kind):
        return
    found = "is a directory" if stat.S_ISDIR(kind) else "is not a regular file"
    raise AcceleratorError(f"{printable(str(path))} {found}; give the path of one {what}")


def printable(text: str, longest: int = 300) -> str:
    """`text` on one line with nothing a terminal would obey, cut after `longest` characters."""
    shown = text if len(text) <= longest else f"{text[:longest]}..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


_BAR_CHARACTERS = 20
_MOST_ROWS = 60


def html_card(
    title: str, facts: Mapping[str, object], *tables: Sequence[Mapping[str, object]]
) -> str:
    """HTML of a title, facts by name (None is left out) and tables given as rows.

    Tables longer than 60 rows are cut; a line says by how many.
    """
    import pandas as pd

    look = {"index": False, "border": 0}
    known = [(name, str(value)) for name, value in facts.items() if value is not None]
    shown = []
    with pd.option_context("display.max_colwidth", None):
        if known:
            shown.append(pd.DataFrame(known).to_html(header=False, **look))
        for rows in tables:
            texts = [{name: str(cell) for name, cell in row.items()} for row in rows[:_MOST_ROWS]]
            if texts:
                shown.append(pd.DataFrame(texts).to_html(**look))
            if len(rows) > _MOST_ROWS:
                shown.append(f"<p>{len(rows) - _MOST_ROWS:,} more rows are not shown</p>")
    return f"<strong>{escape(title)}</strong>{''.join(shown)}"


def bar_text(share: float) -> str:
    """A bar of up to 20 characters; shares outside 0 to 1 are cut."""
    return "\N{FULL BLOCK}" * round(_BAR_CHARACTERS * min(1.0, max(0.0, share)))
