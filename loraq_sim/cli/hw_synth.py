"""``loraq-sim hw synth`` and ``hw energy``: MAC arrays in gates, and what operands cost in them.

Without Yosys the table that ships with the program answers, and a closed form between its rows.
``--synthesize`` runs Yosys on the units asked for and sets the outcome beside the table; ``--fill``
makes the table, ``--fit`` the closed form. ``hw energy`` counts the toggles of a layer's own
operands in those gates, beside random ones.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import hwmodels
from hwmodels.gates import Column, read_gates
from hwmodels.synthesis import TRANSISTORS_PER_GE
from loraq_sim.cli.options import (
    Group,
    LayerDumpFile,
    Layers,
    OutFormat,
    OutputFormat,
    Seed,
    Splits,
    listed,
    whole_numbers,
)
from loraq_sim.cli.output import note, one_line_failures, print_json, print_table, say
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError
from loraq_sim.files import write_file
from loraq_sim.reporting.tables import result_table

__all__ = ["ENERGY_EXAMPLES", "SYNTH_EXAMPLES", "energy_command", "synth_command"]

SYNTH_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw synth --a-bits 4,8 --w-bits 4 --acc-bits 16,20,32 --products-per-add 1,8\n\n"
    "loraq-sim hw synth --acc-bits 16 --overflow wrap,saturate --node 7\n\n"
    "loraq-sim hw synth --acc-bits 20 --products-per-add 4 --synthesize"
)
ENERGY_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw energy --layer-dump examples/minilm.pt --layers 'ffn_up'\n\n"
    "loraq-sim hw energy --layer-dump examples/tiny_pixart.pt --split W4A4,W6A6 --node 28 "
    "--products-per-add 1 --dataflow weight"
)
_ENERGY_SPLITS = ("W4A4", "W4A8", "W6A6", "W8A8")
_ENERGY_SHOWN = (
    *("layer", "split", "pj_per_mac", "random_pj_per_mac", "ratio", "glitch_factor"),
    *("multiplier_pj", "tree_pj", "accumulator_pj", "saturation_pj"),
)
_SHOWN = (
    *("a_bits", "w_bits", "products_per_add", "accumulators", "acc_bits", "overflow"),
    *("source", "area_ge", "multiplier_ge", "tree_ge", "accumulator_ge", "saturation_ge"),
    *("flip_flops", "depth"),
)
_FEWEST_ROWS = 100
Widths = list[str] | None


def _list_option(flag: str, text: str) -> Any:
    return typer.Option(flag, metavar="N,...", help=text, show_default=False)


@one_line_failures
def synth_command(
    a_bits: Annotated[Widths, _list_option("--a-bits", "Bits of activations (8).")] = None,
    w_bits: Annotated[Widths, _list_option("--w-bits", "Bits of weights (8).")] = None,
    acc_bits: Annotated[Widths, _list_option("--acc-bits", "Accumulator widths (32).")] = None,
    overflow: Annotated[
        list[str] | None,
        typer.Option("--overflow", metavar="RULE,...", help="wrap, saturate, saturate_symmetric."),
    ] = None,
    products_per_add: Annotated[
        Widths, _list_option("--products-per-add", "Products summed in a tree before an add (1).")
    ] = None,
    accumulators: Annotated[
        Widths, _list_option("--accumulators", "Partial accumulators that take turns (1).")
    ] = None,
    tree_bits: Annotated[
        int | None,
        typer.Option("--tree-bits", metavar="N", help="Width of a narrow tree; exact without."),
    ] = None,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Activations are unsigned codes.")
    ] = False,
    zero_point: Annotated[
        bool,
        typer.Option("--zero-point", help="Accumulators start at a zero point's correction."),
    ] = False,
    out_bits: Annotated[
        int, typer.Option("--out-bits", metavar="N", help="Width behind shift-round-saturate.")
    ] = 8,
    rounding: Annotated[
        str, typer.Option("--rounding", metavar="MODES", help="conv_even, floor, or all modes.")
    ] = "conv_even",
    node: Annotated[
        int | None,
        typer.Option("--node", metavar="NM", help="Process for area and energy, such as 7."),
    ] = None,
    synthesize: Annotated[
        bool,
        typer.Option("--synthesize", help="Run Yosys on these columns, too (seconds each)."),
    ] = False,
    fill: Annotated[
        Path | None,
        typer.Option(
            "--fill", metavar="FILE.csv", help="Synthesize what the table in FILE lacks (minutes)."
        ),
    ] = None,
    fit: Annotated[
        Path | None,
        typer.Option("--fit", metavar="FILE.json", help="Fit the closed form to the table."),
    ] = None,
    fill_scalable: Annotated[
        Path | None,
        typer.Option(
            "--fill-scalable",
            metavar="FILE.csv",
            help="Synthesize the precision-scalable MACs of `explore --published`.",
        ),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Show what a MAC array costs in gates: by part, per MAC; area and energy on a node."""
    if fill is not None:
        _fill(fill)
    if fit is not None:
        _fit(fit, fill)
    if fill_scalable is not None:
        _fill_scalable(fill_scalable)
    if fill is not None or fit is not None or fill_scalable is not None:
        return
    rows = []
    for a, w, count, turns, bits, rule in itertools.product(
        whole_numbers("--a-bits", a_bits) or (8,),
        whole_numbers("--w-bits", w_bits) or (8,),
        whole_numbers("--products-per-add", products_per_add) or (1,),
        whole_numbers("--accumulators", accumulators) or (1,),
        whole_numbers("--acc-bits", acc_bits) or (32,),
        listed(overflow) or ("wrap",),
    ):
        mac = MacArray(
            acc_bits=bits,
            overflow=rule,
            products_per_add=count,
            accumulators=turns,
            tree_bits=tree_bits,
        )
        array = hwmodels.synthesized_array(
            mac,
            a_bits=a,
            w_bits=w,
            a_signed=not unsigned,
            zero_point=zero_point,
            out_bits=out_bits,
            rounding=rounding,
            node_nm=node,
        )
        rows.append(_row_of(array))
    if synthesize:
        rows = [row | more for row, more in zip(rows, _synthesized(rows), strict=True)]
    shown = list(_SHOWN)
    shown += ["area_um2", "energy_pj_per_mac"] if node is not None else []
    shown += ["yosys_ge", "yosys_depth", "yosys"] if synthesize else []
    if output is OutputFormat.JSON:
        print_json(rows, {"node": _node_facts(node)} if node is not None else None)
        return
    print_table(result_table(rows, shown, title="Gate equivalents per MAC"), output)
    modeled = sum(row["source"] == "modeled" for row in rows)
    note(
        f"{len(rows) - modeled} synthesized, {modeled} from the closed form; gates only: no wires, "
        "clock tree or operand registers. Area is mapped without a timing constraint"
    )
    if node is not None:
        note(_node_note(node))


def _row_of(array: "hwmodels.SynthesizedArray") -> dict[str, Any]:
    column = array.column
    row: dict[str, Any] = {**vars(column), "tree_bits": column.tree_bits or None}
    if column.tree_bits == 0:
        row["tree_overflow"] = None
    row |= {"source": array.source, "area_ge": array.area_ge, "column_ge": array.column_ge}
    row |= {f"{part}_ge": value for part, value in array.parts.items()}
    row |= {"flip_flops": array.flip_flops, "depth": array.depth, "merged_ge": array.merged_ge}
    if array.node is not None:
        row |= {"node_nm": array.node.name, "area_um2": array.area_um2}
        row["energy_pj_per_mac"] = array.energy_pj_per_mac
    return row


def _node_note(node: int) -> str:
    """How far the figures can be trusted that turn gates into area and energy."""
    known = hwmodels.load_node(node)
    how = known.confidence
    return (
        f"{node} nm: a NAND2 of {known.nand2_um2:g} um2 ({how['nand2_um2']}), an int8 multiply of "
        f"{known.multiply_pj:g} pJ ({how['multiply_pj']}), placed area {known.placed:.0%} full "
        f"({how['placed']}); --format json has the sources"
    )


def _node_facts(node: int) -> dict[str, Any]:
    return vars(hwmodels.load_node(node))


def _synthesized(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from loraq_sim.silicon.synthesize import synthesize, yosys_version

    for row in rows:
        settings = {key: row[key] for key in vars(Column())}
        settings |= {"tree_bits": row["tree_bits"] or 0}
        settings |= {"tree_overflow": row["tree_overflow"] or "wrap"}
        found = synthesize(Column(**settings)).gates
        per_mac = TRANSISTORS_PER_GE * row["products_per_add"]
        yield {
            "yosys": yosys_version(),
            "yosys_ge": found.transistors / per_mac,
            "yosys_depth": found.depth,
            "yosys_merged_ge": None
            if found.merged_transistors is None
            else found.merged_transistors / per_mac,
        }


def _fill(path: Path) -> None:
    from loraq_sim.silicon.synthesize import fill_table, table_units

    units = list(table_units())
    added = fill_table(path, units, on_unit=lambda unit: note(f"synthesizes {unit}"))
    note(f"{path}: {len(units)} units, {added} of them new")


def _fill_scalable(path: Path) -> None:
    from loraq_sim.silicon.synthesize import SCALABLE, fill_scalable
    from loraq_sim.silicon.toggles import clocked_units

    fill_scalable(
        path, on_design=lambda design: note(f"synthesizes {design}"), units_of=clocked_units
    )
    note(f"{path}: {len(SCALABLE)} designs")


def _fit(path: Path, table: Path | None) -> None:
    from loraq_sim.silicon.gate_fit import check_fit, model_text
    from loraq_sim.silicon.toggles import activity

    rows, notes = read_gates() if table is None else read_gates(table)
    if len(rows) < _FEWEST_ROWS:
        raise InputError(f"a fit needs {_FEWEST_ROWS} units or more, the table has {len(rows)}")
    write_file(path, model_text(rows, notes[-1:], activity()))
    for name, check in check_fit(rows).items():
        note(
            f"{name}: {check.units} units left out: area off by {check.mean_area_error:.1%} in the "
            f"mean, {check.worst_area_error:.1%} at worst; depth {check.mean_depth_error:.1%}, "
            f"{check.worst_depth_error:.1%}"
        )


@one_line_failures
def energy_command(
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    group: Group = 64,
    acc_bits: Annotated[
        int, typer.Option("--acc-bits", metavar="N", help="Bits of the accumulator.")
    ] = 24,
    overflow: Annotated[
        str, typer.Option("--overflow", metavar="RULE", help="wrap, saturate, saturate_symmetric.")
    ] = "wrap",
    products_per_add: Annotated[
        int, typer.Option("--products-per-add", metavar="N", help="Products summed in a tree.")
    ] = 8,
    node: Annotated[int, typer.Option("--node", metavar="NM", help="Process, such as 7.")] = 7,
    dataflow: Annotated[
        str,
        typer.Option(
            "--dataflow",
            metavar="NAME",
            help="output (both operands change every cycle) or weight (weights stay while rows "
            "pass).",
        ),
    ] = "output",
    cycles: Annotated[
        int, typer.Option("--cycles", metavar="N", help="Cycles of a layer to count, at most.")
    ] = 16384,
    seed: Seed = 0,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Count what a layer's own operands cost in the gates of an array, beside random operands.

    Every accumulator value comes from the emulator. Arrays whose gates do not ship need Yosys.
    """
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.silicon.toggles import layer_energy
    from loraq_sim.split import parse_split

    hwmodels.load_node(node)
    if not 16 <= cycles <= 2**24:
        raise InputError(f"--cycles must be a whole number from 16 to 2**24, got {cycles}")
    mac = MacArray(acc_bits=acc_bits, overflow=overflow, products_per_add=products_per_add)
    dump = read_layer_dump(layer_dump)
    chosen = dump.select(listed(layers)) if layers else dump
    wanted = [parse_split(text, group=group) for text in listed(splits) or _ENERGY_SPLITS]
    rows: list[dict[str, Any]] = []
    for name in chosen:
        layer = chosen[name]
        for split in wanted:
            found = layer_energy(
                layer, split, mac, node_nm=node, dataflow=dataflow, cycles=cycles, seed=seed
            )
            row = {"layer": name, "kind": layer.kind, "split": split.text, "node_nm": node}
            row |= {"pj_per_mac": found.pj_per_mac, "random_pj_per_mac": found.random_pj_per_mac}
            row |= {"ratio": found.pj_per_mac / found.random_pj_per_mac}
            row |= {"glitch_factor": found.glitch_factor, "cycles": found.cycles}
            row |= {f"{part}_pj": value for part, value in found.parts.items()}
            row |= {"n": layer.n, "k": layer.k, "dataflow": dataflow, "array": str(mac)}
            rows.append(row)
    told = [_operands_said(split.text, rows) for split in wanted]
    if output is OutputFormat.JSON:
        print_json(rows, {"node": _node_facts(node), "said": told})
        return
    print_table(result_table(rows, _ENERGY_SHOWN, title=f"Energy of operands in {mac}"), output)
    if output is OutputFormat.TABLE:
        for line in told:
            say(line)
    note(
        "without glitches, which a tree has more of than a single product: glitch_factor times as "
        "much if every gate took one step and swallowed none, an upper bound; no wires, clock "
        "tree, operand registers or memories"
    )
    note(_node_note(node))


def _operands_said(split: str, rows: list[dict[str, Any]]) -> str:
    """What the operands of all layers cost against random ones, each layer by its weights."""
    own = [row for row in rows if row["split"] == split]
    weights = [row["n"] * row["k"] for row in own]
    means = [
        sum(row[key] * weight for row, weight in zip(own, weights, strict=True)) / sum(weights)
        for key in ("pj_per_mac", "random_pj_per_mac", "glitch_factor")
    ]
    return (
        f"{split}: {means[0]:.3g} pJ per MAC on these layers, {means[0] / means[1]:.2f} of the "
        f"{means[1]:.3g} pJ of random operands; up to {means[2]:.1f} times that with glitches"
    )
