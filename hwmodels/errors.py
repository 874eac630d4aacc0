"""Text that goes in and out: the one error this package raises on purpose, and what is around it.

How an unknown name is reported; how text of strangers is shown on one line, and facts as HTML; how
a small file that may come from anywhere is read: regular, of bounded size, UTF-8; and what number a
quantity such as ``1.2 GHz`` is under a key whose name ends with its unit.
"""

import difflib
import math
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from html import escape
from pathlib import Path
from typing import Any

__all__ = [
    "AcceleratorError",
    "UNSAFE_CHARACTER",
    "bar_text",
    "html_card",
    "nearest",
    "printable",
    "quantity",
    "quantity_text",
    "read_text",
    "require_regular",
    "unit_of",
    "worked_out",
    "written_units",
]


class AcceleratorError(ValueError):
    """An accelerator file, its name, or a workload breaks a stated rule."""

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback."""
        return [f"{type(self).__name__}: {self}"]


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
    known = [{"": name, " ": str(value)} for name, value in facts.items() if value is not None]
    shown = [_html_table(known, headed=False)] if known else []
    for rows in tables:
        texts = [{name: str(cell) for name, cell in row.items()} for row in rows[:_MOST_ROWS]]
        shown += [_html_table(texts)] if texts else []
        if len(rows) > _MOST_ROWS:
            shown.append(f"<p>{len(rows) - _MOST_ROWS:,} more rows are not shown</p>")
    return f"<strong>{escape(title)}</strong>{''.join(shown)}"


# A column of words or bars begins at the left; notebooks end every cell at the right.
_WORDS = re.compile(r"[^\W\d_]{4}|\N{FULL BLOCK}")


def _html_table(rows: Sequence[Mapping[str, str]], *, headed: bool = True) -> str:
    """Rows of texts as a table that looks like those of pandas."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    is_text = {
        name: not headed or any(_WORDS.search(r.get(name, "")) for r in rows) for name in names
    }
    side = {name: ' style="text-align:left"' if is_text[name] else "" for name in names}

    def line(kind: str, cells: Mapping[str, str]) -> str:
        shown = (f"<{kind}{side[name]}>{escape(cells.get(name, ''))}</{kind}>" for name in names)
        return f"<tr>{''.join(shown)}</tr>"

    head = f"<thead>{line('th', dict(zip(names, names, strict=True)))}</thead>" if headed else ""
    body = "".join(line("td", row) for row in rows)
    return f'<table class="dataframe" border="0">{head}<tbody>{body}</tbody></table>'


def bar_text(share: float) -> str:
    """A bar of up to 20 characters; shares outside 0 to 1 are cut."""
    return "\N{FULL BLOCK}" * round(_BAR_CHARACTERS * min(1.0, max(0.0, share)))


# Longest suffix first: bytes_per_cycle before bytes.
UNITS = {
    "_bytes_per_cycle": "B/cycle",
    "_elements_per_cycle": "elements/cycle",
    "_macs_per_cycle": "MAC/cycle",
    "macs_per_cycle": "MAC/cycle",
    "_bytes_per_s": "B/s",
    "_cycles_per_64_bytes": "cycles/64 B",
    "_pj_per_byte": "pJ/B",
    "_pj_per_mac": "pJ/MAC",
    "_pj_per_element": "pJ/element",
    "_overhead_cycles": "cycles",
    "_bytes": "B",
    "_words": "words",
    "_bits": "bit",
    "_rows": "rows",
    "_columns": "columns",
    "_percent": "%",
    "_fraction": "of 1",
    "m_axis": "axis",
    "balance": "scheme",
    "output_cast": "scheme",
    "split_k_max": "parts",
    "_hz": "Hz",
    "_nm": "nm",
    "_s": "s",
    "_w": "W",
}


def unit_of(key: str) -> str:
    """The unit that the end of a key says, such as ``B/s`` for ``bandwidth_bytes_per_s``."""
    return next((unit for suffix, unit in UNITS.items() if key.endswith(suffix)), "")


def _scaled(symbol: str, prefixes: Mapping[str, Decimal]) -> dict[str, Decimal]:
    return {f"{prefix}{symbol}": size for prefix, size in prefixes.items()}


_SMALL = {name: Decimal(10) ** power for name, power in (("", 0), ("m", -3), ("u", -6), ("n", -9))}
_LARGE = {name: Decimal(1000) ** power for power, name in enumerate(("", "K", "M", "G", "T"))}
_LARGE["k"] = _LARGE["K"]
_BINARY = {f"{name}i": Decimal(1024) ** power for power, name in enumerate("KMGT", start=1)}
_PICO = {name: size * 10**12 for name, size in _SMALL.items()}
_PICO |= {"p": Decimal(1), "f": Decimal("0.001")}
_BYTES = _scaled("B", _LARGE | _BINARY)
_JOULES_OF = _scaled("J", _PICO)
# What people may write for each unit of a key: symbol, and its size in that unit.
_WRITTEN: dict[str, dict[str, Decimal]] = {
    "B": _BYTES,
    "B/s": {f"{name}{per}": size for name, size in _BYTES.items() for per in ("/s", "ps")},
    "B/cycle": {f"{name}/cycle": size for name, size in _BYTES.items()},
    "MAC/cycle": {f"{name}/cycle": size for name, size in _scaled("MAC", _LARGE).items()},
    "elements/cycle": {"elements/cycle": Decimal(1)},
    "Hz": _scaled("Hz", _LARGE),
    "s": _scaled("s", _SMALL | {"p": Decimal("1e-12")}),
    "nm": {"nm": Decimal(1), "um": Decimal(1000)},
    "W": _scaled("W", {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(1000)}),
    "%": {"%": Decimal(1)},
    "of 1": {"%": Decimal("0.01")},
    "bit": {"bit": Decimal(1), "bits": Decimal(1)},
    "cycles": {"cycles": Decimal(1), "cycle": Decimal(1)},
    "words": {"words": Decimal(1)},
    "rows": {"rows": Decimal(1)},
    "columns": {"columns": Decimal(1)},
}
for _per in ("B", "MAC", "element"):
    _WRITTEN[f"pJ/{_per}"] = {
        f"{name}{tail}": size for name, size in _JOULES_OF.items() for tail in (f"/{_per}", "")
    }
_QUANTITY = re.compile(
    r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,2})?)\s*([^\d\s.+-][^\d]*?)\s*"
)


def quantity(key: str, text: str) -> int | float | str:
    """The number that `text` says in the unit of `key`; `text` itself where it says none.

    Whole numbers are int. K, M and G are powers of 1000, Ki, Mi and Gi of 1024. Small and capital
    letters are told apart where both mean something: bits and bytes, thousandths and millions.

    >>> [quantity("clock_hz", "1.2 GHz"), quantity("capacity_bytes", "16KiB")]
    [1200000000, 16384]
    >>> quantity("clock_hz", "2 parsecs")
    '2 parsecs'
    """
    units = _WRITTEN.get(unit_of(key), {})
    found = _QUANTITY.fullmatch(text) if units and len(text) <= _LONGEST_QUANTITY else None
    size = None if found is None else _size_of(found[2], units)
    if found is None or size is None:
        return text
    value = Decimal(found[1]) * size
    return int(value) if value == value.to_integral_value() else float(value)


_LONGEST_QUANTITY = 60


def _size_of(symbol: str, units: Mapping[str, Decimal]) -> Decimal | None:
    symbol = re.sub(r"\s+", "", symbol).replace("\N{MICRO SIGN}", "u")
    symbol = symbol.replace("\N{GREEK SMALL LETTER MU}", "u")
    if symbol in units:
        return units[symbol]
    # Small letters would make bits of bytes, and a thousandth of a million.
    if any(name.startswith("m") or "B" in name for name in units):
        return None
    return {name.lower(): size for name, size in units.items()}.get(symbol.lower())


_ROUND = ("B", "B/s", "Hz", "s")  # Units of which people write multiples.


def quantity_text(key: str, value: float) -> str:
    """`value` as a file has it: in the unit that makes it shortest, where it is a size or a rate.

    >>> quantity_text("clock_hz", 1.2e9), quantity_text("capacity_bytes", 65536)
    ('1.2 GHz', '64 KiB')
    """
    plain = f"{value:.0f}" if value == int(value) and abs(value) < _EXACT else repr(value)
    unit = unit_of(key)
    texts = [plain]
    for symbol, size in _WRITTEN[unit].items() if unit in _ROUND and value else ():
        text = f"{(Decimal(repr(value)) / size).normalize():f} {symbol}"
        if quantity(key, text) == value:
            texts.append(text)
    return min(texts, key=len)


_EXACT = 2**53


def written_units(key: str) -> str:
    """What people may write after a value of `key`, for messages; empty if it takes no unit."""
    return ", ".join(list(_WRITTEN.get(unit_of(key), {}))[:_MOST_UNITS])


_MOST_UNITS = 9


_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)|(\*\*|[-+*/()]))")
_LONGEST_SUM = 100


def worked_out(value: Any) -> float | None:
    """The number of a value, or of a sum or product such as ``1024*1024*8``; None for words."""
    text = "" if isinstance(value, bool) else str(value).strip().replace("_", "").lower()
    if text in ("inf", ".inf", "+inf"):
        return math.inf
    tokens: list[str] = []
    position = 0
    while position < len(text) <= _LONGEST_SUM:
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match[1] or match[2])
        position = match.end()
    try:
        number, rest = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return None if rest or isinstance(number, complex) else number


def _sum(tokens: list[str]) -> tuple[float, list[str]]:
    total, rest = _product(tokens)
    while rest and rest[0] in "+-":
        value, after = _product(rest[1:])
        total, rest = (total + value if rest[0] == "+" else total - value), after
    return total, rest


def _product(tokens: list[str]) -> tuple[float, list[str]]:
    total, rest = _power(tokens)
    while rest and rest[0] in ("*", "/"):
        value, after = _power(rest[1:])
        total, rest = (total * value if rest[0] == "*" else total / value), after
    return total, rest


def _power(tokens: list[str]) -> tuple[float, list[str]]:
    if tokens[0] in "+-":
        value, rest = _power(tokens[1:])
        return (-value if tokens[0] == "-" else value), rest
    if tokens[0] == "(":
        value, rest = _sum(tokens[1:])
        if rest[0] != ")":
            raise ValueError
        rest = rest[1:]
    else:
        value, rest = float(tokens[0]), tokens[1:]
    if rest and rest[0] == "**":
        exponent, rest = _power(rest[1:])
        value = value ** min(exponent, 1000.0)
    return value, rest
