"""The ``loraq-sim`` program: the list of its commands, and the words that a shell completes."""

import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

import typer
from typer.models import ParameterInfo

import hwmodels
from loraq_sim.cli import (
    allocate,
    cost,
    doctor,
    dump,
    emulate,
    explain,
    explore,
    hw,
    images,
    model,
    pareto,
    schema,
    solve,
    steps,
    stores,
    sweep,
    vectors,
)
from loraq_sim.cli.output import name_commands, set_debug, set_wide
from loraq_sim.version import __version__

__all__ = ["app", "complete_words"]

app = typer.Typer(
    name="loraq-sim",
    help="Error against cost of 4-bit + low-rank diffusion transformers on NPUs and GPUs.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog=(
        "Exit codes: 0 ok, 1 some cases failed, 2 usage or bad input, 3 a threshold was missed, "
        "130 interrupted."
    ),
)

# One line a command.
app.command("sweep", epilog=sweep.EXAMPLES)(sweep.sweep_command)
app.command("solve", epilog=solve.EXAMPLES)(solve.solve_command)
app.command("emulate", epilog=emulate.EXAMPLES)(emulate.emulate_command)
app.command("images", epilog=images.EXAMPLES)(images.images_command)
app.command("cost", epilog=cost.EXAMPLES)(cost.cost_command)
app.command("pareto", epilog=pareto.EXAMPLES)(pareto.pareto_command)
app.command("report", epilog=stores.REPORT_EXAMPLES)(stores.report_command)
app.command("allocate", epilog=allocate.EXAMPLES)(allocate.allocate_command)
app.command("explain", epilog=explain.EXAMPLES)(explain.explain_command)
app.command("explore", epilog=explore.EXAMPLES)(explore.explore_command)
app.command("steps", epilog=steps.EXAMPLES)(steps.steps_command)
app.command("compare", epilog=stores.COMPARE_EXAMPLES)(stores.compare_command)
app.command("merge", epilog=stores.MERGE_EXAMPLES)(stores.merge_command)
app.command("export", epilog=stores.EXPORT_EXAMPLES)(stores.export_command)
app.command("doctor", epilog=doctor.EXAMPLES)(doctor.doctor_command)
app.command("schema", epilog=schema.EXAMPLES)(schema.schema_command)
app.command("vectors", epilog=vectors.EXAMPLES)(vectors.vectors_command)
app.add_typer(dump.app, name="dump", help="Look into, make, convert and capture layer dumps.")
app.add_typer(model.app, name="model", help="Look into and convert quantized models.")
app.add_typer(hw.app, name="hw", help="Look into accelerator descriptions.")
name_commands(app)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"loraq-sim {__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show a traceback instead of a one-line error.")
    ] = False,
    wide: Annotated[
        bool,
        typer.Option("--wide", help="Show all columns of tables, however narrow the terminal."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version
    set_debug(debug)
    set_wide(wide)


# Of a split that a person writes by hand; any other is as good.
_MAINS = ("W4A4", "W4A4u", "W4A4s", "W4A4a", "W4A6", "W4A8", "W6A6", "W8A8", "W16A16")
_BRANCHES = ("W8A8", "W6A6", "W4A8", "W4A4", "W16A16")
_RANKS = ("@fp16r32", "@fp16r16", "@fp16r64", "r16", "r32", "r64")
_BRANCH = re.compile(r"(?P<main>[^+~]+)(?P<sign>[+~])(?P<branch>[^@r]*)")
_PRECISION = re.compile(r"^W\d+A\d+\w*$")


def _words_of_options() -> dict[str, Iterable[str]]:
    # Not for a command that runs: it starts without them.
    from loraq_sim.conditioning import CONDITIONS
    from loraq_sim.emulator.mac_array import OVERFLOW_RULES
    from loraq_sim.emulator.presets import list_array_presets
    from loraq_sim.formats import Rounding, Saturation
    from loraq_sim.metrics import AGGREGATES
    from loraq_sim.results.choice import COSTS
    from loraq_sim.results.wording import glossary
    from loraq_sim.solvers.problem import PRESETS
    from loraq_sim.solvers.solve import METHODS
    from loraq_sim.split import FAMILIES

    columns = ("output_error", *COSTS)
    return {
        **dict.fromkeys(("--hw", "--like", "NAME|FILE"), hwmodels.list_accelerators()),
        "--model": hwmodels.list_models(),
        **dict.fromkeys(("--method", "--compare"), METHODS),
        "--preset": PRESETS,
        "--family": FAMILIES,
        "--condition": CONDITIONS,
        "--rotate": ("hadamard",),
        "--finish": ("data",),
        "--aggregate": AGGREGATES,
        "--array": list_array_presets(),
        "--overflow": OVERFLOW_RULES,
        "--rounding": [rounding.value for rounding in Rounding],
        "--saturation": [saturation.value for saturation in Saturation],
        "--device": ("cpu", "cuda"),
        **dict.fromkeys(("--minimize", "--maximize"), columns),
        **dict.fromkeys(("--under", "--budget"), [f"{name}=" for name in columns]),
        "term": glossary(),
        "command": schema.schema_names(),
    }


def split_words(incomplete: str) -> list[str]:
    """Splits that begin with what stands there: main precisions, then branches and ranks."""
    found = _BRANCH.match(incomplete)
    if found is None:
        mains = [main for main in _MAINS if main.startswith(incomplete)]
        whole = [incomplete] if incomplete in _MAINS else []
        return [*mains, *(f"{main}{sign}W8A8@fp16r32" for main in whole for sign in "+~")]
    head = found["main"] + found["sign"]
    branches = [*_BRANCHES, *_PRECISION.findall(found["branch"])]
    words = [f"{head}{branch}{rank}" for branch in dict.fromkeys(branches) for rank in _RANKS]
    return [word for word in words if word.startswith(incomplete)]


def complete_words(program: typer.Typer, words: Mapping[str, Iterable[str]] | None = None) -> None:
    """Tell every option and argument of the commands of `program` which words it may have."""
    known = words or _words_of_options()
    for group in program.registered_groups:
        if group.typer_instance is not None:
            complete_words(group.typer_instance, known)
    for command in program.registered_commands:
        if command.callback is None:
            continue
        hints = typing.get_type_hints(command.callback, include_extras=True)
        for name, hint in hints.items():
            for info in getattr(hint, "__metadata__", ()):
                if isinstance(info, ParameterInfo):
                    # Within `Annotated`, Typer keeps the first flag where the default would be.
                    flags = (info.default, *(info.param_decls or ()), name, info.metavar)
                    info.autocompletion = _completing(
                        [f for f in flags if isinstance(f, str)], known
                    )


def _completing(
    flags: Sequence[str], words: Mapping[str, Iterable[str]]
) -> Callable[[str], list[str]] | None:
    if "--split" in flags:
        offer: Callable[[str], Iterable[str]] = split_words
    elif found := [words[flag] for flag in flags if flag in words]:
        offer = lambda start: [word for word in found[0] if word.startswith(start)]  # noqa: E731
    else:
        return None

    def completed(incomplete: str) -> list[str]:
        # The last one of a list; what is complete stays before it.
        head, comma, last = incomplete.rpartition(",")
        return [f"{head}{comma}{word}" for word in offer(last)]

    return completed
