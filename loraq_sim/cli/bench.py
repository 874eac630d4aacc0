"""``loraq-sim bench``: how fast the emulator is on this machine."""

import platform
from pathlib import Path
from typing import Annotated

import typer

from loraq_sim.cli.options import NoProgress, OutFormat, OutputFormat, Quiet, listed
from loraq_sim.cli.output import note, one_line_failures, print_table, tracked
from loraq_sim.errors import InputError
from loraq_sim.files import write_file

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)

_EXAMPLES = (
    "[bold]Examples[/bold]\n\n"
    "loraq-sim bench emulator\n\n"
    "loraq-sim bench emulator --shape 4096x1152x4608 --no-peers --format json\n\n"
    "loraq-sim bench emulator --threads 2 --out speed.md"
)
_SHAPES = ("256x1152x1152", "1024x4608x1152")
_THREAD_SHAPES = (*_SHAPES, "4096x1152x4608")


@app.callback()
def _group() -> None:
    """Measure speed on this machine."""


@app.command("emulator", epilog=_EXAMPLES)
@one_line_failures
def emulator_command(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="MxKxN",
            help="GEMM size: rows x input features x output features; repeatable.",
            show_default=" ".join(_SHAPES),
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Timed calls of each kernel; the median counts.")
    ] = 15,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=1, help="Threads of the emulator; more than one is timed by the clock."
        ),
    ] = 1,
    peers: Annotated[
        bool, typer.Option("--peers/--no-peers", help="Time what one would run instead, too.")
    ] = True,
    sections: Annotated[
        bool,
        typer.Option(
            "--sections/--no-sections",
            help="Also time two threads against one, and shift-round-saturate on its own.",
        ),
    ] = True,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Also write the table to this Markdown file."),
    ] = None,
    output: OutFormat = OutputFormat.TABLE,
    quiet: Quiet = False,
    no_progress: NoProgress = False,
) -> None:
    """Time the emulated GEMM, with SRS to int8, as a ratio to the exact torch._int_mm."""
    from loraq_sim.cli.bench_emulator import BENCH_COLUMNS, Operands, goals, measure_goal, peer_row
    from loraq_sim.cli.bench_peers import peers as installed_peers
    from loraq_sim.cli.bench_srs import srs_rows
    from loraq_sim.cli.bench_threads import thread_rows
    from loraq_sim.cli.cost import parse_shape
    from loraq_sim.reporting.tables import result_table

    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    rows = []
    asked = goals()
    cases = [(parse_shape(text), goal) for text in listed(shape) or _SHAPES for goal in asked]
    drawn: dict = {}
    for size, goal in tracked(cases, "timing", quiet=quiet or no_progress):
        if (size, goal.codes) not in drawn:
            drawn[size, goal.codes] = Operands.draw(size, goal.codes)
        rows.append(measure_goal(goal, drawn[size, goal.codes], repeats, threads=threads))
    if sections:
        note("timing two threads, and shift-round-saturate", quiet=quiet)
        for text in listed(shape) or _THREAD_SHAPES:
            rows += thread_rows(Operands.draw(parse_shape(text), "int8"), repeats)
        rows += srs_rows(repeats)
    if peers:
        operands = drawn[cases[0][0], "int8"]
        mac = asked[2].mac
        for name, run, part in installed_peers(
            operands.a, operands.w, mac, lambda text: note(text, quiet=quiet)
        ):
            rows.append(peer_row(operands, mac, name, run, min(repeats, 5), part))
    title = f"Emulated GEMM against torch._int_mm, {threads} thread(s), {_processor()}"
    table = result_table(rows, list(BENCH_COLUMNS), title=title)
    print_table(table, output)
    if out is not None:
        write_file(out, f"**{title}**\n\n{table.to_markdown()}")
    missed = sum(row["verdict"] == "missed" for row in rows)
    n_goals = sum(row["verdict"] is not None for row in rows)
    note(f"{missed} of {n_goals} goals missed", quiet=quiet)


def _processor() -> str:
    """Name of the processor as the system or LLVM gives it."""
    from llvmlite import binding

    return f"{platform.machine()} {binding.get_host_cpu_name()}"
