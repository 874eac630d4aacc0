"""Ways to make one number of a model out of the errors of its layers."""

import numpy as np

__all__ = ["AGGREGATES", "aggregate_all"]

WRITERS = ("self_out", "cross_out", "ffn_down")


def _relative(rows):
    return np.array([np.sqrt(row["miss"] / row["size"]) for row in rows])


def _weights(rows, *names):
    return np.array([np.prod([float(row[name]) for name in names]) for row in rows])


def _rms(rows, weights):
    return float(np.sqrt((weights * _relative(rows) ** 2).sum() / weights.sum()))


def _writers(rows):
    return [row for row in rows if row["kind"] in WRITERS]


def _of_last_block(rows):
    last = max(int(row["layer"].split(".")[1]) for row in rows)
    return [row for row in rows if int(row["layer"].split(".")[1]) == last]


# e_l: relative output error of layer l; c_l its calls per step; all of one call's rows.
AGGREGATES = {
    "rms by calls: sqrt(sum c e^2 / sum c)": lambda rows: _rms(rows, _weights(rows, "calls")),
    "mean: sum e / L": lambda rows: float(_relative(rows).mean()),
    "max e": lambda rows: float(_relative(rows).max()),
    "geometric mean e": lambda rows: float(np.exp(np.log(_relative(rows) + 1e-6).mean())),
    "rms by MACs: sqrt(sum nk e^2 / sum nk)": lambda rows: _rms(rows, _weights(rows, "n", "k")),
    "rms by outputs: sqrt(sum n e^2 / sum n)": lambda rows: _rms(rows, _weights(rows, "n")),
    "by energy: sqrt(sum |dy|^2 / sum |y|^2)": lambda rows: float(
        np.sqrt(sum(row["miss"] for row in rows) / sum(row["size"] for row in rows))
    ),
    "absolute: sqrt(sum |dy|^2)": lambda rows: float(np.sqrt(sum(row["miss"] for row in rows))),
    "residual writers: sqrt(sum |dy|^2) of out and ffn_down": lambda rows: float(
        np.sqrt(sum(row["miss"] for row in _writers(rows)))
    ),
    "residual writers: rms e of out and ffn_down": lambda rows: _rms(
        _writers(rows), np.ones(len(_writers(rows)))
    ),
    "last block: rms e": lambda rows: _rms(
        _of_last_block(rows), np.ones(len(_of_last_block(rows)))
    ),
    "last layer: e of the last ffn_down": lambda rows: float(_relative(rows[-1:])[0]),
    "weights alone: rms weight error": lambda rows: float(
        np.sqrt(np.mean([row["weight_error"] ** 2 for row in rows]))
    ),
}


def aggregate_all(rows, layers, alone):
    """Every aggregate of one variant.

    Parameters
    ----------
    rows : list of dict
        Layers that are emulated; the others of `layers` count as without error.
    layers : mapping of name to row
        All layers, with their sizes.
    alone : mapping of name to (layer error, mean square error of the images)
        Of each layer alone at 4 bits: what one unit of its error does to images.
    """
    known = {row["layer"]: row for row in rows}
    full = [known.get(name) or {**row, "miss": 0.0, "weight_error": 0.0} for name, row in
            layers.items()]  # fmt: skip
    values = {name: aggregate(full) for name, aggregate in AGGREGATES.items()}
    values["probed: sqrt(sum g e^2), g_l of each layer alone"] = float(
        np.sqrt(sum(alone[row["layer"]] * row["miss"] / row["size"] for row in full))
    )
    return values
