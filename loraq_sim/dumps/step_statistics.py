"""What the inputs of each layer look like at each denoising step.

Over the rows x of one time step, with r_c the root mean square and a_c the largest magnitude of
channel c in these rows:

- ``rms`` = sqrt(mean x^2), ``amax`` = max |x|
- ``channel_amax_ratio`` = max_c a_c / median_c a_c: how far outlier channels stand out
- ``kurtosis`` = mean((x - mean x)^4) / mean((x - mean x)^2)^2 - 3, which is 0 for a Gaussian
- ``first_step_correlation``: Pearson correlation over c of r_c with that of the first step that
  has rows; 1 while the channels keep their relative sizes, lower as they drift

A ratio over zero is None, and so is everything at a step without rows.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.capture_steps import plain_step, require_steps, step_counts
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.errors import DumpError

__all__ = ["step_statistics", "step_statistics_of_rows"]

_STATISTICS = ("rms", "amax", "channel_amax_ratio", "kurtosis", "first_step_correlation")


def step_statistics(dump: LayerDump) -> list[dict[str, object]]:
    """Statistics of the activations of every layer at every recorded time step.

    Parameters
    ----------
    dump : LayerDump
        That records time steps; choose layers with `LayerDump.select`.

    Returns
    -------
    rows : list of dict
        In dump order, then in the order the steps were run: ``layer kind group k step rows``, the
        statistics of the module docstring, ``status`` ("ok" or "failed") and ``message``. ``step``
        is the time step's value as the model got it. A layer without activations, or that cannot
        be read, has one row that says so.

    Raises
    ------
    DumpError
        If the dump does not record time steps.
    """
    require_steps(dump)
    # Layers of one group read one stored input.
    measured: dict[tuple, list[dict[str, object]]] = {}
    rows = []
    for name in dump:
        try:
            rows += _layer_rows(dump, name, measured)
        except DumpError as error:
            rows.append(_row(layer=name, status="failed", message=str(error)))
    return rows


def step_statistics_of_rows(
    x: NDArray[np.floating], counts: NDArray[np.int64]
) -> list[dict[str, float | None]]:
    """Statistics of each step of one input.

    Parameters
    ----------
    x : ndarray of shape (T, K), floating
        Rows in order of time step.
    counts : ndarray of shape (S,), int64
        Rows of each step; they sum to T.
    """
    first, found = None, []
    for rows in np.split(x.astype(np.float64), np.cumsum(counts)[:-1]):
        if not len(rows):
            found.append(dict.fromkeys(_STATISTICS))
            continue
        channel_rms = np.sqrt(np.square(rows).mean(axis=0))
        first = channel_rms if first is None else first
        found.append(_statistics(rows, channel_rms, first))
    return found


def _layer_rows(dump: LayerDump, name: str, measured: dict[tuple, list]) -> list[dict[str, object]]:
    info = dump.info(name)
    shared = {"layer": name, "kind": info.kind, "group": info.group, "k": info.k}
    steps = step_counts(dump, name)
    if steps is None:
        return [_row(**shared, rows=0, message="no activations")]
    values, counts = steps
    key = (info.activation_key, tuple(counts))
    if key not in measured:
        measured[key] = step_statistics_of_rows(dump[name].activations, counts)
    return [
        _row(**shared, step=plain_step(value), rows=int(count), **statistics)
        for value, count, statistics in zip(values, counts, measured[key], strict=True)
    ]


def _row(**known: object) -> dict[str, object]:
    columns = ("layer", "kind", "group", "k", "step", "rows", *_STATISTICS)
    return dict.fromkeys(columns) | {"status": "ok", "message": ""} | known


def _statistics(
    rows: NDArray[np.float64], channel_rms: NDArray[np.float64], first: NDArray[np.float64]
) -> dict[str, float | None]:
    size = np.abs(rows)
    channel_amax = size.max(axis=0)
    squared = np.square(rows - rows.mean())
    variance = float(squared.mean())
    # Two ratios: the square of a tiny variance could vanish.
    fourth = _ratio(float(np.square(squared).mean()), variance)
    return {
        "rms": float(np.sqrt(np.square(channel_rms).mean())),
        "amax": float(size.max()),
        "channel_amax_ratio": _ratio(float(channel_amax.max()), float(np.median(channel_amax))),
        "kurtosis": None if fourth is None else fourth / variance - 3.0,
        "first_step_correlation": _correlation(channel_rms, first),
    }


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    sizes = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    # Rounding could carry a perfect correlation beyond 1.
    return None if sizes == 0.0 else min(1.0, max(-1.0, float(a @ b) / sizes))


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None
