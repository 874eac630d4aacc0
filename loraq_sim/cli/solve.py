"""``loraq-sim solve``: split the weights of a dump and report error and bytes per layer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from loraq_sim.cli.failures import case_failure, end_with, one_line_failures
from loraq_sim.cli.options import (
    Family,
    Force,
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
    Tokens,
    listed,
)
from loraq_sim.cli.output import note, print_tables
from loraq_sim.cli.progress import tracked
from loraq_sim.errors import InputError
from loraq_sim.layer_settings import SIXTEEN_BIT_KINDS, parse_override, settings_of, skipped

__all__ = ["EXAMPLES", "solve_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --split W4A4+W8A8@fp16r32\n\n"
    "loraq-sim solve --layer-dump examples/minilm.pt --layers '*query' "
    "--method rtn,lqer,svdquant,loraq --split W4A4+W16A16r32\n\n"
    "loraq-sim solve --layer-dump examples/tiny_pixart.pt --split W4A4+W8A8r8 "
    "--override 'ffn_*:rank=16' --save runs/tiny_pixart_w4.safetensors"
)
_SHOWN = (
    *("layer", "n", "k", "split", "method", "rank", "weight_bytes", "bits_per_weight"),
    *("weight_error", "output_error", "gain_over_rtn", "gain_over_svdquant", "seconds"),
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
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN:KEY=VALUE",
            help="Settings of layers by name or kind: rank, budget, split, method, preset; "
            "repeatable, the last one wins.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="PATTERN",
            help="Layers to leave at 16 bits, by name or kind; 'none' for no layer. Default, "
            "without --layers: the kinds SVDQuant leaves.",
            show_default=False,
        ),
    ] = None,
    tokens: Tokens = None,
    save: Annotated[
        Path | None,
        typer.Option(
            "--save",
            metavar="FILE",
            help="Write the quantized layers as safetensors (one split and method).",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Solve the weights of a dump: bytes, error, and gain over RTN and SVDQuant at equal bytes.

    The output error is that of the stored weight alone: full-precision activations, no emulation
    (see `emulate` for that).
    """
    from loraq_sim.dumps import read_layer_dump
    from loraq_sim.quantized_model import write_quantized_model
    from loraq_sim.solve_report import mean_rows, report_solution, solve_with, split_with
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    texts = listed(splits) or ("W4A4+W8A8@fp16r32",)
    methods = listed(method) or ("loraq",)
    overrides = [parse_override(text) for text in override or ()]
    for text in texts:
        parse_split(text, family=family, group=group)
    if save is not None and (len(texts) > 1 or len(methods) > 1):
        raise InputError("--save needs one split and one method (--override may change them)")
    if save is not None and save.exists() and not force:
        raise InputError(f"{save} is there already; choose another name, or --force to replace it")
    dump = read_layer_dump(layer_dump)
    if layers:
        dump = dump.select(listed(layers))
    left_out = _skip_patterns(listed(skip), bool(layers))
    kept = [name for name in dump if not skipped(name, _kind(dump, name), left_out)]
    if len(kept) < len(dump):
        text = f"{len(dump) - len(kept)} of {len(dump)} layers stay at 16 bits (--skip none: none)"
        note(text, quiet=quiet)
    if not kept:
        raise InputError(f"{layer_dump}: every layer is skipped; give --skip none or --layers")
    cases = [(name, text, chosen) for name in kept for text in texts for chosen in methods]
    rows, solutions = [], {}
    for name, text, chosen in tracked(cases, "solving", quiet=quiet):
        settings = {"split": text, "method": chosen, "preset": preset}
        settings |= settings_of(name, _kind(dump, name), overrides)
        row: dict[str, Any] = {"layer": name} | settings | {"seed": seed}
        try:
            split = parse_split(settings["split"], family=family, group=group)
            split = split_with(split, settings)
            row["split"] = split.text
            layer = dump[name]
            solution = solve_with(layer, split, settings, seed)
            row |= report_solution(layer, solution, split, seed=seed, tokens=tokens)
            solutions[name] = solution
        except Exception as error:
            row |= {"status": "failed", "message": case_failure(error)}
        rows.append(row)
    if save is not None and solutions:
        meta = {"dump": layer_dump.name, "splits": {r["layer"]: r["split"] for r in rows}}
        write_quantized_model(save, solutions, meta=meta, overwrite=force)
        note(f"wrote {save}", quiet=quiet)

    def show(has_messages: bool) -> None:
        columns = [*_SHOWN, "message"] if has_messages else list(_SHOWN)
        tables = [result_table(rows, columns, title=f"{layer_dump}: stored weights")]
        if len({(row["split"], row["method"]) for row in rows}) > 1 and len(kept) > 1:
            tables.append(result_table(mean_rows(rows), title=f"Mean over {len(kept)} layers"))
        print_tables(tables, output)

    end_with(rows, show)


def _skip_patterns(given: tuple[str, ...], has_layers: bool) -> tuple[str, ...]:
    if given:
        return () if given == ("none",) else given
    return () if has_layers else SIXTEEN_BIT_KINDS


def _kind(dump: Any, name: str) -> str:
    try:
        return dump.info(name).kind
    except InputError:
        # A layer that cannot be described gets a failed row when it is solved.
        return ""
