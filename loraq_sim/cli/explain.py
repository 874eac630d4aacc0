"""``loraq-sim explain``: where the error and the cost of one layer in one split come from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraq_sim.cli.options import (
    AccBits,
    AcceleratorsOrPlan,
    Accumulators,
    Condition,
    Family,
    Finish,
    Force,
    Group,
    LayerDumpOrPlan,
    Lora,
    OutFormat,
    OutputFormat,
    Overflow,
    PFormat,
    Preset,
    ProductsPerAdd,
    Quiet,
    Rotate,
    Rows,
    Seed,
    Smooth,
    Splits,
    SynthesizeInputs,
    Unfused,
    ZeroPoint,
    datapath_overrides,
    listed,
)
from loraq_sim.cli.output import (
    note,
    one_line_failures,
    open_dump,
    print_json,
    print_tables,
    say,
)
from loraq_sim.errors import InputError
from loraq_sim.files import make_folder, refuse_existing, write_file
from loraq_sim.reporting.tables import json_text, result_table
from loraq_sim.results.columns import in_own_units
from loraq_sim.results.wording import glossary, meaning_of
from loraq_sim.settings import parse_rows, rows_of
from loraq_sim.split import parse_split

if TYPE_CHECKING:
    from loraq_sim.explain import Explanation

__all__ = ["EXAMPLES", "explain_command"]

EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim explain hypervolume\n\n"
    "loraq-sim explain --hw aie2 --layer-dump examples/tiny_pixart.pt "
    "--layer transformer_blocks.0.attn1.to_q --split W4A4+W8A8r8\n\n"
    "loraq-sim explain --hw aie2 --layer-dump examples/minilm.pt "
    "--layer encoder.layer.2.output.dense --split W8A8 --acc-bits 16 --overflow saturate"
)
_DEFAULT_SPLIT = "W4A4+W8A8@fp16r32"


@one_line_failures
def explain_command(
    term: Annotated[
        str | None,
        typer.Argument(
            metavar="TERM",
            help="Say what this word of tables means, and explain no layer; list: all words.",
            show_default=False,
        ),
    ] = None,
    hw: AcceleratorsOrPlan = None,
    layer_dump: LayerDumpOrPlan = None,
    layer: Annotated[
        str | None,
        typer.Option(
            "--layer", metavar="NAME", help="Name of one layer of the dump.", show_default=False
        ),
    ] = None,
    splits: Splits = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="Solver.")] = "loraq",
    preset: Preset = "balanced",
    family: Family = "int",
    group: Group = 64,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="T", help="Activation rows used, at most."),
    ] = 256,
    synthesize_inputs: SynthesizeInputs = False,
    lora: Lora = None,
    smooth: Smooth = None,
    rotate: Rotate = None,
    condition: Condition = None,
    finish: Finish = None,
    rows: Rows = None,
    unfused: Unfused = False,
    acc_bits: AccBits = None,
    overflow: Overflow = None,
    products_per_add: ProductsPerAdd = None,
    accumulators: Accumulators = None,
    p_format: PFormat = None,
    zero_point: ZeroPoint = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Write errors.csv, costs.csv and explanation.json into this folder.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    seed: Seed = 0,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
) -> None:
    """Explain one (layer, split): every error switched off in turn, every cycle, byte and pJ.

    With a word in place of options, such as hypervolume, say what it means.
    """
    from loraq_sim.explain import explain_case

    if term is not None:
        _print_terms(term, output)
        return
    if not hw or layer_dump is None or layer is None:
        raise InputError("explain needs --hw, --layer-dump and --layer, or a TERM of the glossary")
    texts = listed(splits) or (_DEFAULT_SPLIT,)
    chosen = [parse_split(text, family=family, group=group) for text in texts]
    _check_folder(out, force)
    dump = open_dump(
        layer_dump, synthesize_inputs=synthesize_inputs, tokens=tokens, quiet=quiet, lora=lora
    )
    found = dump[layer]
    datapath = datapath_overrides(
        acc_bits=acc_bits,
        overflow=overflow,
        products_per_add=products_per_add,
        accumulators=accumulators,
        p_format=p_format,
        zero_point=zero_point,
    )
    cases = [
        explain_case(
            found,
            split,
            machine,
            method=method,
            preset=preset,
            tokens=tokens,
            seed=seed,
            fused=not unfused,
            datapath=datapath,
            smooth=smooth,
            rotate=rotate,
            condition=condition,
            finish=finish,
            rows=rows_of(found.name, found.kind, parse_rows(rows or ())),
        )
        for machine in listed(hw)
        for split in chosen
    ]
    for text in dict.fromkeys(text for case in cases for text in case.notes):
        note(text, quiet=quiet)
    views = [_view(case) for case in cases]
    if out is not None:
        _write(out, views, quiet=quiet)
    if output is OutputFormat.JSON:
        print_json(
            _flat(views, "errors", "costs").rows,
            {"cases": views} | (views[0] if len(views) == 1 else {}),
        )
    elif output is OutputFormat.CSV:
        print_tables([_flat(views, "errors", "costs")], output)
    else:
        print_tables([table for case in cases for table in _tables(case)], output)


def _print_terms(term: str, output: OutputFormat) -> None:
    found = glossary().items() if term == "list" else [meaning_of(term)]
    if output is OutputFormat.TABLE:
        for word, meaning in found:
            say(f"{word}: {meaning}")
        return
    rows = [{"term": word, "meaning": meaning} for word, meaning in found]
    print_tables([result_table(rows)], output)


def _view(case: "Explanation") -> dict[str, Any]:
    return {
        "case": case.row,
        "summary": case.summary,
        "errors": case.errors,
        "costs": case.costs,
        "notes": list(case.notes),
    }


def _tables(case: "Explanation") -> list[Any]:

    row, summary = case.row, case.summary
    place = f"{row['layer']} {row['split']} on {row['accelerator']}"
    measure = "output" if summary["measure"] == "output_error" else "weight"
    facts = {"total_error": summary["total_error"]}
    facts |= {"root_sum_of_squares_error": summary["root_sum_of_squares"]}
    facts |= {"unexplained_error": summary["unexplained_error"]}
    facts |= {name: row[name] for name in ("latency_s", "cycles", "energy_j", "weight_bytes")}
    return [
        result_table(_headed([facts | {"bound": row["bound"]}]), title=place),
        result_table(_headed(case.errors), title=f"Where the {measure} error comes from"),
        result_table(in_own_units(case.costs), title="Where the cost goes"),
    ]


# An error is shown in percent where its column is called one.
_DUST = 1e-12
_HEADINGS = {"error_without": "without_error", "error_alone": "alone_error"}


def _headed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows under names the table shows in percent."""
    return [
        {_HEADINGS.get(key, key): _without_dust(value) for key, value in row.items()}
        for row in rows
    ]


def _without_dust(value: Any) -> Any:
    """The number, or 0 where it is what sums of floats leave of 0."""
    return 0.0 if isinstance(value, float) and abs(value) < _DUST else value


def _flat(views: list[dict[str, Any]], *names: str) -> Any:

    rows = [
        {"layer": view["case"]["layer"], "split": view["case"]["split"]}
        | {"accelerator": view["case"]["accelerator"], "about": name}
        | entry
        for view in views
        for name in names
        for entry in view[name]
    ]
    return result_table(rows)


def _check_folder(out: Path | None, force: bool) -> None:
    if out is not None:
        names = ("errors.csv", "costs.csv", "explanation.json")
        refuse_existing(*(out / name for name in names), overwrite=force)


def _write(folder: Path, views: list[dict[str, Any]], *, quiet: bool) -> None:
    from loraq_sim.results.store_records import write_csv

    make_folder(folder)
    for name in ("errors", "costs"):
        rows = _flat(views, name).rows
        write_csv(folder / f"{name}.csv", rows, list(rows[0]))
        note(f"wrote {folder / name}.csv", quiet=quiet)
    write_file(folder / "explanation.json", json_text({"cases": views}))
    note(f"wrote {folder / 'explanation.json'}", quiet=quiet)
