"""Result rows as a terminal table, Markdown, CSV text or JSON text.

`ResultTable` holds rows and the columns people should see. What people read (`to_rich`, `to_text`,
`to_markdown`) shows those columns, scaled, with the unit in the heading. What programs read
(`to_csv`, `to_json`) carries every column of the rows under its plain name at full precision.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.files import csv_cell, json_escaped, markdown_line, shown_line
from loraq_sim.results.columns import (
    Column,
    cells,
    column_for,
    is_missing,
    plain_rows,
    settings_that_matter,
)
from loraq_sim.results.rows import plain_value

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = [
    "ResultTable",
    "TABLE_FORMATS",
    "front_table",
    "json_text",
    "json_value",
    "result_table",
    "totals_table",
]


TABLE_FORMATS = ("table", "json", "csv", "md")

_TRADE_OFF_KEYS = (
    "split",
    "rotation",
    "smooth",
    "condition",
    "finish",
    "rank",
    "bits_per_weight",
    "output_error",
    "sqnr_db",
    "latency_s",
    "energy_j",
    "dram_bytes",
    "bound",
)
_NAMES_LISTED = 4
_PROSE_WIDTH = 60
_PHRASE_WIDTH = 28
_NARROWEST = 8
_TIME_WIDTH = 6
_LEFT_OFF = "..."
# What a narrow terminal leaves out, the first before the others; then what is not kept, from the
# right. Names, and what is decided by, are kept and break into lines if need be.
_LEFT_OUT_FIRST = (
    *("latency_low_s", "latency_high_s", "latency_lo_s", "latency_hi_s", "seconds", "cosine"),
    *("max_abs_error", "cycles", "confidence", "kernel", "fits_in", "preset", "kind", "method"),
    *("dram_bytes", "roofline_latency_s", "peak_activation_bytes", "utilization", "bound"),
    *("energy_j", "sqnr_db", "bits_per_weight", "rank", "tile_mkn", "aliases", "variants"),
)
_OTHER_END = {"latency_low_s": "latency_high_s", "latency_lo_s": "latency_hi_s"}
_DECIDING = (
    *("layer", "split", "output_error", "latency_s", "weight_bytes", "point", "pareto"),
    *("name", "description", "device", "measured_ms", "predicted_ms", "error"),
    *("only", "column", "before", "after", "quantity", "part", "value", "term", "becomes"),
    *("factor", "area_ratio", "energy_ratio"),
)
_LEFT_OUT_LAST = ("k", "n", "m")
# Where even names in pieces leave no room.
_LEFT_OUT_AT_LAST = (
    *("point", "status", "weight_error", "overflow", "acc_bits", "area_ge", "accelerator", "dump"),
    "weight_bytes",
)
_KEPT = (
    *("dump", "accelerator", "weight_error", "acc_bits", "overflow", "area_ge", "status"),
    *_DECIDING,
)
# Shown only where they tell rows apart; a column of one repeated word wastes terminal width.
_PLACE_KEYS = ("dump", "accelerator", "layer")
_SETTING_KEYS = (
    *("method", "preset", "family", "group_size", "acc_bits", "overflow", "products_per_add"),
    *("accumulators", "seed", "token_limit", "options"),
)


@dataclass(frozen=True, kw_only=True)
class ResultTable:
    """Rows with the columns that people see.

    Attributes
    ----------
    rows : list of dict
        Python scalars in base units (s, J, bytes, fractions), all columns kept.
    columns : tuple of Column
        What the forms for people show, in order.
    title : str
        Shown above the rich table; not part of the other forms.
    remarks : tuple of str
        Shown below it, likewise.
    """

    rows: list[dict[str, Any]]
    columns: tuple[Column, ...]
    title: str = ""
    remarks: tuple[str, ...] = ()

    def render(self, format: str) -> "RenderableType":
        """Rich table for ``table``, else text of ``json``, ``csv`` or ``md``.

        Raises
        ------
        InputError
            If `format` is not one of `TABLE_FORMATS`.
        """
        if format not in TABLE_FORMATS:
            raise InputError(unknown_name("format", format, TABLE_FORMATS))
        renderers = {"json": self.to_json, "csv": self.to_csv, "md": self.to_markdown}
        return renderers.get(format, self.to_rich)()

    def within(self, width: int) -> "ResultTable":
        """The table with what fits in `width` characters; a remark names what does not.

        What is the same in all rows is said once below; then columns go in the order of
        `_LEFT_OUT_FIRST`, those without which two rows look alike aside. Numbers are never cut, and
        those of a single row are said below it.
        """
        widths = self._widths()
        if _line(widths.values()) <= width:
            return self
        kept, remarks = list(self.columns), list(self.remarks)
        texts = {column.key: cells(column, self.rows) for column in kept}
        headings = {column.key: column.heading for column in self.columns}
        said_once = {
            key: f"{headings[key]} {column_cells[0]} {unit}".rstrip()
            for key, (unit, column_cells) in texts.items()
            if len(set(column_cells)) == 1
        }
        stay = {*_DECIDING, "message"} - {"split", "layer"}
        same = {k: t for k, t in said_once.items() if len(self.rows) > 1 and k not in stay}
        if len(same) == len(kept):
            same.popitem()
        if same:
            kept = [column for column in kept if column.key not in same]
            remarks.append(f"in all rows: {', '.join(same.values())}")
            widths = {key: taken for key, taken in widths.items() if key not in same}
        shorter = self
        prefix = _common_start(self.rows)
        if _line(widths.values()) > width and len(prefix) > len(_LEFT_OFF):
            names = [_LEFT_OFF + str(row["layer"])[len(prefix) :] for row in self.rows]
            rows = [row | {"layer": name} for row, name in zip(self.rows, names, strict=True)]
            remarks.append(f"layers begin with {prefix}")
            shorter = replace(self, rows=rows)
            widths |= {key: w for key, w in shorter._widths().items() if key == "layer"}
        order = [key for key in _LEFT_OUT_FIRST if key in texts]
        order += [
            column.key
            for column in reversed(kept)
            if column.key not in (*order, *_KEPT, *_LEFT_OUT_LAST, "message")
            and (column.quantity != "percent" or column.key.endswith("_share"))
        ]
        left_out: list[str] = []
        for key in (*order, *_LEFT_OUT_LAST):
            if (
                _line(widths.values()) <= width
                or key not in widths
                or _names_rows(kept, key, texts)
            ):
                continue
            for end in (key, _OTHER_END.get(key, "")):
                if widths.pop(end, None) is not None:
                    left_out.append(end)
                    kept = [column for column in kept if column.key != end]
        folded = {
            c.key: min(widths[c.key], _NARROWEST) for c in kept if c.is_text and c.key in widths
        }
        for key in _LEFT_OUT_AT_LAST:
            if _line((widths | folded).values()) > width and widths.pop(key, None) is not None:
                folded.pop(key, None)
                left_out.append(key)
                kept = [column for column in kept if column.key != key]
        gone = [key for key in headings if key in left_out]
        if gone and len(self.rows) == 1:
            remarks.append(f"beside the table: {', '.join(said_once[key] for key in gone)}")
        elif gone:
            listed = ", ".join(headings[key] for key in gone)
            remarks.append(
                f"{width} columns leave out: {listed}; `loraq-sim --wide` and pipes have all"
            )
        return replace(shorter, columns=tuple(kept), remarks=tuple(remarks))

    def _widths(self) -> dict[str, int]:
        """Characters that each column of the rich table takes at least, names in one piece."""
        from rich.cells import cell_len

        widths = {}
        for column in self.columns:
            if column.key == "message":
                continue
            unit, column_cells = cells(column, self.rows)
            words = ["*"] if column.quantity == "mark" else [*column.heading.split(), unit]
            longest = max(map(cell_len, [*words, *column_cells]))
            # A time has other digits each time: the table is of one shape all the same.
            longest = max(longest, _TIME_WIDTH) if column.key == "seconds" else longest
            is_phrase = _is_phrase(column_cells)
            widths[column.key] = min(longest, _PHRASE_WIDTH) if is_phrase else longest
        return widths

    def to_rich(self, width: int | None = None) -> "RenderableType":
        """Rich table: units under the headings, numbers right-aligned, front rows bold.

        Messages stand below the table, where they do not squeeze the numbers. In a `width` that
        holds less than the table, see `within`, names break into lines.
        """
        from rich.console import Group
        from rich.text import Text

        fitted = self if width is None else self.within(width)
        # Not as its caption, which would break lines at the width of the table.
        lines = fitted._notes()
        notes = [Text(line, style="italic dim") for line in (*lines, *([""] if lines else []))]
        # Not as the table's, which would break at its width.
        title = [Text(shown_line(self.title), style="bold")] if self.title else []
        return Group(*title, fitted._to_rich(math.inf if width is None else width), *notes)

    def _to_rich(self, width: float) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1),
            collapse_padding=True,
        )
        headings, texts = [], []
        shown = [column for column in self.columns if column.key != "message"]
        for column in shown:
            unit, column_cells = cells(column, self.rows)
            # One word a line: the numbers, not their headings, set the width of a column.
            words = ["*"] if column.quantity == "mark" else [*column.heading.split(), unit]
            headings.append([word for word in words if word])
            texts.append(column_cells)
        height = max(map(len, headings), default=0)
        lengths = [max(map(len, column_cells), default=0) for column_cells in texts]
        breaks = {i for i, t in enumerate(texts) if width < math.inf and _is_phrase(t)}
        names = sorted((i for i, c in enumerate(shown) if c.is_text), key=lambda i: lengths[i])
        too_wide = _line(self._widths().values()) - width
        while too_wide > 0 and names:
            breaks.add(longest := names.pop())
            too_wide -= max(lengths[longest] - _NARROWEST, 0)
        for i, (column, words, column_cells) in enumerate(zip(shown, headings, texts, strict=True)):
            wraps = _is_prose(column_cells) or i in breaks
            table.add_column(
                Text("\n" * (height - len(words)) + "\n".join(words)),
                justify="left" if column.is_text else "right",
                no_wrap=not wraps,
                overflow="fold" if wraps else "ellipsis",
                min_width=min(_NARROWEST, lengths[i]) if wraps else lengths[i],
                max_width=_PROSE_WIDTH if wraps else None,
            )
        for i, row in enumerate(self.rows):
            style = "bold" if self._has_marks and row.get("pareto") == 1 else ""
            # Text, not str: layer names may hold brackets, which rich would read as markup.
            table.add_row(*(Text(column_cells[i]) for column_cells in texts), style=style)
        return table

    @property
    def _has_marks(self) -> bool:
        return any(column.key == "pareto" for column in self.columns)

    def _notes(self) -> list[str]:
        notes = ["* on the Pareto front"] if self._has_marks else []
        if not any(column.key == "message" for column in self.columns):
            return [*notes, *map(shown_line, self.remarks)]
        cases: dict[str, list[str]] = {}
        for row in self.rows:
            failed = row.get("status") not in (None, "", "ok")
            if failed or row.get("message"):
                status = f"{row['status']}: " if failed else ""
                remark = status + str(row.get("message") or "no reason given")
                case = " ".join(str(row[key]) for key in ("layer", "split") if row.get(key))
                cases.setdefault(remark, []).append(case)
        notes += [f"{_listing(names, len(self.rows))}: {r}" for r, names in cases.items()]
        return [shown_line(text) for text in (*notes, *self.remarks)]

    def to_text(self) -> str:
        """The rich table as plain text, as wide as names and numbers need: a pipe loses nothing."""
        from rich.console import Console

        out = io.StringIO()
        Console(file=out, width=10_000, color_system=None).print(self.to_rich())
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"

    def to_markdown(self) -> str:
        """GitHub Markdown table with units in the headings; ends with a newline."""
        headings, texts = [], []
        for column in self.columns:
            unit, column_cells = cells(column, self.rows)
            headings.append(f"{column.heading} ({unit})" if unit else column.heading)
            texts.append(column_cells)
        lines = [
            markdown_line(headings),
            markdown_line(["---" if c.is_text else "---:" for c in self.columns]),
        ]
        for i in range(len(self.rows)):
            lines.append(markdown_line([column_cells[i] for column_cells in texts]))
        return "\n".join(lines) + "\n"

    def to_csv(self) -> str:
        """CSV text with a header of plain names; floats at full precision, missing values empty."""
        keys = _all_keys(self.rows) or [column.key for column in self.columns]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(map(csv_cell, keys))
        for row in self.rows:
            values = [row.get(key) for key in keys]
            writer.writerow(["" if is_missing(value) else csv_cell(value) for value in values])
        return out.getvalue()

    def to_json(self) -> str:
        """JSON text of the list of rows; see `json_text`."""
        return json_text(self.rows)


def result_table(
    rows: Any, columns: Sequence[str] | None = None, *, title: str = ""
) -> ResultTable:
    """Table of any rows.

    Parameters
    ----------
    rows : DataFrame or iterable of mappings
        Values in base units. Not modified.
    columns : sequence of str, optional
        Row keys to show, in order; by default every key, in order of first appearance.
    title : str
        Heading of the rich table.

    Raises
    ------
    InputError
        If a name in `columns` is in none of the rows.
    """
    plain = plain_rows(rows)
    known = _all_keys(plain)
    for key in columns or ():
        if known and key not in known:
            raise InputError(unknown_name("column", key, known))
    shown = tuple(column_for(key, (row.get(key) for row in plain)) for key in columns or known)
    return ResultTable(rows=plain, columns=shown, title=title)


def front_table(front_rows: Any, *, title: str = "Pareto front", among: Any = None) -> ResultTable:
    """Table of the rows on a Pareto front, fastest first: what each choice costs and loses.

    Settings are shown in which rows of one split differ, of `among` where that is given.
    """
    return _trade_off_table(front_rows, title, (), among)


def totals_table(model_rows: Any, *, title: str = "Whole model, per split") -> ResultTable:
    """Table of all splits, fastest first; rows on the front carry ``*`` and are bold."""
    return _trade_off_table(model_rows, title, ("pareto",))


def _trade_off_table(
    rows: Any, title: str, first_keys: tuple[str, ...], among: Any = None
) -> ResultTable:
    plain = sorted(plain_rows(rows), key=_reading_order)
    context = [key for key in _PLACE_KEYS if len({row.get(key) for row in plain}) > 1]
    settings = settings_that_matter(plain if among is None else plain_rows(among), _SETTING_KEYS)
    context += settings
    failures = ("message",) if any(r.get("message") for r in plain) else ()
    known = set(_all_keys(plain))
    marks = first_keys if any(row.get("pareto") == 1 for row in plain) else ()
    points = ("point",) if any(row.get("point") for row in plain) else ()
    # Arrays differ in area at equal latency: without it their rows look alike.
    areas = ("area_ge",) if {"acc_bits", "products_per_add"} & set(settings) else ()
    keys = [*marks, *context, *areas, *_stand_ins(plain), *points, *failures]
    # A column without a single value (the bound of a mixed model, say) would only show dashes.
    shown = [key for key in keys if key in known and not all(is_missing(r.get(key)) for r in plain)]
    columns = tuple(column_for(key, [row.get(key) for row in plain]) for key in shown or keys)
    return ResultTable(rows=plain, columns=columns, title=title)


def _stand_ins(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a trade-off; what is known of weights alone where nothing else is."""
    stand_ins = {"output_error": "weight_error", "latency_s": "weight_bytes"}
    return [
        stand_ins[key]
        if key in stand_ins and all(is_missing(row.get(key)) for row in rows)
        else key
        for key in _TRADE_OFF_KEYS
    ]


def _reading_order(row: Mapping[str, Any]) -> tuple:
    latency = row.get("latency_s")
    missing = is_missing(latency)
    place = [str(row.get(key, "")) for key in _PLACE_KEYS]
    return (*place, missing, 0.0 if missing else latency)


def json_text(value: Any, *, indent: int | None = 2) -> str:
    """Strictly valid JSON text, ending with a newline.

    NaN and infinities become null, NumPy scalars and arrays become numbers and lists, a DataFrame
    becomes a list of records, a `ResultTable` its rows, paths become strings.

    Raises
    ------
    TypeError
        If a value has no JSON form.
    """
    text = json.dumps(json_value(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return json_escaped(text) + "\n"


def json_value(value: Any) -> Any:
    """What `json_text` writes, as dicts, lists and scalars."""
    value = plain_value(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, ResultTable):
        return json_value(value.rows)
    if hasattr(value, "to_dict"):
        return json_value(plain_rows(value))
    if hasattr(value, "tolist"):
        return json_value(value.tolist())
    if hasattr(value, "__fspath__"):
        return str(value)
    if isinstance(value, Iterable) and not isinstance(value, bytes):
        return [json_value(item) for item in value]
    raise TypeError(f"{type(value).__name__} value {value!r} has no JSON form")


def _is_prose(texts: Sequence[str]) -> bool:
    """Whether a column holds sentences, which wrap, rather than names, which stay in one piece."""
    return any(len(text) > _PROSE_WIDTH and " " in text for text in texts)


def _common_start(rows: Sequence[Mapping[str, Any]]) -> str:
    """The parts of a name, up to a dot, with which the layers of all rows begin."""
    names = {str(row.get("layer") or "") for row in rows}
    start = os.path.commonprefix(sorted(names)).rpartition(".")[0] if len(names) > 1 else ""
    return f"{start}." if start else ""


def _names_rows(kept: Sequence[Column], key: str, texts: Mapping[str, Any]) -> bool:
    """Whether rows that the words of the `kept` columns tell apart look alike without `key`."""
    words = [c.key for c in kept if c.is_text and c.key not in ("message", "point")]
    if key not in words:
        return False

    def n_told(keys: Sequence[str]) -> int:
        return len(set(zip(*(texts[one][1] for one in keys), strict=True))) if keys else 1

    return n_told(words) > n_told([one for one in words if one != key])


def _line(widths: Iterable[int]) -> int:
    """Characters of a line of columns of these widths."""
    taken = list(widths)
    return sum(taken) + 2 * len(taken)


def _is_phrase(texts: Sequence[str]) -> bool:
    """Whether a column holds several words a cell, which may wrap where there is no room."""
    return any(len(text) > _PHRASE_WIDTH and " " in text for text in texts)


def _listing(names: Sequence[str], n_rows: int) -> str:
    if len(names) == n_rows > 1:
        return "all rows"
    more = f" and {len(names) - _NAMES_LISTED} more" if len(names) > _NAMES_LISTED else ""
    return ", ".join(names[:_NAMES_LISTED]) + more


def _all_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
