"""The cases of one layer: every combination of what a plan asks for, overrides applied."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraq_sim.case_settings import CaseSettings, as_tuple, datapath_grid
from loraq_sim.dumps import LayerInfo
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.layer_settings import settings_of, settings_with
from loraq_sim.split import PrecisionSplit, parse_split
from loraq_sim.sweep.case_identity import case_identity
from loraq_sim.sweep.case_labels import case_labels
from loraq_sim.sweep.code_digest import code_digests
from loraq_sim.sweep.tasks import SweepCase
from loraq_sim.sweep.work import case_work, effort_of

if TYPE_CHECKING:
    from hwmodels import Accelerator
    from loraq_sim.sweep.plan import SweepPlan

__all__ = ["CaseGrid"]


class CaseGrid:
    """The grid of a plan, from which every layer takes its cases.

    Parameters
    ----------
    plan : SweepPlan
        With its splits filled in.
    accelerators : mapping of str to Accelerator
        By the reference they were loaded from.
    rows : mapping
        Rows per call by layer name, and in words where they come from, of the layers for which
        the plan says more than the dump.

    Attributes
    ----------
    points : list of CaseSettings
        Distinct ones but for the data path: without a branch there is nothing to solve but
        rounding (rtn), which has neither an effort nor a seed.
    notes : list of str
        What was reduced, for the user.
    """

    def __init__(
        self,
        plan: "SweepPlan",
        accelerators: "Mapping[str, Accelerator]",
        rows: Mapping[str, tuple[int, str]],
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._accelerators = {ref: (a, a.digest()) for ref, a in accelerators.items()}
        self._paths = datapath_grid(plan.datapath)
        self.notes: list[str] = []
        self.points = self._distinct_points()

    def cases(self, name: str, info: LayerInfo | None, digest: str) -> tuple[SweepCase, ...]:
        """Cases of the layer called `name` whose content is `digest`."""
        cases: list[SweepCase] = []
        solved: set[str] = set()
        rows, _ = self._rows.get(name, (None, ""))
        points = [self._overridden(point, name, info) for point in self.points]
        for path in self._paths:
            for ref in self._accelerators:
                for point, asked in points:
                    settings = dataclasses.replace(point, datapath=path, rows=rows)
                    case = self._case(name, info, digest, ref, settings, asked)
                    is_solved = case.solution_key in solved
                    case = dataclasses.replace(
                        case,
                        work=case_work(settings, info, is_solved=is_solved),
                        effort=effort_of(settings, is_solved=is_solved),
                    )
                    solved.add(case.solution_key)
                    cases.append(case)
        return tuple(cases)

    def _case(
        self,
        name: str,
        info: LayerInfo | None,
        digest: str,
        ref: str,
        settings: CaseSettings,
        asked: Mapping[str, str],
    ) -> SweepCase:
        accelerator, description = self._accelerators[ref]
        code = code_digests()
        _, rows_source = self._rows.get(name, (None, ""))
        solving = {key: _plain(value) for key, value in settings.solving().items()}
        return SweepCase(
            case_id=case_identity(
                layer=name,
                content=digest,
                accelerator=description,
                code=code,
                settings=settings.facts(),
                asked=dict(asked),
            ),
            solution_key=case_identity(content=digest, code=code["solver"], solving=solving),
            accelerator=ref,
            settings=settings,
            asked=asked,
            labels=case_labels(
                self._plan.dump, name, info, settings, accelerator, asked, rows_source
            ),
        )

    def _distinct_points(self) -> list[CaseSettings]:
        plan = self._plan
        points: dict[str, CaseSettings] = {}
        reduced = set()
        for preset in as_tuple(plan.preset):
            for seed in as_tuple(plan.seed):
                for text in plan.splits:
                    for method in plan.methods:
                        split = parse_split(text, family=plan.family, group=plan.group)
                        if method == "rtn" and split.has_branch:
                            reduced.add(split.text)
                        point = self._point(split, method, preset, seed)
                        points.setdefault(case_identity(**point.facts()), point)
        if reduced:
            self.notes.append(
                f"method rtn has no branch: {len(reduced)} splits are their main part only"
            )
        return list(points.values())

    def _point(self, split: PrecisionSplit, method: str, preset: str, seed: int) -> CaseSettings:
        if method == "rtn" and split.has_branch:
            split = parse_split(split.main, family=split.family, group=split.group)
        if not split.has_branch:
            # The first effort and seed stand for all.
            method, preset = "rtn", as_tuple(self._plan.preset)[0]
            seed = as_tuple(self._plan.seed)[0]
        return CaseSettings(
            split=split,
            method=method,
            preset=preset,
            seed=seed,
            smooth=self._plan.smooth,
            rotate=self._plan.rotate,
            tokens=self._plan.tokens,
            fused=self._plan.fused,
        )

    def _overridden(
        self, point: CaseSettings, name: str, info: LayerInfo | None
    ) -> tuple[CaseSettings, dict[str, str]]:
        """What this layer does for `point`, and what `point` asked for where that differs."""
        from loraq_sim.recipe import split_of

        settings = settings_of(name, info.kind if info else "", self._plan.overrides)
        if not settings:
            return point, {}
        asked = point.split
        stated = {"split": asked.text, "family": asked.family, "group": asked.group}
        try:
            split = split_of(settings_with(stated, settings))
        except InputError as error:
            raise InputError(f"override for layer {name!r}: {error}") from None
        method = settings.get("method", point.method)
        if method == "rtn" and split.has_branch and "method" not in settings:
            method = next((m for m in self._plan.methods if m != "rtn"), "rtn")
        done = self._point(split, method, settings.get("preset", point.preset), point.seed)
        # The seed and effort the grid asked for stay on the row, so that totals find it.
        done = dataclasses.replace(
            done,
            seed=point.seed,
            smooth=settings.get("smooth", point.smooth),
            rotate=settings.get("rotate", point.rotate),
        )
        changes = {"split": (asked.text, done.split.text), "family": (asked.family, split.family)}
        changes |= {"group_size": (asked.group, split.group)}
        changes |= {n: (getattr(point, n), getattr(done, n)) for n in ("method", "preset")}
        changes |= {"smooth": (point.smooth, done.smooth), "rotation": (point.rotate, done.rotate)}
        return done, {name: asked for name, (asked, got) in changes.items() if asked != got}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Format) else value
