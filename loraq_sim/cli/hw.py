"""``loraq-sim hw``: the accelerators, what is known of them, and how far to trust it."""

from typing import TYPE_CHECKING, Annotated

import typer

from loraq_sim.cli import hw_explain, hw_validate
from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import Family, OutFormat, OutputFormat, Splits, listed
from loraq_sim.cli.output import print_json, print_table, print_tables

if TYPE_CHECKING:
    from hwmodels import Accelerator
    from loraq_sim.split import PrecisionSplit

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

_DEFAULT_SPLITS = ("W4A4+W8A8r32", "W4A8+W4A8r32", "W8A8+W6A6r32", "W16A16")
_LIST_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw list\n\nloraq-sim hw list --format json"
_SHOW_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw show aie2\n\n"
    "loraq-sim hw show a100 --split W4A4+W16A16r32\n\n"
    "loraq-sim hw show aie2@emulated_int4\n\n"
    "loraq-sim hw show mi355x --family mxfp --split W4A8+W8A8r64"
)
_SCHEMA_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw schema > accelerator.schema.json"


@app.command("list", epilog=_LIST_EXAMPLES)
@one_line_failures
def list_command(output: OutFormat = OutputFormat.TABLE) -> None:
    """List the accelerators that come with the program."""
    import hwmodels
    from reports.tables import result_table

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
    name: Annotated[
        str,
        typer.Argument(metavar="NAME|FILE", help="Accelerator, NAME@VARIANT, or YAML file."),
    ],
    splits: Splits = None,
    family: Family = "int",
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Show every number of an accelerator with its source, and the MAC mode each split uses."""
    import hwmodels
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    accelerator = hwmodels.load_accelerator(name)
    modes = []
    for text in listed(splits) or _DEFAULT_SPLITS:
        split = parse_split(text, family=family)
        for mode in _modes_of(accelerator, split):
            modes.append({"split": split.text} | mode)
    facts = hwmodels.describe(accelerator)
    idle = [{"key": key, "why": why} for key, why in hwmodels.idle_keys(accelerator).items()]
    if output is OutputFormat.JSON:
        print_json({"name": accelerator.name, "facts": facts, "modes": modes, "idle": idle})
        return
    title = f"{accelerator.name}: {accelerator.title}"
    tables = [result_table(facts, title=title), result_table(modes, title="MAC modes of splits")]
    if idle:
        tables.append(result_table(idle, title="Values that change no result"))
    print_tables(tables, output)


def _modes_of(accelerator: "Accelerator", split: "PrecisionSplit") -> list[dict]:
    import hwmodels

    return hwmodels.describe_modes(accelerator, split.main, split.branch, family=split.family)


app.command("explain", epilog=hw_explain.EXAMPLES)(hw_explain.explain_command)
app.command("validate", epilog=hw_validate.EXAMPLES)(hw_validate.validate_command)


@app.command("schema", epilog=_SCHEMA_EXAMPLES)
@one_line_failures
def schema_command() -> None:
    """Print the JSON Schema of accelerator files, for editors and checkers."""
    from hwmodels.description import Accelerator

    print_json(Accelerator.model_json_schema())
