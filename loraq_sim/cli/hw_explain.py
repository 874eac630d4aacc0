"""``loraq-sim hw explain``: where each second, byte and joule of one layer call comes from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.hw_choice import Sets, Variants, chosen_machines
from loraq_sim.cli.options import Family, Group, OutFormat, OutputFormat, Rotate, SharedBy, Smooth
from loraq_sim.cli.output import print_json, print_tables
from loraq_sim.errors import InputError

if TYPE_CHECKING:
    from hwmodels import Cost

__all__ = ["EXAMPLES", "explain_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim hw explain aie2 --shape 4096x1152x4608 --split W4A4+W8A8r64\n\n"
    "loraq-sim hw explain h100 --shape 4096x3072x3072 --split W4A4+W16A16r32 --schedule unfused"
)


@one_line_failures
def explain_command(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="Accelerator, NAME@VARIANT, or YAML file."),
    ],
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            metavar="MxKxN",
            help="GEMM size: rows x input features x output features.",
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
    variants: Variants = None,
    sets: Sets = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Explain one cost: its parts, what is busy how long, and which numbers of the file matter."""
    import hwmodels
    from loraq_sim.cli.cost import checked_schedule, parse_shape, workload_of_split
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    machines = chosen_machines([name], variants, sets, None)
    if len(machines) != 1:
        raise InputError("hw explain takes one machine; give one --variant")
    machine = machines[0][1]
    chosen = parse_split(split, family=family, group=group)
    work = workload_of_split(
        parse_shape(shape), chosen, machine, checked_schedule(schedule, unfused=False),
        smooth=smooth, rotate=rotate, shared_by=shared_by,
    )  # fmt: skip
    cost = hwmodels.estimate_cost(work, machine)
    parts = _parts(cost)
    effects = hwmodels.sensitivity(work, machine)
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
    }  # fmt: skip
    if output is OutputFormat.JSON:
        details = {"modes": cost.modes, "tile_mkn": cost.tile_mkn, "parts": parts}
        print_json(summary | details | {"sensitivity": effects})
        return
    what = " ".join([chosen.text, *work.transforms])
    what += f" shared by {shared_by}" if shared_by > 1 else ""
    tables = [
        result_table(parts, title=f"{shape} {what} on {machine.name}: {cost.bound}-bound"),
        result_table(effects, title="Change of the cost per change of a number (1: in proportion)"),
    ]
    print_tables(tables, output)


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
