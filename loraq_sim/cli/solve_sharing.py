"""Solving the cases of ``solve`` that read one input together, with ``--share-inputs common``."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from loraq_sim.errors import InputError

__all__ = ["ShareInputs", "SharedSolver", "Sharing"]


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
        members = self._members.get(key, ())
        if len(members) < 2 or not split.has_branch:
            return solve_with(layer, split, case, case["seed"])
        if key not in self._solved:
            self._solved[key] = self._solve_group(members, split, case)
        return self._solved[key][layer.name]

    def _solve_group(self, members: list[str], split: Any, case: dict[str, Any]) -> dict[str, Any]:
        from loraq_sim.solvers import solve_group

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
