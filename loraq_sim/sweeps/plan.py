"""From what the user asks for to the list of tasks: every name checked before anything runs.

**Fit**: a rank must not exceed min(N, K) of a layer, and a budget must hold one rank. A split that
breaks this in every layer it is for is a mistake of the plan; one that does so in some layers, as
happens with mixed shapes, fails there and is worth doing elsewhere. So are rotations and smoothing.

**Shards**: a sweep in n parts that together are the whole, for array jobs that share nothing but
files. Every job composes the same plan and takes its part, so the parts depend on the plan alone:
layers go, longest first (by formula, not by clock), to the part with the least work so far; ties go
by name. A layer is never divided, because its cases share what is loaded and solved.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hwmodels
from loraq_sim.conditioning import check_condition, check_rotation, hadamard_block
from loraq_sim.dumps import LayerDump, LayerInfo, read_layer_dump
from loraq_sim.dumps.kinds import RESOLUTIONS, model_of_config, rows_of_model
from loraq_sim.errors import DumpError, InputError, counted, unknown_name
from loraq_sim.formats import parse_format
from loraq_sim.kernels.processor import forced_path
from loraq_sim.layers import rows_notes
from loraq_sim.settings import as_tuple, checked_count, datapath_grid, matches, rows_of
from loraq_sim.solvers.gptq import check_finish
from loraq_sim.solvers.problem import PRESETS, resolve_rank
from loraq_sim.solvers.solve import METHODS
from loraq_sim.split import PrecisionSplit, branch_bytes
from loraq_sim.sweeps.cases import CaseGrid, SweepCase, SweepTask, default_splits
from loraq_sim.sweeps.digests import code_digest, code_digests, dump_content_digest, layer_digests
from loraq_sim.sweeps.plan_file import SweepPlan

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = [
    "ComposedSweep",
    "check_split_fit",
    "compose",
    "parse_shard",
    "take_shard",
]


@dataclass(frozen=True, kw_only=True)
class ComposedSweep:
    """A checked plan: its tasks in dump order, and what was decided on the way.

    `plan` is the plan with every default filled in; `notes` are sentences for the user; the
    digests name the content of the dump's chosen layers and of each accelerator; `shard` is
    ``i/n`` where this is one of n parts, and `others` are the tasks of the other ones.
    """

    plan: SweepPlan
    tasks: tuple[SweepTask, ...]
    notes: tuple[str, ...]
    dump_digest: str
    accelerator_digests: Mapping[str, str]
    shard: str = ""
    others: tuple[SweepTask, ...] = ()

    @property
    def whole(self) -> "ComposedSweep":
        """The sweep that this is a part of, or this one."""
        tasks = sorted((*self.tasks, *self.others), key=lambda task: task.position)
        return replace(self, tasks=tuple(tasks), others=(), shard="")

    @property
    def cases(self) -> tuple[SweepCase, ...]:
        """All cases, layer by layer."""
        return tuple(case for task in self.tasks for case in task.cases)

    @property
    def case_ids(self) -> tuple[str, ...]:
        """Names of all cases, in the order of `cases`."""
        return tuple(case.case_id for case in self.cases)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in dump order."""
        return tuple(task.layer for task in self.tasks)

    def describe(self) -> dict[str, Any]:
        """The composed plan and the digests as plain values, for provenance."""
        return {
            "plan": json.loads(json.dumps(asdict(self.plan))),
            "notes": list(self.notes),
            "shard": self.shard,
            "n_cases": len(self.cases),
            "n_layers": len(self.tasks),
            "dump_digest": self.dump_digest,
            "accelerator_digests": dict(self.accelerator_digests),
            "code_digest": code_digest(),
            "code_digests": code_digests(),
        }


def compose(plan: SweepPlan, *, remember: bool = True, contents: bool = True) -> ComposedSweep:
    """Check `plan` against the dump, the accelerators and the known names; list its cases.

    `remember` writes down the digests of the layers, so that the next plan need not read them.
    Without `contents` no values of layers are read: cases can be counted and costed, but have not
    the names that rows of a store are found by.

    Raises
    ------
    InputError
        If a name, split or setting is unknown or breaks a rule, or no layer can take a split.
    DumpError
        If the dump cannot be read or a pattern matches no layer.
    hwmodels.AcceleratorError
        If an accelerator is unknown or its file is broken.
    """
    _check_settings(plan)
    forced_path()
    dump = read_layer_dump(plan.dump, synthesize_inputs=plan.drawn_rows, lora=plan.lora)
    if plan.layers:
        dump = dump.select(plan.layers)
    infos = {name: _info(dump, name) for name in dump}
    notes = [text for text in (dump.left_out, dump.inputs_note) if text]
    splits: Sequence[str] = plan.splits
    defaults = not splits
    if defaults:
        usable = [info for info in infos.values() if info is not None]
        if not usable:
            raise DumpError(
                f"{plan.dump}: none of its {counted(len(infos), 'layer')} is usable: {_why(dump)}"
            )
        splits, note = default_splits(usable)
        notes.append(note)
    plan = replace(plan, splits=tuple(splits))
    accelerators = _accelerators(plan)
    _check_overrides(plan, infos)
    rows = _planned_rows(plan, infos, dump.config)
    grid = CaseGrid(plan, accelerators, rows, defaults=defaults)
    digests = layer_digests(dump, remember=remember, contents=contents)
    tasks: list[SweepTask] = []
    for name, info in infos.items():
        task = SweepTask(
            dump=str(plan.dump),
            layer=name,
            info=info,
            digest=digests[name],
            drawn_rows=plan.drawn_rows,
            lora=plan.lora,
            position=tasks[-1].position + len(tasks[-1].cases) if tasks else 0,
            cases=grid.cases(name, info, digests[name]),
        )
        tasks.append(task)
    return ComposedSweep(
        plan=replace(plan, splits=grid.splits),
        tasks=tuple(tasks),
        notes=(
            *notes,
            *grid.notes,
            *check_split_fit(tasks),
            *check_transform_fit(tasks),
            *_notes_on_rows(infos, rows, dump.config),
        ),
        dump_digest=dump_content_digest(digests),
        accelerator_digests={a.name: a.digest() for a in accelerators.values()},
    )


def _check_settings(plan: SweepPlan) -> None:
    if not plan.methods or not plan.accelerators:
        raise InputError("a sweep needs at least one method and one accelerator")
    if not as_tuple(plan.preset) or not as_tuple(plan.seed):
        raise InputError("a sweep needs at least one preset and one seed")
    for method in plan.methods:
        if method not in METHODS:
            raise InputError(unknown_name("method", method, METHODS))
    overrides = [override.settings for override in plan.overrides]
    for method in (settings["method"] for settings in overrides if "method" in settings):
        if method not in METHODS:
            raise InputError(unknown_name("method", method, METHODS))
    presets = [settings["preset"] for settings in overrides if "preset" in settings]
    for preset in (*as_tuple(plan.preset), *presets):
        if preset not in PRESETS:
            raise InputError(unknown_name("preset", preset, PRESETS))
    for smooth, rotate in [
        (plan.smooth, plan.rotate),
        *((settings.get("smooth"), settings.get("rotate")) for settings in overrides),
    ]:
        check_rotation(rotate)
        if smooth is not None and not 0 <= smooth <= 1:
            raise InputError(f"smooth must be a strength from 0 to 1, got {smooth!r}")
    for settings in ({"condition": plan.condition, "finish": plan.finish}, *overrides):
        check_condition(settings.get("condition"))
        check_finish(settings.get("finish"))
    checked_count("tokens", plan.tokens)
    for seed in as_tuple(plan.seed):
        is_whole = isinstance(seed, int) and not isinstance(seed, bool)
        if not is_whole or not 0 <= seed < 2**63:
            raise InputError(f"seed must be an integer from 0, below 2**63, got {seed!r}")


def _info(dump: LayerDump, name: str) -> LayerInfo | None:
    # A layer that cannot even be described gets failed rows later, when its worker asks for it.
    try:
        return dump.info(name)
    except DumpError:
        return None


def _why(dump: LayerDump) -> str:
    try:
        dump.info(next(iter(dump)))
    except DumpError as error:
        return str(error)
    return ""


def _planned_rows(
    plan: SweepPlan, infos: Mapping[str, LayerInfo | None], config: Path
) -> dict[str, tuple[int, str]]:
    """Rows per call that the plan says, and whence, by layer name."""
    checked_count("batch", plan.batch)
    kinds = {name: "" if info is None else info.kind for name, info in infos.items()}
    for pattern in plan.rows:
        checked_count("rows", plan.rows[pattern])
        if not any(matches(pattern, name, kind) for name, kind in kinds.items()):
            near = ", ".join(_nearest(pattern, infos))
            raise InputError(f"rows: {pattern!r} matches none of the layers; nearest: {near}")
    found: dict[str, tuple[int, str]] = {}
    if plan.model is not None or plan.resolution is not None:
        model = model_of_config(config) if plan.model is None else plan.model
        counts, source = rows_of_model(kinds, model, plan.resolution or RESOLUTIONS[0])
        found = {name: (count, source) for name, count in counts.items()}
    for name, kind in kinds.items():
        count = rows_of(name, kind, plan.rows)
        if count is not None:
            found[name] = (count, "given")
    if plan.batch > 1:
        known = {name: (info.m, info.m_source) for name, info in infos.items() if info} | found
        images = f", {plan.batch} images"
        found = {name: (m * plan.batch, f"{s}{images}") for name, (m, s) in known.items() if m}
    return found


def _notes_on_rows(
    infos: Mapping[str, LayerInfo | None], planned: Mapping[str, tuple[int, str]], config: Path
) -> list[str]:
    known = {name: (info.m, info.m_source) for name, info in infos.items() if info is not None}
    rows = known | dict(planned)
    notes = rows_notes(rows)
    if any(count is None for count, _ in rows.values()) and config.is_file():
        with suppress(InputError):
            model = model_of_config(config)
            notes.append(f"{config.name} beside it is of {model}: --resolution PIXELS is enough")
    return notes


def _check_overrides(plan: SweepPlan, infos: Mapping[str, LayerInfo | None]) -> None:
    for override in plan.overrides:
        if not any(info and override.matches(name, info.kind) for name, info in infos.items()):
            raise InputError(
                f"override {override.pattern!r} matches none of "
                f"{counted(len(infos), 'layer')}; "
                f"nearest: {', '.join(_nearest(override.pattern, infos))}"
            )


def _nearest(pattern: str, infos: Mapping[str, LayerInfo | None]) -> list[str]:
    kinds = dict.fromkeys(info.kind for info in infos.values() if info)
    bare = pattern.replace("*", "").replace("?", "")
    near = difflib.get_close_matches(bare, list(kinds | dict.fromkeys(infos)), n=3, cutoff=0.3)
    return near or [*kinds][:3]


def _accelerators(plan: SweepPlan) -> "dict[str, Accelerator]":
    from loraq_sim.machine import datapath_for

    loaded: dict[str, Accelerator] = {}
    for ref in plan.accelerators:
        accelerator = hwmodels.load_accelerator(ref)
        # Two names of one description ask for the same rows.
        if accelerator.digest() not in {other.digest() for other in loaded.values()}:
            loaded[str(ref)] = accelerator
    by_name: dict[str, str] = {}
    for ref, accelerator in loaded.items():
        for path in datapath_grid(plan.datapath):
            datapath_for(accelerator, path)
        if by_name.setdefault(accelerator.name, ref) != ref:
            raise InputError(
                f"{ref} and {by_name[accelerator.name]} are both named {accelerator.name!r}; "
                "their rows could not be told apart, so rename one"
            )
    return loaded


def check_split_fit(tasks: Iterable[SweepTask]) -> list[str]:
    """One sentence on each split that some of its layers cannot take.

    Raises
    ------
    InputError
        If none of a split's layers can; the message has a split that fits.
    """
    infos: dict[PrecisionSplit, dict[str, LayerInfo]] = {}
    n_cases: dict[tuple[PrecisionSplit, str], int] = {}
    for task in tasks:
        for case in task.cases:
            split = case.settings.split
            if task.info is not None:
                infos.setdefault(split, {})[task.layer] = task.info
            n_cases[split, task.layer] = n_cases.get((split, task.layer), 0) + 1
    notes = []
    for split, layers in infos.items():
        broken = {name: info for name, info in layers.items() if _broken_rule(split, info)}
        if len(broken) == len(layers) > 0:
            raise InputError(_refusal(split, broken))
        if broken:
            name, info = next(iter(broken.items()))
            count = sum(n_cases[split, layer] for layer in broken)
            notes.append(
                f"split {split} fails in {len(broken)} of "
                f"{counted(len(layers), 'layer')} ({counted(count, 'case')}), "
                f"such as {name}: {_broken_rule(split, info)}"
            )
    return notes


def check_transform_fit(tasks: Iterable[SweepTask]) -> list[str]:
    """One sentence on each rotation or smoothing that some of its layers cannot take.

    Raises
    ------
    InputError
        If none of its layers can.
    """
    layers: dict[tuple[str, str | float], dict[str, LayerInfo]] = {}
    for task in tasks:
        for case in task.cases:
            if task.info is None:
                continue
            for key in ("rotate", "smooth", "condition", "finish"):
                value = getattr(case.settings, key)
                if value is not None:
                    layers.setdefault((key, value), {})[task.layer] = task.info
    notes = []
    for (key, value), infos in layers.items():
        broken = {name: rule for name, i in infos.items() if (rule := _unfit(key, value, i))}
        if not broken:
            continue
        name, rule = next(iter(broken.items()))
        if len(broken) == len(infos):
            raise InputError(f"{key} {value} fits none of its {len(infos)} layers; {name}: {rule}")
        where = f"{len(broken)} of {counted(len(infos), 'layer')}, such as {name}"
        notes.append(f"{key} {value} fails in {where}: {rule}")
    return notes


_NEEDS_DATA = {
    "smooth": "smoothing by strength",
    "condition": "smoothing by statistics",
    "finish": "a finish with data",
}


def _unfit(key: str, value: str | float, info: LayerInfo) -> str:
    if key == "condition" and value == "auto":
        return ""
    if key != "rotate":
        return "" if info.tokens else f"{_NEEDS_DATA[key]} needs activations"
    try:
        hadamard_block(str(value), info.k)
    except InputError as error:
        return str(error)
    return ""


def _broken_rule(split: PrecisionSplit, info: LayerInfo) -> str:
    """Why the layer cannot take the split, empty if it can."""
    if split.feedback is not None and not info.tokens:
        return "a residual input (~) needs the layer's activations; write + or capture them"
    if isinstance(split.feedback, int) and info.tokens and split.feedback > info.tokens:
        return f"f{split.feedback} asks for more directions than {info.tokens} activation rows hold"
    return _broken_rule_of_shape(split, info.n, info.k)


# Models repeat their shapes.
@lru_cache(maxsize=4096)
def _broken_rule_of_shape(split: PrecisionSplit, n: int, k: int) -> str:
    if not split.has_branch:
        return ""
    try:
        resolve_rank((n, k), split.branch_weight, split.rank, split.budget)
        rank, spent = split.ranks(n, k)
        if isinstance(split.feedback, int) and split.feedback > spent:
            return f"f{split.feedback} is more than the {rank} components that its bytes hold"
    except InputError as error:
        return str(error)
    return ""


def _refusal(split: PrecisionSplit, layers: dict[str, LayerInfo]) -> str:
    """What is wrong in the layer that comes nearest, and what would fit there."""
    sizes = {name: _nearest_size(split, info) for name, info in layers.items()}
    wanted = split.rank or 0
    if split.budget is not None:
        wanted = int(split.budget.rpartition("@")[2])
    name = min(sizes, key=lambda layer: abs(sizes[layer] - wanted))
    info = layers[name]
    which = "its only layer" if len(layers) == 1 else f"any of its {len(layers)} layers"
    rule = (
        f"split {split.text} cannot be solved in {which}; {name} ({info.n}, {info.k}) comes "
        f"nearest: {_broken_rule(split, info)}"
    )
    if split.feedback is not None:
        return rule
    size = split.text.removesuffix(str(wanted)) + str(sizes[name])
    bound = "a smaller rank" if split.budget is None else "a larger budget"
    return f"{rule}; use {size} or {bound}"


def _nearest_size(split: PrecisionSplit, info: LayerInfo) -> int:
    """The largest rank the layer takes, or the least rank of a budget that holds one rank."""
    if split.budget is None or split.branch_weight is None:
        return min(info.n, info.k)
    least = branch_bytes(info.n, info.k, 1, split.branch_weight)
    fmt = parse_format(split.budget.partition("@")[0])
    rank = 1
    while branch_bytes(info.n, info.k, rank, fmt) < least:
        rank += 1
    return rank


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of ``i/n`` with 1 <= i <= n.

    Raises
    ------
    InputError
        If the text is not of this form.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*/\s*(\d{1,6})\s*", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"--shard must be i/n with i from 1 to n, such as 1/4, got {text!r}")
    return int(match[1]), int(match[2])


def take_shard(sweep: ComposedSweep, shard: tuple[int, int]) -> ComposedSweep:
    """Part `i` of `n` of a sweep, for ``shard = (i, n)``; its cases keep their places."""
    index, count = shard
    if count > len(sweep.tasks):
        raise InputError(
            f"--shard {index}/{count}: only {counted(len(sweep.tasks), 'layer', 'is')} to share out"
        )
    loads = [0.0] * count
    mine: set[str] = set()
    for task in sorted(sweep.tasks, key=lambda task: (-task.work, task.layer)):
        part = loads.index(min(loads))
        loads[part] += task.work
        if part == index - 1:
            mine.add(task.layer)
    tasks = tuple(task for task in sweep.tasks if task.layer in mine)
    others = tuple(task for task in sweep.tasks if task.layer not in mine)
    return replace(sweep, tasks=tasks, others=others, shard=f"{index}/{count}")
