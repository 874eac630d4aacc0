"""Where the ``loraq-sim`` script begins: nothing is imported before Ctrl-C is looked after."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the program."""
    try:
        # A name that the terminal's encoding lacks is no reason to lose a table.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.reconfigure(errors="replace")
        from loraq_sim.cli.app import app

        # The same words whether a script or `python -m` started it.
        app(prog_name="loraq-sim")
    except KeyboardInterrupt:
        # Before a command runs or after it: inside one, `one_line_failures` has seen it.
        sys.exit(130)
