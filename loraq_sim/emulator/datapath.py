"""The data path of one layer on an accelerator: X -> main + branch -> output format.

    X_a = round(X)   main:    acc[g] = X_a[:, g] Q[:, g]^T     one MAC-array pass per scale group
    X_b = round(X)   branch:  P = X_b R^T, P^ = round(P), Z = P^ L^T
    y = round(combine(main) + combine(Z) + bias)

Inside a scale group the accumulation is integer and bit exact (`emulate_gemm`). Group partials are
then combined in order of K, each step rounded to the combine format:

    fp32:  y <- fl32(y + fl32(fl32(acc) * fl32(s_x s_w)))
    bf16:  y <- bf16(y + bf16(fl32(acc) * fl32(s_x s_w)))

16-bit operands (a 16-bit branch, or P kept in fp16) multiply as float32 products accumulated in
float32 by the host's matrix multiply: a model of the accumulation, not a bit-exact emulation.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.split import PrecisionSplit

__all__ = [
    "COMBINES",
    "Datapath",
    "IntegerStatistics",
    "LayerOutput",
    "StoredLayer",
    "run_layer",
    "scaled_gemm",
]

COMBINES = ("fp32", "bf16")


class StoredLayer(Protocol):
    """What a data path reads of a solved layer (see `loraq_sim.solvers.Solution`)."""

    main: QuantizedTensor
    left: QuantizedTensor | None
    right: QuantizedTensor | None
    smooth: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Datapath:
    """Accumulator, combine rule and intermediate formats of an accelerator.

    ``p_format`` is ``"branch"`` (P is rounded to the branch's activation format) or a format string
    such as ``"fp16"``; ``out_format`` is the format y is written in, such as ``"bf16"``.
    """

    mac: MacArray = MacArray()
    combine: str = "fp32"
    p_format: str = "branch"
    out_format: str = "fp16"

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise InputError(unknown_name("combine rule", self.combine, COMBINES))
        if self.p_format != "branch":
            parse_format(self.p_format)
        parse_format(self.out_format)


@dataclass(frozen=True, kw_only=True)
class IntegerStatistics:
    """What the accumulators saw: overflow events and the narrowest width without any.

    ``safe_acc_bits`` is None where no integer GEMM ran.
    """

    overflow_count: int = 0
    safe_acc_bits: int | None = None

    def joined(self, other: "IntegerStatistics") -> "IntegerStatistics":
        """Counts added, the wider width kept."""
        widths = [w for w in (self.safe_acc_bits, other.safe_acc_bits) if w is not None]
        return IntegerStatistics(
            overflow_count=self.overflow_count + other.overflow_count,
            safe_acc_bits=max(widths, default=None),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerOutput:
    """Output (M, N) as float32 values of the output format, with the integer statistics."""

    y: np.ndarray
    statistics: IntegerStatistics


def run_layer(
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
    bias: np.ndarray | None = None,
) -> LayerOutput:
    """Run one solved layer on an accelerator's data path.

    Parameters
    ----------
    activations : ndarray of shape (M, K), float32
        Full-precision input rows; rounded here, per token and group, with absmax scales.
    stored : StoredLayer
        A solution; its ``smooth`` factors divide the activations first.
    split : PrecisionSplit
        Names the activation formats of the two branches.
    datapath : Datapath
    bias : ndarray of shape (N,), float32, optional
        Added in float32 after the branches are combined.
    """
    x = activations if stored.smooth is None else activations / stored.smooth
    x_main = quantize(x, split.main_activation)
    y, statistics = scaled_gemm(x_main, stored.main, datapath)
    if stored.left is not None:
        shared = split.branch_activation == split.main_activation
        x_branch = x_main if shared else quantize(x, split.branch_activation)
        p, down = scaled_gemm(x_branch, stored.right, datapath)
        p_stored = quantize(p, _p_format(split, datapath))
        z, up = scaled_gemm(p_stored, stored.left, datapath)
        y = _rounded(y + z, datapath.combine)
        statistics = statistics.joined(down).joined(up)
    if bias is not None:
        y = y + bias
    return LayerOutput(y=quantize(y, datapath.out_format).dequantize(), statistics=statistics)


def scaled_gemm(
    x: QuantizedTensor, w: QuantizedTensor, datapath: Datapath
) -> tuple[np.ndarray, IntegerStatistics]:
    """x w^T as float32 (M, N) of two stored tensors (M, K) and (N, K), and what accumulators saw.

    Integer operands run through the MAC array, one pass for each stretch of K in which both scales
    are constant; anything else multiplies in float32.
    """
    if not (_is_symmetric_integer(x.format) and _is_symmetric_integer(w.format)):
        return x.dequantize() @ w.dequantize().T, IntegerStatistics()
    y = np.zeros((x.shape[0], w.shape[0]), dtype=np.float32)
    statistics = IntegerStatistics()
    for start, stop in _constant_scale_stretches(x.shape[1], x.format, w.format):
        report = emulate_gemm_report(x.codes[:, start:stop], w.codes[:, start:stop], datapath.mac)
        scale = _scale_at(x, start)[:, None] * _scale_at(w, start)[None, :]
        partial = report.acc.astype(np.float32) * scale
        y = _rounded(y + _rounded(partial, datapath.combine), datapath.combine)
        statistics = statistics.joined(
            IntegerStatistics(
                overflow_count=report.overflow_count, safe_acc_bits=report.safe_acc_bits
            )
        )
    return y, statistics


def _is_symmetric_integer(fmt: Format) -> bool:
    return fmt.element.is_integer and fmt.element.is_signed


def _constant_scale_stretches(k: int, *formats: Format) -> list[tuple[int, int]]:
    edges = {0, k}
    for fmt in formats:
        if fmt.granularity == "group":
            edges.update(range(0, k, fmt.group_size))
    ordered = sorted(edges)
    return list(zip(ordered[:-1], ordered[1:], strict=True))


def _scale_at(tensor: QuantizedTensor, k: int) -> np.ndarray:
    """Scale of every row at position `k` of the last axis, (rows,) float32."""
    group = k // tensor.format.group_size if tensor.format.granularity == "group" else 0
    return np.broadcast_to(tensor.scales[:, group], (tensor.shape[0],))


def _rounded(values: np.ndarray, combine: str) -> np.ndarray:
    if combine == "fp32":
        return values
    import ml_dtypes

    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _p_format(split: PrecisionSplit, datapath: Datapath) -> Format:
    if datapath.p_format == "branch":
        return split.branch_activation
    return parse_format(datapath.p_format)
