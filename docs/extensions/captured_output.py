"""What the commands of a page print, run in this process in a folder of the page's own."""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from page_blocks import Block, commands_of

__all__ = ["CommandFailed", "PageFolder"]

# What a terminal has: who follows a page sees what it shows. GitHub scrolls only beyond 100.
_COLUMNS = 80
_ROOT = Path(__file__).resolve().parents[2]


class CommandFailed(Exception):
    """A command on a page that ended with an error."""


class PageFolder:
    """A folder that has the examples and receives what the commands of one page write."""

    def __init__(self, folder: Path | None = None) -> None:
        self._made = None if folder else tempfile.TemporaryDirectory(prefix="loraq-sim-docs-")
        self.path = folder or Path(self._made.name)
        for name in ("examples", "hwmodels", "benchmarks", "reports"):
            link = self.path / name
            if not link.exists() and (_ROOT / name).exists():
                link.symlink_to(_ROOT / name)

    @staticmethod
    def can_run(block: Block) -> bool:
        """Whether `block` is for readers and tests of every day, and its program is installed."""
        has_program = block.note == "needs" and shutil.which(block.why) is not None
        return block.note is None or has_program

    def close(self) -> None:
        """Remove the folder, if it was made here."""
        if self._made is not None:
            self._made.cleanup()

    def run(self, block: Block) -> tuple[str, str]:
        """What the commands of `block` write to stdout, and with the notes on stderr.

        Raises
        ------
        CommandFailed
            If a command ends with anything but 0, with its output.
        """
        out, both = [], []
        with self.entered():
            for command in commands_of(block.text):
                printed, everything = _run(command)
                out.append(printed)
                both.append(everything)
        return "\n".join(out), "\n".join(both)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work in the folder, then come back."""
        before = Path.cwd()
        os.chdir(self.path)
        try:
            yield
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _as_a_terminal() -> Iterator[None]:
    """What readers see: tables as wide as their terminal."""
    from loraq_sim.cli import output

    before, columns = output.is_terminal, os.environ.get("COLUMNS")
    output.is_terminal = lambda stream: stream is sys.stdout
    os.environ["COLUMNS"] = str(_COLUMNS)
    try:
        yield
    finally:
        output.is_terminal = before
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _run(command: str) -> tuple[str, str]:
    if not command.startswith("loraq-sim "):
        shell = ["bash", "-euc", command]
        done = subprocess.run(shell, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandFailed(f"{command}\n{done.stdout}{done.stderr}")
        return done.stdout, done.stdout + done.stderr
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app

    with _as_a_terminal():
        done = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    if done.exit_code:
        raise CommandFailed(f"{command}\n{done.output}")
    return done.stdout, done.output
