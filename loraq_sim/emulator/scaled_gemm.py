"""One GEMM of stored tensors: groups of K through the MAC array, their partial sums combined.

What is exact and what is a model:

- integer elements (``intN``, ``uintN``, ``mxintN``, ``bfp16ebs8``): bit exact. Inside a stretch of
  K with constant scales and zero points `emulate_gemm` accumulates, and the correction of the zero
  points enters where the array takes it (`loraq_sim.emulator.mac_array`); partial sums combine in
  order of K as below.
- small float elements (``mxfpN``, ``nvfp4``) and 16-bit floats on a tensor core that the combine
  step names (``hopper``, ``blackwell``, ...): bit exact by the rule published for that generation
  (`loraq_sim.emulator.tensor_cores`).
- small float elements elsewhere, also with integers: the products and the sum of one stretch are
  exact (for ``mxfp8_e5m2`` to float64), then rounded once to float32 and combined as below. Arrays
  round inside the stretch too: a model.
- 16- and 32-bit floats elsewhere (a 16-bit branch, P kept in fp16): float32 products accumulated in
  float32 by the host's matrix multiply: a model.

Partial sums are combined in the accelerator's format, each step rounded to it:

fp32   y <- fl32(y + fl32(partial))
bf16   y <- bf16(y + bf16(partial))
fp16   y <- fp16(y + fp16(partial))
fp22   y <- trunc14(y + fl32(partial)): 14 significant bits, truncated toward zero, the width
       reported for the FP8 path of Hopper's tensor cores (DeepSeek-V3, arXiv 2412.19437,
       section 3.5.2); the alignment inside one instruction is not modeled
shift  integers aligned by the exponents of power-of-two scales and added exactly
turing, ampere, ada, hopper, blackwell, cdna3
       as fp32; what happens inside an instruction of floats is that generation's

Sums beyond the format become infinite, or are clamped at every step where the data path says so,
and are counted (`loraq_sim.emulator.float_overflow`).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.mac_array import (
    TENSOR_CORES,
    MacArray,
    TwoLevelArray,
    combine_format,
    fused_dot_of,
)
from loraq_sim.emulator.tensor_cores import fused_gemm
from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor

if TYPE_CHECKING:
    from loraq_sim.emulator.scaled_tiles import ScaledSums

__all__ = [
    *("BIT_EXACT", "BLOCK_MODEL", "COMBINES", "FLOAT_MODEL", "FUSED_DOT"),
    *("GemmStatistics", "clamped", "ended_gemm", "rounded", "scaled_gemm", "zero_points_at"),
]

COMBINES = ("fp32", "bf16", "fp16", "fp22", "shift", *TENSOR_CORES)

# float32 has 23 fraction bits; 13 of them and the implied one are kept.
_FP22_MASK = np.uint32(0xFFFFFFFF << (23 - 13) & 0xFFFFFFFF)
# Magnitude bits of aligned sums, which are int64.
_ALIGNED_BITS = 62


BIT_EXACT = "bit exact"
BLOCK_MODEL = "model: block sums rounded once"
FLOAT_MODEL = "model: float32 sums"
FUSED_DOT = "published rule: fused dot-add"
_ARITHMETICS = (BIT_EXACT, FUSED_DOT, BLOCK_MODEL, FLOAT_MODEL)


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
    zero_point: str = "initial",
) -> tuple[np.ndarray, GemmStatistics]:
    """x w^T as float32 (M, N) of two stored tensors (M, K) and (N, K), and what accumulators saw.

    With `saturate` a sum outside the accumulators is clamped at the largest value of its format;
    else it becomes infinite. `zero_point` says where zero points are corrected, as in
    `loraq_sim.emulate_gemm`.

    Raises
    ------
    InputError
        If `combine` is ``shift`` and the scales are not powers of two, or too far apart.
    """
    if fused_dot_of(combine, x.format, w.format) is not None:
        y, clipped = fused_gemm(x, w, combine), None
        if saturate:
            y, clipped = clamped(y, "fp32")
        return y, _with_clipped(GemmStatistics(arithmetic=FUSED_DOT), y, x, clipped)
    if not (_has_block_products(x.format) and _has_block_products(w.format)):
        return _float_gemm(x, w, saturate)
    if combine in TENSOR_CORES:
        combine = combine_format(combine)
    if combine == "fp32" and (found := _tiled(x, w, mac, saturate, zero_point)) is not None:
        return found
    return by_stretches(x, w, mac, combine, saturate, zero_point)


def ended_gemm(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: "MacArray | TwoLevelArray",
    combine: str,
    zero_point: str,
    fmt: str,
    *,
    other: NDArray[np.float32] | None = None,
    bias: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint16], GemmStatistics] | None:
    """The end of a layer in one pass: ``x w^T + other + bias`` as bits of ``bf16`` or ``fp16``.

    `other` (M, N) and `bias` (N,) are C-contiguous. None where that does not serve, and where a sum
    or the rounding overflows.
    """
    from loraq_sim.emulator.scaled_tiles import Ending, run_scaled

    sums = _has_block_products(x.format) and _has_block_products(w.format)
    is_fused = fused_dot_of(combine, x.format, w.format) is not None
    if not sums or is_fused or combine_format(combine) != "fp32":
        return None
    found = run_scaled(x, w, mac, zero_point, Ending(fmt, other, bias))
    if found is None or not found.finite:
        return None
    return found.y.view(np.uint16), _statistics_of(found)


def _statistics_of(found: "ScaledSums") -> GemmStatistics:
    return GemmStatistics(
        safe_acc_bits=found.safe_acc_bits,
        guaranteed_acc_bits=found.guaranteed_acc_bits,
        arithmetic=BIT_EXACT if found.safe_acc_bits is not None else BLOCK_MODEL,
    )


def _tiled(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: "MacArray | TwoLevelArray",
    saturate: bool,
    zero_point: str,
) -> tuple[np.ndarray, GemmStatistics] | None:
    """The same on the fast route; None where that does not serve."""
    # Only here: describing a data path, for its cost, does not load the compiled kernels.
    from loraq_sim.emulator.scaled_tiles import run_scaled

    found = run_scaled(x, w, mac, zero_point)
    # Sums that became infinite on the way would have been clamped there.
    if found is None or (saturate and not found.finite):
        return None
    statistics, y = _statistics_of(found), found.y.view(np.float32)
    return y, statistics if found.finite else _with_clipped(statistics, y, x, None)


def by_stretches(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: "MacArray | TwoLevelArray",
    combine: str,
    saturate: bool,
    zero_point: str,
) -> tuple[np.ndarray, GemmStatistics]:
    """`scaled_gemm`, one stretch of K with constant scales after the other: takes everything."""
    is_integer = x.format.element.is_integer and w.format.element.is_integer
    statistics = GemmStatistics(arithmetic=BIT_EXACT if is_integer else BLOCK_MODEL)
    combiner = _combiner(x, w, combine, is_integer, saturate)
    for start, stop in _constant_scale_stretches(x.shape[1], x.format, w.format):
        if is_integer:
            acc, seen = _accumulate(x, w, mac, slice(start, stop), zero_point)
            statistics = statistics.joined(seen)
        else:
            # Small floats that a conversion without saturation left infinite stay so.
            with np.errstate(invalid="ignore"):
                acc = _levels(x, start, stop) @ _levels(w, start, stop).T
        combiner.add(acc, _scale_at(x, start), _scale_at(w, start))
    y = combiner.result()
    return y, _with_clipped(statistics, y, x, combiner.clipped)


def _float_gemm(
    x: QuantizedTensor, w: QuantizedTensor, saturate: bool
) -> tuple[np.ndarray, GemmStatistics]:
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.dequantize() @ w.dequantize().T
    clipped = None
    if saturate:
        y, clipped = clamped(y, "fp32")
    return y, _with_clipped(GemmStatistics(arithmetic=FLOAT_MODEL), y, x, clipped)


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


def _levels(tensor: QuantizedTensor, start: int, stop: int) -> NDArray[np.float64]:
    """Code minus zero point of a stretch of K, (rows, stretch): what a scale multiplies."""
    levels = tensor.codes[:, start:stop].astype(np.float64)
    zeros = zero_points_at(tensor, start)
    return levels if zeros is None else levels - zeros[:, None]


def _accumulate(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: "MacArray | TwoLevelArray",
    stretch: slice,
    zero_point: str,
) -> tuple[np.ndarray, GemmStatistics]:
    """Accumulators (M, N) of one stretch of K, and what happened there."""
    # Only here: describing a data path, for its cost, does not load the compiled kernels.
    from loraq_sim.emulator.accumulation import GemmReport, measured
    from loraq_sim.emulator.gemm import emulate_gemm_report
    from loraq_sim.emulator.two_level import TwoLevelReport

    report: GemmReport | TwoLevelReport = emulate_gemm_report(
        x.codes[:, stretch],
        w.codes[:, stretch],
        mac,
        a_zero=zero_points_at(x, stretch.start),
        w_zero=zero_points_at(w, stretch.start),
        zero_point=zero_point,
        a_bits=x.format.element.bits,
    )
    if isinstance(report, TwoLevelReport):
        inner = report.column_overflow_count + report.column_tree_overflow_count
    else:
        inner = measured(report.tree_overflow_count)
    first = report.first_overflow_k
    return report.acc, GemmStatistics(
        overflow_count=measured(report.overflow_count) + inner,
        outputs_affected=measured(report.outputs_affected),
        first_overflow_k=None if first is None else stretch.start + first,
        safe_acc_bits=report.safe_acc_bits,
        guaranteed_acc_bits=report.guaranteed_acc_bits,
    )


def _known(choose: Callable[..., int], *values: int | None) -> int | None:
    return choose((value for value in values if value is not None), default=None)


def _has_block_products(fmt: Format) -> bool:
    return not fmt.element.is_plain_float


def rounded(values: NDArray[np.float32], combine: str) -> NDArray[np.float32]:
    """Float32 `values` rounded to the format of a combine step; infinite beyond it."""
    if combine in ("bf16", "fp16"):
        with np.errstate(over="ignore"):
            return values.astype(_dtype(combine)).astype(np.float32)
    if combine == "fp22":
        # Cut bits would make a NaN with a small payload infinite.
        cut = (np.ascontiguousarray(values).view(np.uint32) & _FP22_MASK).view(np.float32)
        return np.where(np.isnan(values), values, cut)
    return values


def clamped(values: np.ndarray, combine: str) -> tuple[np.ndarray, np.ndarray]:
    """`values` with infinities replaced by the largest value of a combine step's format, and where.

    The largest value of fp22 is float32's with the last bits cut.
    """
    largest = np.float32(np.finfo(np.float32).max)
    if combine in ("bf16", "fp16"):
        import ml_dtypes

        largest = np.float32(ml_dtypes.finfo(_dtype(combine)).max)
    infinite = np.isinf(values)
    end = rounded(np.asarray(largest), combine)
    return np.where(infinite, np.copysign(end, values), values), infinite


class SumCombiner:
    """Floating-point combination in order of K; with `saturate` every step is clamped."""

    def __init__(self, shape: tuple[int, int], combine: str, *, saturate: bool = False) -> None:
        self._sum = np.zeros(shape, dtype=np.float32)
        self._combine = combine
        self.clipped = np.zeros(shape, dtype=np.bool_) if saturate else None

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add fl32(acc) * fl32(x_scale w_scale); acc (M, N), scales (M,) and (N,)."""
        is_fast = acc.dtype == np.int32 and self._combine in ("fp32", "bf16")
        if is_fast and self.clipped is None:
            from loraq_sim.kernels.float_passes import add_scaled

            # The formula below in one pass over memory.
            scales = (np.ascontiguousarray(s, np.float32) for s in (x_scale, w_scale))
            acc = np.ascontiguousarray(acc)
            add_scaled(acc, *scales, self._combine == "bf16", self._sum)
            return
        # Infinities are results here, and 0 times infinity is NaN.
        with np.errstate(over="ignore", invalid="ignore"):
            partial = acc.astype(np.float32) * (x_scale[:, None] * w_scale[None, :])
            if self._combine in ("bf16", "fp16"):
                partial = self._step(partial)
            self._sum = self._step(self._sum + partial)

    def result(self) -> np.ndarray:
        """The sum, (M, N) float32."""
        return self._sum

    def _step(self, values: np.ndarray) -> np.ndarray:
        values = rounded(values, self._combine)
        if self.clipped is None:
            return values
        values, infinite = clamped(values, self._combine)
        self.clipped |= infinite
        return values


class ShiftCombiner:
    """Exact integer combination: acc << (exponent - smallest exponent of the row and column).

    Rows and columns with a scale that is not finite are NaN.
    """

    clipped = None

    def __init__(self, x_scales: np.ndarray, w_scales: np.ndarray) -> None:
        self._wild = ~np.isfinite(x_scales).all(axis=1)[:, None] | ~np.isfinite(w_scales).all(
            axis=1
        )
        self._x_base, self._w_base = _smallest_exponents(x_scales), _smallest_exponents(w_scales)
        self._sum = np.zeros((len(x_scales), len(w_scales)), dtype=np.int64)
        self._bound = 0

    def add(self, acc: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray) -> None:
        """Add acc (M, N) integers, aligned by the exponents of the scales (M,) and (N,)."""
        # A zero scale marks a group of zeros: its accumulators are zero and need no shift.
        x_shift = np.where(x_scale == 0, 0, _exponents(x_scale) - self._x_base)
        w_shift = np.where(w_scale == 0, 0, _exponents(w_scale) - self._w_base)
        shift = x_shift[:, None] + w_shift[None, :]
        shift[(acc == 0) | self._wild] = 0
        _, magnitude = np.frexp(np.abs(acc.astype(np.float64)))
        self._bound += 2 ** int((magnitude + shift).max())
        if self._bound >= 2**_ALIGNED_BITS:
            bits = self._bound.bit_length() + 1
            raise InputError(
                f"combine 'shift' needs an aligned sum of {bits} bits, more than the "
                f"{_ALIGNED_BITS + 1} emulated: the scales of a row lie too far apart; use fp32"
            )
        self._sum += acc.astype(np.int64) << shift.astype(np.int64)

    def result(self) -> np.ndarray:
        """The sum rounded once to float32, (M, N)."""
        exponent = self._x_base[:, None] + self._w_base[None, :]
        with np.errstate(over="ignore"):
            y = np.ldexp(self._sum.astype(np.float32), exponent).astype(np.float32)
        return np.where(self._wild, np.float32(np.nan), y) if self._wild.any() else y


def _dtype(combine: str) -> np.dtype:
    if combine == "fp16":
        return np.dtype(np.float16)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def _exponents(scales: np.ndarray) -> np.ndarray:
    """e of scales 2**e; of no meaning for a zero scale."""
    return np.frexp(scales)[1] - 1


def _smallest_exponents(scales: np.ndarray) -> np.ndarray:
    """Smallest exponent of each row of (rows, groups) power-of-two scales; 0 for zero rows."""
    highest = np.iinfo(np.int32).max
    counts = np.isfinite(scales) & (scales != 0)
    smallest = np.where(counts, _exponents(np.where(counts, scales, 1)), highest).min(axis=1)
    return np.where(smallest == highest, 0, smallest)


def _combiner(
    x: QuantizedTensor, w: QuantizedTensor, combine: str, is_integer: bool, saturate: bool
) -> SumCombiner | ShiftCombiner:
    if combine != "shift":
        return SumCombiner((x.shape[0], w.shape[0]), combine, saturate=saturate)
    for operand in (x, w):
        if not is_integer or operand.format.scale_format.name != "e8m0":
            raise InputError(
                f"combine 'shift' needs integers with power-of-two (e8m0) scales, got "
                f"{operand.format}; use the element family mxint, or combine fp32"
            )
    return ShiftCombiner(*(_scales_that_count(tensor) for tensor in (x, w)))


def _scales_that_count(tensor: QuantizedTensor) -> np.ndarray:
    """Scales (rows, groups), 0 for groups of zeros: theirs says nothing about alignment."""
    rows, k = tensor.shape
    scales = np.broadcast_to(tensor.group_scales, (rows, tensor.group_scales.shape[1]))
    starts = np.arange(0, k, tensor.format.group_width(k))
    is_level = tensor.codes != 0
    if tensor.zero_points is not None:
        zeros = np.repeat(tensor.zero_points, tensor.format.group_width(k), axis=1)[:, :k]
        is_level = tensor.codes != zeros
    is_empty = ~np.logical_or.reduceat(is_level, starts, axis=1)
    return np.where(is_empty & np.isfinite(scales), np.float32(0), scales)


def _constant_scale_stretches(k: int, *formats: Format) -> list[tuple[int, int]]:
    edges = {0, k}
    for fmt in formats:
        edges.update(range(0, k, fmt.group_width(k)) if k else ())
    ordered = sorted(edges)
    return list(zip(ordered[:-1], ordered[1:], strict=True))


def zero_points_at(tensor: QuantizedTensor, k: int) -> NDArray[np.integer] | None:
    """Zero point of every row at position `k` of the last axis, (rows,) integers; or None."""
    if tensor.zero_points is None:
        return None
    group = k // tensor.format.group_width(tensor.shape[1])
    return np.broadcast_to(tensor.zero_points[:, group], (tensor.shape[0],))


def _scale_at(tensor: QuantizedTensor, k: int) -> np.ndarray:
    """Scale of every row at position `k` of the last axis, (rows,) float32."""
    group = k // tensor.format.group_width(tensor.shape[1])
    return np.broadcast_to(tensor.group_scales[:, group], (tensor.shape[0],))
