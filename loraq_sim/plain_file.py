"""Files that people give: regular ones, and of those that hold text or TOML, what is safe to parse.

A pipe would be waited for, a device need not end, and the TOML reader takes minutes for a key of
ten thousand parts; all of that is refused in one line. The rules are those of accelerator files
(`hwmodels.text_file`), so every text a user names is read by one function.
"""

import tomllib
from pathlib import Path
from typing import Any

from hwmodels.errors import AcceleratorError
from hwmodels.text_file import printable, read_text, require_regular
from loraq_sim.errors import InputError

__all__ = ["MAX_TOML_BYTES", "printable", "read_toml", "require_regular_file", "toml_value"]

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
