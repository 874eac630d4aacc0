"""What ``solve`` does with several cases at once.

``--compare`` sets methods side by side, layer by layer, at equal bytes. ``--share-inputs common``
solves the layers that read one input together, with one branch for all of them.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import case_failure, print_tables, tracked
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.reporting.tables import result_table
from loraq_sim.solvers import METHODS, solve_group

if TYPE_CHECKING:
    from loraq_sim.dumps import LayerDump

__all__ = [
    "Compare",
    "ShareInputs",
    "SharedSolver",
    "Sharing",
    "compare_rows",
    "print_comparison",
]


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
    from loraq_sim.recipe import split_of
    from loraq_sim.solve_report import compare_methods

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
    from loraq_sim.solve_report import comparison_means, comparison_table_rows

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


class Sharing(StrEnum):
    """Whose low-rank branch a layer has."""

    OWN = "own"
    COMMON = "common"


ShareInputs = Annotated[
    Sharing,
    typer.Option(
        "--share-inputs",
        help="Branch of layers that read the same input, such as q, k and v: one each, or one in "
        "common, as SVDQuant has it (rank and budget are then those of the stacked weight).",
    ),
]


class SharedSolver:
    """Solves each case, together with those of its group where all else is equal.

    Layers belong together that the dump puts into one group, with the same split and settings.
    """

    def __init__(self, dump: Any, cases: list[dict[str, Any]], sharing: Sharing) -> None:
        self._dump = dump
        self._members: dict[tuple, list[str]] = {}
        self._solved: dict[tuple, dict[str, Any]] = {}
        if sharing is Sharing.COMMON:
            for case in cases:
                key = self._key(case)
                if key is not None:
                    self._members.setdefault(key, []).append(case["layer"])

    def solve(self, layer: Any, split: Any, case: dict[str, Any]) -> Any:
        """The solution of `layer`, which `case` is about."""
        from loraq_sim.solve_report import solve_with

        key = self._key(case) if self._members else None
        members = [] if key is None else self._members.get(key, [])
        if key is None or len(members) < 2 or not split.has_branch:
            return solve_with(layer, split, case, case["seed"])
        if key not in self._solved:
            self._solved[key] = self._solve_group(members, split, case)
        return self._solved[key][layer.name]

    def _solve_group(self, members: list[str], split: Any, case: dict[str, Any]) -> dict[str, Any]:

        layers = {name: self._dump[name] for name in members}
        try:
            return solve_group(
                {name: layer.weight for name, layer in layers.items()},
                main=split.main_weight,
                branch=split.branch_weight,
                rank=split.rank,
                budget=split.budget,
                activations=layers[members[0]].activations,
                method=case["method"],
                preset=case["preset"],
                seed=case["seed"],
                device=case["device"],
                smooth=case["smooth"],
                rotate=case["rotate"],
                condition=case.get("condition"),
                finish=case.get("finish"),
                main_activation=split.main_activation,
                branch_activation=split.branch_activation,
                main_rule=split.main_rule,
                branch_rule=split.branch_rule,
                feedback=split.feedback,
            )
        except InputError as error:
            raise InputError(f"layers {', '.join(members)}: {error}") from error

    def _key(self, case: dict[str, Any]) -> tuple | None:
        try:
            group = self._dump.info(case["layer"]).group
        except InputError:
            # Such a layer gets a failed row of its own.
            return None
        rest = tuple(sorted((k, str(v)) for k, v in case.items() if k != "layer"))
        return (group, *rest) if group else None
