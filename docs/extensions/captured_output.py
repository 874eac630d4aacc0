"""What the commands of a page print, run in this process in a folder of the page's own."""

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from page_blocks import Block, commands_of

__all__ = ["CommandFailed", "PageFolder"]

_ROOT = Path(__file__).resolve().parents[2]


class CommandFailed(Exception):
    """A command on a page that ended with an error."""


class PageFolder:
    """A folder that has the examples and receives what the commands of one page write."""

    def __init__(self, folder: Path | None = None) -> None:
        self._made = None if folder else tempfile.TemporaryDirectory(prefix="loraq-sim-docs-")
        self.path = folder or Path(self._made.name)
        for name in ("examples", "hwmodels", "benchmarks"):
            link = self.path / name
            if not link.exists():
                link.symlink_to(_ROOT / name)

    @staticmethod
    def can_run(block: Block) -> bool:
        """Whether `block` is for readers and tests of every day, and its program is installed."""
        has_program = block.note == "needs" and shutil.which(block.why) is not None
        return block.note is None or has_program

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


def _run(command: str) -> tuple[str, str]:
    if not command.startswith("loraq-sim "):
        shell = ["bash", "-euc", command]
        done = subprocess.run(shell, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandFailed(f"{command}\n{done.stdout}{done.stderr}")
        return done.stdout, done.stdout + done.stderr
    from typer.testing import CliRunner

    from loraq_sim.cli.app import app

    done = CliRunner().invoke(app, shlex.split(command, comments=True)[1:])
    if done.exit_code:
        raise CommandFailed(f"{command}\n{done.output}")
    return done.stdout, done.output
