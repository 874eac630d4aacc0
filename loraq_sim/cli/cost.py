"""``loraq-sim cost``: memory, latency and energy of shapes, dumps or models, without arrays.

Machines are names, files and variants with ``--set``; ``--vary`` makes a grid of them. Shapes and
dumps give a row for each layer, split and machine; a model gives the rows of one denoising step,
one per kind of layer, and their total.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwmodels
from hwmodels.workload import BRANCH_SCHEDULES
from loraq_sim.cli.options import (
    Accelerators,
    Batch,
    Family,
    Force,
    Group,
    KernelFamily,
    Layers,
    OutFormat,
    OutputFormat,
    Resolution,
    Rotate,
    Rows,
    SharedBy,
    Smooth,
    Splits,
    Unfused,
    is_given,
    listed,
    listed_shapes,
)
from loraq_sim.cli.output import (
    case_failure,
    end_with,
    note,
    one_line_failures,
    print_tables,
    say,
)
from loraq_sim.dumps import read_layer_dump
from loraq_sim.dumps.kinds import list_models
from loraq_sim.errors import CaseFailed, InputError, counted, unknown_name
from loraq_sim.files import refuse_existing
from loraq_sim.layers import rows_notes
from loraq_sim.reporting.tables import result_table
from loraq_sim.results.wording import resting_of
from loraq_sim.settings import parse_rows, rows_of
from loraq_sim.split import PrecisionSplit, parse_split

if TYPE_CHECKING:
    from hwmodels import Accelerator

    _Pair = tuple[PrecisionSplit, dict[str, Any], Accelerator]

__all__ = [
    "EXAMPLES",
    "Launch",
    "MODEL_COLUMNS",
    "Sets",
    "Variants",
    "checked_schedule",
    "chosen_machines",
    "cost_command",
]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim cost --hw aie2 --shape 4096x1152x4608 --split W4A4 --split W4A4+W8A8r64\n\n"
    "loraq-sim cost --hw aie2,a100 --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8\n\n"
    "loraq-sim cost --model pixart-sigma --hw aie2,h100 --split W4A4+W8A8r64 --resolution 512\n\n"
    "loraq-sim cost --hw mi355x --family mxfp --schedule recompute --shape 4096x3072x12288\n\n"
    "loraq-sim cost --hw aie2 --shape 4096x1152x4608 --split W4A8 "
    "--vary clock_hz=1e9,1.5e9 --set memories.dram.bandwidth_bytes_per_s=30e9\n\n"
    "loraq-sim cost --hw aie2 --shape 4096x1152x1152 --split W4A4+W8A8r32 --rotate hadamard:64 "
    "--smooth 0.5 --shared-by 3 --batch 4\n\n"
    "loraq-sim cost --model pixart-sigma --hw aie2p --split W4A8 --resolution 512 --attention int8 "
    "--timeline step.svg"
)
_COLUMNS = (
    *("weight_bytes", "latency_s", "cycles", "roofline_latency_s", "energy_j", "dram_bytes"),
    *("utilization", "bound", "peak_activation_bytes", "working_set_bytes", "fits_in"),
    *("kernel", "confidence", "latency_low_s", "latency_high_s", "mean_error", "worst_error"),
    *("tile_mkn", "modes", "parts"),
)
_SHOWN = (
    *("layer", "m", "k", "n", "split", "rank", "accelerator", "weight_bytes", "latency_s"),
    *("roofline_latency_s", "energy_j", "dram_bytes", "utilization", "bound"),
    *("peak_activation_bytes", "fits_in", "kernel", "confidence"),
)
# Shown where one of them was asked for.
_EXTRAS = ("batch", "guidance", "transforms", "shared_by")
MODEL_COLUMNS = (
    *("model", "accelerator", "split", "kind", "precision", "calls", "macs", "weight_bytes"),
    *("latency_s", "share", "energy_j", "dram_bytes", "bound", "peak_activation_bytes"),
    *("kernel", "confidence", "validated_share", "batch", "guidance"),
)
_SCHEDULE_COLUMNS = (
    *("model", "accelerator", "split", "latency_s", "scheduled_s", "critical_path_s"),
    *("idle_share", "resident_bytes", "validated_share"),
)
_MOST_MACHINES = 10_000
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the accelerator file, by the key that hw show prints "
        "(units.clock_hz=1.2e9); repeatable.",
        show_default=False,
    ),
]
Varies = Annotated[
    list[str] | None,
    typer.Option(
        "--vary",
        metavar="KEY=V1,V2",
        help="Cost every one of these values of a key (clock_hz=1e9,1.5e9); repeatable, all "
        "combinations are costed.",
        show_default=False,
    ),
]
Launch = Annotated[
    str,
    typer.Option(
        "--launch",
        metavar="NAME",
        help="How kernels start: stream, or graph (inside a recorded graph or chain of layers).",
    ),
]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME",
        help="Variant of the accelerator where sources conflict (hw show lists them); repeatable.",
        show_default=False,
    ),
]


@one_line_failures
def cost_command(
    context: typer.Context,
    hw: Accelerators,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="m=M,n=N,k=K|MxKxN",
            help="GEMM size: M rows, N output features, K input features, by name in any order or "
            "as MxKxN; repeatable.",
            show_default=False,
        ),
    ] = None,
    layer_dump: Annotated[
        Path | None,
        typer.Option("--layer-dump", metavar="FILE", help="Cost the layers of this dump instead."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help=f"Cost a denoising step of a model instead: {', '.join(list_models())}; "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    resolution: Resolution = 1024,
    rows: Rows = None,
    layers: Layers = None,
    splits: Splits = None,
    family: Family = "int",
    group: Group = 64,
    batch: Batch = 1,
    guidance: Annotated[
        int | None,
        typer.Option(
            "--guidance",
            metavar="N",
            min=1,
            help="Guidance passes in one call (2: with and without the prompt); multiplies the "
            "rows. Default: those of --model, else 1 (rows as they are given).",
            show_default=False,
        ),
    ] = None,
    smooth: Smooth = None,
    rotate: Rotate = None,
    shared_by: SharedBy = 1,
    unfused: Unfused = False,
    schedule: Annotated[
        str | None,
        typer.Option(
            "--schedule",
            metavar="NAME",
            help=f"How the branch runs: {', '.join(BRANCH_SCHEDULES)}. Default: fused.",
            show_default=False,
        ),
    ] = None,
    kernel: KernelFamily = None,
    launch: Launch = "stream",
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            metavar="NAME[/NAME]",
            help="Formats of the products of attention of --model, queries times keys and "
            "probabilities times values: bf16, int8 or fp8; one name for both. Default: bf16.",
            show_default=False,
        ),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            metavar="FILE",
            help="Draw the schedule of one step of --model as .png, .svg or .pdf.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    variants: Variants = None,
    sets: Sets = None,
    varies: Varies = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Cost layers or whole models without solving or emulating anything."""

    way = checked_schedule(schedule, unfused=unfused)
    if sum(map(bool, (shape, layer_dump, model))) != 1:
        raise InputError("give one of --shape MxKxN, --layer-dump FILE and --model NAME")
    counts = parse_rows(rows or ())
    if model and counts:
        raise InputError("--rows is for --layer-dump: --model says the rows itself")
    if not model and (attention or timeline):
        asked_for = "--attention" if attention else "--timeline"
        raise InputError(f"{asked_for} is for --model: layers of a shape have no step around them")
    if timeline is not None:
        refuse_existing(timeline, overwrite=force)
    if not model and is_given(context, "resolution"):
        raise InputError("--resolution says how many image rows a model has: give --model too")
    if layers and not layer_dump:
        raise InputError("--layers is for --layer-dump: it names layers of a dump")
    if not shape and shared_by > 1:
        raise InputError("--shared-by is for --shape: not all layers of a model read one input")
    shapes = listed_shapes("--shape", shape)
    sizes = {} if model else _sizes(shapes, layer_dump, listed(layers), counts)
    machines = chosen_machines(listed(hw), variants, sets, varies)
    texts = listed(splits) or _default_splits(sizes or {"": (1024, 1024, 1024)})
    chosen = [parse_split(text, family=family, group=group) for text in texts]
    pairs = [(split, point, machine) for split in chosen for point, machine in machines]
    if not splits:
        pairs = _without_lacking(pairs)
    varied = list(dict.fromkeys(key for point, _ in machines for key in point))
    extra: dict[str, Any] = {"smooth": smooth, "rotate": rotate, "shared_by": shared_by}
    asked = [key for key, value in extra.items() if value not in (None, 1)]
    how = extra | {"schedule": way, "kernel": kernel, "launch": launch}
    if model:
        how |= {"resolution": resolution, "batch": batch, "guidance": guidance}
        how |= {"attention": _attention_formats(attention)}
        asked_steps = [
            (name, split, machine, point)
            for name in listed(model)
            for split, point, machine in pairs
        ]
        if timeline is not None and len(asked_steps) != 1:
            raise InputError(
                f"--timeline draws one step, and {len(asked_steps)} are asked for; give one model, "
                "split and machine"
            )
        costed = [
            {**row, **point}
            for name, split, machine, point in asked_steps
            for row in _step_rows(name, split, machine, how, timeline)
        ]
        columns, title = [*MODEL_COLUMNS], f"Cost of one denoising step at {resolution} px"
    else:
        scale = batch * (guidance or 1)
        costed = [
            {"batch": batch, "guidance": guidance or 1}
            | _row(name, (scale * m, n, k), split, machine, how)
            | point
            for name, (m, n, k) in sizes.items()
            for split, point, machine in pairs
        ]
        columns = [name for name in _SHOWN if name != "layer" or layer_dump is not None]
        title = "Cost of one call"
        if batch > 1 or guidance:
            title += f" of {counted(batch, 'image')} and {counted(guidance or 1, 'guidance pass')}"
    columns += [key for key in _EXTRAS if key in asked or (key == "transforms" and asked)]

    def show(has_messages: bool) -> None:
        shown = [*columns, *varied, *(["message"] if has_messages else [])]
        tables = [result_table(costed, shown, title=title)]
        steps = [row for row in costed if "scheduled_s" in row]
        if steps and output is OutputFormat.TABLE:
            keys = [*_SCHEDULE_COLUMNS, *varied]
            tables.append(result_table(steps, keys, title="The step as a schedule"))
        print_tables(tables, output)
        if output is OutputFormat.TABLE:
            _say_assumptions(costed)

    end_with(costed, show)


def checked_schedule(schedule: str | None, *, unfused: bool) -> str:
    """The branch schedule asked for; `unfused` is short for that one."""
    if schedule is None:
        return "unfused" if unfused else "fused"
    if schedule not in BRANCH_SCHEDULES:
        raise InputError(unknown_name("--schedule", schedule, BRANCH_SCHEDULES))
    if unfused and schedule != "unfused":
        raise InputError(f"--unfused and --schedule {schedule} contradict each other; give one")
    return schedule


def chosen_machines(
    names: Iterable[str],
    variants: Iterable[str] | None,
    sets: Iterable[str] | None,
    varies: Iterable[str] | None,
) -> "list[tuple[dict[str, Any], Accelerator]]":
    """(varied keys and values, machine) of every combination, in the order given."""

    fixed = dict(_assignment(text, "--set") for text in sets or ())
    grid = [
        [(key, value) for value in listed([values])]
        for key, values in (_split(text, "--vary") for text in varies or ())
    ]
    n_points = 1
    for axis in grid:
        n_points *= len(axis)
    if n_points > _MOST_MACHINES:
        raise InputError(f"--vary asks for {n_points} machines; {_MOST_MACHINES} are the most")
    machines = []
    for name, variant in itertools.product(names, listed(variants) or (None,)):
        base = hwmodels.load_accelerator(name, variant)
        for point in itertools.product(*grid):
            varied = {key: hwmodels.parse_value(value, key) for key, value in point}
            changes = fixed | varied
            machine = hwmodels.with_overrides(base, changes) if changes else base
            machines.append((varied, machine))
    return machines


def _assignment(text: str, flag: str) -> tuple[str, Any]:

    key, value = _split(text, flag)
    return key, hwmodels.parse_value(value, key)


def _split(text: str, flag: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (equals and key.strip() and value.strip()):
        raise InputError(f"{flag} must be KEY=VALUE such as clock_hz=1.5e9, got {text!r}")
    return key.strip(), value.strip()


def _default_splits(sizes: dict[str, tuple[int, int, int]]) -> list[str]:
    """A rank that suits the narrowest layer: 32, or an eighth of its smaller side."""
    rank = max(1, min(32, min(min(n, k) for _, n, k in sizes.values()) // 8))
    branches = (f"W16A16r{rank}", f"W8A8r{rank}", f"W4A8r{rank}")
    return ["W4A4", "W4A8", "W8A8", *(f"W4A4+{branch}" for branch in branches)]


def _without_lacking(pairs: "list[_Pair]") -> "list[_Pair]":
    """The pairs of default splits and machines without those that have no MAC mode."""
    from loraq_sim.machine import lacking_defaults

    splits = list(dict.fromkeys(split for split, _, _ in pairs))
    found: dict[int, list[str]] = {}
    remarks: dict[str, None] = {}
    for _, _, machine in pairs:
        if id(machine) not in found:
            found[id(machine)], remark = lacking_defaults(machine, splits)
            remarks[remark] = None
    for remark in filter(None, remarks):
        note(remark)
    return [pair for pair in pairs if pair[0].text not in found[id(pair[2])]]


_MOST_ASSUMPTIONS = 6


def _say_assumptions(rows: list[dict[str, Any]]) -> None:
    """On sketched machines: which assumed numbers each latency rests on."""
    told = [(row, text) for row in rows if (text := resting_of(row))]
    for row, text in told[:_MOST_ASSUMPTIONS]:
        place = row.get("layer") or row.get("model")
        name = f"{place}, " if place else ""
        say(f"{name}{row['split']} on {row['accelerator']} {text}")
    if len(told) > _MOST_ASSUMPTIONS:
        say(f"{len(told) - _MOST_ASSUMPTIONS} more rows: --format json has their rests_on")


def _sizes(
    shapes: dict[str, tuple[int, int, int]],
    layer_dump: Path | None,
    layers: tuple[str, ...],
    rows: dict[str, int],
) -> dict[str, tuple[int, int, int]]:
    """(m, n, k) by name."""
    if layer_dump is None:
        if rows:
            raise InputError("--rows is for --layer-dump: --shape MxKxN says the rows itself")
        return shapes

    dump = read_layer_dump(layer_dump)
    if layers:
        dump = dump.select(layers)
    infos = [dump.info(name) for name in dump]
    known = {i.name: (i.m, i.m_source) for i in infos}
    for info in infos:
        count = rows_of(info.name, info.kind, rows)
        known[info.name] = known[info.name] if count is None else (count, "given")
    notes = rows_notes(known)
    if all(m is None for m, _ in known.values()):
        raise InputError(f"{layer_dump}: {notes[0]}")
    for text in notes:
        note(text)
    return {i.name: (m, i.n, i.k) for i in infos if (m := known[i.name][0]) is not None}


def _row(
    name: str,
    size: tuple[int, int, int],
    split: PrecisionSplit,
    accelerator: "Accelerator",
    how: Mapping[str, Any],
) -> dict[str, Any]:
    from loraq_sim.machine import array_columns, cost_split, datapath_for

    m, n, k = size
    row = {"layer": name, "m": m, "k": k, "n": n, "split": split.text, "family": split.family}
    row |= {"accelerator": accelerator.name, "schedule": how["schedule"], "status": "ok"}
    row["message"] = ""
    try:
        work, cost = cost_split(m, n, k, split, accelerator, **how)
    except Exception as error:
        return row | {"status": "failed", "message": f"{name}: {case_failure(error)}"}
    row |= {"transforms": ", ".join(work.transforms), "shared_by": work.shared_by}
    row["message"] = cost.padding
    row |= array_columns(work, accelerator, datapath_for(accelerator))
    asked = {name: how[name] for name in ("kernel", "launch")}
    row["rests_on"] = hwmodels.resting(work, accelerator, **asked)
    return row | {"rank": work.rank} | {column: getattr(cost, column) for column in _COLUMNS}


def _attention_formats(text: str | None) -> tuple[str, str]:
    from hwmodels.inventory import ATTENTION_FORMATS

    first, _, second = (text or "bf16").partition("/")
    for name in (first, second or first):
        if name not in ATTENTION_FORMATS:
            raise InputError(unknown_name("--attention", name, ATTENTION_FORMATS))
    return first, second or first


def _step_rows(
    model: str,
    split: PrecisionSplit,
    accelerator: "Accelerator",
    how: Mapping[str, Any],
    timeline: Path | None,
) -> list[dict[str, Any]]:
    from loraq_sim.machine import model_step

    try:
        step = model_step(model, split, accelerator, **how)
    except CaseFailed as error:
        where = {"model": model, "resolution": how["resolution"], "split": split.text}
        where |= {"accelerator": accelerator.name, "schedule": how["schedule"], "kind": "total"}
        return [where | {"status": "failed", "message": case_failure(error)}]
    if timeline is not None:
        from loraq_sim.reporting.figures import save_figure
        from loraq_sim.reporting.machine_figures import timeline_figure

        title = f"{model} at {how['resolution']} px, {split.text} on {accelerator.name}"
        drawn = timeline_figure(step.schedule, step.kinds, title=title)
        note(f"wrote {save_figure(drawn, timeline)}")
    if accelerator.assumed:
        from loraq_sim.explain.terms import step_rests_on

        step.rows[-1]["rests_on"] = step_rests_on(model, split, accelerator, **how)
    return step.rows
