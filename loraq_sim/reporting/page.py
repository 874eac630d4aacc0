"""One self-contained HTML page: text, tables, data and every script inside, nothing fetched.

Names of layers, accelerators and files come from strangers. The template escapes all text, the data
are JSON in which no tag can begin, and a content security policy lets only the scripts of this page
run, by their digests, and forbids every request.

Plotly's script is stored compressed (gzip, base64) and unpacked by the browser, which keeps the
page at a third of its size; that needs a browser of 2023 or newer. The matrices of a large model's
layers are stored so too, at a tenth of their size. The last section says where the numbers come
from.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from loraq_sim.errors import InputError
from loraq_sim.reporting import sections
from loraq_sim.reporting.plot_data import plot_data
from loraq_sim.reporting.report_data import COSTS, Answer, ReportData, answers
from loraq_sim.reporting.sections import compare_methods, method_sentences
from loraq_sim.reporting.tables import ResultTable, json_value
from loraq_sim.results.columns import cells, column_for, is_missing
from loraq_sim.results.wording import pretty_unit, value_text

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = [
    "check_report_extra",
    "html_report",
]

_SCRIPTS = (
    *("core", "controls", "pareto", "layers", "costs", "accumulators", "comparisons", "start"),
)
_MANY_ROWS = 16
# Characters of the matrices of layers that stand in the page as they are.
_MOST_PLAIN = 500_000
_NAME_LENGTH = 36
_DIGEST_DIGITS = 16


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
    layers = _script_safe(drawn["layers"])
    is_large = len(layers) > _MOST_PLAIN
    template = _environment().get_template("report.html")
    return template.render(
        data=data,
        headline=data.verdict.headline,
        joint=data.verdict.joint,
        views=[_view(data, answer, methods) for answer in found],
        style=_asset("report.css"),
        script=main,
        library=packed,
        drawn=_script_safe(drawn | {"layers": None} if is_large else drawn),
        layers=_packed(layers) if is_large else "",
        drawn_accumulators=bool(drawn["accumulators"]),
        policy=_policy(main, library),
        devices=_html_table(sections.devices_table(data)),
        validation=_html_table(sections.validation_table(data)),
        failures=_html_table(sections.failures_table(data)),
        provenance=provenance_view(data),
        has_methods=bool(methods),
        many=_MANY_ROWS,
    )


def _view(data: ReportData, answer: Answer, methods: list) -> dict[str, Any]:
    """What the template shows of one context."""
    context = answer.context
    return {
        "context": context,
        "answer": answer,
        "figures": _figures(data, answer),
        "choices": _html_table(sections.choices_table(data, answer), strong=(0,)),
        "totals": _html_table(sections.totals_of_context_table(data, context)),
        "kinds": _html_table(sections.kinds_table(data, answer)),
        "costs": _html_table(sections.costs_table(data, answer)),
        "accumulators": _html_table(sections.accumulators_table(data, context)),
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


def _script_safe(value: Any) -> str:
    """Strict JSON that can stand in a script element: no tag or comment can begin in it."""
    text = json.dumps(json_value(value), separators=(",", ":"), allow_nan=False)
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


def provenance_view(data: ReportData) -> dict[str, Any]:
    """Facts of each sweep, its plan, and each accelerator's numbers with their sources."""
    return {
        "runs": [{"title": _title(run), "facts": _facts(run)} for run in data.runs],
        "machines": [
            {"name": name, "title": machine.get("title") or "", "facts": _sourced(machine)}
            for name, machine in data.machines.items()
        ],
    }


def _title(run: Mapping[str, Any]) -> str:
    started = run.get("started")
    return f"Sweep {run.get('run', '')} of {started}" if started else f"Sweep {run.get('run', '')}"


def _facts(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    plan = run.get("plan") or {}
    facts: list[tuple[str, Any]] = [
        ("Command", " ".join(map(str, run.get("command") or ()))),
        ("Layer dump", plan.get("dump")),
        ("Digest of the dump's layers", _digest(run.get("dump_digest"))),
    ]
    for name, digest in (run.get("accelerator_digests") or {}).items():
        facts.append((f"Digest of {name}", _digest(digest)))
    facts += [
        ("Digest of the code", _digest(run.get("code_digest"))),
        ("Plan", _settings(plan, without=("dump",))),
        ("Seed", run.get("seed")),
        ("Cases", _counts(run)),
        ("Versions", _settings(run.get("versions") or {})),
        ("Machine", _listing(run, ("cpu", "machine", "platform"))),
        ("Started, ended", _listing(run, ("started", "ended"))),
        ("Remarks", "; ".join(map(str, run.get("notes") or ()))),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "", [], {})]


def _digest(value: Any) -> str:
    return str(value)[:_DIGEST_DIGITS] if value else ""


def _settings(values: Mapping[str, Any], *, without: Iterable[str] = ()) -> str:
    parts = []
    for name, value in values.items():
        if name in without or value in (None, "", [], {}):
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return "; ".join(parts)


def _counts(run: Mapping[str, Any]) -> str:
    words = (("n_ok", "ok"), ("n_failed", "failed"), ("n_skipped", "found from earlier sweeps"))
    return ", ".join(f"{run[key]:,} {word}" for key, word in words if run.get(key))


def _listing(run: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(str(run[key]) for key in keys if run.get(key))


def _sourced(machine: Mapping[str, Any]) -> list[dict[str, str]]:
    """Numbers of one machine by source, so that a source is read once."""
    by_source: dict[tuple[str, str], list[str]] = {}
    for fact in machine.get("facts") or ():
        where = (str(fact.get("source") or "not stated"), str(fact.get("confidence") or ""))
        value = f"{fact['value']} {fact.get('unit') or ''}".strip()
        by_source.setdefault(where, []).append(f"{fact['key']} = {value}")
    return [
        {"source": source, "confidence": confidence, "numbers": "; ".join(numbers)}
        for (source, confidence), numbers in by_source.items()
    ]
