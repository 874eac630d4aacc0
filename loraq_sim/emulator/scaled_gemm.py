"""One GEMM of stored tensors: groups of K through the MAC array, their partial sums combined.

What is exact and what is a model:

- integer elements (``intN``, ``mxintN``, ``bfp16ebs8``): bit exact. Inside a stretch of K with
  constant scales `emulate_gemm` accumulates; partial sums combine in order of K as
  `loraq_sim.emulator.combine` says.
- small float elements (``mxfpN``, ``nvfp4``), also with integers: the products and the sum of one
  stretch are exact (for ``mxfp8_e5m2`` to float64), then rounded once to float32 and combined as
  above. Real tensor cores round inside the stretch too, in an order that is not published: a model.
- 16- and 32-bit floats (a 16-bit branch, P kept in fp16): float32 products accumulated in float32
  by the host's matrix multiply: a model.
- integers with zero points: the same, so no accumulator is emulated and none can overflow: a model
  that says so by its name.

Sums beyond the format they are combined in become infinite or are clamped, and are counted
(`loraq_sim.emulator.float_overflow`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from loraq_sim.emulator.combine import ShiftCombiner, SumCombiner, clamped
from loraq_sim.emulator.gemm import emulate_gemm_report
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.two_level import emulate_two_level_report
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor

__all__ = ["GemmStatistics", "scaled_gemm"]

BIT_EXACT = "bit exact"
BLOCK_MODEL = "model: block sums rounded once"
FLOAT_MODEL = "model: float32 sums"
ZERO_POINT_MODEL = "model: float32 sums of codes with zero points"
_ARITHMETICS = (BIT_EXACT, BLOCK_MODEL, FLOAT_MODEL, ZERO_POINT_MODEL)


@dataclass(frozen=True, kw_only=True)
class GemmStatistics:
    """What accumulators saw, and how exact the emulation was.

    ``overflow_count`` counts adds (and sums of chunks or columns) that overflowed,
    ``outputs_affected`` the group sums they touched; ``first_overflow_k`` is the index along K of
    the chunk where the first happened. ``safe_acc_bits`` is the narrowest width without any on
    these operands, and ``guaranteed_acc_bits`` the narrowest for any activations of their width
    (from the weights' L1 norms, as A2Q does); both None where no integer GEMM ran.
    ``arithmetic`` is ``bit exact`` or names a model. ``clipped_count`` outputs of finite operands
    left the format their partial sums are combined in, ``first_clipped_row`` is the first row.
    """

    overflow_count: int = 0
    outputs_affected: int = 0
    first_overflow_k: int | None = None
    safe_acc_bits: int | None = None
    guaranteed_acc_bits: int | None = None
    arithmetic: str = BIT_EXACT
    clipped_count: int = 0
    first_clipped_row: int | None = None

    def joined(self, other: "GemmStatistics") -> "GemmStatistics":
        """Counts added; the first overflow, wider width and less exact arithmetic kept."""
        return GemmStatistics(
            overflow_count=self.overflow_count + other.overflow_count,
            outputs_affected=self.outputs_affected + other.outputs_affected,
            first_overflow_k=_known(min, self.first_overflow_k, other.first_overflow_k),
            safe_acc_bits=_known(max, self.safe_acc_bits, other.safe_acc_bits),
            guaranteed_acc_bits=_known(max, self.guaranteed_acc_bits, other.guaranteed_acc_bits),
            arithmetic=max(self.arithmetic, other.arithmetic, key=_ARITHMETICS.index),
            clipped_count=self.clipped_count + other.clipped_count,
            first_clipped_row=_known(min, self.first_clipped_row, other.first_clipped_row),
        )


def scaled_gemm(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: "MacArray | TwoLevelArray",
    combine: str = "fp32",
    *,
    saturate: bool = False,
) -> tuple[np.ndarray, GemmStatistics]:
    """x w^T as float32 (M, N) of two stored tensors (M, K) and (N, K), and what accumulators saw.

    With `saturate` a sum outside the accumulators is clamped at the largest value of its format;
    else it becomes infinite.

    Raises
    ------
    InputError
        If `combine` is ``shift`` and the scales are not powers of two, or too far apart.
    """
    if not (_has_block_products(x.format) and _has_block_products(w.format)):
        return _float_gemm(x, w, saturate)
    is_integer = x.format.element.is_integer and w.format.element.is_integer
    statistics = GemmStatistics(arithmetic=BIT_EXACT if is_integer else BLOCK_MODEL)
    combiner = _combiner(x, w, combine, is_integer, saturate)
    for start, stop in _constant_scale_stretches(x.shape[1], x.format, w.format):
        x_codes, w_codes = x.codes[:, start:stop], w.codes[:, start:stop]
        if is_integer:
            acc, seen = _accumulate(x_codes, w_codes, mac, x.format.element.bits, start)
            statistics = statistics.joined(seen)
        else:
            # Small floats that a conversion without saturation left infinite stay so.
            with np.errstate(invalid="ignore"):
                acc = x_codes.astype(np.float64) @ w_codes.astype(np.float64).T
        combiner.add(acc, _scale_at(x, start), _scale_at(w, start))
    y = combiner.result()
    return y, _with_clipped(statistics, y, x, combiner.clipped)


def _float_gemm(
    x: QuantizedTensor, w: QuantizedTensor, saturate: bool
) -> tuple[np.ndarray, GemmStatistics]:
    has_zero_point = x.format.element.has_zero_point or w.format.element.has_zero_point
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.dequantize() @ w.dequantize().T
    clipped = None
    if saturate:
        y, clipped = clamped(y, "fp32")
    model = ZERO_POINT_MODEL if has_zero_point else FLOAT_MODEL
    return y, _with_clipped(GemmStatistics(arithmetic=model), y, x, clipped)


def _with_clipped(
    statistics: GemmStatistics, y: np.ndarray, x: QuantizedTensor, clipped: np.ndarray | None
) -> GemmStatistics:
    """`statistics` with the outputs that left their format: `clipped`, or what is not finite now.

    An infinity stays one or becomes NaN, so the last sum tells whether any step overflowed.
    """
    if clipped is None:
        clipped = ~np.isfinite(y)
    if not clipped.any():
        return statistics
    finite = np.isfinite(x.codes).all(axis=1)
    if x.scales is not None:
        finite = finite & np.isfinite(x.scales).all(axis=1)
    clipped = clipped & finite[:, None]
    count = int(clipped.sum())
    first = int(np.flatnonzero(clipped.any(axis=1))[0]) if count else None
    return dataclasses.replace(statistics, clipped_count=count, first_clipped_row=first)


def _accumulate(
    x: np.ndarray, w: np.ndarray, mac: "MacArray | TwoLevelArray", x_bits: int, start: int
) -> tuple[np.ndarray, GemmStatistics]:
    """Accumulators (M, N) of one stretch of K that begins at `start`, and what happened there."""
    if isinstance(mac, TwoLevelArray):
        report = emulate_two_level_report(x, w, mac, a_bits=x_bits)
        inner = report.column_overflow_count + report.column_tree_overflow_count
    else:
        report = emulate_gemm_report(x, w, mac, a_bits=x_bits)
        inner = report.tree_overflow_count
    first = report.first_overflow_k
    return report.acc, GemmStatistics(
        overflow_count=report.overflow_count + inner,
        outputs_affected=report.outputs_affected,
        first_overflow_k=None if first is None else start + first,
        safe_acc_bits=report.safe_acc_bits,
        guaranteed_acc_bits=report.guaranteed_acc_bits,
    )


def _known(choose: Callable[..., int], *values: int | None) -> int | None:
    return choose((value for value in values if value is not None), default=None)


def _has_block_products(fmt: Format) -> bool:
    return not fmt.element.is_plain_float and not fmt.element.has_zero_point


def _combiner(
    x: QuantizedTensor, w: QuantizedTensor, combine: str, is_integer: bool, saturate: bool
) -> SumCombiner | ShiftCombiner:
    if combine != "shift":
        return SumCombiner((x.shape[0], w.shape[0]), combine, saturate=saturate)
    for operand in (x, w):
        if not is_integer or operand.format.scale.name != "e8m0":
            raise InputError(
                f"combine 'shift' needs integers with power-of-two (e8m0) scales, got "
                f"{operand.format}; use the element family mxint, or combine fp32"
            )
    return ShiftCombiner(*(_scales_that_count(tensor) for tensor in (x, w)))


def _scales_that_count(tensor: QuantizedTensor) -> np.ndarray:
    """Scales (rows, groups), 0 for groups of zeros: theirs says nothing about alignment."""
    rows, k = tensor.shape
    scales = np.broadcast_to(tensor.scales, (rows, tensor.scales.shape[1]))
    width = min(tensor.format.group_size, k) if tensor.format.granularity == "group" else k
    starts = np.arange(0, k, width)
    is_empty = ~np.logical_or.reduceat(tensor.codes != 0, starts, axis=1)
    return np.where(is_empty & np.isfinite(scales), np.float32(0), scales)


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
