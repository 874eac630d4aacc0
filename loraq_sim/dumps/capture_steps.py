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

__all__ = ["step_record", "steps_of_layer"]


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
    return np.repeat(values, counts)
