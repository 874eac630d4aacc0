"""``loraq-sim hw list`` and ``hw show``: the accelerators and what is known of them."""

from typing import Annotated

import typer

from loraq_sim.cli.failures import one_line_failures
from loraq_sim.cli.options import OutFormat, OutputFormat, Splits, listed
from loraq_sim.cli.output import print_json, print_table, print_tables

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

_DEFAULT_SPLITS = ("W4A4+W8A8r32", "W4A8+W4A8r32", "W8A8+W6A6r32", "W16A16")
_LIST_EXAMPLES = "[bold]Examples[/bold]\n\nloraq-sim hw list\n\nloraq-sim hw list --format json"
_SHOW_EXAMPLES = (
    "[bold]Examples[/bold]\n\nloraq-sim hw show aie2\n\n"
    "loraq-sim hw show a100 --split W4A4+W16A16r32"
)


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
                "description": accelerator.title,
            }
        )
    print_table(result_table(rows), output)


@app.command("show", epilog=_SHOW_EXAMPLES)
@one_line_failures
def show_command(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="Accelerator name or YAML file.")
    ],
    splits: Splits = None,
    output: OutFormat = OutputFormat.TABLE,
) -> None:
    """Show every number of an accelerator with its source, and the MAC mode each split uses."""
    import hwmodels
    from loraq_sim.split import parse_split
    from reports.tables import result_table

    accelerator = hwmodels.load_accelerator(name)
    modes = []
    for text in listed(splits) or _DEFAULT_SPLITS:
        split = parse_split(text)
        for mode in hwmodels.describe_modes(accelerator, split.main, split.branch):
            modes.append({"split": split.text} | mode)
    facts = hwmodels.describe(accelerator)
    if output is OutputFormat.JSON:
        print_json({"name": accelerator.name, "facts": facts, "modes": modes})
        return
    title = f"{accelerator.name}: {accelerator.title}"
    print_tables(
        [result_table(facts, title=title), result_table(modes, title="MAC modes of splits")], output
    )
