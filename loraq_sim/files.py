"""Files of this project and of strangers: written whole, read with care, shown harmless.

Written: every file the package, its command line and its reports write comes through here, so that
a full disk, a quota or Ctrl-C leaves either the old file or the new one, and the message names the
file; nothing that is there is replaced unasked.

Read: a file that a person names must be a regular one, and text or TOML must be safe to parse. A
pipe would be waited for, a device need not end, and the TOML reader takes minutes for a key of ten
thousand parts; all of that is refused in one line. The rules are those of accelerator files
(`hwmodels.errors`), so every text a user names is read by one function.

Shown: names of layers, messages, provenance and whatever else a file holds may carry characters
that a terminal obeys, that Markdown reads as markup, or that a spreadsheet runs. Values themselves
stay as they are; one function for each place stands where text leaves the program.
"""

import os
import re
import secrets
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from hwmodels.errors import (
    UNSAFE_CHARACTER,
    AcceleratorError,
    printable,
    read_text,
    require_regular,
)
from loraq_sim.errors import InputError, LoraqError

__all__ = [
    "MAX_TOML_BYTES",
    "csv_cell",
    "json_escaped",
    "line_of",
    "make_folder",
    "markdown_line",
    "markdown_text",
    "printable",
    "read_toml",
    "refuse_existing",
    "replaced_file",
    "require_regular_file",
    "shown",
    "shown_line",
    "toml_value",
    "write_file",
    "write_together",
]


def refuse_existing(
    *paths: str | Path, overwrite: bool, error: type[LoraqError] = InputError
) -> None:
    """Raise `error` if one of `paths` is there, unless it may be replaced."""
    for path in () if overwrite else map(Path, paths):
        if os.path.lexists(path) and not _is_stream(path):
            raise error(
                f"{path} is there already; choose another name, or --force (in Python: "
                "overwrite=True) to replace it"
            )


def make_folder(folder: str | Path, *, error: type[LoraqError] = InputError) -> Path:
    """Make `folder` and those above it; raise `error` if that is not possible."""
    _check_name(folder, error)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise error(f"{folder}: cannot make this folder ({cause.strerror or cause})") from cause
    return Path(folder)


def _check_name(path: str | Path, error: type[LoraqError]) -> None:
    """Refuse what no file system takes, which Python answers with another exception."""
    if "\0" in str(path):
        raise error(f"{str(path)!r:.200}: the name of a file or folder cannot hold a NUL character")


@contextmanager
def replaced_file(path: str | Path, *, error: type[LoraqError] = InputError) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends well.

    The folder must be there. A link is followed; a device or a pipe is written as it is.

    Raises
    ------
    LoraqError
        Of type `error`, if the folder or the disk refuses; then, and after any other error, `path`
        is as it was and nothing lies beside it.
    """
    target = Path(path)
    _check_name(target, error)
    with _explained(target, error):
        if _is_stream(target):
            with target.open("wb") as file:
                yield file
            return
        target = Path(os.path.realpath(target))
        # Short, so that it fits wherever the name of the file does.
        part = target.with_name(f".{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with part.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def write_file(path: str | Path, content: str | bytes, *, error: type[LoraqError] = InputError):
    """Write one file, text as UTF-8; return its path. Raises as `replaced_file` does."""
    with replaced_file(path, error=error) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


def write_together(
    contents: Mapping[Path, str | bytes], *, error: type[LoraqError] = InputError
) -> None:
    """Write files that belong together: none takes its place before all are on the disk.

    They take it in the order of `contents`. Raises as `replaced_file` does.
    """
    with ExitStack() as stack:
        files = {}
        # The stack closes what was opened last first.
        for path in reversed(list(contents)):
            files[path] = stack.enter_context(replaced_file(path, error=error))
        for path, content in contents.items():
            with _explained(path, error):
                files[path].write(content.encode("utf-8") if isinstance(content, str) else content)
                files[path].flush()


@contextmanager
def _explained(path: Path, error: type[LoraqError]) -> Iterator[None]:
    """Turn what the system says about writing `path` into one line that names it."""
    try:
        yield
    except (OSError, RuntimeError) as cause:
        # torch reports a full disk as a plain RuntimeError; its subclasses are something else, and
        # so is a refusal that names another file, which the block may be reading.
        named = getattr(cause, "filename", None)
        is_other = named is not None and not str(named).endswith((".tmp", str(path)))
        if is_other or (isinstance(cause, RuntimeError) and type(cause) is not RuntimeError):
            raise
        reason = getattr(cause, "strerror", None) or (str(cause).splitlines() or ["no reason"])[0]
        raise error(
            f"{path}: cannot be written: {reason}; check the folder and its free space"
        ) from cause


def _is_stream(path: Path) -> bool:
    """Whether `path` leads to a device or a pipe, such as /dev/stdout, which cannot be replaced."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    # Even where the shell has sent it to a file: that file is open already.
    is_link = path.is_symlink() and path.parts[:2] in (("/", "dev"), ("/", "proc"))
    return not stat.S_ISDIR(mode) and (is_link or not stat.S_ISREG(mode))


MAX_TOML_BYTES = 256 * 1024
"""Plans take a few KiB, a recipe with settings for each of 1,000 layers some 150 KiB."""
MAX_DOTS = 1000
# Time of the TOML reader goes with the square of the dots of a line: about 1 s for this sum.
MAX_SQUARED_DOTS = 20 * MAX_DOTS**2


def require_regular_file(path: str | Path, what: str) -> None:
    """Raise InputError unless `path` is a regular file; `what` is what it should be."""
    try:
        require_regular(Path(path), what)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, AcceleratorError):
            raise InputError(str(error)) from None
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(str(path))}: cannot be read ({reason})") from None


def read_toml(path: str | Path, what: str) -> tuple[str, dict[str, Any]]:
    """Text and content of the TOML file at `path`.

    Parameters
    ----------
    path : str or Path
    what : str
        What the file is to be, for messages: ``"plan"``.

    Raises
    ------
    InputError
        If it is no regular file of at most `MAX_TOML_BYTES` bytes of UTF-8 text, is no TOML, would
        take the reader minutes, or holds an integer of more than 64 bits.
    """
    path = Path(path)
    try:
        text = read_text(path, what, MAX_TOML_BYTES).replace("\r\n", "\n")
    except AcceleratorError as error:
        raise InputError(str(error)) from None
    dots = [line.count(".") for line in text.split("\n")]
    if max(dots) > MAX_DOTS:
        raise InputError(f"{path}: has a line with over {MAX_DOTS} dots; write it as several lines")
    if sum(count * count for count in dots) > MAX_SQUARED_DOTS:
        raise InputError(f"{path}: has many lines with hundreds of dots; no {what} needs them")
    return text, _parsed(text, str(path))


def line_of(text: str, *keys: str | int) -> int:
    """Line of a TOML text where the innermost of `keys` is set or its table begins.

    TOML's reader does not say. Keys are looked for one after the other, each at the start of a line
    or of a table's name; one that is not found is passed over.
    """
    lines = text.splitlines()
    found = 0
    for part in keys:
        key = re.escape(str(part))
        start = re.compile(rf"""^\s*(?:\[[^\]]*)?["']?{key}["']?\s*[=\].]""")
        hits = (i for i in range(found, len(lines)) if start.match(lines[i]))
        found = next(hits, found)
    return found + 1


def toml_value(text: str, where: str) -> Any:
    """The TOML value that `text` is.

    Raises
    ------
    InputError
        If it is none, or holds an integer of more than 64 bits; the message begins with `where`.
    """
    if text.count(".") > MAX_DOTS:
        raise InputError(f"{where}: has over {MAX_DOTS} dots")
    return _parsed(f"value = {text}", where)["value"]


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        content = tomllib.loads(text)
        _refuse_huge(content, where)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        # ValueError: TOMLDecodeError, and an integer of thousands of digits.
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where}: is not TOML: {printable(str(reason), 200)}") from None
    return content


def _refuse_huge(value: Any, where: str) -> None:
    """Refuse integers of over 64 bits, which Python may refuse to print."""
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise InputError(
            f"{where}: holds an integer of {value.bit_length()} bits; no setting needs it"
        )
    if isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            _refuse_huge(entry, where)


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
