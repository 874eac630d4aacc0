"""``loraq-sim solve``: split the weights of a dump and report error and bytes per layer."""

from loraq_sim.cli.failures import case_failure, end_with, one_line_failures
from loraq_sim.cli.options import (
    Family,
    Group,
    LayerDumpFile,
    Layers,
    Methods,
    OutFormat,
    OutputFormat,
    Preset,
    Quiet,
    Seed,
    Splits,
    listed,
)
from loraq_sim.cli.output import print_table
from loraq_sim.cli.progress import tracked

__all__ = ["EXAMPLES", "solve_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --split W4A4+W8A8@fp16r32\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --layers '*query' "
    "--method rtn,lqer,svdquant,loraq --split W4A4+W16A16r32"
)
_SHOWN = (
    *("layer", "n", "k", "split", "method", "rank", "weight_bytes", "bits_per_weight"),
    *("weight_error", "seconds"),
)


@one_line_failures
def solve_command(
    layer_dump: LayerDumpFile,
    layers: Layers = None,
    splits: Splits = None,
    method: Methods = None,
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    seed: Seed = 0,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Solve the weights of a dump; no accelerator, no activations."""
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.evaluate import solve_split
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    dump = read_layer_dump(layer_dump)
    if layers:
        dump = dump.select(listed(layers))
    chosen = [
        parse_split(text, family=family, group=group)
        for text in listed(splits) or ("W4A4+W8A8@fp16r32",)
    ]
    cases = [
        (name, split, name_of_method)
        for name in dump
        for split in chosen
        for name_of_method in listed(method) or ("loraq",)
    ]
    rows = []
    for name, split, name_of_method in tracked(cases, "solving", quiet=quiet):
        row = {"layer": name, "split": split.text, "method": name_of_method, "preset": preset}
        try:
            layer = dump[name]
            solution = solve_split(layer, split, method=name_of_method, preset=preset, seed=seed)
            row |= {
                "kind": layer.kind,
                "n": layer.n,
                "k": layer.k,
                "method": solution.method,
                "rank": solution.rank,
                "weight_bytes": solution.nbytes,
                "bits_per_weight": solution.bits_per_weight,
                "weight_error": solution.weight_error,
                "seconds": solution.seconds,
                "bytes_by_part": solution.bytes_by_part,
                "seed": seed,
                "status": "ok",
                "message": "",
            }
        except Exception as error:
            row |= {"status": "failed", "message": case_failure(error)}
        rows.append(row)
    title = f"{layer_dump}: weight error"

    def show(has_messages: bool) -> None:
        columns = [*_SHOWN, "message"] if has_messages else list(_SHOWN)
        print_table(result_table(rows, columns, title=title), output)

    end_with(rows, show)
