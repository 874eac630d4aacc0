"""Float dot products inside tensor cores, as MMA-Sim measured and published them.

One instruction multiplies a chunk of K and adds the products to its accumulator c in one step
("fused dot-add"): all products and c are aligned to the largest exponent among them, each is cut
toward zero at F bits below it, the integers are summed exactly, and the sum is cut to float32 (13
fraction bits for fp8 on Ada and Hopper). Exponents are those of the fields: subnormals keep the
lowest, a product's is the sum of two, so that it may be of a significand up to 4.

========== ===================== == ====== ====================================
Generation Elements              F  Chunk  Sum kept
========== ===================== == ====== ====================================
turing     fp16                  24 8      float32
ampere     fp16, bf16            24 8      float32
ada        fp16, bf16            24 8      float32
ada        fp8                   13 16     13 fraction bits
hopper     fp16, bf16            25 16     float32
hopper     fp8                   13 32     13 fraction bits
blackwell  fp16, bf16            25 16     float32
blackwell  fp8, fp6, fp4, mixed  25 32     float32
blackwell  e2m1 with scales      35 64     float32; exact sums of 16 times their scales
cdna3      fp16, bf16            24 8      see `kernels.float_passes.fused_dot_round_down`
========== ===================== == ====== ====================================

Blackwell applies e8m0 scales of blocks of 32 (of e2m1 also e4m3 scales of 16) inside the
instruction: the accumulator runs through all of K. Every other scale multiplies, in float32, what
the instructions made of its stretch of K, and stretches are added in float32. The scale of a whole
tensor multiplies the result.

Elements a generation has no instruction for, and fp8 of CDNA3 (another encoding, with other
exponents), are left to `loraq_sim.emulator.scaled_gemm`.

References
----------
.. [1] P. Xie, Y. Wang, F. Yang, M. Yang, "MMA-Sim: Bit-Accurate Reference Model of Tensor Cores and
   Matrix Cores", arXiv 2511.10909: bitwise equal to ten GPUs on over a million cases.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.mac_array import FusedDot, element_name, fused_dot_of
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import spread

__all__ = ["fused_gemm"]


_E2M1 = "float4_e2m1fn"
# (fraction bits, lowest exponent) of each element.
_FIELDS = {
    "fp16": (10, -14),
    "bf16": (7, -126),
    "float8_e4m3fn": (3, -6),
    "float8_e5m2": (2, -14),
    "float6_e2m3fn": (3, 0),
    "float6_e3m2fn": (2, -2),
    "float4_e2m1fn": (1, 0),
}
# e2m1 with scales on Blackwell: groups of 16, four of them in one instruction.
_GROUP, _GROUPS, _GROUP_BITS, _GROUP_ZERO = 16, 4, 35, -139


def fused_gemm(x: QuantizedTensor, w: QuantizedTensor, combine: str) -> NDArray[np.float32]:
    """x w^T as float32 (M, N), by the rule of a generation; needs `fused_dot_of` it.

    Infinities and NaN of operands and sums that leave float32 come out as float64 sums have them.
    """
    rule = fused_dot_of(combine, x.format, w.format)
    if rule is None:
        raise ValueError(f"{combine} has no published instruction for {x.format} by {w.format}")
    with np.errstate(over="ignore", invalid="ignore"):
        if x.scales is None and w.scales is None:
            y = _dot_add(rule, _Operand.of(x), _Operand.of(w))
        elif combine == "blackwell" and _scales_inside(x, w):
            y = _block_scaled(rule, x, w)
        else:
            y = _by_stretches(rule, x, w)
        return _wild(y, x, w)


def _wild(y: NDArray[np.float32], x: QuantizedTensor, w: QuantizedTensor) -> NDArray[np.float32]:
    """`y` with rows and columns of operands that are not finite as float64 sums have them."""
    values = [tensor.dequantize() for tensor in (x, w)]
    rows, columns = (~np.isfinite(v).all(axis=1) for v in values)
    if not (rows.any() or columns.any()):
        return y
    whole = values[0].astype(np.float64) @ values[1].astype(np.float64).T
    return np.where(rows[:, None] | columns, whole, y).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Operand:
    """Significands and exponents, int32 (rows, K), and the fraction bits of the significands."""

    significand: NDArray[np.int32]
    exponent: NDArray[np.int32]
    fraction: int

    @classmethod
    def of(cls, tensor: QuantizedTensor) -> "_Operand":
        fraction, lowest = _FIELDS[element_name(tensor.format)]
        values = tensor.codes.astype(np.float64)
        return cls(**_fields(values, fraction, lowest), fraction=fraction)

    def at(self, stretch: slice) -> "_Operand":
        return _Operand(
            significand=self.significand[:, stretch],
            exponent=self.exponent[:, stretch],
            fraction=self.fraction,
        )

    def scaled(self, exponent: NDArray[np.int32]) -> "_Operand":
        """Times 2**exponent, (rows, K); zeros stay."""
        from loraq_sim.kernels.float_passes import ZERO_EXPONENT

        moved = np.where(self.significand == 0, ZERO_EXPONENT, self.exponent + exponent)
        return _Operand(
            significand=self.significand, exponent=moved.astype(np.int32), fraction=self.fraction
        )


def _fields(
    values: NDArray[np.float64], fraction: int, lowest: int
) -> dict[str, NDArray[np.int32]]:
    """Significand and exponent of values of a small float; of zeros, 0 and one far below."""
    from loraq_sim.kernels.float_passes import ZERO_EXPONENT

    finite = np.where(np.isfinite(values), values, 0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, lowest)
    significand = np.ldexp(finite, fraction - exponent)
    exponent = np.where(significand == 0, ZERO_EXPONENT, exponent)
    return {"significand": significand.astype(np.int32), "exponent": exponent.astype(np.int32)}


def _dot_add(rule: FusedDot, x: _Operand, w: _Operand) -> NDArray[np.float32]:
    from loraq_sim.kernels.float_passes import fused_dot_add, fused_dot_round_down

    out = np.zeros((len(x.significand), len(w.significand)), dtype=np.float32)
    operands = (
        *(np.ascontiguousarray(part) for part in (x.significand, x.exponent)),
        *(np.ascontiguousarray(part.T) for part in (w.significand, w.exponent)),
    )
    sizes = (np.int64(x.fraction + w.fraction), np.int64(rule.chunk), np.int64(rule.bits))
    if rule.rounds_down:
        fused_dot_round_down(*operands, *sizes, out)
    else:
        fused_dot_add(*operands, *sizes, np.int64(rule.zero), np.int64(rule.kept), out)
    return out


def _by_stretches(rule: FusedDot, x: QuantizedTensor, w: QuantizedTensor) -> NDArray[np.float32]:
    """Stretches of constant scales, each from zero, scaled and added in float32."""
    k = x.shape[1]
    edges = {0, k}
    for tensor in (x, w):
        if tensor.scales is not None and k:
            edges.update(range(0, k, tensor.format.group_width(k)))
    ordered = sorted(edges)
    one, other = _Operand.of(x), _Operand.of(w)
    y = np.zeros((x.shape[0], w.shape[0]), dtype=np.float32)
    for start, stop in zip(ordered[:-1], ordered[1:], strict=True):
        partial = _dot_add(rule, one.at(slice(start, stop)), other.at(slice(start, stop)))
        y = y + partial * (_column(x, start)[:, None] * _column(w, start)[None, :])
    return y


def _column(tensor: QuantizedTensor, k: int) -> NDArray[np.float32]:
    """Scale of each row at position `k`, ones where there is none, (rows,) float32."""
    if tensor.scales is None:
        return np.ones(tensor.shape[0], dtype=np.float32)
    whole = np.broadcast_to(spread(tensor.scales, tensor.format, tensor.shape), tensor.shape)
    return whole[:, k]


def _scales_inside(x: QuantizedTensor, w: QuantizedTensor) -> bool:
    """Whether the scales of both operands are ones that the instruction takes."""
    for tensor in (x, w):
        # Such scales have no sign in the instruction.
        if tensor.scales is None or tensor.format.granularity == "block":
            return False
        if (tensor.scales < 0).any():
            return False
    kinds = {(t.format.scale_format.name, t.format.group_size) for t in (x, w)}
    if kinds == {("e8m0", 32)}:
        return True
    return _both_e2m1(x, w) and kinds in ({("e4m3", 16)}, {("e8m0", 16)})


def _both_e2m1(x: QuantizedTensor, w: QuantizedTensor) -> bool:
    return {element_name(t.format) for t in (x, w)} == {_E2M1}


def _block_scaled(rule: FusedDot, x: QuantizedTensor, w: QuantizedTensor) -> NDArray[np.float32]:
    """Scales inside the instruction, the accumulator through all of K."""
    if _both_e2m1(x, w):
        return _group_scaled(x, w)
    sides = []
    for tensor in (x, w):
        exponent = np.frexp(spread(tensor.group_scales, tensor.format, tensor.shape))[1] - 1
        sides.append(_Operand.of(tensor).scaled(exponent.astype(np.int32)))
    return _dot_add(rule, *sides)


def _group_scaled(x: QuantizedTensor, w: QuantizedTensor) -> NDArray[np.float32]:
    from loraq_sim.kernels.float_passes import fused_group_add

    significands, scales = [], []
    unit = np.float32(1)
    for tensor in (x, w):
        rows, k = tensor.shape
        groups = -(-k // _GROUP)
        codes = np.zeros((rows, groups * _GROUP), dtype=np.int32)
        codes[:, :k] = (tensor.codes.astype(np.float32) * 2).astype(np.int32)
        stored = spread(tensor.group_scales, tensor.format, tensor.shape)[:, ::_GROUP]
        if tensor.tensor_scale is not None:
            unit = unit * np.float32(tensor.tensor_scale)
            stored = _as_e4m3(stored / np.float32(tensor.tensor_scale))
        lowest = -6 if tensor.tensor_scale is not None else -127
        fields = _fields(stored.astype(np.float64), 3, lowest)
        significands.append(codes)
        scales += [np.ascontiguousarray(v) for v in fields.values()]
    out = np.zeros((x.shape[0], w.shape[0]), dtype=np.float32)
    counts = (np.int64(2), np.int64(_GROUPS), np.int64(_GROUP_BITS), np.int64(_GROUP_ZERO))
    a, b = significands[0], np.ascontiguousarray(significands[1].T)
    columns = (np.ascontiguousarray(part.T) for part in scales[2:])
    fused_group_add(a, b, *scales[:2], *columns, *counts, out)
    return out * unit if unit != 1 else out


def _as_e4m3(stored: NDArray[np.floating]) -> NDArray[np.float32]:
    """The stored scale that a float32 product hides."""
    import ml_dtypes

    return stored.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
