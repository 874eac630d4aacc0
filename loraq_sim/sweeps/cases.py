"""The cases of one layer: every combination of what a plan asks for, overrides applied.

Cases and tasks travel to workers, so they hold paths, names and settings, never arrays.

**Name.** A digest of everything a result depends on: the values of the layer, the accelerator's
description, the settings, and the code that computes (`loraq_sim.sweeps.digests`). The same command
run again finds its cases in the store by these names and skips them. A dump that is renamed,
re-ordered or converted gives the same names; a changed value anywhere gives new ones, so nothing
stale is ever taken for fresh.

**Labels.** The columns of a row that are known before it is evaluated; a row that fails has them.

**Splits**, where the user names none: no branch, the 16-bit branch of SVDQuant, and low-precision
branches that fit the same bytes (the question of LoRaQ), on a 4-bit main branch with 4-bit and with
8-bit activations.

**Work.** How much a case is next to others of its effort; what a unit of it takes is measured.
Nothing here knows what a solver does inside: cases of one effort (a method with a preset, plain
rounding, or a solution that an earlier case has) are compared by the size of the layer alone,

    N K (1 + r / 64)  where it is solved,  and  N K / 8 + T (N + K)  for what is emulated,

with N K weights, rank r and T activation rows. Seconds per unit come from a probe of each effort
or from finished cases (`loraq_sim.sweeps.forecast`, `loraq_sim.sweeps.run`).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps import LayerInfo
from loraq_sim.errors import InputError, counted
from loraq_sim.formats import Format
from loraq_sim.results.rows import COLUMN_NAMES
from loraq_sim.settings import (
    ARRAY_KEYS,
    CaseSettings,
    as_tuple,
    datapath_grid,
    settings_of,
    settings_with,
)
from loraq_sim.solvers.condition import NOBODY_CHOOSES
from loraq_sim.split import AUTO, WITHOUT_BRANCH, PrecisionSplit, parse_split
from loraq_sim.sweeps.digests import SolutionCache, code_digests
from loraq_sim.sweeps.plan_file import SweepPlan

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = [
    "CaseGrid",
    "SOLVED",
    "SweepCase",
    "SweepTask",
    "case_identity",
    "case_work",
    "default_splits",
    "effort_of",
    "rank_of",
    "seconds_of",
    "units_by_effort",
]


# PixArt-Sigma: SVDQuant's rank 32 on width 1152.
_WIDTH_PER_RANK = 1152 / 32
_RANK_STEP = 4
_LEAST_WIDTH_PER_RANK = 8

_SPLITS = (
    "W4A4",
    "W4A8",
    "W8A8",
    "W4A4+W16A16r{rank}",
    "W4A4+W8A8@fp16r{rank}",
    "W4A4+W6A6@fp16r{rank}",
    "W4A4+W4A8@fp16r{rank}",
    "W4A4+W4A4@fp16r{rank}",
    "W4A4+W8A8@fp16r{double}",
    "W4A4+W4A8@fp16r{double}",
    "W4A8+W16A16r{rank}",
    "W4A8+W8A8@fp16r{rank}",
    "W4A8+W4A8@fp16r{rank}",
)


def default_splits(layers: Iterable[LayerInfo]) -> tuple[tuple[str, ...], str]:
    """Default splits for these layers, and one sentence on the rank that was chosen.

    The 16-bit rank is 1/36 of the narrowest layer's smaller side (PixArt's 32 of 1152) in steps
    of 4, at least 4. In layers narrower than 32 it is an eighth of that side, at least 2: twice
    the rank is asked for as well, and 4-bit elements fit up to four times as many.
    """
    narrowest = min(layers, key=lambda info: min(info.n, info.k))
    width = min(narrowest.n, narrowest.k)
    rank = max(_RANK_STEP, _RANK_STEP * round(width / _WIDTH_PER_RANK / _RANK_STEP))
    # A budget of one rank can be less than one rank's codes and scales take.
    rank = min(rank, max(2, width // _LEAST_WIDTH_PER_RANK), width)
    splits = tuple(text.format(rank=rank, double=2 * rank) for text in _SPLITS)
    note = (
        f"default splits with 16-bit-equivalent ranks {rank} and {2 * rank}: the narrowest layer, "
        f"{narrowest.name}, has width {width}, and PixArt's rank 32 is 1/36 of its width 1152"
    )
    return splits, note


@dataclass(frozen=True, kw_only=True)
class SweepCase:
    """One layer with one combination of settings on one accelerator.

    `accelerator` is the name or path to load, `labels` are the columns of the row known before it
    is evaluated, and `work` is in units of its `effort` (`loraq_sim.sweeps.cases`).
    Cases of equal `solution_key` have the same solution, which `cache` may hold. `asked` says what
    the plan named where an override changed it: a label, not a setting.
    """

    case_id: str
    accelerator: str
    settings: CaseSettings
    solution_key: str
    cache: SolutionCache | None = None
    asked: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Any] = field(default_factory=dict)
    work: float = 1.0
    effort: str = ""


@dataclass(frozen=True, kw_only=True)
class SweepTask:
    """All cases of one layer, so that a worker loads the layer once.

    `digest` is what the content of the layer was when the sweep was planned, empty if unknown;
    `drawn_rows` are the synthetic input rows of a layer that the dump has no inputs of; `lora` are
    adapters merged into it; `position` is the place of the first case among all cases of the plan.
    """

    dump: str
    layer: str
    info: LayerInfo | None
    digest: str = ""
    drawn_rows: bool | int = False
    lora: tuple[str, ...] = ()
    position: int = 0
    cases: tuple[SweepCase, ...]

    @property
    def work(self) -> float:
        """Units of work of all its cases, to order tasks by."""
        return sum(case.work for case in self.cases)


def case_identity(**facts: Any) -> str:
    """SHA-256 (hex) of `facts`: strings, numbers, None, and mappings and sequences of them."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _case_labels(
    dump: str,
    name: str,
    info: LayerInfo | None,
    settings: CaseSettings,
    accelerator: "Accelerator",
    asked: Mapping[str, str],
    rows_source: str,
) -> dict[str, Any]:
    """Columns known beforehand; a row that fails has these and nothing else.

    `rows_source` says where the rows of the settings come from, if they have any.
    """
    # Workers import this module before they know how many threads to compute on.
    from loraq_sim.emulator.mac_array import describe_array
    from loraq_sim.machine import datapath_for

    mac = datapath_for(accelerator, settings.datapath).mac
    labels = {
        "layer": name,
        "split": settings.split.text,
        "rotation": settings.rotate,
        "smooth": settings.smooth,
        "condition": settings.condition,
        "finish": settings.finish,
        "method": settings.method,
        "preset": settings.preset,
        "accelerator": accelerator.name,
        "seed": settings.seed,
        **describe_array(mac),
        "dump": Path(dump).name,
        "family": settings.split.family,
        "group_size": settings.split.group,
        "token_limit": settings.tokens,
        "options": _other_options(settings, asked),
    }
    if info is not None:
        labels |= {"kind": info.kind, "group": info.group, "n": info.n, "k": info.k}
        known = (info.m, info.m_source) if settings.rows is None else (settings.rows, rows_source)
        labels |= dict(zip(("m", "m_source"), known, strict=True))
        labels |= {"calls_per_step": info.calls_per_step}
    return labels


def _other_options(settings: CaseSettings, asked: Mapping[str, str]) -> str:
    """JSON of the settings that have no column of their own; empty without any."""
    others: dict[str, Any] = {}
    if not settings.fused:
        others["fused"] = False
    if settings.kernel is not None:
        others["kernel"] = settings.kernel
    if asked:
        others["asked"] = dict(asked)
    unnamed = {name: v for name, v in settings.datapath.items() if name not in COLUMN_NAMES}
    others |= {"datapath": unnamed} if unnamed else {}
    return json.dumps(others, sort_keys=True) if others else ""


SOLVED = "solved"
_ROUNDED = "rtn"
_RANK = 64.0
_WEIGHTS_PER_VALUE = 8.0


def effort_of(settings: CaseSettings, *, is_solved: bool) -> str:
    """Cases of one effort take the same time per unit of work."""
    if is_solved:
        return SOLVED
    if not settings.split.has_branch:
        return _ROUNDED
    return f"{settings.method} {settings.preset}"


def case_work(settings: CaseSettings, info: LayerInfo | None, *, is_solved: bool) -> float:
    """Units of work of one case; 1 for a layer that nobody could describe."""
    if info is None:
        return 1.0
    weights = info.n * info.k
    rows = min(settings.tokens or math.inf, info.tokens or 0)
    units = weights / _WEIGHTS_PER_VALUE + rows * (info.n + info.k)
    if not is_solved:
        units += weights * (1.0 + min(rank_of(settings), info.n, info.k) / _RANK)
    return units


def units_by_effort(work: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sum of units by effort, of (effort, units) pairs."""
    sums: dict[str, float] = {}
    for effort, units in work:
        sums[effort] = sums.get(effort, 0.0) + units
    return sums


def seconds_of(units: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    """Seconds of `units` at `rates` (seconds per unit), by effort; None if a rate is missing."""
    needed = {effort: amount for effort, amount in units.items() if amount > 0}
    if not needed.keys() <= rates.keys():
        return None
    return sum(amount * rates[effort] for effort, amount in needed.items())


def rank_of(settings: CaseSettings) -> int:
    """Rank of the branch, for a budget about the rank its codes alone would allow."""
    split = settings.split
    if split.rank is not None:
        return split.rank
    if split.branch_weight is None or split.budget is None:
        return 0
    return int(split.budget.rpartition("@")[2]) * 16 // split.branch_weight.element.bits


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
    defaults : bool
        Whether nobody chose the splits: those that a machine has no modes for are left out there.

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
        plan: SweepPlan,
        accelerators: "Mapping[str, Accelerator]",
        rows: Mapping[str, tuple[int, str]],
        defaults: bool,
    ) -> None:
        self._plan = plan
        self._rows = rows
        self._accelerators = {ref: (a, a.digest()) for ref, a in accelerators.items()}
        self._paths = datapath_grid(plan.datapath)
        self.notes: list[str] = []
        self.points = self._distinct_points()
        self._left_out = {ref: self._lacking(ref) if defaults else [] for ref in accelerators}
        self._check_arrays()
        for point in self.points:
            self._check_machines(point)

    def cases(self, name: str, info: LayerInfo | None, digest: str) -> tuple[SweepCase, ...]:
        """Cases of the layer called `name` whose content is `digest`."""
        cases: list[SweepCase] = []
        solved: set[str] = set()
        rows, _ = self._rows.get(name, (None, ""))
        points = [self._overridden(point, name, info) for point in self.points]
        for path in self._paths:
            for ref in self._accelerators:
                for point, asked in points:
                    if asked.get("split", point.split.text) in self._left_out[ref]:
                        continue
                    settings = replace(point, datapath=path, rows=rows)
                    case = self._case(name, info, digest, ref, settings, asked)
                    is_solved = case.solution_key in solved
                    case = replace(
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
        from loraq_sim.machine import excluded_on

        accelerator, description = self._accelerators[ref]
        code = code_digests()
        _, rows_source = self._rows.get(name, (None, ""))
        excluded = excluded_on(accelerator, settings.split)
        solved = settings.solving(excluded).items()
        solving = {key: str(v) if isinstance(v, Format) else v for key, v in solved}
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
            labels=_case_labels(
                self._plan.dump, name, info, settings, accelerator, asked, rows_source
            ),
        )

    def _lacking(self, ref: str) -> list[str]:
        from loraq_sim.machine import lacking_defaults

        lacking, remark = lacking_defaults(
            self._accelerators[ref][0], [p.split for p in self.points]
        )
        self.notes += [remark] if remark else []
        return lacking

    @property
    def splits(self) -> tuple[str, ...]:
        """Those asked for that some machine has cases of."""
        nowhere = set.intersection(*map(set, self._left_out.values()))
        return tuple(text for text in self._plan.splits if text not in nowhere)

    def _check_arrays(self) -> None:
        """Refuse a grid of arrays where no split runs in integers; a note where some do not."""
        from loraq_sim.machine import runs_in_integers

        if not any(isinstance(self._plan.datapath.get(key), tuple) for key in ARRAY_KEYS):
            return
        splits = dict.fromkeys(point.split for point in self.points)
        for accelerator, _ in self._accelerators.values():
            other = [split.text for split in splits if not runs_in_integers(accelerator, split)]
            if len(other) == len(splits):
                modes = ", ".join(mode.name for mode in accelerator.modes if mode.kind == "int")
                raise InputError(
                    f"a grid of arrays needs integer products, and {accelerator.name} has no "
                    f"integer mode for {', '.join(other)} (its integer modes: {modes or 'none'})"
                )
            if other:
                self.notes.append(
                    f"{', '.join(other)} on {accelerator.name} runs in a float mode: the grid of "
                    "arrays changes nothing there"
                )

    def _check_machines(self, point: CaseSettings) -> None:
        """Refuse what no machine of the plan can do, and note what some of them cannot."""
        conditions = {point.condition, *(o.settings.get("condition") for o in self._plan.overrides)}
        if point.split.main_rule == AUTO and "auto" not in conditions:
            raise InputError(f"split {point.split}: {NOBODY_CHOOSES}")
        from hwmodels import AcceleratorError
        from loraq_sim.machine import check_machine

        refused: list[AcceleratorError] = []
        for accelerator, _ in self._accelerators.values():
            try:
                check_machine(point, accelerator)
            except AcceleratorError as error:
                refused.append(error)
        if len(refused) == len(self._accelerators):
            raise refused[0]
        notes = [f"split {point.split} fails there: {refusal}" for refusal in refused]
        self.notes += [note for note in notes if note not in self.notes]

    def _distinct_points(self) -> list[CaseSettings]:
        plan = self._plan
        points: dict[str, CaseSettings] = {}
        reduced: dict[str, set[str]] = {}
        for preset in as_tuple(plan.preset):
            for seed in as_tuple(plan.seed):
                for text in plan.splits:
                    for method in plan.methods:
                        split = parse_split(text, family=plan.family, group=plan.group)
                        if method in WITHOUT_BRANCH and split.has_branch:
                            reduced.setdefault(method, set()).add(split.text)
                        point = self._point(split, method, preset, seed)
                        points.setdefault(case_identity(**point.facts()), point)
        for method, texts in reduced.items():
            of = counted(len(texts), "split")
            self.notes.append(
                f"method {method} has no branch: of {of} it solves the main part only"
            )
        return list(points.values())

    def _point(self, split: PrecisionSplit, method: str, preset: str, seed: int) -> CaseSettings:
        plan = self._plan
        if method in WITHOUT_BRANCH and split.has_branch:
            split = parse_split(split.labels[0], family=split.family, group=split.group)
        if not split.has_branch:
            # The first effort and seed stand for all.
            method = method if method in WITHOUT_BRANCH else "rtn"
            preset, seed = as_tuple(plan.preset)[0], as_tuple(plan.seed)[0]
        return CaseSettings(
            split=split, method=method, preset=preset, seed=seed, smooth=plan.smooth,
            rotate=plan.rotate, condition=plan.condition, finish=plan.finish, tokens=plan.tokens,
            fused=plan.fused, kernel=plan.kernel,
        )  # fmt: skip

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
        if method in WITHOUT_BRANCH and split.has_branch and "method" not in settings:
            method = next((m for m in self._plan.methods if m not in WITHOUT_BRANCH), method)
        done = self._point(split, method, settings.get("preset", point.preset), point.seed)
        # The seed and effort the grid asked for stay on the row, so that totals find it.
        done = replace(
            done,
            seed=point.seed,
            smooth=settings.get("smooth", point.smooth),
            rotate=settings.get("rotate", point.rotate),
            condition=settings.get("condition", point.condition),
            finish=settings.get("finish", point.finish),
        )
        changes: dict[str, tuple[Any, Any]] = {
            "split": (asked.text, done.split.text),
            "family": (asked.family, split.family),
            "group_size": (asked.group, split.group),
            "smooth": (point.smooth, done.smooth),
            "rotation": (point.rotate, done.rotate),
        }
        same_names = ("method", "preset", "condition", "finish")
        changes |= {n: (getattr(point, n), getattr(done, n)) for n in same_names}
        return done, {name: asked for name, (asked, got) in changes.items() if asked != got}
