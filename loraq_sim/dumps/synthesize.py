"""Layers of a published model's true shapes, drawn with the statistics of trained layers.

For studies at full size where no checkpoint is at hand: errors and costs behave as for trained
layers (see `synthesize_statistics` for what is measured, what is assumed and how inputs are drawn),
images do not exist. Every tensor has a random stream of its own, keyed by seed, model and name, so
a layer is the same whichever others are drawn, and nothing is held but the layer in use.

A weight has heavy tails, uneven rows and columns, and a decaying spectrum. With T iid from
Student's t scaled to unit variance, it is, up to one factor,

    W = T * exp(0.12 e_n) * exp(0.15 u_k)  +  U diag(s) V^T
    s_i = 0.8 c sqrt(max(N, K)) i^-0.4,   i = 1 ... 0.1 min(N, K)

with e, u standard normal, corr(u, ln of the input channels' root mean square) given, and U, V
orthonormal. The factor sets the standard deviation of all values.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loraq_sim.dumps.kinds import InventoryLayer, ModelInventory, load_inventory
from loraq_sim.dumps.layer_dump import LayerDump
from loraq_sim.dumps.stored import StoredDump, StoredLayer, StoredTensor, step_record
from loraq_sim.dumps.synthesize_statistics import (
    REFERENCE_WIDTH,
    TIME_STEPS,
    InputModel,
    InputStatistics,
    KindStatistics,
    WeightStatistics,
    correlated,
    statistics_of,
    steps_of_rows,
)
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.layers import SYNTHETIC_MODEL
from loraq_sim.version import __version__

__all__ = [
    "MAX_TOKENS",
    "draw_weight",
    "synthesize_layers",
]

MAX_TOKENS = 65_536

_ROW_SCALE_STD = 0.12
_COLUMN_SCALE_STD = 0.15
_RANK_SHARE = 0.1
_DECAY = 0.4

_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


def synthesize_layers(
    model: str,
    *,
    tokens: int = 256,
    resolution: int = 1024,
    seed: int = 0,
    dtype: str = "float16",
    include_16_bit: bool = False,
) -> LayerDump:
    """Return the layers of a model; values are drawn when a layer is asked for.

    The dump has no file: write it with `write_layer_dump` to use it in other processes.

    Parameters
    ----------
    model : str
        One of `loraq_sim.dumps.kinds.list_models`.
    tokens : int
        Input rows T of each layer, spread evenly over 20 time steps.
    resolution : {1024, 512}
        Image size in pixels, which sets the rows per call.
    seed : int
        At least 0. On one machine and NumPy version, equal seeds give equal values.
    dtype : {"float16", "bfloat16", "float32"}
        Storage that values are rounded to.
    include_16_bit : bool
        Also the layers that SVDQuant does not run as W4A4: embeddings, modulations, the cross
        attention's text keys and values, the final projection.

    Raises
    ------
    InputError
        If the model, resolution or dtype is unknown, or `tokens` or `seed` is out of range.
    """
    if not 1 <= tokens <= MAX_TOKENS:
        raise InputError(f"tokens must be 1 to {MAX_TOKENS}, got {tokens}")
    if seed < 0:
        raise InputError(f"seed must be at least 0, got {seed}")
    if dtype not in _DTYPES:
        raise InputError(unknown_name("storage dtype", str(dtype), _DTYPES))
    inventory = load_inventory(model, resolution=resolution)
    drawn = _DrawnModel(inventory, tokens, seed, _DTYPES[dtype])
    layers = {
        layer.name: drawn.stored(layer)
        for layer in inventory.layers
        if layer.is_gemm and (layer.is_quantized or include_16_bit)
    }
    meta = {
        "model": model,
        "origin": f"synthetic, drawn by loraq-sim {__version__} with seed {seed}",
        "seed": seed,
        "resolution": resolution,
        "cfg_batch": inventory.cfg_batch,
        "shapes": inventory.source,
        "time_steps": step_record(list(range(TIME_STEPS)), {"*": steps_of_rows(tokens)}),
    }
    return LayerDump(Path(model), StoredDump(layers=layers, meta=meta))


class _DrawnModel:
    """Random streams of a model's tensors."""

    def __init__(self, inventory: ModelInventory, tokens: int, seed: int, dtype: np.dtype) -> None:
        self.inventory = inventory
        self.tokens = tokens
        self.seed = seed
        self.dtype = dtype
        self.is_gated = any("depthwise" in layer.op for layer in inventory.layers)
        # Layers of one input follow each other, so one distribution is enough to remember.
        self._input_model = lru_cache(maxsize=1)(self._make_input_model)

    def stored(self, layer: InventoryLayer) -> StoredLayer:
        """Record of a layer whose tensors are drawn when they are loaded."""
        n, k, bias = layer.n, layer.k, None
        if layer.has_bias:
            bias = self._stored_tensor(f"{layer.name}.bias", (n,), partial(self._bias, layer))
        return StoredLayer(
            name=layer.name,
            kind=layer.kind,
            group=layer.group,
            rows_per_call=layer.rows_per_call,
            calls_per_step=layer.calls_per_step,
            inputs_source=SYNTHETIC_MODEL,
            weight=self._stored_tensor(
                f"{layer.name}.weight", (n, k), partial(self._weight, layer)
            ),
            bias=bias,
            activations=self._stored_tensor(
                f"{layer.group}.activations", (self.tokens, k), partial(self._rows, layer)
            ),
        )

    def _stored_tensor(
        self, key: str, shape: tuple[int, ...], load: Callable[[], NDArray]
    ) -> StoredTensor:
        return StoredTensor(
            key=key,
            shape=shape,
            dtype=self.dtype.name,
            nbytes=int(np.prod(shape)) * self.dtype.itemsize,
            load=lambda: load().astype(self.dtype),
        )

    def _weight(self, layer: InventoryLayer) -> NDArray[np.float32]:
        inputs = self._inputs_of(layer)
        return draw_weight(
            layer.n,
            self._statistics(layer.kind).weight,
            inputs.channel_rms,
            self._weight_std(layer),
            self._rng(layer.name, "weight"),
        )

    def _bias(self, layer: InventoryLayer) -> NDArray[np.float32]:
        # As large as a weight: an assumption, small beside the output.
        rng = self._rng(layer.name, "bias")
        return self._weight_std(layer) * rng.standard_normal(layer.n, dtype=np.float32)

    def _rows(self, layer: InventoryLayer) -> NDArray[np.float32]:
        inputs = self._inputs_of(layer)
        return inputs.draw(self.tokens, self._rng(layer.group, "rows"))

    def _inputs_of(self, layer: InventoryLayer) -> InputModel:
        return self._input_model(layer.group, layer.k, self._statistics(layer.kind).inputs)

    def _make_input_model(self, group: str, k: int, statistics: InputStatistics) -> InputModel:
        return InputModel(k, statistics, self._rng(group, "channels"))

    def _statistics(self, kind: str) -> KindStatistics:
        return statistics_of(kind, gated=self.is_gated)

    def _weight_std(self, layer: InventoryLayer) -> float:
        # Outputs keep their size as the model gets wider.
        relative = (REFERENCE_WIDTH / self.inventory.width) ** 0.5
        return self._statistics(layer.kind).weight.std * relative

    def _rng(self, name: str, what: str) -> np.random.Generator:
        key = f"{self.seed}/{self.inventory.model}/{name}/{what}".encode()
        return np.random.default_rng(int.from_bytes(hashlib.sha256(key).digest()))


def draw_weight(
    n: int,
    statistics: WeightStatistics,
    channel_rms: NDArray[np.float64],
    std: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Draw a weight.

    Parameters
    ----------
    n : int
        Output features N.
    statistics : WeightStatistics
        Its `std` is not used.
    channel_rms : ndarray of shape (K,), float64
        Root mean square of each input channel.
    std : float
        Standard deviation of all values of the weight.

    Returns
    -------
    weight : ndarray of shape (N, K), float32
    """
    k = len(channel_rms)
    weight = _student_t(n, k, statistics.tail_df, rng)
    weight *= np.exp(_ROW_SCALE_STD * rng.standard_normal((n, 1), dtype=np.float32))
    columns = correlated(np.log(channel_rms), statistics.correlation, rng)
    weight *= np.exp(_COLUMN_SCALE_STD * columns).astype(np.float32)
    left, right = (
        _orthonormal(size, max(round(_RANK_SHARE * min(n, k)), 1), rng) for size in (n, k)
    )
    order = np.arange(1, left.shape[1] + 1, dtype=np.float32)
    left *= 0.8 * statistics.low_rank * max(n, k) ** 0.5 * order**-_DECAY
    weight += left @ right.T
    weight *= np.float32(std / weight.std(dtype=np.float64))
    return weight


def _student_t(n: int, k: int, df: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Student's t over its standard deviation sqrt(df / (df - 2)): a normal over a chi."""
    values = rng.standard_normal((n, k), dtype=np.float32)
    # chi^2 with df degrees of freedom is twice a gamma variable of shape df / 2.
    chi2 = rng.standard_gamma(df / 2, (n, k), dtype=np.float32)
    values /= np.sqrt(chi2, out=chi2)
    values *= np.float32((df / 2 - 1) ** 0.5)
    return values


def _orthonormal(size: int, rank: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random orthonormal columns: A C^-T with A normal and A^T A = C C^T.

    A is far from singular, its size being ten times its rank; LAPACK's QR would take most of the
    time of a weight.
    """
    normal = rng.standard_normal((size, rank), dtype=np.float32)
    cholesky = np.linalg.cholesky((normal.T @ normal).astype(np.float64))
    return normal @ np.linalg.inv(cholesky).T.astype(np.float32)
