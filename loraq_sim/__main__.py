"""Where the ``loraq-sim`` script and ``python -m loraq_sim`` begin.

Nothing is imported before Ctrl-C is looked after.
"""

import io
import os
import sys
from typing import TextIO

__all__ = ["LastingStream", "main"]


class LastingStream(io.TextIOWrapper):
    """stdout or stderr that outlives its reader.

    When the other end of a pipe is gone (``| head -1``), what is written goes nowhere from then on
    and the work goes on: exit codes say whether all of it was done, not whether all of it was read.
    """

    def __init__(self, stream: TextIO) -> None:
        # A name that the terminal's encoding lacks is no reason to lose a table.
        super().__init__(
            stream.buffer, stream.encoding, "replace", line_buffering=bool(stream.line_buffering)
        )
        self._original = stream  # closes the buffer when it goes

    def write(self, text: str) -> int:
        """Write `text`, to nowhere once the reader is gone."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush what is buffered, to nowhere once the reader is gone."""
        try:
            super().flush()
        except BrokenPipeError:
            self._let_go()

    def _let_go(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def main() -> None:
    """Run the program."""
    try:
        # One of them may have been closed before the start.
        if sys.stdout is not None:
            sys.stdout = LastingStream(sys.stdout)
        if sys.stderr is not None:
            sys.stderr = LastingStream(sys.stderr)
        from loraq_sim.cli.app import app, complete_words

        if "_LORAQ_SIM_COMPLETE" in os.environ:
            complete_words(app)
        # The same words whether a script or `python -m` started it.
        app(prog_name="loraq-sim")
    except KeyboardInterrupt:
        # Before a command runs or after it: inside one, `one_line_failures` has seen it.
        sys.exit(130)


# Worker processes import this module too, under another name.
if __name__ == "__main__":
    main()
