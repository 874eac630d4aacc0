"""Rows for ``dump info``: sizes of every layer and, on request, what its values look like.

With w the weight's values and r_c the root mean square of activation channel c over the tokens:

- ``weight_std`` = sqrt(mean((w - mean w)^2)), ``weight_max_over_std`` = max|w| / weight_std
- ``weight_kurtosis`` = mean((w - mean w)^4) / weight_std^4 - 3, which is 0 for a Gaussian
- ``weight_top32_energy`` = sum of the 32 largest squared singular values / sum of all
- ``activation_outlier_ratio`` = max_c r_c / median_c r_c

A ratio over zero is None.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.layer_dump import LayerDump, LayerInfo
from loraq_sim.errors import DumpError
from loraq_sim.layers import Layer

__all__ = ["summarize"]

_TOP = 32

_SIZES = ("layer", "kind", "group", "n", "k", "tokens", "rows_per_call", "calls_per_step")
_STORAGE = ("dtype", "bytes")
_STATISTICS = (
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
        columns += _STATISTICS
    if singular_values:
        columns.append("weight_top32_energy")
    rows = []
    for name in dump:
        row = dict.fromkeys(columns) | {"layer": name, "status": "ok", "message": ""}
        try:
            row |= _sizes(dump.info(name))
            if statistics or singular_values:
                layer = dump[name]
                row |= _statistics(layer) if statistics else {}
                row |= {"weight_top32_energy": _top_energy(layer.weight)} if singular_values else {}
        except DumpError as error:
            row |= {"status": "failed", "message": str(error)}
        rows.append(row)
    return rows


def _sizes(info: LayerInfo) -> dict[str, object]:
    sizes = {column: getattr(info, column) for column in _SIZES if column != "layer"}
    return sizes | {"dtype": info.dtype, "bytes": info.nbytes}


def _statistics(layer: Layer) -> dict[str, float | None]:
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


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def _top_energy(weight: NDArray[np.float32]) -> float | None:
    # Squared singular values are the eigenvalues of the smaller Gram matrix.
    narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
    narrow = narrow.astype(np.float64)
    energies = np.linalg.eigvalsh(narrow @ narrow.T)
    return _ratio(float(energies[-_TOP:].sum()), float(energies.sum()))
