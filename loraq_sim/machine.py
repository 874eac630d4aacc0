"""What an accelerator's description means to the emulator and to the cost model.

The data path it states (and a user overrides) becomes a `Datapath`; a split and a shape become the
`GemmWorkload` that `hwmodels` costs, and the layers of a published model the cost of one denoising
step.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import hwmodels
from hwmodels.families import weakest
from hwmodels.modes import mode_of
from hwmodels.schedule import (
    CallCost,
    StepSchedule,
    entry_names,
    resident_names,
    schedule_step,
)
from loraq_sim.conditioning import hadamard_block
from loraq_sim.emulator.datapath import Datapath, datapath_steps
from loraq_sim.emulator.float_overflow import FloatOverflow
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.presets import array_preset
from loraq_sim.errors import CaseFailed, InputError, LoraqError, unknown_name
from loraq_sim.formats import ELEMENTS, parse_format
from loraq_sim.layers import is_after_gelu
from loraq_sim.settings import ARRAY_KEYS, DATAPATH_KEYS, CaseSettings
from loraq_sim.split import AUTO, PrecisionSplit, parse_split

if TYPE_CHECKING:
    from hwmodels.inventory import InventoryEntry, ModelInventory, ProductCost
    from hwmodels.kernel_cost import LaunchState, WeightState
    from loraq_sim.solvers import Solution

__all__ = [
    "ARRAY_COSTS",
    "ModelStep",
    "array_columns",
    "check_machine",
    "cost_split",
    "datapath_for",
    "excluded_on",
    "lacking_defaults",
    "model_step",
    "model_step_rows",
    "runs_in_integers",
    "solved_workload",
    "transforms_asked",
    "transforms_of",
    "workload_for",
]

# Steps that every workload charges: as MACs, as vector work, or in passing where a tile of y is
# scaled, summed and drained.
_CHARGED = {
    *("main", "down", "up", "round_main", "round_branch", "round_p"),
    *("combine", "bias", "output"),
    *("round_feedback", "feedback_down", "round_feedback_p", "feedback_back", "deflate"),
    *("feedback_up", "feedback_combine"),
}


def datapath_for(
    accelerator: "hwmodels.Accelerator", overrides: Mapping[str, Any] | None = None
) -> Datapath:
    """The emulated data path an accelerator's file describes, with `overrides` applied."""
    values: dict[str, Any] = {
        key: getattr(accelerator.datapath, key, None) for key in DATAPATH_KEYS
    }
    for key, value in (overrides or {}).items():
        if key not in DATAPATH_KEYS:
            raise InputError(unknown_name("datapath setting", key, DATAPATH_KEYS))
        values[key] = value
    described = accelerator.datapath.float_overflow
    changed = (overrides or {}).get("float_overflow") or {}
    if isinstance(changed, Mapping):
        # A kernel that converts one format in its own way leaves the others as the file has them.
        changed = FloatOverflow.of({**described.rules, **changed})
    return Datapath(
        mac=_mac_array(values, overrides or {}),
        float_overflow=changed,
        zero_point=_zero_point(values, overrides or {}),
        combine=values["combine"],
        p_format=values["p_format"],
        feedback_p_format=values["feedback_p_format"],
        out_format=values["out_format"],
        rounding=values["rounding"],
        block_rounding=values["block_rounding"],
    )


def _zero_point(described: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """Where zero points are corrected: as asked, as the preset named has it, or as the file."""
    if "array" in overrides and overrides.get("zero_point") is None:
        return array_preset(overrides["array"]).zero_point
    return described["zero_point"] or "initial"


def _mac_array(
    described: Mapping[str, Any], overrides: Mapping[str, Any]
) -> MacArray | TwoLevelArray:
    """The array of the accelerator's file, or the preset named instead, with its overrides."""
    if "array" not in overrides:
        return MacArray(**{key: described[key] for key in ARRAY_KEYS})
    array = array_preset(overrides["array"]).array
    given = {key: overrides[key] for key in ARRAY_KEYS if key in overrides}
    if isinstance(array, MacArray):
        return dataclasses.replace(array, **given)
    # Of a two-level array, width and overflow are the wide accumulator's, the rest the column's.
    wide = {key: given.pop(key) for key in ("acc_bits", "overflow") if key in given}
    return dataclasses.replace(array, column=dataclasses.replace(array.column, **given), **wide)


def cost_split(
    m: int,
    n: int,
    k: int,
    split: PrecisionSplit,
    accelerator: "hwmodels.Accelerator",
    *,
    schedule: str = "fused",
    smooth: float | None = None,
    rotate: str | None = None,
    shared_by: int = 1,
    kernel: str | None = None,
    launch: "LaunchState" = "stream",
    weights: "WeightState" = "cold",
) -> "tuple[hwmodels.GemmWorkload, hwmodels.Cost]":
    """Workload and cost of one call of a layer of this shape: no weight, nothing solved.

    `schedule` is one of `hwmodels.workload.BRANCH_SCHEDULES`; `smooth` and `rotate` are what would
    be done to X, as in `loraq_sim.solve`; `shared_by` layers read the same X and share its branch.
    `kernel`, `launch` and `weights` as in `hwmodels.estimate_cost`.
    """
    rank, feedback_rank = split.ranks(n, k)
    path = datapath_for(accelerator)
    asked = transforms_asked(k, split, path, smooth=smooth, rotate=rotate)
    work = workload_for(
        m, n, k, split, rank, path, feedback_rank=feedback_rank, fused=True, transforms=asked,
        shared_by=shared_by,
    )  # fmt: skip
    work = dataclasses.replace(work, branch_schedule=schedule)
    cost = hwmodels.estimate_cost(work, accelerator, kernel=kernel, launch=launch, weights=weights)
    return work, cost


def solved_workload(
    m: int, solution: "Solution", split: PrecisionSplit, path: Datapath, *, fused: bool
) -> "hwmodels.GemmWorkload":
    """A solved layer called with `m` rows: all that is done to X, its part of what it shares."""
    n, k = solution.main.shape
    return workload_for(
        m, n, k, split, solution.rank, path, feedback_rank=solution.feedback_rank, fused=fused,
        transforms=transforms_of(solution, split, path), shared_by=solution.shared_by,
        feedback_shared_by=solution.feedback_shared_by,
    )  # fmt: skip


ARRAY_COSTS = ("area_ge", "area_mm2", "array_energy_j")
"""Columns of a row that price its MAC array from gates."""


def array_columns(
    work: "hwmodels.GemmWorkload", accelerator: "hwmodels.Accelerator", path: Datapath
) -> dict[str, float | None]:
    """Area of the array that a case emulates, and the energy of its main branch's MACs in it.

    All are None in a float mode, whose gates nobody has synthesized.
    """
    found = hwmodels.array_of(work, accelerator, mac=path.mac, zero_point=path.zero_point)
    if found is None:
        return dict.fromkeys(ARRAY_COSTS)
    energy = found.energy_pj_per_mac
    joules = None if energy is None else work.m * work.n * work.k * energy * 1e-12
    return dict(zip(ARRAY_COSTS, (found.area_ge, found.area_mm2, joules), strict=True))


def runs_in_integers(accelerator: "hwmodels.Accelerator", split: PrecisionSplit) -> bool:
    """Whether the main branch of `split` runs in an integer mode, which has accumulators."""
    work = hwmodels.GemmWorkload(m=1, n=1, k=1, main=split.costed[0], family=split.family)
    try:
        return hwmodels.array_of(work, accelerator) is not None
    except hwmodels.AcceleratorError:
        return False


def lacking_defaults(
    accelerator: "hwmodels.Accelerator", splits: Sequence[PrecisionSplit]
) -> tuple[list[str], str]:
    """The default splits that a machine has no MAC modes for, and a remark on them."""
    costed = {split.text: split.costed for split in splits}
    lacking = hwmodels.lacking_modes(accelerator, costed, family=splits[0].family)
    remark = f"left out of the default splits on {accelerator.name}: no MAC mode"
    return lacking, f"{', '.join(lacking)} {remark}" if lacking else ""


def transforms_of(stored: Any, split: PrecisionSplit, path: Datapath) -> tuple[str, ...]:
    """Names, for the cost model, of what the data path's steps do to X before it is rounded.

    Raises
    ------
    InputError
        If the data path has a step that the cost model does not charge.
    """
    names = []
    for step in datapath_steps(stored, split, path):
        if step.operation in ("smooth", "shift"):
            names.append(step.operation)
        elif step.operation == "rotate":
            names.append(f"hadamard{stored.rotation}")
        elif step.name not in _CHARGED:
            raise InputError(f"the cost model does not charge step {step.name!r} of the data path")
    return tuple(names)


def transforms_asked(
    k: int, split: PrecisionSplit, path: Datapath, *, smooth: float | None, rotate: str | None
) -> tuple[str, ...]:
    """`transforms_of` a layer of `k` channels that options named as in `solve` would give."""
    parts = dict.fromkeys(("main", "left", "right"), None)
    if split.has_branch:
        parts = dict.fromkeys(parts, split)
    stored = SimpleNamespace(**parts, smooth=smooth, rotation=hadamard_block(rotate, k))
    return transforms_of(stored, split, path)


def check_machine(settings: CaseSettings, accelerator: "hwmodels.Accelerator") -> None:
    """Refuse what a case names that its machine lacks; `excluded_on` is for what is chosen.

    Raises
    ------
    hwmodels.AcceleratorError
        With the way out.
    """
    smooths = settings.smooth is not None or settings.condition == "rms"
    asked = ("smooth",) * smooths + ("hadamard",) * (settings.rotate is not None)
    feedback = 0 if settings.split.feedback is None else 1
    hwmodels.check_transforms(accelerator, asked, feedback_rank=feedback)


def excluded_on(accelerator: "hwmodels.Accelerator", split: PrecisionSplit) -> tuple[str, ...]:
    """What ``condition="auto"`` must not choose on this machine, of `condition.CHOICES`.

    Transforms that its file does not list; zero points where the main branch would need another MAC
    mode for them, or has none.
    """
    lacking = [name for name in ("hadamard", "smooth") if name not in accelerator.transforms]
    if split.main_rule == AUTO and not _takes_zero_points(accelerator, split):
        lacking.append("zero_points")
    return tuple(lacking)


def _takes_zero_points(accelerator: "hwmodels.Accelerator", split: PrecisionSplit) -> bool:
    modes = []
    for main in (split.costed[0].removesuffix("u"), split.costed[0]):
        work = hwmodels.GemmWorkload(m=1, n=1, k=1, main=main, family=split.family)
        try:
            modes.append(mode_of(accelerator, work, "main").mode)
        except hwmodels.AcceleratorError:
            return not modes
    return modes[0] == modes[1]


def workload_for(
    m: int,
    n: int,
    k: int,
    split: PrecisionSplit,
    rank: int,
    path: Datapath,
    *,
    fused: bool,
    feedback_rank: int = 0,
    transforms: tuple[str, ...] = (),
    shared_by: int = 1,
    feedback_shared_by: int = 1,
) -> "hwmodels.GemmWorkload":
    """What the cost model needs to know of a case: shapes and bits.

    `transforms` and who shares what as in `hwmodels.GemmWorkload`.
    """
    has_branch = split.has_branch and rank > 0
    main, branch = split.costed
    p_element = ELEMENTS.get(path.p_format)
    feedback_p = ELEMENTS.get(path.feedback_p_format or path.p_format)
    return hwmodels.GemmWorkload(
        m=m,
        n=n,
        k=k,
        main=main,
        branch=branch if has_branch else None,
        rank=rank if has_branch else 0,
        fused=fused,
        out_bits=parse_format(path.out_format).element.bits,
        family=split.family,
        group=split.main_weight.group_size,
        scale_bits=_scale_bits(split),
        p_bits=p_element.bits if has_branch and p_element else None,
        feedback_rank=feedback_rank if has_branch else 0,
        feedback_p_bits=feedback_p.bits if has_branch and feedback_rank and feedback_p else None,
        transforms=transforms,
        shared_by=shared_by,
        feedback_shared_by=feedback_shared_by,
    )


def _scale_bits(split: PrecisionSplit) -> int:
    formats = (split.main_weight, split.main_activation, split.branch_weight)
    stored = [fmt.scale.nbytes for fmt in formats if fmt is not None and fmt.scale is not None]
    return 8 * stored[0] if stored else 0


_SUMS = ("weight_bytes", "calls", "macs", "latency_s", "energy_j", "dram_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelStep:
    """One denoising step of a model on a machine.

    rows : a row for every kind of layer, in order of the model, and their total.
    schedule : where every call lies in time, with `resident` entries' weights in L2.
    kinds : of each name in the schedule gemm, attention or elementwise.
    """

    rows: list[dict[str, Any]]
    schedule: StepSchedule
    resident: tuple[str, ...]
    kinds: dict[str, str]


def model_step_rows(
    model: str, split: PrecisionSplit, accelerator: "hwmodels.Accelerator", **options: Any
) -> list[dict[str, Any]]:
    """The rows of `model_step`, whose options it takes."""
    return model_step(model, split, accelerator, **options).rows


def model_step(
    model: str,
    split: PrecisionSplit,
    accelerator: "hwmodels.Accelerator",
    *,
    resolution: int = 1024,
    batch: int = 1,
    guidance: int | None = None,
    schedule: str = "fused",
    attention: Sequence[str] = ("bf16", "bf16"),
    **options: Any,
) -> ModelStep:
    """Costs of every kind of layer of one denoising step, their total, and the step's schedule.

    All calls of a step count; `batch` images and `guidance` passes (by default the model's) are in
    one call, or each in a call of its own where the model does so (the schedule is of one).
    `attention` are the formats of its two products (`hwmodels.inventory`); `options` are further
    ones of `cost_split`. ``share`` is the part of the step's latency, ``validated_share`` that of a
    row's latency which measured rows carry, and the peak of activations is the largest of one call.
    The total adds what the schedule says, and ``resident_bytes``, weights that stay in L2.

    Raises
    ------
    hwmodels.AcceleratorError
        If the model or resolution is unknown, or the rows of one call do not divide as asked.
    CaseFailed
        If a kind of layer cannot be costed; the message names it.
    """
    inventory = hwmodels.load_model(model, resolution)
    repeats, together = 1 if guidance else inventory.guidance_calls, inventory.guidance_batch
    passes = guidance or together * repeats
    scale = Fraction(batch * passes, together * repeats)
    where: dict[str, Any] = {"batch": batch, "guidance": passes, "model": model}
    where |= {"resolution": resolution, "split": split.text, "accelerator": accelerator.name}
    where["schedule"] = options["schedule"] = schedule
    names = entry_names(inventory)
    costed: dict[str, _Costed] = {}
    for name, entry in zip(
        names, (entry.scaled(scale) for entry in inventory.entries), strict=True
    ):
        try:
            costed[name] = _costed(entry, split, accelerator, tuple(attention), options)
        except (LoraqError, hwmodels.AcceleratorError) as error:
            raise CaseFailed(f"{model}, {entry.kind}: {error}") from error
    by_kind: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for item in costed.values():
        by_kind.setdefault((item.row["kind"], item.row["precision"]), []).append(item.row)
    rows = [_summed(parts) for parts in by_kind.values()]
    for row in rows:
        row |= {name: row[name] * repeats for name in (*_SUMS[1:], "validated_s")}
    total = _summed(rows) | {"kind": "total", "precision": "all"}
    rows.append(total)
    for row in rows:
        row["share"] = row["latency_s"] / total["latency_s"]
        row["validated_share"] = row.pop("validated_s") / row["latency_s"]
    placed, resident = _scheduled(inventory, accelerator, costed, total["peak_activation_bytes"])
    total["scheduled_s"] = placed.makespan_s * repeats
    total["critical_path_s"] = placed.critical_path_s * repeats
    total["idle_share"] = placed.idle_share
    total["resident_bytes"] = sum(costed[name].row["weight_bytes"] for name in resident)
    return ModelStep(
        rows=[where | row | {"status": "ok", "message": ""} for row in rows],
        schedule=placed,
        resident=resident,
        kinds={name: _KIND_OF_OP[e.op] for name, e in zip(names, inventory.entries, strict=True)},
    )


_KIND_OF_OP = {"gemm": "gemm", "attention": "attention", "linear_attention": "attention"}
_KIND_OF_OP |= {"depthwise": "elementwise", "elementwise": "elementwise"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Costed:
    """An entry's row (all calls), and one call with its weights read from DRAM or found in L2."""

    row: dict[str, Any]
    call: CallCost
    resident: CallCost


def _costed(
    entry: "InventoryEntry",
    split: PrecisionSplit,
    accelerator: "hwmodels.Accelerator",
    attention: tuple[str, ...],
    options: Mapping[str, Any],
) -> _Costed:
    precision = entry.precision
    cost: hwmodels.Cost | ProductCost
    resident: hwmodels.Cost | ProductCost
    if entry.op == "gemm":
        used = split.after_gelu(is_after_gelu(entry.kind))
        if precision != "split":
            used = parse_split(precision, family="int", group=split.group)
        precision = used.text
        size = (entry.m, entry.n, entry.k)
        _, cost = cost_split(*size, used, accelerator, **options)
        resident = cost
        if accelerator.memories.l2.panel_fraction:
            _, resident = cost_split(*size, used, accelerator, **options, weights="resident")
    else:
        asked = dict(zip(("qk", "pv"), attention, strict=True)) if entry.op == "attention" else {}
        cost = resident = hwmodels.product_cost(entry, accelerator, **asked)
        if set(asked.values()) - {"bf16"}:
            precision = "/".join(dict.fromkeys(attention))
    each = {name: getattr(cost, name) for name in (_SUMS[0], *_SUMS[3:])}
    row: dict[str, Any] = {"peak_activation_bytes": cost.peak_activation_bytes}
    row |= {name: value * entry.calls for name, value in each.items()}
    row |= {"kind": entry.kind, "precision": precision, "calls": entry.calls, "macs": entry.macs}
    row |= {"validated_s": row["latency_s"] * (cost.confidence == "measured")}
    row |= {"bound": cost.bound, "kernel": cost.kernel, "confidence": cost.confidence}
    return _Costed(row=row, call=_call(cost), resident=_call(resident))


def _call(cost: "hwmodels.Cost | ProductCost") -> CallCost:
    return CallCost(
        latency_s=cost.latency_s,
        units_share=cost.units_share,
        dram_share=min(1.0, cost.busy_s["dram"] / cost.latency_s),
        is_validated=cost.confidence == "measured",
    )


def _scheduled(
    inventory: "ModelInventory",
    accelerator: "hwmodels.Accelerator",
    costed: Mapping[str, _Costed],
    activation_bytes: int,
) -> tuple[StepSchedule, tuple[str, ...]]:
    """The schedule of a step, and the entries whose weights stay in L2 from step to step."""
    saved = {
        name: (item.call.latency_s - item.resident.latency_s) * item.row["calls"]
        for name, item in costed.items()
    }
    stored = {name: item.row["weight_bytes"] for name, item in costed.items()}
    resident = resident_names(accelerator, stored, saved, activation_bytes)
    calls = {
        name: item.resident if name in resident else item.call for name, item in costed.items()
    }
    return schedule_step(inventory, calls), tuple(resident)


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of rows; bound and kernel are those of most of their time, confidence the least."""
    row = {name: parts[0][name] for name in ("kind", "precision")}
    row |= {name: sum(part[name] for part in parts) for name in (*_SUMS, "validated_s")}
    row["peak_activation_bytes"] = max(part["peak_activation_bytes"] for part in parts)
    for name in ("bound", "kernel"):
        paced: Counter[str] = Counter()
        for part in parts:
            paced[part[name]] += part["latency_s"]
        row[name] = paced.most_common(1)[0][0]
    row["confidence"] = weakest([part["confidence"] for part in parts])
    return row
