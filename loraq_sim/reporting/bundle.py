"""The report as files: the page, and beside it pictures, tables and a summary in Markdown."""

import gc
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.files import make_folder, markdown_text, write_file
from loraq_sim.reporting import sections
from loraq_sim.reporting.figures import pareto_figure, save_figure
from loraq_sim.reporting.layer_figures import accumulators_figure, heat_map_figure, latency_figure
from loraq_sim.reporting.page import html_report
from loraq_sim.reporting.plot_data import plot_data
from loraq_sim.reporting.report_data import Answer, ReportData, Row, answers
from loraq_sim.reporting.sections import compare_methods, method_sentences
from loraq_sim.reporting.tables import ResultTable, result_table
from loraq_sim.results.columns import is_missing
from loraq_sim.results.store_records import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "files_folder",
    "write_report",
]


_PICTURES = (".png", ".svg")
# Of a PNG: a picture of 48 lines has 6 million at 200 dots per inch, and takes 130 MB to draw.
_MOST_PIXELS = 3_200_000
# Longer tables are for programs.
_MOST_FOR_PEOPLE = 200
# What the page computes for itself.
_HIDDEN = frozenset(("fronts", "run_split", "parts"))


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
        The HTML file. Its folder is made if it is missing.
    with_files : bool
        Whether to write pictures and tables.
    validation : Figure, optional
        Picture of the cost model against measurement.

    Raises
    ------
    InputError
        If a file cannot be written or a package of the extra ``report`` is missing.
    """
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
    # A figure and its canvas hold each other, and 10 MB of pixels: each is collected before the
    # next, for which the rows of a large store need not be searched again.
    gc.freeze()
    try:
        for name, figure in _pictures(data, drawn, validation):
            pictures.append(name)
            written += [
                save_figure(figure, folder / f"{name}{suffix}", most_pixels=_MOST_PIXELS)
                for suffix in _PICTURES
            ]
            del figure
            gc.collect()
    finally:
        gc.unfreeze()
    written.append(write_file(folder / "summary.md", _summary(data, pictures)))
    return written


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
            "methods": sections.methods_table(data, methods, answer.context),
        }
        for number, mix in enumerate(m for m in data.mixed if m.context == answer.context):
            own[f"mixed_{number}" if number else "mixed"] = sections.mixed_table(mix)
        yield from ((f"{key}_{name}", table) for key, table in own.items() if table.rows)
    if data.validation:
        yield "cost_model", result_table(list(data.validation))


def _names(rows: Sequence[Row]) -> list[str]:
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
    for answer in answers(data):
        name = _slug(answer.context, data.contexts)
        if answer.best is not None:
            yield f"pareto_{name}", _pareto(data, answer)
        quantities = [q["key"] for q in drawn["layers"][answer.context]["quantities"]]
        if data.error in quantities:
            yield f"layers_{name}", heat_map_figure(drawn, answer.context, data.error)
        for key, figure in (
            ("latency", latency_figure(data, answer)),
            ("accumulators", accumulators_figure(drawn, answer.context)),
        ):
            if figure is not None:
                yield f"{key}_{name}", figure
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


def _summary(data: ReportData, pictures: list[str]) -> str:
    """The answer, its tables and the pictures as Markdown."""
    found = answers(data)
    methods = compare_methods(data)
    lines = [f"# {markdown_text(data.verdict.headline)}", "", markdown_text(data.title), ""]
    lines += [markdown_text(data.verdict.joint), ""] if data.verdict.joint else []
    for answer in found:
        lines += [f"## {markdown_text(answer.context)}", ""]
        lines += [f"- {markdown_text(sentence)}" for sentence in answer.sentences]
        lines += [f"- {markdown_text(s)}" for s in method_sentences(methods, answer.context)]
        table = sections.choices_table(data, answer)
        lines += ["", table.to_markdown()] if table.rows else [""]
        own = _slug(answer.context, data.contexts)
        lines += [f"![{n.replace('_', ' ')}]({n}.png)\n" for n in pictures if n.endswith(f"_{own}")]
    lines += [f"![{n.replace('_', ' ')}]({n}.png)\n" for n in pictures if n == "cost_model"]
    lines += [*(f"{markdown_text(note)}\n" for note in data.notes)]
    return "\n".join(lines).rstrip() + "\n"
