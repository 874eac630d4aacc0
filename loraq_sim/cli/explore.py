"""``loraq-sim explore`` and ``hw new --split``: chips on paper, searched for or given."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwmodels
from hwmodels.errors import quantity_text
from loraq_sim.cli.options import (
    Family,
    Force,
    Group,
    Layers,
    OutFormat,
    OutputFormat,
    Quiet,
    Splits,
    listed,
    whole_numbers,
)
from loraq_sim.cli.output import note, one_line_failures, print_json, print_tables, say
from loraq_sim.errors import InputError, counted
from loraq_sim.files import refuse_existing, write_file
from loraq_sim.reporting.tables import result_table
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from loraq_sim.emulator.mac_array import MacArray
    from loraq_sim.layers import Layer
    from loraq_sim.silicon.explore import StepWork

__all__ = ["EXAMPLES", "explore_command", "new_paper"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim explore --area 4mm2 --model pixart-sigma\n\n"
    "loraq-sim explore --area 2mm2 --model pixart-sigma --node 28 --split W4A8,W8A8 "
    "--out runs/chip.yaml\n\n"
    "loraq-sim explore --area 0.5mm2 --layer-dump examples/tiny_pixart.pt --layers '*.0.*' "
    "--split W4A4,W8A8"
)
_SPLITS = ("W4A4", "W4A4+W8A8@fp16r32", "W4A8", "W6A6", "W8A8")
_SHOWN = (
    *("split", "rows", "columns", "products_per_add", "acc_bits", "overflow", "sram_bytes"),
    *("area_mm2", "output_error", "latency_s", "energy_j", "peak_tops", "tops_per_w", "bound"),
    "point",
)
_COMPARED = (
    *("chip", "node_nm", "precision", "macs", "published_mm2", "model_mm2", "area_error"),
    *("published_tops_per_w", "at_nominal_tops_per_w", "model_tops_per_w", "energy_error"),
    "mac_share",
)
_SCALABLE = (
    *("comparison", "quantity", "published_ratio", "model_ratio", "published_um2", "model_um2"),
    "factor",
)
_AREA = re.compile(r"\s*(\d+\.?\d*|\.\d+)\s*mm2\s*")
_SHOWN_DESIGNS = 24
_FIRM = ("published", "derived")


@one_line_failures
def explore_command(
    area: Annotated[
        str | None,
        typer.Option(
            "--area", metavar="AREA", help="Area of the chip, such as 4mm2.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME",
            help="Published model whose linear layers are to run. Default: those of the dump.",
            show_default=False,
        ),
    ] = None,
    layer_dump: Annotated[
        Path | None,
        typer.Option(
            "--layer-dump",
            metavar="FILE",
            help="Layers that errors are measured on. Default: three drawn ones of the model.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    splits: Splits = None,
    family: Family = "int",
    group: Group = 64,
    node: Annotated[int, typer.Option("--node", metavar="NM", help="Process, such as 7.")] = 7,
    products_per_add: Annotated[
        list[str] | None,
        typer.Option(
            "--products-per-add",
            metavar="N,...",
            help="Adder trees to try (1,8).",
            show_default=False,
        ),
    ] = None,
    clock: Annotated[
        str, typer.Option("--clock", metavar="HZ", help="Clock of the array.")
    ] = "1GHz",
    dram: Annotated[
        str, typer.Option("--dram", metavar="B/S", help="Bandwidth of DRAM.")
    ] = "51.2GB/s",
    resolution: Annotated[
        int, typer.Option("--resolution", metavar="PIXELS", help="Image side of the model.")
    ] = 1024,
    tokens: Annotated[
        int, typer.Option("--tokens", metavar="T", help="Activation rows for the errors.")
    ] = 16,
    method: Annotated[
        str, typer.Option("--method", metavar="NAME", help="Solver of splits with a branch.")
    ] = "svdquant",
    attention: Annotated[
        str,
        typer.Option(
            "--attention",
            metavar="FORMAT",
            help="With --model: run attention in int8 on the same array, or none of it.",
        ),
    ] = "int8",
    per_branch: Annotated[
        int,
        typer.Option(
            "--per-branch",
            metavar="N",
            help="Multipliers of the main branch for one of the side branch or of attention.",
        ),
    ] = 8,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.yaml",
            help="Write the accelerator file of the knee, for --hw.",
            show_default=False,
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published", help="Hold area and energy against published chips, and do no search."
        ),
    ] = False,
    force: Force = False,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Search columns, rows, accumulator, SRAM and split of a chip for latency, energy and error."""
    from loraq_sim.silicon.explore import check_chip, explore

    if published:
        _print_published(output)
        return
    size = None if area is None else _AREA.fullmatch(area)
    if size is None:
        raise InputError(f"--area must be a number of mm2, such as 4mm2, got {area!r:.40}")
    check_chip(float(size[1]), node)
    clock_hz = _rate("--clock", clock)
    dram_bytes_per_s = _rate("--dram", dram)
    if out is not None:
        refuse_existing(out, overwrite=force)
    wanted = [parse_split(text, family=family, group=group) for text in listed(splits) or _SPLITS]
    chosen, work, whence = _layers_and_work(
        model, layer_dump, listed(layers), resolution, tokens, attention
    )
    found = explore(
        wanted,
        chosen,
        work,
        area_mm2=float(size[1]),
        node_nm=node,
        clock_hz=clock_hz,
        dram_bytes_per_s=dram_bytes_per_s,
        per_branch=per_branch,
        products_per_add=whole_numbers("--products-per-add", products_per_add) or (1, 8),
        tokens=tokens,
        method=method,
        on_split=lambda split: note(f"measures the error of {split}", quiet=quiet),
    )
    for text in found.notes:
        note(text, quiet=quiet)
    rows = [_plain(row) | {"point": "knee" if row is found.knee else ""} for row in found.front]
    said = _said(found.knee, found.front, found.n_designs, float(size[1]), node)
    whence += f"; branches by {method}, splits without one rounded to nearest"
    if output is OutputFormat.JSON:
        print_json(
            rows,
            {"said": said, "n_designs": found.n_designs, "errors_of": whence, "work": work.told},
        )
    else:
        shown = _spread(rows) if output is OutputFormat.TABLE else rows
        title = f"Front of {found.n_designs} designs of {size[1]} mm2 on {node} nm"
        print_tables([result_table(shown, _SHOWN, title=title)], output)
        if output is OutputFormat.TABLE:
            say(said)
    note(f"errors of {whence}; accumulators hold the sums of these rows", quiet=quiet)
    note(f"latency and energy of {work.told}", quiet=quiet)
    note(
        "area of MACs, what stands below columns, and SRAM: no control, wires between units, clock "
        "or pads, so that published chips take two to four times as much (--published)",
        quiet=quiet,
    )
    if out is not None:
        _write(out, found.knee["design"])
        note(f"wrote {out}", quiet=quiet)


# Flag: the key whose unit it has, least and most.
_RATES = {
    "--clock": ("clock_hz", 1e7, 1e11),
    "--dram": ("bandwidth_bytes_per_s", 1e7, 5e13),
}


def _rate(flag: str, given: str | float) -> float:
    """A clock or bandwidth, which may be written with its unit, as in accelerator files."""
    key, least, most = _RATES[flag]
    value = hwmodels.parse_value(given, key) if isinstance(given, str) else given
    if isinstance(value, int | float) and least <= value <= most:
        return float(value)
    low, high = (quantity_text(key, limit) for limit in (least, most))
    raise InputError(f"{flag} must be from {low} to {high}, got {given!r:.40}")


def _print_published(output: OutputFormat) -> None:
    from loraq_sim.silicon import gate_fit

    rows, operations = gate_fit.published_chips(), gate_fit.published_operations()
    scalable = gate_fit.published_scalable()
    if output is OutputFormat.JSON:
        print_json(rows, {"operations": operations, "scalable": scalable})
        return
    tables = [
        result_table(
            operations, [name for name in operations[0] if name != "source"],
            title="Published operations, and the same gates of a synthesized column",
        ),
        result_table(
            scalable, _SCALABLE,
            title="Published precision-scalable MACs, and our gates of such designs",
        ),
        result_table(
            rows, _COMPARED,
            title="Published chips, and what gates, bit cells and the cost model say of them",
        ),
    ]  # fmt: skip
    # Programs read one table: the chips; JSON has the operations beside them.
    print_tables(tables[2:] if output is OutputFormat.CSV else tables, output)
    for row in operations:
        note(f"{row['operation']}, {row['node_nm']} nm: {row['source']}")
    for row in scalable:
        note(f"{row['comparison']}: {row['source']}; {row['differs']}")
    for row in rows:
        note(f"{row['chip']}: {row['area_of']}; {row['measured']}. {row['source']}")


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in ("design", "pareto")}


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `_SHOWN_DESIGNS` of a front, both ends and the knee among them."""
    if len(rows) <= _SHOWN_DESIGNS:
        return rows
    step = (len(rows) - 1) / (_SHOWN_DESIGNS - 1)
    kept = {round(index * step) for index in range(_SHOWN_DESIGNS)}
    note(f"{len(rows)} designs on the front, {_SHOWN_DESIGNS} shown; --format json has all")
    return [row for index, row in enumerate(rows) if index in kept or row["point"]]


def _layers_and_work(
    model: str | None,
    layer_dump: Path | None,
    patterns: tuple[str, ...],
    resolution: int,
    tokens: int,
    attention: str,
) -> "tuple[list[Layer], StepWork, str]":
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.silicon.explore import StepWork, drawn_layers, model_work

    work = None
    if model is not None:
        work = model_work(model, resolution=resolution, attention=attention)
    if layer_dump is None:
        if work is None:
            raise InputError("explore needs --model, --layer-dump, or both")
        chosen = drawn_layers(str(model), tokens=tokens, resolution=resolution)
        names = ", ".join(layer.kind or layer.name for layer in chosen)
        told = f"{names}, {tokens} rows each drawn with the statistics of trained layers of {model}"
        return chosen, work, told
    dump = read_layer_dump(layer_dump)
    dump = dump.select(patterns) if patterns else dump
    chosen = [dump[name] for name in dump]
    if work is None:
        shapes: dict[tuple[int, int, int], int] = {}
        for layer in chosen:
            if layer.m is None:
                raise InputError(f"layer {layer.name!r}: rows per call not known; give --model")
            shape = (layer.m, *layer.weight.shape)
            shapes[shape] = shapes.get(shape, 0) + (layer.calls_per_step or 1)
        told = (
            f"{counted(len(chosen), 'linear layer')} of {layer_dump.name} in a step: no attention"
        )
        work = StepWork(shapes=shapes, told=f"{told} and no elementwise work, which no dump holds")
    told = f"{counted(len(chosen), 'layer')} of {layer_dump.name}, {tokens} rows each at most"
    return chosen, work, told


def _said(
    knee: dict[str, Any], front: list[dict[str, Any]], n_designs: int, area: float, node: int
) -> str:
    """The knee in a sentence, and what the ends of the front have instead."""
    from loraq_sim.results.choice import WORST_ERROR
    from loraq_sim.results.wording import value_text

    def design(row: dict[str, Any]) -> str:
        over = row["overflow_count"]
        return (
            f"{row['rows']} x {row['columns']} elements of "
            f"{counted(row['products_per_add'], 'product')}, {row['acc_bits']} bits "
            f"({row['overflow']}{f', {over:,} adds overflow' if over else ''}), "
            f"{row['sram_bytes'] / 2**20:.2g} MiB"
        )

    def numbers(row: dict[str, Any]) -> str:
        return ", ".join(value_text(k, row[k]) for k in ("output_error", "latency_s", "energy_j"))

    least, fastest = front[0], min(front, key=lambda row: row["latency_s"])
    share = knee["sram_mm2"] / knee["area_mm2"]
    text = f"{area:g} mm2 on {node} nm, {n_designs} designs: {knee['split']} on {design(knee)} "
    text += f"({share:.0%} of the area SRAM) is the knee with {numbers(knee)} error, time and "
    text += "energy of a step."
    for word, row in (("Least error", least), ("Least time", fastest)):
        if row is not knee:
            text += f" {word}: {row['split']} on {design(row)} with {numbers(row)}."
    if knee["output_error"] > WORST_ERROR:
        text += (
            f" No design is fit to build: {WORST_ERROR:.0%} is the most error that counts as fit."
        )
    return f"{text} {_assumed_said(knee, node)}"


_FIGURES = (
    *(("nand2_um2", "area of a gate"), ("multiply_pj", "energy of a product")),
    ("sram_um2_per_bit", "bit cell"),
)


def _assumed_said(knee: dict[str, Any], node: int) -> str:
    """What the knee rests on that nobody has synthesized or measured."""
    made, how = knee["design"], hwmodels.load_node(node).confidence
    text = f"Assumed: {1 - knee['gates_energy_share']:.1%} of the knee's energy (memories, lanes "
    text += "and idle power at figures nobody measured for it; the rest is MACs in gates)"
    if "," in knee["modes"]:
        text += f", {counted(made.beside, 'multiplier')} of each other mode beside "
        text += f"{made.products_per_add} of the main one"
    weak = [f"{words} {how[name]}" for name, words in _FIGURES if how[name] not in _FIRM]
    return f"{text}, clock and SRAM speed" + f"; of {node} nm: {', '.join(weak)}" * bool(weak) + "."


def _write(path: Path, design: Any) -> None:
    import io

    from ruamel.yaml import YAML

    from loraq_sim.silicon.explore import paper_content

    yaml, text = YAML(), io.StringIO()
    yaml.default_flow_style = False
    name = re.sub(r"[^a-z0-9_.-]", "-", path.stem.lower())[:40].lstrip("_.-") or "paper"
    content = paper_content(design, name)
    for mode in content["modes"]:
        if "unsigned" in mode:
            mode["unsigned"] = list(mode["unsigned"])
    yaml.dump(content, text)
    write_file(path, f"# Chosen by loraq-sim explore, for {design.split}.\n{text.getvalue()}")


def print_paper(
    path: Path,
    split: str,
    *,
    rows: int,
    columns: int,
    array: "MacArray",
    sram_bytes: int,
    node: int,
    clock_hz: float,
    dram_bytes_per_s: float,
    output: OutputFormat,
) -> None:
    """Write the file of a chip on paper, whose energies come from synthesis, and print its area."""
    from loraq_sim.silicon.explore import Design, paper_machine

    hwmodels.load_node(node)
    for flag, size, least, most in (
        *(("--rows", rows, 1, 4096), ("--columns", columns, 1, 4096)),
        ("--sram", sram_bytes, 1024, 2**30),
    ):
        if not least <= size <= most:
            raise InputError(f"{flag} must be a whole number from {least} to {most}, got {size}")
    for flag, given in (("--clock", clock_hz), ("--dram", dram_bytes_per_s)):
        _rate(flag, given)
    design = Design(
        split=parse_split(split),
        rows=rows,
        columns=columns,
        products_per_add=array.products_per_add,
        acc_bits=array.acc_bits,
        overflow=array.overflow,
        sram_bytes=sram_bytes,
        node_nm=node,
        clock_hz=clock_hz,
        dram_bytes_per_s=dram_bytes_per_s,
    )
    machine = paper_machine(design)
    _write(path, design)
    tops = 2e-12 * machine.units.count * machine.units.clock_hz
    parts = hwmodels.chip_area(machine)
    row = {
        **{"file": str(path), "area_mm2": sum(parts.values())},
        **{f"{part}_mm2": value for part, value in parts.items()},
        **{f"peak_tops_{mode.name}": tops * mode.macs_per_cycle for mode in machine.modes},
        **{f"pj_per_mac_{mode.name}": mode.energy_pj_per_mac for mode in machine.modes},
    }
    if output is OutputFormat.JSON:
        print_json([row])
        return
    print_tables([result_table([row], title=machine.title)], output)


def new_paper(
    path: Path,
    name: str,
    split: str,
    given: dict[str, Any],
    modes: list[str] | None,
    output: OutputFormat,
) -> None:
    """A chip on paper, of what was given and the defaults of the template of its kind."""
    from loraq_sim.emulator.mac_array import MacArray

    idle = [f"--{flag}" for flag in ("l1", "launch") if given.pop(flag) is not None]
    idle += ["--modes"] if modes else []
    if idle:
        raise InputError(f"{', '.join(idle)} and --split exclude each other: it decides those")
    defaults = {"rows": 64, "columns": 64, "clock": 1e9, "sram": 2**20, "dram": 51.2e9, "node": 7}
    known = {flag: value for flag, value in given.items() if value is not None}
    machine = hwmodels.sketch(name, organization="systolic", **{**defaults, **known})
    rule = machine.datapath
    array = MacArray(
        acc_bits=rule.acc_bits, overflow=rule.overflow, products_per_add=rule.products_per_add
    )
    print_paper(
        path,
        split,
        rows=machine.units.rows,
        columns=machine.units.columns,
        array=array,
        sram_bytes=machine.memories.l2.capacity_bytes,
        node=int(machine.energy.node_nm),
        clock_hz=machine.units.clock_hz,
        dram_bytes_per_s=machine.memories.dram.bandwidth_bytes_per_s,
        output=output,
    )
