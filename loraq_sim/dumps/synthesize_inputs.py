"""Inputs for a checkpoint that has none, drawn by the kind of each layer on its own weights.

What `loraq_sim.dumps.synthesize_statistics` knows of the inputs of trained diffusion transformers
(outlier channels behind modulated norms, the raw residual stream before cross attention, what GELU
leaves, drift over the time steps) is drawn for the layers of the user's own file. Nothing here was
measured on this model: rows, reports and verdicts call such inputs ``synthetic``.

The weights decide one thing: which channels are loud. In trained layers the log root mean square of
a channel and that of its weight column go together with a correlation that the table has by kind
(-0.6 for values, -0.3 in feed-forward parts). The drawn channels are put into that order: channel c
gets the scale whose rank is that of

    u_c = rho z_c + sqrt(1 - rho^2) e_c

with z the standardized log rms of the weight's columns and e standard normal. Layers of one group
read one input, by the weight of theirs that is most correlated with it.

A feed-forward part is gated (SwiGLU, GEGLU, the gated convolutions of SANA) where its first layers
put out twice what its second one reads; the input of that one is then the product of two branches,
else what GELU leaves. Behind GELU no value is below -0.17, whatever its channel's scale.

Every input has a random stream of its own, keyed by the group's or layer's name.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, step_record
from loraq_sim.dumps.synthesize_statistics import (
    TIME_STEPS,
    InputModel,
    InputStatistics,
    correlated,
    is_in_table,
    statistics_of,
    steps_of_rows,
)
from loraq_sim.errors import InputError, counted
from loraq_sim.layers import STORAGE_DTYPES, SYNTHETIC, SYNTHETIC_MODEL

__all__ = ["MAX_ROWS", "SYNTHETIC_ROWS", "inputs_note", "with_synthetic_inputs"]

SYNTHETIC_ROWS = 256
"""Rows of each input where nobody says how many."""

MAX_ROWS = 65_536

_FEED_FORWARD = {"ffn_down": "ffn_up", "text_ffn_down": "text_ffn_up"}
_SUFFIX = ".synthetic"


@dataclass(frozen=True, kw_only=True)
class _Input:
    """One input: its key, features K, statistics, and the layer whose weight orders its channels.

    `correlation` is that of the layer's weight columns with the input's channels.
    """

    key: str
    k: int
    statistics: InputStatistics
    correlation: float
    weight: StoredTensor

    def draw(self, rows: int) -> NDArray[np.float32]:
        """Rows of shape (rows, K), in order of time step."""
        model = InputModel(self.k, self.statistics, self._rng("channels"))
        drawn = model.draw(rows, self._rng("rows"))
        if self.statistics.shape == "attention_and_gelu":
            # Its channels are of two kinds, each in its place.
            return drawn
        columns = np.asarray(self.weight.load(), dtype=np.float32).reshape(-1, self.k)
        loudness = np.sqrt(np.square(columns, dtype=np.float64).mean(axis=0))
        wanted = correlated(
            np.log(np.maximum(loudness, 1e-30)), self.correlation, self._rng("order")
        )
        order = np.empty(self.k, dtype=np.int64)
        order[np.argsort(wanted, kind="stable")] = np.argsort(model.channel_rms, kind="stable")
        return np.ascontiguousarray(drawn[:, order])

    def _rng(self, what: str) -> np.random.Generator:
        key = f"inputs/{self.key}/{what}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()))


def with_synthetic_inputs(stored: StoredDump, rows: int) -> StoredDump:
    """`stored` with inputs for the layers that have none; values are drawn when they are asked for.

    Parameters
    ----------
    stored : StoredDump
        With the kinds of its layers.
    rows : int
        Rows of each input, spread evenly over 20 time steps.

    Raises
    ------
    InputError
        If `rows` is no whole number from 1 to 65,536.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= MAX_ROWS:
        raise InputError(f"synthetic inputs have 1 to {MAX_ROWS} rows, got {rows!r}")
    silent = {name: layer for name, layer in stored.layers.items() if _needs_input(layer)}
    if not silent:
        return stored
    gated = _gated(stored.layers.values())
    inputs: dict[str, _Input] = {}
    keys: dict[str, str] = {}
    for name, layer in silent.items():
        found = _input_of(layer, gated)
        keys[name] = found.key
        known = inputs.get(found.key)
        if known is None or abs(found.correlation) > abs(known.correlation):
            inputs[found.key] = found
    layers = {
        name: replace(layer, activations=_tensor(inputs[keys[name]], rows), inputs_source=SYNTHETIC)
        if name in silent
        else layer
        for name, layer in stored.layers.items()
    }
    meta = dict(stored.meta)
    if len(silent) == len(stored.layers) and "time_steps" not in meta:
        meta["time_steps"] = step_record(list(range(TIME_STEPS)), {"*": steps_of_rows(rows)})
    return replace(stored, layers=layers, meta=meta)


def _needs_input(layer: StoredLayer) -> bool:
    weight = layer.weight
    return (
        not layer.problem
        and layer.activations is None
        and weight is not None
        and weight.dtype in STORAGE_DTYPES
        and len(weight.shape) > 1
        and min(weight.shape) > 0
    )


def _sizes(layer: StoredLayer) -> tuple[int, int]:
    shape = () if layer.weight is None else layer.weight.shape
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (0, 0)


def _gated(layers: Iterable[StoredLayer]) -> set[str]:
    """Kinds of second feed-forward layers whose first ones put out twice what they read."""
    out_of: dict[str, int] = {}
    into: dict[str, int] = {}
    for layer in layers:
        n, k = _sizes(layer)
        out_of[str(layer.kind)] = out_of.get(str(layer.kind), 0) + n
        into[str(layer.kind)] = into.get(str(layer.kind), 0) + k
    return {
        down
        for down, up in _FEED_FORWARD.items()
        if into.get(down) and out_of.get(up) == 2 * into[down]
    }


def _input_of(layer: StoredLayer, gated: set[str]) -> _Input:
    if layer.weight is None:
        raise InputError(f"layer {layer.name!r} has no weight to draw inputs for")
    kind = str(layer.kind)
    _, k = _sizes(layer)
    statistics = statistics_of(kind, gated=kind in gated)
    group = layer.group if isinstance(layer.group, str) else ""
    return _Input(
        # Members of a group that read another number of channels read another input.
        key=f"{group}/{k}" if group else layer.name,
        k=k,
        statistics=replace(statistics.inputs, keeps_floor=True),
        correlation=statistics.weight.correlation,
        weight=layer.weight,
    )


def _tensor(found: _Input, rows: int) -> StoredTensor:
    return StoredTensor(
        key=f"{found.key}{_SUFFIX}",
        shape=(rows, found.k),
        dtype="float32",
        nbytes=4 * rows * found.k,
        load=partial(found.draw, rows),
    )


def inputs_note(layers: Mapping[str, StoredLayer]) -> str:
    """One sentence on the layers whose inputs nobody captured; empty where there are none."""
    drawn = {name: x for name, x in layers.items() if SYNTHETIC in str(x.inputs_source)}
    if not drawn:
        return ""
    told = (
        f"inputs of {len(drawn)} of {counted(len(layers), 'layer')} are synthetic: drawn by kind "
        "of layer, not captured from a run of the model"
    )
    if any(x.inputs_source == SYNTHETIC_MODEL for x in drawn.values()):
        told += "; weights are drawn with the statistics of trained ones, too"
    other = [name for name, layer in drawn.items() if not is_in_table(str(layer.kind))]
    if other:
        told += (
            f" ({len(other)} of kinds without measured statistics, such as {other[0]:.100}: "
            "without outlier channels)"
        )
    return told
