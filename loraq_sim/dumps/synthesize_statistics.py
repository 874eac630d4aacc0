"""What the inputs and weights of diffusion transformer layers look like, by kind of layer.

The table (`statistics_of`) follows measurements of trained transformer layers (MiniLM, a small
PixArt) and what is published about PixArt and SANA: heavy-tailed weights with a few dominant
singular values (SVDQuant, arXiv 2411.05007), salient channels in fixed places whose size drifts
over the time steps (PTQ4DiT, arXiv 2405.16005; LRQ-DiT, arXiv 2508.03485), the raw residual stream
as input of the cross attention's queries. No numeric tables of PixArt's own weights are published;
the standard deviations of weights are therefore assumptions, on which no relative error depends.

Input rows (`InputModel`) have outlier channels, a decaying spectrum and drift over the time steps.
A row of time step t has, in channel c,

    x_c = exp(token_std e) g_t scale_tc (z_c + mean_std m_c)
    z = 0.9 F diag(d) V + 0.44 noise,   d_i ~ i^-0.45,   i = 1 ... 3 * directions * K
    scale_tc = exp(scale_std (sqrt(1 - drift^2) a_c + drift b_tc))

with e, m, a, F, V and the noise standard normal, and b a stationary AR(1) process over the steps.
Its coefficient 0.9 lets the log scales of the first and the last of 20 steps correlate by
1 - drift^2 (1 - 0.9^19), which is 0.45 at drift 0.8 (measured for self_q on a small PixArt).
Outlier channels keep their place; their scale is a fixed ratio times the median, with a quarter of
the others' drift. g_t is a common AR(1) factor: root mean squares of whole tensors change over the
steps by 1.1 to 2.1.

What enters a second feed-forward layer is GELU(0.9 h - 1), or h SiLU(h') in a gated one, with h
drawn as above, times exp(0.35 N) per channel and times the outlier ratio.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "REFERENCE_WIDTH",
    "TIME_STEPS",
    "InputModel",
    "InputStatistics",
    "KindStatistics",
    "WeightStatistics",
    "correlated",
    "is_in_table",
    "statistics_of",
    "steps_of_rows",
]

REFERENCE_WIDTH = 1152
"""Width of PixArt-Σ, for which the table stands."""

TIME_STEPS = 20
"""Denoising steps that the rows of an input are spread over."""

Shape = Literal["linear", "gelu", "silu_glu", "attention_and_gelu"]


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """How a weight is drawn; the formula is in `synthesize`.

    `std` is that of all values at width 1152, `tail_df` the degrees of freedom of Student's t,
    `low_rank` the size c of the low-rank part against the noise, `correlation` that of a column's
    log scale with the log root mean square of its input channel.
    """

    std: float
    tail_df: float
    low_rank: float
    correlation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """How input rows are drawn, by the formulas above.

    `scale_std` is the standard deviation of the channels' log scale, `outlier_share` the share of
    channels that are set to one of `outlier_ratios` times the median, `mean_std` that of a
    channel's mean over its scale, `token_std` that of the tokens' log scale, `directions` the share
    of dimensions that the tokens mainly vary in, `drift` the part of the log scale that changes
    over the time steps. `keeps_floor`: scales and outlier ratios behind GELU leave its negative
    values as they are, above -0.17.
    """

    scale_std: float
    mean_std: float
    token_std: float
    directions: float
    outlier_share: float = 0.0
    outlier_ratios: tuple[float, ...] = ()
    drift: float = 0.8
    shape: Shape = "linear"
    keeps_floor: bool = False


@dataclass(frozen=True, kw_only=True)
class KindStatistics:
    """Weight and input of one kind of layer."""

    weight: WeightStatistics
    inputs: InputStatistics


_BLOCK_INPUT = InputStatistics(
    scale_std=0.45,
    outlier_share=0.008,
    outlier_ratios=(4.0, 6.0, 8.0),
    mean_std=0.4,
    token_std=0.12,
    directions=0.08,
)
_ATTENTION_OUTPUT = InputStatistics(scale_std=0.33, mean_std=0.5, token_std=0.25, directions=0.06)
_RESIDUAL_STREAM = InputStatistics(
    scale_std=0.5,
    outlier_share=0.003,
    outlier_ratios=(12.0, 20.0, 30.0),
    mean_std=0.9,
    token_std=0.12,
    directions=0.10,
)
_TEXT = InputStatistics(
    scale_std=0.25,
    outlier_share=0.002,
    outlier_ratios=(10.0,),
    mean_std=0.15,
    token_std=0.26,
    directions=0.12,
)
_CROSS_OUTPUT = InputStatistics(scale_std=0.30, mean_std=0.3, token_std=0.40, directions=0.10)
_FFN_INPUT = InputStatistics(
    scale_std=0.42,
    outlier_share=0.008,
    outlier_ratios=(4.0, 6.0, 10.0),
    mean_std=0.45,
    token_std=0.12,
    directions=0.08,
)
_AFTER_GELU = InputStatistics(
    scale_std=0.45,
    mean_std=0.3,
    token_std=0.15,
    directions=0.08,
    # 12 of 4608 channels, six times as large after the activation function.
    outlier_share=12 / 4608,
    outlier_ratios=(6.0,),
    # GELU turns a small change of the scale into a larger one of its output.
    drift=0.4,
    shape="gelu",
)
# A product of two normals has heavy tails by itself: excess kurtosis 30 to 60 in SANA.
_AFTER_GLU = InputStatistics(
    scale_std=0.15, mean_std=0.2, token_std=0.1, directions=0.08, drift=0.4, shape="silu_glu"
)
_AFTER_BOTH = replace(_AFTER_GELU, shape="attention_and_gelu")

_QK = WeightStatistics(std=0.028, tail_df=12, low_rank=6.0)
_V = WeightStatistics(std=0.022, tail_df=20, low_rank=4.0, correlation=-0.6)
_OUT = WeightStatistics(std=0.022, tail_df=15, low_rank=4.0, correlation=-0.1)
_TEXT_WEIGHT = WeightStatistics(std=0.024, tail_df=15, low_rank=3.5)
# Trained ffn_up layers hold 12 to 15 % of their energy in 2.8 % of the singular values.
_UP = WeightStatistics(std=0.024, tail_df=10, low_rank=6.0, correlation=-0.3)
_DOWN = WeightStatistics(std=0.022, tail_df=8, low_rank=3.2, correlation=-0.3)

_TABLE = {
    "self_q": KindStatistics(weight=_QK, inputs=_BLOCK_INPUT),
    "self_k": KindStatistics(weight=_QK, inputs=_BLOCK_INPUT),
    "self_v": KindStatistics(weight=_V, inputs=_BLOCK_INPUT),
    "self_out": KindStatistics(weight=_OUT, inputs=_ATTENTION_OUTPUT),
    "cross_q": KindStatistics(
        weight=WeightStatistics(std=0.026, tail_df=12, low_rank=4.5), inputs=_RESIDUAL_STREAM
    ),
    "cross_k": KindStatistics(weight=_TEXT_WEIGHT, inputs=_TEXT),
    "cross_v": KindStatistics(weight=_TEXT_WEIGHT, inputs=_TEXT),
    "cross_out": KindStatistics(
        weight=WeightStatistics(std=0.020, tail_df=15, low_rank=3.5, correlation=-0.1),
        inputs=_CROSS_OUTPUT,
    ),
    "ffn_up": KindStatistics(weight=_UP, inputs=_FFN_INPUT),
    "ffn_down": KindStatistics(weight=_DOWN, inputs=_AFTER_GELU),
    "single_out": KindStatistics(weight=_DOWN, inputs=_AFTER_BOTH),
}
# Joint attention normalizes and modulates the text stream as it does the image stream.
_TABLE |= {
    f"text_{part}": _TABLE[same]
    for part, same in [
        *(("q", "self_q"), ("k", "self_k"), ("v", "self_v"), ("out", "self_out")),
        *(("ffn_up", "ffn_up"), ("ffn_down", "ffn_down")),
    ]
}
# What is fused reads what its parts read; FLUX's single blocks start with q, k, v and the first
# feed-forward layer in one.
_TABLE |= {
    "self_qkv": _TABLE["self_q"],
    "text_qkv": _TABLE["self_q"],
    "single_in": _TABLE["self_q"],
    "cross_kv": _TABLE["cross_k"],
}
# Embeddings and modulations stay at 16 bits and are in no table: no outliers, an assumption.
_OTHER = KindStatistics(
    weight=_TEXT_WEIGHT,
    inputs=InputStatistics(scale_std=0.3, mean_std=0.3, token_std=0.15, directions=0.10),
)


def statistics_of(kind: str, *, gated: bool = False) -> KindStatistics:
    """Return the statistics of a kind of layer.

    Parameters
    ----------
    kind : str
        As in `kinds`; a kind outside the table (embeddings, modulations) has no outliers.
    gated : bool
        The feed-forward part is gated by SiLU (SANA), so its second layer has a symmetric input.
    """
    found = _TABLE.get(kind, _OTHER)
    if gated and kind == "ffn_down":
        return KindStatistics(weight=found.weight, inputs=_AFTER_GLU)
    return found


def is_in_table(kind: str) -> bool:
    """Whether inputs of a kind of layer follow measurements; the others have no outliers."""
    return kind in _TABLE


_SHARED, _WHITE = 0.9, 0.44
_SPECTRUM_DECAY = 0.45
_DRIFT_COEFFICIENT = 0.9
_OUTLIER_DRIFT = 0.25
_COMMON_DRIFT_STD = 0.12
_HIDDEN_SCALE_STD = 0.35

Rng = np.random.Generator
Draw = Callable[[int, Rng], NDArray[np.float32]]


def steps_of_rows(tokens: int) -> NDArray[np.int64]:
    """Time step of each of `tokens` rows: they are spread evenly over the steps, in order."""
    return np.arange(tokens, dtype=np.int64) * TIME_STEPS // tokens


class InputModel:
    """The distribution of one layer's input rows.

    Parameters
    ----------
    k : int
        Input features K.
    statistics : InputStatistics
    rng : Generator
        Draws what all rows share: channel scales, means and directions.

    Attributes
    ----------
    channel_rms : ndarray of shape (K,), float64
        Root mean square of each channel over rows and time steps.
    """

    def __init__(self, k: int, statistics: InputStatistics, rng: Rng) -> None:
        build = _SHAPES[statistics.shape]
        self.channel_rms, self._draw = build(k, statistics, rng)

    def draw(self, tokens: int, rng: Rng) -> NDArray[np.float32]:
        """Draw rows of shape (tokens, K), float32, in order of time step."""
        return self._draw(tokens, rng)


def _linear(k: int, statistics: InputStatistics, rng: Rng) -> tuple[NDArray[np.float64], Draw]:
    scale, mean = _channels(k, statistics, rng)
    rank = max(round(3 * statistics.directions * k), 1)
    spectrum = np.arange(1, rank + 1, dtype=np.float64) ** -_SPECTRUM_DECAY
    spectrum *= _SHARED / np.linalg.norm(spectrum)
    seed = rng.integers(2**63)

    def draw(tokens: int, rng: Rng) -> NDArray[np.float32]:
        # Drawn again for each call: kept, the directions would be the largest array of a model.
        directions = np.random.default_rng(seed).standard_normal((rank, k), dtype=np.float32)
        factors = rng.standard_normal((tokens, rank), dtype=np.float32)
        rows = (factors * spectrum.astype(np.float32)) @ directions
        rows += np.float32(_WHITE) * rng.standard_normal((tokens, k), dtype=np.float32)
        rows += mean.astype(np.float32)
        rows *= scale.astype(np.float32)[steps_of_rows(tokens)]
        loudness = statistics.token_std * rng.standard_normal((tokens, 1), dtype=np.float32)
        rows *= np.exp(loudness)
        return rows

    return np.sqrt(np.square(scale).mean(axis=0) * (1 + np.square(mean))), draw


def _gelu(k: int, statistics: InputStatistics, rng: Rng) -> tuple[NDArray[np.float64], Draw]:
    _, draw_hidden = _linear(k, replace(statistics, outlier_share=0.0), rng)
    gain = _hidden_gain(k, statistics, rng)
    rms, draw = _after(
        gain, rng, lambda tokens, rng: _gelu_tanh(0.9 * draw_hidden(tokens, rng) - 1)
    )
    if not statistics.keeps_floor:
        return rms, draw

    def draw_above_floor(tokens: int, rng: Rng) -> NDArray[np.float32]:
        rows = draw(tokens, rng)
        return np.where(rows < 0, rows / gain, rows)

    return rms, draw_above_floor


def _silu_glu(k: int, statistics: InputStatistics, rng: Rng) -> tuple[NDArray[np.float64], Draw]:
    plain = replace(statistics, outlier_share=0.0)
    _, draw_hidden = _linear(k, plain, rng)
    _, draw_gate = _linear(k, plain, rng)
    gain = _hidden_gain(k, statistics, rng)

    def draw(tokens: int, rng: Rng) -> NDArray[np.float32]:
        gate = draw_gate(tokens, rng)
        return draw_hidden(tokens, rng) * gate / (1 + np.exp(-gate))

    return _after(gain, rng, draw)


def _attention_and_gelu(
    k: int, statistics: InputStatistics, rng: Rng
) -> tuple[NDArray[np.float64], Draw]:
    """FLUX's single blocks: the attention's output beside a feed-forward part 4 times as wide."""
    n_attention = k // 5
    rms_a, draw_a = _linear(n_attention, statistics_of("self_out").inputs, rng)
    rms_g, draw_g = _gelu(k - n_attention, replace(statistics, shape="gelu"), rng)

    def draw(tokens: int, rng: Rng) -> NDArray[np.float32]:
        return np.concatenate([draw_a(tokens, rng), draw_g(tokens, rng)], axis=1)

    return np.concatenate([rms_a, rms_g]), draw


_SHAPES = {
    "linear": _linear,
    "gelu": _gelu,
    "silu_glu": _silu_glu,
    "attention_and_gelu": _attention_and_gelu,
}


def _channels(
    k: int, statistics: InputStatistics, rng: Rng
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scales of shape (steps, K) and means of shape (K,) in units of the scale."""
    fixed = rng.standard_normal(k)
    drifting = _drift((TIME_STEPS, k), rng)
    fixed_part = (1 - statistics.drift**2) ** 0.5
    scale = np.exp(statistics.scale_std * (fixed_part * fixed + statistics.drift * drifting))
    places, ratios = _outliers(k, statistics, rng)
    calm = np.exp(_OUTLIER_DRIFT * statistics.scale_std * drifting[:, places])
    scale[:, places] = np.median(scale) * ratios * calm
    scale *= np.exp(_COMMON_DRIFT_STD * _drift((TIME_STEPS, 1), rng))
    return scale, statistics.mean_std * rng.standard_normal(k)


def correlated(reference: NDArray[np.float64], correlation: float, rng: Rng) -> NDArray[np.float64]:
    """Standard normal values of a given correlation with `reference`."""
    noise = rng.standard_normal(len(reference))
    spread = reference.std()
    if not spread:
        return noise
    known = (reference - reference.mean()) / spread
    return correlation * known + (1 - correlation**2) ** 0.5 * noise


def _drift(shape: tuple[int, int], rng: Rng) -> NDArray[np.float64]:
    """AR(1) processes of unit variance along the first axis."""
    noise = rng.standard_normal(shape)
    fresh = (1 - _DRIFT_COEFFICIENT**2) ** 0.5
    for step in range(1, len(noise)):
        noise[step] = _DRIFT_COEFFICIENT * noise[step - 1] + fresh * noise[step]
    return noise


def _outliers(
    k: int, statistics: InputStatistics, rng: Rng
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Places of the outlier channels, and how many times the median each is."""
    count = round(statistics.outlier_share * k)
    places = rng.choice(k, size=count, replace=False)
    return places, np.resize(np.asarray(statistics.outlier_ratios or (1.0,)), count)


def _hidden_gain(k: int, statistics: InputStatistics, rng: Rng) -> NDArray[np.float32]:
    gain = np.exp(_HIDDEN_SCALE_STD * rng.standard_normal(k))
    places, ratios = _outliers(k, statistics, rng)
    gain[places] *= ratios
    return gain.astype(np.float32)


def _after(gain: NDArray[np.float32], rng: Rng, draw: Draw) -> tuple[NDArray[np.float64], Draw]:
    """Draw times gain; the root mean square behind a curve comes from 400 rows of its own."""
    sample = draw(400, np.random.default_rng(rng.integers(2**63)))
    rms = gain * np.sqrt(np.square(sample, dtype=np.float64).mean(axis=0))
    return rms, lambda tokens, rng: draw(tokens, rng) * gain


def _gelu_tanh(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return 0.5 * x * (1 + np.tanh(np.float32(0.7978845608) * (x + np.float32(0.044715) * x**3)))
