"""From what the user asks for to the list of tasks: every name checked before anything runs."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from loraq_sim.dumps import LayerDump, LayerInfo, read_layer_dump
from loraq_sim.errors import DumpError, InputError, unknown_name
from loraq_sim.split import PrecisionSplit, parse_split
from loraq_sim.sweep.case_identity import case_identity, code_digest
from loraq_sim.sweep.case_settings import case_labels, case_options, datapath_grid
from loraq_sim.sweep.default_splits import default_splits
from loraq_sim.sweep.forecast import case_seconds
from loraq_sim.sweep.tasks import SweepCase, SweepTask

if TYPE_CHECKING:
    from hwmodels import Accelerator

__all__ = ["ComposedSweep", "SweepPlan", "compose"]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """What a sweep is asked for.

    Parameters
    ----------
    dump : str
        Path of the layer dump.
    accelerators : tuple of str
        Names or paths of YAML files.
    layers : tuple of str
        Patterns of layer names or kinds; all layers when empty.
    splits : tuple of str
        Precision splits; `default_splits` when empty.
    methods, preset, seed, smooth
        See `loraq_sim.solve`.
    family, group
        Element family and group of the splits.
    tokens : int, optional
        Activation rows to use; all by default.
    fused : bool
        Whether the cost model runs the branch inside the main kernel.
    datapath : mapping
        Overrides of the accelerators' data paths; a tuple of values asks for each of them.
    """

    dump: str
    accelerators: tuple[str, ...]
    layers: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("loraq",)
    preset: str = "balanced"
    family: str = "int"
    group: int = 64
    tokens: int | None = None
    seed: int = 0
    smooth: float | None = None
    fused: bool = True
    datapath: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ComposedSweep:
    """A checked plan: its tasks in dump order, and what was decided on the way.

    `plan` is the plan with every default filled in; `notes` are sentences for the user; the
    digests name the content of the dump and of each accelerator.
    """

    plan: SweepPlan
    tasks: tuple[SweepTask, ...]
    notes: tuple[str, ...]
    dump_digest: str
    accelerator_digests: Mapping[str, str]

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
            "n_cases": len(self.cases),
            "n_layers": len(self.tasks),
            "dump_digest": self.dump_digest,
            "accelerator_digests": dict(self.accelerator_digests),
            "code_digest": code_digest(),
        }


def compose(plan: SweepPlan) -> ComposedSweep:
    """Check `plan` against the dump, the accelerators and the known names; list its cases.

    Raises
    ------
    InputError
        If a name, split or setting is unknown or breaks a rule.
    DumpError
        If the dump cannot be read or a pattern matches no layer.
    hwmodels.AcceleratorError
        If an accelerator is unknown or its file is broken.
    """
    _check_settings(plan)
    dump = read_layer_dump(plan.dump)
    if plan.layers:
        dump = dump.select(plan.layers)
    infos = {name: _info(dump, name) for name in dump}
    notes: list[str] = []
    splits: Sequence[str] = plan.splits
    if not splits:
        usable = [info for info in infos.values() if info is not None]
        if not usable:
            raise DumpError(f"{plan.dump}: none of its {len(infos)} layers is usable: {_why(dump)}")
        splits, note = default_splits(usable)
        notes.append(note)
    pairs = _solver_cases(splits, plan, notes)
    accelerators = _accelerators(plan)
    paths = datapath_grid(plan.datapath)
    digest = dump.digest()
    tasks = tuple(
        SweepTask(
            dump=str(plan.dump),
            layer=name,
            info=info,
            cases=tuple(
                case
                for path in paths
                for case in _cases(plan, name, info, pairs, accelerators, digest, path)
            ),
        )
        for name, info in infos.items()
    )
    return ComposedSweep(
        plan=_with_splits(plan, splits),
        tasks=tasks,
        notes=tuple(notes),
        dump_digest=digest,
        accelerator_digests={a.name: a.digest() for a in accelerators.values()},
    )


def _check_settings(plan: SweepPlan) -> None:
    from loraq_sim.solvers import METHODS, PRESETS

    if not plan.methods or not plan.accelerators:
        raise InputError("a sweep needs at least one method and one accelerator")
    for method in plan.methods:
        if method not in METHODS:
            raise InputError(unknown_name("method", method, METHODS))
    if plan.preset not in PRESETS:
        raise InputError(unknown_name("preset", plan.preset, PRESETS))
    for name, value, lowest in (("tokens", plan.tokens, 1), ("seed", plan.seed, 0)):
        if value is None and name == "tokens":
            continue
        if not isinstance(value, int) or not lowest <= value < 2**63:
            what = "a positive integer" if lowest else "an integer from 0"
            raise InputError(f"{name} must be {what}, below 2**63, got {value!r}")


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


def _solver_cases(
    splits: Sequence[str], plan: SweepPlan, notes: list[str]
) -> list[tuple[PrecisionSplit, str]]:
    """Distinct (split, method): without a branch there is nothing to solve but rounding (rtn)."""
    pairs: dict[tuple[str, str], tuple[PrecisionSplit, str]] = {}
    reduced = set()
    for text in splits:
        for method in plan.methods:
            split = parse_split(text, family=plan.family, group=plan.group)
            if method == "rtn" and split.has_branch:
                reduced.add(split.text)
                split = parse_split(split.main, family=plan.family, group=plan.group)
            chosen = method if split.has_branch else "rtn"
            pairs.setdefault((split.text, chosen), (split, chosen))
    if reduced:
        notes.append(f"method rtn has no branch: {len(reduced)} splits are their main part only")
    return list(pairs.values())


def _accelerators(plan: SweepPlan) -> "dict[str, Accelerator]":
    import hwmodels
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


def _cases(
    plan: SweepPlan,
    name: str,
    info: LayerInfo | None,
    pairs: Sequence[tuple[PrecisionSplit, str]],
    accelerators: "Mapping[str, Accelerator]",
    dump_digest: str,
    datapath: Mapping[str, Any],
) -> Iterator[SweepCase]:
    settings = {"preset": plan.preset, "seed": plan.seed, "tokens": plan.tokens}
    options = case_options(plan, datapath)
    for ref, accelerator in accelerators.items():
        for split, method in pairs:
            what = settings | {"split": split.text, "method": method, "options": options}
            what |= {"family": split.family, "group": split.group}
            yield SweepCase(
                case_id=case_identity(
                    dump=dump_digest,
                    layer=name,
                    accelerator=accelerator.digest(),
                    code=code_digest(),
                    **what,
                ),
                accelerator=ref,
                labels=case_labels(plan, name, info, split, method, accelerator, options),
                work=case_seconds(info, split, method, plan.preset, plan.tokens),
                **what,
            )


def _with_splits(plan: SweepPlan, splits: Sequence[str]) -> SweepPlan:
    from dataclasses import replace

    return replace(plan, splits=tuple(splits))
