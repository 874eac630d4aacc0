"""``loraq-sim solve --compare``: methods side by side, layer by layer, at equal bytes."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.failures import case_failure
from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import print_tables
from loraq_sim.cli.progress import tracked
from loraq_sim.errors import InputError, unknown_name

if TYPE_CHECKING:
    from loraq_sim.dumps import LayerDump

__all__ = ["Compare", "compare_rows", "print_comparison"]

Compare = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        metavar="METHOD,...",
        help="Solve each layer with each method as published, at equal bytes, and show the gain of "
        "the last one: rtn,lqer,svdquant,loraq. Methods published with a 16-bit branch get one of "
        "the bytes of the split's branch.",
        show_default=False,
    ),
]


def compare_rows(
    dump: "LayerDump",
    cases: list[dict[str, Any]],
    methods: tuple[str, ...],
    *,
    tokens: int | None,
    quiet: bool,
) -> list[dict[str, Any]]:
    """One row per case and method; a case that fails has one failed row."""
    from loraq_sim.method_comparison import compare_methods
    from loraq_sim.recipe import split_of
    from loraq_sim.solvers import METHODS

    for method in methods:
        if method not in METHODS:
            raise InputError(unknown_name("method", method, METHODS))
    rows: list[dict[str, Any]] = []
    for case in tracked(cases, "comparing", quiet=quiet):
        try:
            split = split_of(case)
            options = {name: case[name] for name in ("preset", "seed", "device")}
            layer = dump[case["layer"]]
            rows += compare_methods(layer, split, methods, tokens=tokens, **options)
        except Exception as error:
            rows.append(
                {"layer": case["layer"], "split": case["split"]}
                | {"status": "failed", "message": case_failure(error)}
            )
    return rows


def print_comparison(rows: list[dict[str, Any]], output: OutputFormat, *, title: str) -> None:
    """Wide tables for people; for programs a row per layer and method."""
    from loraq_sim.method_comparison import comparison_means, comparison_table_rows
    from reports.tables import result_table

    if output in (OutputFormat.JSON, OutputFormat.CSV):
        print_tables([result_table(rows)], output)
        return
    last = next(row["method"] for row in reversed(rows) if row["status"] == "ok")
    by_layer = f"{title}: weight error at equal bytes, and the gain of {last} over each"
    means = f"All layers (bytes: sum; errors: mean; gain of {last}: geometric mean and least)"
    tables = [
        result_table(comparison_table_rows(rows), title=by_layer),
        result_table(comparison_means(rows), title=means),
    ]
    print_tables(tables, output)
