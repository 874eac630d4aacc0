"""How commands that write a dump show their progress and what they wrote."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from loraq_sim.cli.options import OutputFormat
from loraq_sim.cli.output import print_json, print_table
from loraq_sim.cli.progress import tracked

__all__ = ["OnLayer", "layer_progress", "print_written", "seconds_since"]

OnLayer = Callable[[str], None]


@contextmanager
def layer_progress(names: Sequence[str], label: str, *, quiet: bool) -> Iterator[OnLayer]:
    """Give the listener to call once for each of `names`, under `tracked` progress."""
    with closing(tracked(names, label, quiet=quiet)) as steps:
        next(steps, None)
        yield lambda name: next(steps, None)
        # The bar ends when its last item has been asked for the next one.
        next(steps, None)


def seconds_since(started: float) -> float:
    """Seconds since a `time.monotonic` reading."""
    return time.monotonic() - started


def print_written(path: Path, *, seconds: float, output: OutputFormat) -> None:
    """Print one row about a dump that was just written; only its directory is read."""
    from loraq_sim.dumps import read_layer_dump
    from reports.tables import result_table

    dump = read_layer_dump(path)
    infos = [dump.info(name) for name in dump]
    tokens = [info.tokens for info in infos if info.tokens is not None]
    row = {
        "file": str(path),
        "layers": len(infos),
        "inputs": len({info.activation_key for info in infos} - {None}),
        "tokens": max(tokens, default=None),
        "dtype": "/".join(dict.fromkeys(info.dtype for info in infos)),
        "bytes": path.stat().st_size,
        "seconds": seconds,
    }
    if output is OutputFormat.JSON:
        print_json(row)
    else:
        print_table(result_table([row], title=f"wrote {path}"), output)
