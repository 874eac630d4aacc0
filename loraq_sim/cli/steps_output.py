"""What ``loraq-sim steps`` prints, and the files it writes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import note, print_json, print_tables
from loraq_sim.files import make_folder, refuse_existing

if TYPE_CHECKING:
    from loraq_sim.time_steps import StepReport

__all__ = ["check_folder", "print_reports", "write_reports"]

Row = dict[str, Any]

_TABLES = ("cells", "layers", "steps")
_SETTINGS = ("accelerator", "split", "method", "calibration")
_HEADINGS = {"share": "share (%)", "run_share": "run share (%)"}
_LARGEST = 10


def check_folder(out: Path | None, force: bool) -> None:
    """Raise InputError if the folder has tables of an earlier run, unless they may be replaced."""
    if out is not None:
        refuse_existing(*(out / f"{name}.csv" for name in _TABLES), overwrite=force)


def print_reports(reports: Sequence["StepReport"], output: OutputFormat, *, title: str) -> None:
    """Tables for people; for programs everything as JSON, or the cells as CSV."""
    from reports.tables import result_table

    if output is OutputFormat.JSON:
        print_json(
            {
                "cases": [
                    {"case": one.case, "layers": one.layers, "steps": one.steps, "cells": one.cells}
                    for one in reports
                ]
            }
        )
        return
    if output is OutputFormat.CSV:
        print_tables([result_table(_flat(reports, "cells"))], output)
        return
    columns = [
        *_SETTINGS,
        *("n_layers", "tokens", "output_error", "half_layers", "dominant_layer"),
        *("half_steps", "dominant_step"),
    ]
    cases = [one.case | _named_step(one.case, "dominant_step") for one in reports]
    summary = result_table(cases, columns, title=f"{title}: time steps")
    if len(reports) > 1:
        tables = [
            result_table(
                _side_by_side(reports, f"{key}s", key), title=f"Output error of each {key}"
            )
            for key in ("step", "layer")
        ]
    else:
        tables = _tables(reports[0])
    print_tables([summary, *tables], output)


def write_reports(folder: Path, reports: Sequence["StepReport"], *, dump: str, quiet: bool) -> None:
    """Write the tables of all cases and a heat map of each."""
    from loraq_sim import __version__
    from loraq_sim.csv_file import write_csv
    from reports.figures import save_figure
    from reports.step_figures import step_heat_map

    make_folder(folder)
    written = []
    for name in _TABLES:
        rows = _flat(reports, name)
        written.append(folder / f"{name}.csv")
        write_csv(written[-1], rows, list(rows[0]))
    for one, label in zip(reports, _labels(reports), strict=True):
        stem = "heat_map" + ("_" + re.sub(r"[^\w.+@-]+", "_", label).strip("_") if label else "")
        provenance = {"dump": dump, "loraq-sim": __version__, "seed": one.case["seed"]}
        figure = step_heat_map(one.case, one.cells, provenance=provenance)
        written += [save_figure(figure, folder / f"{stem}{end}") for end in (".png", ".svg")]
    for path in written:
        note(f"wrote {path}", quiet=quiet)


def _tables(one: "StepReport") -> list[Any]:
    from reports.tables import result_table

    def by_share(rows: Sequence[Row]) -> list[Row]:
        return sorted(rows, key=lambda row: -(row["run_share"] or 0.0))

    largest = by_share(one.cells)[:_LARGEST]
    columns = ("rows", "output_error", "share", "run_share")
    return [
        result_table(_percent(one.steps, "step", *columns, "dominant_layer"), title="Time steps"),
        result_table(
            _percent(by_share(one.layers), "layer", "tokens", *columns[1:], "dominant_step"),
            title="Layers, largest share first",
        ),
        result_table(
            _percent(largest, "layer", "step", *columns), title=f"The {len(largest)} largest parts"
        ),
    ]


def _percent(rows: Sequence[Row], *keys: str) -> list[Row]:
    """Rows with the columns `keys`; shares in percent, under a heading that says so."""
    shown = []
    for row in rows:
        row = row | _named_step(row, "step", "dominant_step")
        row |= {key: 100 * row[key] for key in _HEADINGS if row[key] is not None}
        shown.append({_HEADINGS.get(key, key): row[key] for key in keys})
    return shown


def _named_step(row: Row, *keys: str) -> Row:
    """Time steps as words: three digits, as of a measured number, could not tell them apart."""
    return {key: str(row[key]) for key in keys if row.get(key) is not None}


def _side_by_side(reports: Sequence["StepReport"], table: str, key: str) -> list[Row]:
    """The output error of each case, one column a case."""
    names = _labels(reports)
    rows: dict[Any, Row] = {}
    for one, name in zip(reports, names, strict=True):
        for i, row in enumerate(getattr(one, table)):
            # Steps may repeat a value and are told apart by their place; a layer may have failed.
            place = i if key == "step" else row[key]
            rows.setdefault(place, {key: str(row[key])})[f"{name}_error"] = row["output_error"]
    columns = [key, *(f"{name}_error" for name in names)]
    return [dict.fromkeys(columns) | row for row in rows.values()]


def _labels(reports: Sequence["StepReport"]) -> list[str]:
    """What tells the cases apart; one case has no label."""
    differ = [key for key in _SETTINGS if len({one.case[key] for one in reports}) > 1]
    labels = [" ".join(str(one.case[key]) for key in differ) for one in reports]
    # Two files may describe machines of one name.
    return [
        f"{label} #{i}".strip() if labels.count(label) > 1 else label
        for i, label in enumerate(labels, start=1)
    ]


def _flat(reports: Sequence["StepReport"], table: str) -> list[Row]:
    return [
        {key: one.case[key] for key in _SETTINGS} | row
        for one in reports
        for row in getattr(one, table)
    ]
