"""Which denoising step each activation row of a dump comes from.

A dump's ``meta`` says it once, rows being stored in order of time step:

    {"time_steps": {"values": [999, 949, ...], "rows": {"<group>": [13, 12, ...]}}}

with the time step's value as the model got it, and for each group of layers (one stored input) the
number of rows from each step. A count under ``*`` holds for every group that is not listed.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.errors import DumpError

__all__ = ["plain_step", "require_steps", "step_counts", "step_record", "steps_of_layer"]


def step_record(
    values: list[float], steps_of_rows: Mapping[str, NDArray[np.integer]]
) -> dict[str, object]:
    """What goes into ``meta["time_steps"]``.

    Parameters
    ----------
    values : list of float
        Time step values, in the order they were run.
    steps_of_rows : mapping of group to ndarray of shape (T,), integer
        For each row the index into `values`; sorted.
    """
    rows = {
        group: np.bincount(steps, minlength=len(values)).tolist()
        for group, steps in steps_of_rows.items()
    }
    return {"values": list(values), "rows": rows}


def steps_of_layer(dump: LayerDump, name: str) -> NDArray[np.float64] | None:
    """Time step value of each activation row of a layer, or None if the dump does not say.

    Returns
    -------
    steps : ndarray of shape (T,), float64, or None

    Raises
    ------
    DumpError
        If the layer is unknown, or the record does not fit its rows.
    """
    found = step_counts(dump, name)
    return None if found is None else np.repeat(*found)


def require_steps(dump: LayerDump) -> None:
    """Raise DumpError if the dump says nothing about time steps, with what to do about it."""
    if dump.meta.get("time_steps") is None:
        raise DumpError(
            f"{dump.path}: does not record which time step a row comes from (meta 'time_steps'); "
            "capture it again with `loraq-sim dump capture`, or write the record with the dump"
        )


def step_counts(dump: LayerDump, name: str) -> tuple[NDArray[np.float64], NDArray[np.int64]] | None:
    """Time steps in the order they were run, and how many rows of a layer come from each.

    Returns
    -------
    values : ndarray of shape (S,), float64
    counts : ndarray of shape (S,), int64
        They sum to T; a step without a row counts 0. None in place of both if the dump does not
        say, or the layer has no activations.

    Raises
    ------
    DumpError
        If the layer is unknown, or the record does not fit its rows.
    """
    info = dump.info(name)
    record = dump.meta.get("time_steps")
    if record is None or info.tokens is None:
        return None
    try:
        rows = record["rows"]
        counts = rows[info.group] if info.group in rows else rows["*"]
        values = np.asarray(record["values"], dtype=np.float64)
        counts = np.asarray(counts, dtype=np.int64)
        if values.shape != counts.shape or values.ndim != 1 or np.any(counts < 0):
            raise ValueError
        if not np.isfinite(values).all():
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise DumpError(
            f"{dump.path}: meta 'time_steps' is incomplete for layer {name!r} "
            f"(group {info.group!r}); capture the dump again"
        ) from None
    # Summed as Python integers, and before anything of that size is made.
    total = sum(counts.tolist())
    if total != info.tokens:
        raise DumpError(
            f"{dump.path}: meta 'time_steps' counts {total} rows for layer {name!r}, "
            f"which has {info.tokens}; capture the dump again"
        )
    return values, counts


def plain_step(value: float) -> float | int:
    """A time step's value as people write it: 960 rather than 960.0."""
    return int(value) if float(value).is_integer() else float(value)
