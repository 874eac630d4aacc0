"""Statistics of diffusion transformer layers by kind, from which `synthesize` draws layers.

The table follows measurements of trained transformer layers (MiniLM, a small PixArt) and what is
published about PixArt and SANA: heavy-tailed weights with a few dominant singular values (SVDQuant,
arXiv 2411.05007), salient channels in fixed places whose size drifts over the time steps (PTQ4DiT,
arXiv 2405.16005; LRQ-DiT, arXiv 2508.03485), the raw residual stream as input of the cross
attention's queries. No numeric tables of PixArt's own weights are published; the standard
deviations of weights are therefore assumptions, on which no relative error depends.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "REFERENCE_WIDTH",
    "TIME_STEPS",
    "InputStatistics",
    "KindStatistics",
    "WeightStatistics",
    "statistics_of",
]

REFERENCE_WIDTH = 1152
"""Width of PixArt-Σ, for which the table stands."""

TIME_STEPS = 20
"""Denoising steps that the rows of an input are spread over."""

Shape = Literal["linear", "gelu", "silu_glu", "attention_and_gelu"]


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    """How a weight is drawn; the formula is in `synthesize_weights`.

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
    """How input rows are drawn; the formulas are in `synthesize_inputs`.

    `scale_std` is the standard deviation of the channels' log scale, `outlier_share` the share of
    channels that are set to one of `outlier_ratios` times the median, `mean_std` that of a
    channel's mean over its scale, `token_std` that of the tokens' log scale, `directions` the share
    of dimensions that the tokens mainly vary in, `drift` the part of the log scale that changes
    over the time steps.
    """

    scale_std: float
    mean_std: float
    token_std: float
    directions: float
    outlier_share: float = 0.0
    outlier_ratios: tuple[float, ...] = ()
    drift: float = 0.8
    shape: Shape = "linear"


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
_HIDDEN = {
    "scale_std": 0.45,
    "mean_std": 0.3,
    "token_std": 0.15,
    "directions": 0.08,
    # 12 of 4608 channels, six times as large after the activation function.
    "outlier_share": 12 / 4608,
    "outlier_ratios": (6.0,),
    # GELU turns a small change of the scale into a larger one of its output.
    "drift": 0.4,
}
_AFTER_GELU = InputStatistics(**_HIDDEN, shape="gelu")
# A product of two normals has heavy tails by itself: excess kurtosis 30 to 60 in SANA.
_AFTER_GLU = InputStatistics(
    scale_std=0.15, mean_std=0.2, token_std=0.1, directions=0.08, drift=0.4, shape="silu_glu"
)
_AFTER_BOTH = InputStatistics(**_HIDDEN, shape="attention_and_gelu")

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
        As in `inventory`; a kind outside the table (embeddings, modulations) has no outliers.
    gated : bool
        The feed-forward part is gated by SiLU (SANA), so its second layer has a symmetric input.
    """
    found = _TABLE.get(kind, _OTHER)
    if gated and kind == "ffn_down":
        return KindStatistics(weight=found.weight, inputs=_AFTER_GLU)
    return found
