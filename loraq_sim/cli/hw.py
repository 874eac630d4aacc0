"""``loraq-sim hw``: the accelerators, what is known of them, and how far to trust it.

``list``, ``show`` and ``schema`` describe machines and their files; ``new`` writes a file of one's
own. ``explain`` says where each
second, byte and joule of one layer call comes from. ``validate`` and ``fit`` are in
`loraq_sim.cli.hw_measured`, ``synth`` and ``energy`` in `loraq_sim.cli.hw_synth`, ``new`` in
`loraq_sim.cli.explore`.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import hwmodels
from loraq_sim.cli.cost import (
    Launch,
    Sets,
    Variants,
    checked_schedule,
    chosen_machines,
)
from loraq_sim.cli.explore import new_paper
from loraq_sim.cli.hw_measured import (
    FIT_EXAMPLES,
    VALIDATE_EXAMPLES,
    fit_command,
    new_foreign,
    validate_command,
)
from loraq_sim.cli.hw_synth import (
    ENERGY_EXAMPLES,
    SYNTH_EXAMPLES,
    energy_command,
    synth_command,
)
from loraq_sim.cli.options import (
    Family,
    Force,
    Group,
    KernelFamily,
    OutFormat,
    OutputFormat,
    Rotate,
    SharedBy,
    Smooth,
    Splits,
    listed,
    sizes_of,
)
from loraq_sim.cli.output import (
    note,
    one_line_failures,
    print_json,
    print_table,
    print_tables,
    say,
)
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, write_file
from loraq_sim.reporting.tables import json_text, result_table
from loraq_sim.results.columns import in_own_units
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from hwmodels import Accelerator, Cost
    from loraq_sim.split import PrecisionSplit

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)
_LIST_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw list\n\nloraq-sim hw list --format json"
_SHOW_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw show aie2\n\n"
    "loraq-sim hw show a100 --split W4A4+W16A16r32\n\n"
    "loraq-sim hw show aie2@emulated_int4\n\n"
    "loraq-sim hw show mi355x --family mxfp --split W4A8+W8A8r64"
)
_EXPLAIN_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw explain aie2 --shape 4096x1152x4608 --split W4A4+W8A8r64\n\n"
    "loraq-sim hw explain h100 --shape 4096x3072x3072 --split W4A4+W16A16r32 --schedule unfused"
)
_SCHEMA_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw schema > accelerator.schema.json"
_NEW_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw new my_npu --rows 8 --columns 8 --clock 1.2GHz --modes int8,int4x8 --sram 2MB "
    "--dram 68GB/s\n\n"
    "loraq-sim hw new my_array --organization systolic --rows 64 --columns 64\n\n"
    "loraq-sim hw new my_npu --like aie2\n\n"
    "loraq-sim hw new my_npu --from-yaml tpu_like.yaml --clock 1GHz\n\n"
    "loraq-sim hw new runs/chip.yaml --rows 64 --columns 64 --split W4A4+W8A8@fp16r32 "
    "--acc-bits 20 --products-per-add 8 --sram 2MiB"
)
_FAMILY_COLUMNS = ("name", "modes", "m", "n", "k", "mean_error", "worst_error")
Machine = Annotated[
    str,
    typer.Argument(
        metavar="NAME|FILE",
        help="Accelerator, NAME@VARIANT, or YAML file.",
    ),
]
_DEFAULT_SPLITS = ("W4A4+W8A8r32", "W4A8+W4A8r32", "W8A8+W6A6r32", "W16A16")


@app.command("list", epilog=_LIST_EXAMPLES)
@one_line_failures
def list_command(output: OutFormat = OutputFormat.TABLE) -> None:
    """List the accelerators that come with the program."""

    rows = []
    for name in hwmodels.list_accelerators():
        accelerator = hwmodels.load_accelerator(name)
        rows.append(
            {
                "name": name,
                "aliases": ", ".join(accelerator.aliases),
                "variants": ", ".join(variant.name for variant in accelerator.variants),
                "description": accelerator.title,
            }
        )
    print_table(result_table(rows), output)


@app.command("show", epilog=_SHOW_EXAMPLES)
@one_line_failures
def show_command(
    name: Machine,
    splits: Splits = None,
    family: Family = "int",
    every: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Every number of the file with its unit, source and confidence, the MAC modes of "
            "splits, and the numbers that change no result.",
        ),
    ] = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Show an accelerator on one screen: rates, memories, kernel families and how sure they are."""

    accelerator = hwmodels.load_accelerator(name)
    modes = []
    for text in listed(splits) or _DEFAULT_SPLITS:
        split = parse_split(text, family=family)
        for mode in _modes_of(accelerator, split):
            modes.append({"split": split.text} | mode)
    facts = hwmodels.describe(accelerator)
    idle = [{"key": key, "why": why} for key, why in hwmodels.idle_keys(accelerator).items()]
    rates, memories, families = hwmodels.overview(accelerator)
    if output is OutputFormat.JSON:
        report = {"name": accelerator.name, "facts": facts, "modes": modes, "idle": idle}
        report |= {"rates": rates, "memories": memories, "kernels": families}
        print_json(facts, report)
        return
    title = f"{accelerator.name}: {accelerator.title}"
    tables = [
        result_table(rates, title=f"{title}, rates per MAC mode"),
        result_table(memories, title="Memories, clock and dispatch"),
    ]
    one_screen = output is OutputFormat.TABLE and not every
    if one_screen:
        tables = [result_table(rates, title="Rates per MAC mode")]
        say(f"{title}\n{_memories_text(memories)}\n")
    if families:
        named = [{"name": family["kernel"], **family} for family in families]
        shown = _FAMILY_COLUMNS if one_screen else list(families[0])
        tables.append(
            result_table(named, shown, title="Kernel families, in the order they are chosen")
        )
    if every or splits or output is not OutputFormat.TABLE:
        tables.append(result_table(modes, title="MAC modes of splits"))
    if every or output is not OutputFormat.TABLE:
        tables.insert(0, result_table(facts, title=title))
        if idle:
            tables.append(result_table(idle, title="Values that change no result"))
    print_tables(tables, output)
    if output is OutputFormat.TABLE and (text := _assumptions_of(accelerator)):
        say(text)
    if not every and output is OutputFormat.TABLE:
        note(f"{len(facts)} numbers with their sources: loraq-sim hw show {name} --all")


def _memories_text(memories: list[dict[str, Any]]) -> str:
    """Units, memories and dispatch in lines, by how sure they are."""
    by_trust: dict[str, list[str]] = {}
    for fact in memories:
        what, _, unit = fact["what"].partition(" (")
        value = fact["value"]
        if isinstance(value, float):
            value = f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        said = f"{what} {value} {unit.rstrip(')')}".strip()
        by_trust.setdefault(fact["from"], []).append(said)
    return "\n".join(f"{trust}: {', '.join(said)}" for trust, said in by_trust.items())


def _quantity(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, show_default=False)


@app.command("new", epilog=_NEW_EXAMPLES)
@one_line_failures
def new_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE.yaml", help="What to call it, or the file to write.")
    ] = "my_npu",
    like: Annotated[
        str | None,
        _quantity("--like", "NAME", "Copy this shipped machine's file, comments and all, instead."),
    ] = None,
    from_yaml: Annotated[
        Path | None,
        _quantity(
            "--from-yaml",
            "FILE",
            "Start from a hardware file of ZigZag, Stream, Timeloop, Accelergy or AccelForge, and "
            "say what becomes of each of its keys; other options stand over it.",
        ),
    ] = None,
    organization: Annotated[
        str,
        typer.Option(
            "--organization",
            metavar="NAME",
            help="array (cores in a mesh), grid (independent units) or systolic (one array).",
        ),
    ] = "array",
    rows: Annotated[int | None, _quantity("--rows", "N", "Rows of units.")] = None,
    columns: Annotated[int | None, _quantity("--columns", "N", "Columns of units.")] = None,
    clock: Annotated[str | None, _quantity("--clock", "HZ", "Clock, such as 1.2GHz.")] = None,
    modes: Annotated[
        list[str] | None,
        _quantity(
            "--modes",
            "LIST",
            "MAC modes: int8, int4x8 (weights of 4 bits, activations of 8), bf16, fp8; with MACs a "
            "cycle of a unit int8=256. Default: int8.",
        ),
    ] = None,
    sram: Annotated[str | None, _quantity("--sram", "B", "Shared memory (L2), as 2MB.")] = None,
    dram: Annotated[str | None, _quantity("--dram", "B/S", "DRAM bandwidth, as 68GB/s.")] = None,
    l1: Annotated[str | None, _quantity("--l1", "B", "Memory of a unit, as 64KiB.")] = None,
    launch: Annotated[
        str | None, _quantity("--launch", "S", "Dispatch of a kernel, as 20us.")
    ] = None,
    split: Annotated[
        str | None,
        _quantity(
            "--split",
            "SPLIT",
            "Make a chip on paper for this split: a systolic array whose energies and area come "
            "from synthesis.",
        ),
    ] = None,
    acc_bits: Annotated[int | None, _quantity("--acc-bits", "N", "Accumulator width.")] = None,
    products_per_add: Annotated[
        int | None, _quantity("--products-per-add", "N", "Products that an add sums at once.")
    ] = None,
    overflow: Annotated[
        str | None, _quantity("--overflow", "RULE", "wrap, saturate or saturate_symmetric.")
    ] = None,
    node: Annotated[str | None, _quantity("--node", "NM", "Process node, as 7nm.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the file.")] = Path(),
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Write the file of a machine of one's own; what is not given is assumed, and said so."""

    given: dict[str, Any] = {
        "rows": rows, "columns": columns, "clock": clock, "sram": sram, "dram": dram, "l1": l1,
        "launch": launch, "acc_bits": acc_bits, "products_per_add": products_per_add,
        "overflow": overflow, "node": node,
    }  # fmt: skip
    asked = {flag: value for flag, value in {**given, "modes": modes, "split": split}.items()}
    flags = [f"--{flag.replace('_', '-')}" for flag, value in asked.items() if value is not None]
    if like and flags:
        raise InputError(
            f"--like copies a file as it is; leave out {', '.join(flags)}, or change the copy"
        )
    is_file = name.endswith((".yaml", ".yml"))
    path = out / name if is_file else out / f"{name}.yaml"
    name = path.stem if is_file else name
    if name in hwmodels.list_accelerators():
        raise InputError(f"{name} is a shipped machine; give yours another name, and --like {name}")
    if split is not None:
        refuse_existing(path, overwrite=force)
        make_folder(path.parent)
        new_paper(path, name, split, given, modes, output)
        return
    if from_yaml is not None:
        if like:
            raise InputError("--like copies a file as it is; leave out --from-yaml")
        read = hwmodels.read_foreign(from_yaml, name, modes=modes, **given)
        new_foreign(path, read, force=force, output=output)
        return
    sketched = hwmodels.sketch(
        name, organization=organization, modes=tuple(modes or ("int8",)), **given
    )
    text = hwmodels.shipped_text(like, name) if like else hwmodels.sketch_text(sketched)
    refuse_existing(path, overwrite=force)
    make_folder(path.parent)
    write_file(path, text)
    # Read as any file: what is unusual in it is said.
    machine = hwmodels.load_accelerator(path)
    n_assumed = len(hwmodels.assumed_keys(machine))
    if output is not OutputFormat.TABLE:
        facts = {"path": str(path), "name": name, "assumed_values": n_assumed}
        print_table(result_table([facts]), output)
        return
    say(str(path))
    if n_assumed:
        note(f"{n_assumed} values are assumed, as the file says; replace those that you know")
    if not any(mode.is_wide_float for mode in machine.modes):
        note(
            "no mode for 16-bit floats: layers and branches in 16 bits, as models have them, are "
            "refused; add bf16 to --modes if it has one"
        )
    note(f"next: loraq-sim hw show {path}; loraq-sim cost --hw {path} --shape 4096x1152x4608")


_USUAL = (4096, 4608, 1152)


def _assumptions_of(accelerator: "Accelerator") -> str:
    """Of a sketch: what latency and energy of a usual layer rest on, in a split that it runs."""
    from loraq_sim.machine import cost_split

    assumed = hwmodels.assumed_keys(accelerator)
    for text in _DEFAULT_SPLITS if assumed else ():
        try:
            work, _ = cost_split(*_USUAL, parse_split(text), accelerator)
        except hwmodels.AcceleratorError:
            continue
        quantities: tuple[Literal["latency", "energy"], ...] = ("latency", "energy")
        told = [
            hwmodels.resting_text(hwmodels.rests_on(work, accelerator, of=of), of)
            for of in quantities
        ]
        m, n, k = _USUAL
        whole = "; its energy ".join(text for text in told if text)
        start = f"{len(assumed)} values are assumed: {text} of m={m}, n={n}, k={k} "
        return (start + ("its energy " if not told[0] else "") + whole) * bool(whole)
    return ""


def _modes_of(accelerator: "Accelerator", split: "PrecisionSplit") -> list[dict]:

    main, branch = split.costed
    return hwmodels.describe_modes(accelerator, main, branch=branch, family=split.family)


@app.command("explain", epilog=_EXPLAIN_EXAMPLES)
@one_line_failures
def explain_command(
    name: Machine,
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="m=M,n=N,k=K|MxKxN",
            help="GEMM size: M rows, N output features, K input features.",
        ),
    ] = "4096x1152x4608",
    split: Annotated[
        str, typer.Option("--split", metavar="SPLIT", help="Precision split such as W4A4+W8A8r16.")
    ] = "W4A4",
    schedule: Annotated[
        str, typer.Option("--schedule", metavar="NAME", help="How the branch runs; see cost.")
    ] = "fused",
    family: Family = "int",
    group: Group = 64,
    smooth: Smooth = None,
    rotate: Rotate = None,
    shared_by: SharedBy = 1,
    kernel: KernelFamily = None,
    launch: Launch = "stream",
    variants: Variants = None,
    sets: Sets = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Explain one cost: its parts, what is busy how long, and which numbers of the file matter."""
    from loraq_sim.machine import cost_split

    machines = chosen_machines([name], variants, sets, None)
    if len(machines) != 1:
        raise InputError("hw explain takes one machine; give one --variant")
    machine = machines[0][1]
    chosen = parse_split(split, family=family, group=group)
    m, n, k = sizes_of("--shape", shape)
    how: dict[str, Any] = {"kernel": kernel, "launch": launch}
    work, cost = cost_split(
        m, n, k, chosen, machine,
        schedule=checked_schedule(schedule, unfused=False),
        smooth=smooth, rotate=rotate, shared_by=shared_by, **how,
    )  # fmt: skip
    parts = _parts(cost)
    same = functools.partial(hwmodels.estimate_cost, **how)
    effects = hwmodels.sensitivity(work, machine, cost_of=same)
    facts = {row["key"]: row for row in hwmodels.describe(machine)}
    for row in effects:
        row["confidence"] = facts.get(_indexed(row["key"], machine), {}).get("confidence", "")
    summary = {
        "accelerator": machine.name, "shape": shape, "split": chosen.text, "schedule": schedule,
        "latency_s": cost.latency_s, "roofline_latency_s": cost.roofline_latency_s,
        "utilization": cost.utilization, "bound": cost.bound, "energy_j": cost.energy_j,
        "dram_bytes": cost.dram_bytes, "weight_bytes": cost.weight_bytes,
        "peak_activation_bytes": cost.peak_activation_bytes, "fits_in": cost.fits_in,
        "transforms": list(work.transforms), "shared_by": work.shared_by,
        "kernel": cost.kernel, "confidence": cost.confidence,
        "latency_low_s": cost.latency_low_s, "latency_high_s": cost.latency_high_s,
        "mean_error": cost.mean_error, "worst_error": cost.worst_error, "padding": cost.padding,
    }  # fmt: skip
    if cost.padding:
        note(cost.padding)
    if output is OutputFormat.JSON:
        details = {"modes": cost.modes, "tile_mkn": cost.tile_mkn, "parts": parts}
        print_json(parts, summary | details | {"sensitivity": effects})
        return
    what = " ".join([f"M={m}, N={n}, K={k}: {chosen.text}", *work.transforms])
    what += f" shared by {shared_by}" if shared_by > 1 else ""
    tables = [
        result_table(
            parts if output is OutputFormat.CSV else in_own_units(parts),
            title=f"{what} on {machine.name}: {cost.bound}-bound, kernels {cost.kernel} "
            f"({trust_words(cost)})",
        ),
        result_table(effects, title="Change of the cost per change of a number (1: in proportion)"),
    ]
    print_tables(tables, output)


def trust_words(cost: "Cost") -> str:
    """How sure a cost is: its confidence, and the errors of the rows behind it."""
    if cost.mean_error is None or cost.worst_error is None:
        return f"{cost.confidence}: no measured rows"
    errors = f"rows off by {cost.mean_error:.0%} in the mean, {cost.worst_error:.0%} at worst"
    return f"{cost.confidence}; {errors}"


def _parts(cost: "Cost") -> list[dict[str, Any]]:
    totals = {"latency_s": cost.latency_s, "energy_j": cost.energy_j}
    totals |= {"dram_bytes": cost.dram_bytes, "weight_bytes": cost.weight_bytes}
    rows = []
    for quantity, total in totals.items():
        for part, value in cost.parts[quantity].items():
            if value:
                share = value / total
                rows.append({"quantity": quantity, "part": part, "value": value, "share": share})
    for resource, value in cost.busy_s.items():
        share = value / cost.latency_s
        rows.append({"quantity": "busy_s", "part": resource, "value": value, "share": share})
    return rows


def _indexed(key: str, machine: Any) -> str:
    """The key as `describe` writes it: modes by number."""
    for index, mode in enumerate(machine.modes):
        key = key.replace(f"modes.{mode.name}.", f"modes[{index}].")
    return key


app.command("validate", epilog=VALIDATE_EXAMPLES)(validate_command)
app.command("fit", epilog=FIT_EXAMPLES)(fit_command)
app.command("synth", epilog=SYNTH_EXAMPLES)(synth_command)
app.command("energy", epilog=ENERGY_EXAMPLES)(energy_command)


@app.command("schema", epilog=_SCHEMA_EXAMPLES)
@one_line_failures
def schema_command() -> None:
    """Print the JSON Schema of accelerator files, for editors and checkers."""
    from hwmodels.description import Accelerator

    # A document of a standard of its own, no rows.
    say(json_text(Accelerator.model_json_schema()), nl=False)
