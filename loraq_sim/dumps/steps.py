"""What the values of a dump look like, layer by layer and at each denoising step.

Which denoising step each activation row comes from, a dump's ``meta`` says once, rows being stored
in order of time step:

    {"time_steps": {"values": [999, 949, ...], "rows": {"<group>": [13, 12, ...]}}}

with the time step's value as the model got it, and for each group of layers (one stored input) the
number of rows from each step. A count under ``*`` holds for every group that is not listed.

Inputs at each step (`step_statistics`): over the rows x of one time step, with r_c the root mean
square and a_c the largest magnitude of channel c in these rows,

- ``rms`` = sqrt(mean x^2), ``amax`` = ``max |x|``
- ``channel_amax_ratio`` = max_c a_c / median_c a_c: how far outlier channels stand out
- ``kurtosis`` = mean((x - mean x)^4) / mean((x - mean x)^2)^2 - 3, which is 0 for a Gaussian
- ``first_step_correlation``: Pearson correlation over c of r_c with that of the first step that
  has rows; 1 while the channels keep their relative sizes, lower as they drift

Layers as a whole (`summarize`, for ``dump info``): with w the weight's values and r_c the root mean
square of activation channel c over the tokens,

- ``weight_std`` = sqrt(mean((w - mean w)^2)), ``weight_max_over_std`` = ``max |w| / weight_std``
- ``weight_kurtosis`` = mean((w - mean w)^4) / weight_std^4 - 3, which is 0 for a Gaussian
- ``weight_top32_energy`` = sum of the 32 largest squared singular values / sum of all
- ``activation_outlier_ratio`` = max_c r_c / median_c r_c

A ratio over zero is None, and so is everything at a step without rows.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.layer_dump import LayerDump, LayerInfo
from loraq_sim.errors import DumpError
from loraq_sim.layers import Layer

__all__ = [
    "plain_step",
    "require_steps",
    "step_counts",
    "step_statistics",
    "step_statistics_of_rows",
    "steps_of_layer",
    "summarize",
]


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
        if not isinstance(record, Mapping):
            raise TypeError
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
        inputs = dump[name].activations
        measured[key] = [] if inputs is None else step_statistics_of_rows(inputs, counts)
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


_TOP = 32

_SIZES = ("layer", "kind", "group", "n", "k", "tokens", "rows_per_call", "calls_per_step")
_STORAGE = ("dtype", "bytes")
_SUMMARY_STATISTICS = (
    "weight_std",
    "weight_max_abs",
    "weight_max_over_std",
    "weight_kurtosis",
    "activation_rms",
    "activation_max_abs",
    "activation_outlier_ratio",
)


def summarize(
    dump: LayerDump, *, statistics: bool = True, singular_values: bool = False
) -> list[dict[str, object]]:
    """Return one row per layer, in dump order; a bad layer gives a row that says why.

    Parameters
    ----------
    dump : LayerDump
    statistics : bool
        Read the values and add the statistics of the module docstring. Without them only the
        file's directory is read.
    singular_values : bool
        Also add ``weight_top32_energy``, about a second for a 4608 x 1152 weight.

    Returns
    -------
    rows : list of dict
        Keys ``layer kind group n k tokens rows_per_call calls_per_step dtype bytes``, then the
        statistics, then ``status`` ("ok" or "failed") and ``message``. ``bytes`` is the stored
        size of weight and bias, ``dtype`` that of the weight. Missing values are None.
    """
    columns = [*_SIZES, *_STORAGE]
    if statistics:
        columns += _SUMMARY_STATISTICS
    if singular_values:
        columns.append("weight_top32_energy")
    rows = []
    for name in dump:
        row = dict.fromkeys(columns) | {"layer": name, "status": "ok", "message": ""}
        try:
            row |= _sizes(dump.info(name))
            if statistics or singular_values:
                layer = dump[name]
                row |= _summary_statistics(layer) if statistics else {}
                row |= {"weight_top32_energy": _top_energy(layer.weight)} if singular_values else {}
        except DumpError as error:
            row |= {"status": "failed", "message": str(error)}
        rows.append(row)
    return rows


def _sizes(info: LayerInfo) -> dict[str, object]:
    sizes = {column: getattr(info, column) for column in _SIZES if column != "layer"}
    return sizes | {"dtype": info.dtype, "bytes": info.nbytes}


def _summary_statistics(layer: Layer) -> dict[str, float | None]:
    weight = layer.weight.astype(np.float64)
    centered = weight - weight.mean()
    squared = np.square(centered)
    variance = float(squared.mean())
    std = variance**0.5
    largest = float(np.abs(weight).max())
    out = {
        "weight_std": std,
        "weight_max_abs": largest,
        "weight_max_over_std": _ratio(largest, std),
        "weight_kurtosis": None,
    }
    fourth_over_variance = _ratio(float(np.square(squared).mean()), variance)
    if fourth_over_variance is not None:
        out["weight_kurtosis"] = fourth_over_variance / variance - 3.0
    if layer.activations is not None:
        x = layer.activations.astype(np.float64)
        channel_rms = np.sqrt(np.square(x).mean(axis=0))
        out["activation_rms"] = float(np.sqrt(np.square(channel_rms).mean()))
        out["activation_max_abs"] = float(np.abs(x).max())
        out["activation_outlier_ratio"] = _ratio(
            float(channel_rms.max()), float(np.median(channel_rms))
        )
    return out


def _top_energy(weight: NDArray[np.float32]) -> float | None:
    # Squared singular values are the eigenvalues of the smaller Gram matrix.
    narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
    narrow = narrow.astype(np.float64)
    energies = np.linalg.eigvalsh(narrow @ narrow.T)
    return _ratio(float(energies[-_TOP:].sum()), float(energies.sum()))
