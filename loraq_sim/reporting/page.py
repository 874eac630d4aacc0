"""The report as files: one self-contained HTML page, and beside it pictures, tables and a summary.

The page has text, tables, data and every script inside and fetches nothing.

Names of layers, accelerators and files come from strangers. The template escapes all text, the data
are JSON in which no tag can begin, and a content security policy lets only the scripts of this page
run, by their digests, and forbids every request.

Plotly's script is stored compressed (gzip, base64) and unpacked by the browser, which keeps the
page at a third of its size; that needs a browser of 2023 or newer. The matrices of a large model's
layers are stored so too, at a tenth of their size.
"""

import base64
import gc
import gzip
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, markdown_text, write_file
from loraq_sim.reporting import sections
from loraq_sim.reporting.figures import pareto_figure, save_figure
from loraq_sim.reporting.layer_figures import accumulators_figure, heat_map_figure, latency_figure
from loraq_sim.reporting.machine_figures import arrays_figure
from loraq_sim.reporting.panels import mark_partial
from loraq_sim.reporting.plot_data import plot_data
from loraq_sim.reporting.points import static_front, strips_view
from loraq_sim.reporting.report_data import COSTS, Answer, ReportData, answers
from loraq_sim.reporting.sections import compare_methods, method_sentences
from loraq_sim.reporting.tables import ResultTable, json_value, result_table
from loraq_sim.results.columns import cells, column_for, is_missing
from loraq_sim.results.rows import AnyRow
from loraq_sim.results.store_records import write_csv
from loraq_sim.results.wording import pretty_unit, value_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

__all__ = [
    "check_report_extra",
    "check_report_name",
    "files_folder",
    "html_report",
    "markdown_report",
    "write_report",
]

_SCRIPTS = (
    *("core", "controls", "pareto", "points", "layers", "costs", "accumulators", "comparisons"),
    "start",
)
_MANY_ROWS = 16
# Characters of the matrices of layers that stand in the page as they are.
_MOST_PLAIN = 500_000
_NAME_LENGTH = 36

# Of a PNG: a picture of 48 lines has 6 million at 200 dots per inch, and takes 130 MB to draw.
_MOST_PIXELS = 3_200_000
# Rows, from which on pictures have half of them, and no SVG beside: each is of hundreds of points.
_MANY_DRAWN = 20_000
# Accelerators (of several dumps, pairs) with pictures; the page draws all of them.
_MOST_PICTURED = 4
# Longer tables are for programs.
_MOST_FOR_PEOPLE = 200
# What the page computes for itself.
_HIDDEN = frozenset(("fronts", "run_split", "parts"))


def check_report_extra() -> None:
    """Raise unless the packages of the extra ``report`` are there.

    Raises
    ------
    InputError
        If one is missing: which, and what to install.
    """
    for name in ("jinja2", "plotly"):
        try:
            __import__(name)
        except ImportError:
            raise InputError(
                f"the report needs {name}, which is not installed; "
                "run: pip install 'loraq-sim[report]'"
            ) from None


def check_report_name(page: str | Path) -> None:
    """Refuse a name that is neither that of a page nor of Markdown."""
    if Path(page).suffix.lower() not in (".html", ".htm", ".md"):
        raise InputError(
            f"a report is an HTML file such as report.html, or a .md, got {str(page)!r}"
        )


def files_folder(page: Path) -> Path:
    """The folder beside a page that holds its pictures and tables: ``report_files``."""
    return page.with_name(f"{page.stem}_files")


def write_report(
    data: ReportData, page: Path, *, with_files: bool = True, validation: "Figure | None" = None
) -> list[Path]:
    """Write the page and, unless told not to, the folder beside it; return what was written.

    Parameters
    ----------
    data : ReportData
    page : Path
        The HTML file, or a ``.md`` for verdict and numbers as Markdown, without files beside it.
        Its folder is made if it is missing.
    with_files : bool
        Whether to write pictures and tables.
    validation : Figure, optional
        Picture of the cost model against measurement.

    Raises
    ------
    InputError
        If a file cannot be written or a package of the extra ``report`` is missing.
    """
    if page.suffix.lower() == ".md":
        make_folder(page.parent)
        return [write_file(page, markdown_report(data))]
    drawn = plot_data(data, answers(data), compare_methods(data))
    text = html_report(data, drawn)
    make_folder(page.parent)
    written = [write_file(page, text)]
    if not with_files:
        return written
    folder = make_folder(files_folder(page))
    tables = list(_tables(data))
    if len(data.rows) > _MOST_FOR_PEOPLE:
        names = [name for name in _names(data.rows) if name not in _HIDDEN]
        path = folder / "layers.csv"
        write_csv(path, data.rows, names, line_end="\n")
        written.append(path)
    for name, table in tables:
        written.append(write_file(folder / f"{name}.csv", table.to_csv()))
        if len(table.rows) <= _MOST_FOR_PEOPLE:
            written.append(write_file(folder / f"{name}.md", table.to_markdown()))
    pictures = []
    is_large = len(data.rows) > _MANY_DRAWN
    suffixes = (".png",) if is_large else (".png", ".svg")
    most_pixels = _MOST_PIXELS // 2 if is_large else _MOST_PIXELS
    # A figure and its canvas hold each other, and 10 MB of pixels: each is collected before the
    # next, for which the rows of a large store need not be searched again.
    gc.freeze()
    try:
        for name, figure in _pictures(data, drawn, validation):
            pictures.append(name)
            written += [
                save_figure(figure, folder / f"{name}{suffix}", most_pixels=most_pixels)
                for suffix in suffixes
            ]
            del figure
            gc.collect()
    finally:
        gc.unfreeze()
    written.append(write_file(folder / "summary.md", markdown_report(data, pictures, cases=False)))
    return written


def html_report(data: ReportData, drawn: dict[str, Any] | None = None) -> str:
    """The page as text; `drawn` is what `plot_data` made of `data`, if that was done already.

    Raises
    ------
    InputError
        If a package of the extra ``report`` is missing.
    """
    check_report_extra()
    found = answers(data)
    methods = compare_methods(data)
    drawn = drawn or plot_data(data, found, methods)
    main = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    library, packed = _plotly()
    # Made of rounded numbers and texts: a million values need no second look.
    layers = _script_safe(drawn["layers"], is_plain=True)
    is_large = len(layers) > _MOST_PLAIN
    template = _environment().get_template("report.html")
    return template.render(
        data=data,
        headline=data.verdict.headline,
        joint=" ".join(filter(None, (_partial(data), data.verdict.joint))),
        views=[_view(data, answer, methods, drawn) for answer in found],
        strips=strips_view(data, found),
        style=_asset("report.css"),
        script=main,
        library=packed,
        drawn=_script_safe(drawn | {"layers": None} if is_large else drawn),
        layers=_packed(layers) if is_large else "",
        drawn_accumulators=bool(drawn["accumulators"]),
        drawn_arrays=bool(drawn["arrays"]),
        policy=_policy(main, library),
        devices=_html_table(sections.devices_table(data)),
        validation=_html_table(sections.validation_table(data)),
        failures=_html_table(sections.failures_table(data)),
        provenance=sections.provenance_view(data),
        has_methods=bool(methods),
        many=_MANY_ROWS,
    )


def _partial(data: ReportData) -> str:
    """What is missing as a whole; of one context its own sentences say it."""
    return data.verdict.partial if len(data.contexts) > 1 else ""


def _view(data: ReportData, answer: Answer, methods: list, drawn: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of one context."""
    context = answer.context
    texts = {} if answer.best is None else drawn["cases"][context].get(answer.best["label"], {})
    return {
        "texts": [(sections.TEXT_NAMES[name], text) for name, text in texts.items() if text],
        "picture": static_front(data, answer),
        "compared": _html_table(sections.compared_table(data, context)),
        "context": context,
        "answer": answer,
        "figures": _figures(data, answer),
        "choices": _html_table(sections.choices_table(data, answer), strong=(0,)),
        "totals": _html_table(sections.totals_of_context_table(data, context)),
        "kinds": _html_table(sections.kinds_table(data, answer)),
        "costs": _html_table(sections.costs_table(data, answer)),
        "accumulators": _html_table(sections.accumulators_table(data, context)),
        "arrays": _html_table(sections.arrays_table(data, context)),
        "methods": _html_table(sections.methods_table(data, methods, context)),
        "method_sentences": method_sentences(methods, context),
        "mixed": [
            _html_table(sections.mixed_table(mix)) for mix in data.mixed if mix.context == context
        ],
    }


def _figures(data: ReportData, answer: Answer) -> list[tuple[str, str]]:
    """The few numbers that stand large: what the choice loses and costs."""
    if answer.best is None:
        return []
    keys = (data.error, *COSTS[:3])
    return [
        (column_for(key).heading, value_text(key, answer.best[key]))
        for key in keys
        if not is_missing(answer.best.get(key))
    ]


def _html_table(table: ResultTable, *, strong: tuple[int, ...] = ()) -> dict[str, Any]:
    """Texts of a table: headings with units, cells, which columns are words, which rows stand out.

    A mark becomes the word a screen reader can say.
    """
    columns, texts = [], []
    for column in table.columns:
        unit, column_cells = cells(column, table.rows)
        is_mark = column.quantity == "mark"
        look = _look(column_cells) if column.is_text else "number"
        columns.append({"heading": column.heading, "unit": pretty_unit(unit), "look": look})
        texts.append(["yes" if cell and is_mark else cell for cell in column_cells])
    marked = [i for i, row in enumerate(table.rows) if row.get("pareto") == 1]
    return {
        "caption": table.title,
        "columns": columns,
        "rows": [[line[i] for line in texts] for i in range(len(table.rows))],
        "strong": set(strong) or set(marked),
    }


def _look(texts: Sequence[str]) -> str:
    """Class of a column of words: names stay in one piece, sentences wrap."""
    longest = max(map(len, texts), default=0)
    if longest <= _NAME_LENGTH:
        return "word whole"
    return "word prose" if longest > 2 * _NAME_LENGTH else "word"


def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("loraq_sim.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _asset(name: str) -> str:
    return (files("loraq_sim.reporting") / "templates" / name).read_text(encoding="utf-8")


def _script_safe(value: Any, *, is_plain: bool = False) -> str:
    """Strict JSON that can stand in a script element: no tag or comment can begin in it."""
    plain = value if is_plain else json_value(value)
    text = json.dumps(plain, separators=(",", ":"), allow_nan=False, default=json_value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """Plotly's script, and the same compressed as base64 text; equal inputs give equal text."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    # The browser hashes text whose line ends are normalized.
    source = source.replace("\r\n", "\n")
    return source, _packed(source, level=9)


def _packed(text: str, *, level: int = 6) -> str:
    """The text as gzip in base64; equal texts give equal ones."""
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=level, mtime=0)).decode()


def _policy(*scripts: str) -> str:
    """A content security policy that runs these scripts and requests nothing."""
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _tables(data: ReportData) -> Iterator[tuple[str, ResultTable]]:
    """Name and table of each file that has a row; columns the page computes for itself left out."""
    methods = compare_methods(data)
    found = answers(data)

    def cut(rows):
        return [{k: v for k, v in row.items() if k not in _HIDDEN} for row in rows]

    yield "cases", result_table(cut(data.totals))
    if len(data.rows) <= _MOST_FOR_PEOPLE:
        yield "layers", result_table(cut(data.rows))
    yield "kinds", result_table(cut(data.kinds))
    if data.parts:
        yield "cost_parts", result_table(_flat_parts(data))
    for answer in found:
        name = _slug(answer.context, data.contexts)
        own = {
            "choices": sections.choices_table(data, answer),
            "accumulators": sections.accumulators_table(data, answer.context),
            "arrays": sections.arrays_table(data, answer.context),
            "methods": sections.methods_table(data, methods, answer.context),
        }
        for number, mix in enumerate(m for m in data.mixed if m.context == answer.context):
            own[f"mixed_{number}" if number else "mixed"] = sections.mixed_table(mix)
        yield from ((f"{key}_{name}", table) for key, table in own.items() if table.rows)
    if data.validation:
        yield "cost_model", result_table(list(data.validation))


def _names(rows: Sequence[AnyRow]) -> list[str]:
    """Keys in order of appearance; rows have few patterns of them."""
    return list(dict.fromkeys(name for keys in dict.fromkeys(map(tuple, rows)) for name in keys))


def _flat_parts(data: ReportData) -> list[dict]:
    """One row a shape, case and part: a table other programs can pivot."""
    keys = ("context", "label", "kind", "m", "k", "n", "rank", "n_layers", "calls", "bound")
    return [
        {**{key: row[key] for key in keys}, "cost": cost, "part": part, "value": value}
        for row in data.parts
        for cost, parts in row["parts"].items()
        for part, value in parts.items()
        if value
    ]


def _pictures(
    data: ReportData, drawn: dict[str, Any], validation: "Figure | None"
) -> "Iterator[tuple[str, Figure]]":
    for answer in answers(data)[:_MOST_PICTURED]:
        name = _slug(answer.context, data.contexts)
        if answer.best is not None:
            yield f"pareto_{name}", _pareto(data, answer)
        quantities = [q["key"] for q in drawn["layers"][answer.context]["quantities"]]
        if data.error in quantities:
            figure = heat_map_figure(drawn, answer.context, data.error)
            mark_partial(figure, answer.verdict.partial)
            yield f"layers_{name}", figure
        for key, other in (
            ("latency", latency_figure(data, answer)),
            ("accumulators", accumulators_figure(drawn, answer.context)),
            ("arrays", arrays_figure(drawn, answer.context)),
        ):
            if other is not None:
                mark_partial(other, answer.verdict.partial)
                yield f"{key}_{name}", other
    if validation is not None:
        yield "cost_model", validation


def _pareto(data: ReportData, answer: Answer) -> "Figure":
    rows = data.totals_of(answer.context)
    known = [
        cost
        for cost in dict.fromkeys((answer.cost, "latency_s", "weight_bytes"))
        if not any(is_missing(row.get(cost)) for row in rows)
    ]
    marked = [{**row, "pareto": answer.cost in row["fronts"]} for row in rows]
    return pareto_figure(
        marked,
        x=known[:2],
        y=answer.verdict.error,
        model=data.title,
        layers=len({row["layer"] for row in data.rows_of(answer.context)}),
        provenance={"loraq-sim": data.version},
        verdict=answer.verdict,
    )


def _slug(context: str, contexts: list[str]) -> str:
    """Part of a file name for a context: unlike those of the others, whatever they are called."""

    def clean(text: str) -> str:
        return re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("._")[:60] or "accelerator"

    alike = [other for other in contexts if clean(other).lower() == clean(context).lower()]
    place = alike.index(context)
    return f"{clean(context)}_{place + 1}" if place else clean(context)


def markdown_report(data: ReportData, pictures: Sequence[str] = (), *, cases: bool = True) -> str:
    """The answer, its tables and the `pictures` (names of files) as Markdown.

    With `cases` also the table of all cases: the page's numbers for readers of text.
    """
    found = answers(data)
    methods = compare_methods(data)
    lines = [f"# {markdown_text(data.verdict.headline)}", "", markdown_text(data.title), ""]
    for text in filter(None, (_partial(data), data.verdict.joint)):
        lines += [markdown_text(text), ""]
    if data.verdict_before is not None:
        told = f"{data.verdict_before.headline}. {data.verdict_before.partial}".rstrip()
        lines += [f"Before: {markdown_text(told)}", ""]
    for answer in found:
        lines += [f"## {markdown_text(answer.context)}", ""]
        lines += [f"- {markdown_text(sentence)}" for sentence in answer.sentences]
        lines += [f"- {markdown_text(s)}" for s in method_sentences(methods, answer.context)]
        table = sections.choices_table(data, answer)
        lines += ["", table.to_markdown()] if table.rows else [""]
        more = [sections.compared_table(data, answer.context)]
        more += [sections.totals_of_context_table(data, answer.context)] if cases else []
        for table in more:
            if table.rows:
                lines += [f"### {markdown_text(table.title)}", "", table.to_markdown()]
        own = _slug(answer.context, data.contexts)
        lines += [f"![{n.replace('_', ' ')}]({n}.png)\n" for n in pictures if n.endswith(f"_{own}")]
    lines += [f"![{n.replace('_', ' ')}]({n}.png)\n" for n in pictures if n == "cost_model"]
    if pictures and len(found) > _MOST_PICTURED:
        lines += [f"Pictures are of the first {_MOST_PICTURED}; the page draws all {len(found)}.\n"]
    lines += [*(f"{markdown_text(note)}\n" for note in data.notes)]
    return "\n".join(lines).rstrip() + "\n"
