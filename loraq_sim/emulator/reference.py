"""The slow reference: Python integers and fractions, one value at a time, no kernel shared.

This file is the meaning of the emulator. Everything faster must agree with it, value for value.
Each rounding is written as its meaning on exact fractions, not as the shifts and nudges of the C
sources, so that an error in one cannot hide in the other. It is meant for tests and for a handful
of outputs: about a million products per second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray

__all__ = [
    "ReferenceReport",
    "ReferenceTwoLevel",
    "reference_float",
    "reference_gemm",
    "reference_gemmlowp",
    "reference_report",
    "reference_single_rounding",
    "reference_srs",
    "reference_two_level",
    "reference_ups",
]


@dataclass(frozen=True, kw_only=True)
class ReferenceReport:
    """What the reference saw.

    `acc` (M, N) int64. `overflow_count` adds and merges whose exact result left the accumulator;
    `tree_overflow_count` chunk sums that left the tree; `outputs_affected` outputs with either.
    `first_overflow_k` is the lowest K index whose add overflowed an accumulator (K for a merge,
    None for no overflow). `safe_acc_bits` is the narrowest two's complement accumulator that
    holds every exact prefix.
    """

    acc: NDArray[np.int64]
    overflow_count: int
    tree_overflow_count: int
    outputs_affected: int
    first_overflow_k: int | None
    safe_acc_bits: int


def reference_gemm(
    a: ArrayLike,
    w: ArrayLike,
    mac: MacArray,
    init: ArrayLike | None = None,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
) -> NDArray[np.int64]:
    """Return the accumulators of a GEMM on a MAC array, (M, N) int64, in Python integers.

    `a` (M, K) and `w` (N, K) integer codes, `init` broadcastable to (M, N) or None; zero points as
    in `loraq_sim.emulate_gemm`.
    """
    report = reference_report(a, w, mac, init, a_zero=a_zero, w_zero=w_zero, zero_point=zero_point)
    return report.acc


class _Operands:
    """What every output reads: its row, its column, where it starts, and what is added behind it.

    Zero points take off the sum of codes against that of shifted codes.
    """

    def __init__(
        self,
        a: ArrayLike,
        w: ArrayLike,
        init: ArrayLike | None,
        a_zero: ArrayLike | None,
        w_zero: ArrayLike | None,
        is_after: bool,
    ) -> None:
        self.rows, self.columns = np.asarray(a).tolist(), np.asarray(w).tolist()
        self.shape = len(self.rows), len(self.columns)
        self.starts = np.broadcast_to(np.asarray(0 if init is None else init), self.shape)
        self.a = self._each(a_zero, len(self.rows))
        self.w = self._each(w_zero, len(self.columns))
        self.is_after = is_after

    @staticmethod
    def _each(given: ArrayLike | None, count: int) -> list[int]:
        values = np.asarray(0 if given is None else given).reshape(-1).tolist()
        return values * count if len(values) == 1 else values

    def correction(self, i: int, j: int) -> int:
        shifted = plain = 0
        for x, y in zip(self.rows[i], self.columns[j], strict=True):
            shifted += (x - self.a[i]) * (y - self.w[j])
            plain += x * y
        return shifted - plain

    def __iter__(self) -> Iterator[tuple[int, int, list[int], list[int], int, int]]:
        for i, row in enumerate(self.rows):
            for j, column in enumerate(self.columns):
                start, correction = int(self.starts[i, j]), self.correction(i, j)
                ends = (start, correction) if self.is_after else (start + correction, 0)
                yield i, j, row, column, *ends


def reference_report(
    a: ArrayLike,
    w: ArrayLike,
    mac: MacArray,
    init: ArrayLike | None = None,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
) -> ReferenceReport:
    """Return accumulators and overflow statistics of `reference_gemm`, in Python integers."""
    operands = _Operands(a, w, init, a_zero, w_zero, zero_point == "after")
    acc = np.zeros(operands.shape, dtype=np.int64)
    adds = trees = affected = 0
    firsts: list[int] = []
    widest = 1
    for i, j, row, column, start, after in operands:
        one = _Output(mac, start)
        one.run(row, column)
        acc[i, j] = one.value + after
        adds += one.overflows
        trees += one.tree_overflows
        affected += one.overflows + one.tree_overflows > 0
        widest = max(widest, one.bits)
        if one.first_k is not None:
            firsts.append(one.first_k)
    return ReferenceReport(
        acc=acc,
        overflow_count=adds,
        tree_overflow_count=trees,
        outputs_affected=affected,
        first_overflow_k=min(firsts) if firsts else None,
        safe_acc_bits=widest,
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceTwoLevel:
    """What the reference saw on a two-level array; fields as in `TwoLevelReport`."""

    acc: NDArray[np.int64]
    overflow_count: int
    outputs_affected: int
    first_overflow_k: int | None
    safe_acc_bits: int
    column_overflow_count: int
    column_tree_overflow_count: int
    partials_affected: int
    safe_column_bits: int


def reference_two_level(
    a: ArrayLike,
    w: ArrayLike,
    array: TwoLevelArray,
    init: ArrayLike | None = None,
    *,
    a_zero: ArrayLike | None = None,
    w_zero: ArrayLike | None = None,
    zero_point: str = "initial",
) -> ReferenceTwoLevel:
    """Return accumulators and statistics of a GEMM on a two-level array, as `reference_report`."""
    operands = _Operands(a, w, init, a_zero, w_zero, zero_point == "after")
    acc = np.zeros(operands.shape, dtype=np.int64)
    wide_overflows: list[tuple[int, int, int]] = []  # row, column, first K of the tile
    columns: list[_Output] = []
    safe = 1
    for i, j, row, weight, exact, after in operands:
        held = _fit(exact, array.acc_bits, array.overflow)
        if held != exact:
            wide_overflows.append((i, j, 0))
        safe = max(safe, _width(exact))
        for first in range(0, len(row), array.column_k):
            tile = slice(first, first + array.column_k)
            columns.append(_Output(array.column, 0))
            columns[-1].run(row[tile], weight[tile])
            total = held + columns[-1].value
            held = _fit(total, array.acc_bits, array.overflow)
            if held != total:
                wide_overflows.append((i, j, first))
            exact += columns[-1].value
            safe = max(safe, _width(exact))
        acc[i, j] = held + after
    return ReferenceTwoLevel(
        acc=acc,
        overflow_count=len(wide_overflows),
        outputs_affected=len({(i, j) for i, j, _ in wide_overflows}),
        first_overflow_k=min((k for _, _, k in wide_overflows), default=None),
        safe_acc_bits=safe,
        column_overflow_count=sum(c.overflows for c in columns),
        column_tree_overflow_count=sum(c.tree_overflows for c in columns),
        partials_affected=sum(c.overflows + c.tree_overflows > 0 for c in columns),
        safe_column_bits=max((c.bits for c in columns), default=1),
    )


class _Output:
    """One output's accumulators: what they hold, what they would hold exactly, what overflowed."""

    def __init__(self, mac: MacArray, init: int) -> None:
        self.mac = mac
        self.held = [_fit(init, mac.acc_bits, mac.overflow)] + [0] * (mac.accumulators - 1)
        self.exact = [init, *self.held[1:]]
        self.tree_overflows = 0
        self.overflows = int(self.held[0] != init)
        self.first_k: int | None = 0 if self.overflows else None
        self.bits = _width(init)

    @property
    def value(self) -> int:
        return self.held[0]

    def run(self, row: list[int], column: list[int]) -> None:
        chunk = self.mac.products_per_add
        for start in range(0, len(row), chunk):
            products = zip(row[start : start + chunk], column[start : start + chunk], strict=True)
            total = sum(x * y for x, y in products)
            if self.mac.tree_bits is not None:
                kept = _fit(total, self.mac.tree_bits, self.mac.tree_rule)
                self.tree_overflows += kept != total
                total = kept
            self.add(start // chunk % self.mac.accumulators, total, total, start)
        for source in range(1, self.mac.accumulators):
            self.add(0, self.held[source], self.exact[source], len(row))

    def add(self, target: int, amount: int, exact_amount: int, k: int) -> None:
        total = self.held[target] + amount
        self.held[target] = _fit(total, self.mac.acc_bits, self.mac.overflow)
        if self.held[target] != total:
            self.overflows += 1
            self.first_k = k if self.first_k is None else min(self.first_k, k)
        self.exact[target] += exact_amount
        self.bits = max(self.bits, _width(self.exact[target]))


def _fit(value: int, bits: int, overflow: str) -> int:
    if overflow == "wrap":
        low = value % 2**bits
        return low - 2**bits if low >= 2 ** (bits - 1) else low
    top = 2 ** (bits - 1) - 1
    bottom = -top if overflow == "saturate_symmetric" else -top - 1
    return max(bottom, min(top, value))


def _width(value: int) -> int:
    """Bits of the narrowest two's complement register that holds `value`."""
    return (value if value >= 0 else -value - 1).bit_length() + 1


def reference_srs(
    acc: ArrayLike,
    shift: int,
    *,
    out_bits: int = 8,
    signed: bool = True,
    rounding: str = "conv_even",
    saturation: str = "saturate",
) -> NDArray[np.int64]:
    """Return shift-round-saturate computed on exact fractions; int64, the shape of `acc`.

    Each mode is written as its meaning (toward zero, ties to even, ...), not as guard and
    sticky bits, so that an error in the bit tables cannot hide here as well.
    """
    values = np.asarray(acc)
    lo, hi = (-(2 ** (out_bits - 1)), 2 ** (out_bits - 1) - 1) if signed else (0, 2**out_bits - 1)
    if saturation == "symmetric" and signed:
        lo = -hi
    out = []
    for value in values.reshape(-1).tolist():
        rounded = _round(Fraction(value) / Fraction(2) ** shift, rounding)
        if saturation == "none":
            rounded = rounded % 2**out_bits
            rounded -= 2**out_bits if signed and rounded > hi else 0
        out.append(max(lo, min(hi, rounded)))
    return np.array(out, dtype=np.int64).reshape(values.shape)


def _round(x: Fraction, rounding: str) -> int:
    below, above = floor(x), ceil(x)
    toward_zero, from_zero = (below, above) if x >= 0 else (above, below)
    directed = {
        "floor": below,
        "ceil": above,
        "symmetric_floor": toward_zero,
        "symmetric_ceil": from_zero,
    }
    if rounding in directed:
        return directed[rounding]
    if x - below != above - x:
        return below if x - below < above - x else above
    even, odd = (below, above) if below % 2 == 0 else (above, below)
    return {
        "negative_inf": below,
        "positive_inf": above,
        "symmetric_zero": toward_zero,
        "symmetric_inf": from_zero,
        "conv_even": even,
        "conv_odd": odd,
    }[rounding]


def reference_ups(x: int, shift: int, *, acc_bits: int, saturate: bool, clamp: str) -> int:
    """Return one upshifted value."""
    low, high = -(2 ** (acc_bits - 1)), 2 ** (acc_bits - 1) - 1
    exact = x * 2**shift
    if low <= exact <= high:
        return exact
    if not saturate:
        return (exact - low) % 2**acc_bits + low
    if clamp == "after":
        return low if exact < low else high
    # The multiple of 2**shift nearest to the limit, inside it.
    step = 2**shift
    return ceil(Fraction(low, step)) * step if exact < low else floor(Fraction(high, step)) * step


def reference_gemmlowp(
    acc: int, multiplier: int, exponent: int, *, zero_point: int, low: int, high: int
) -> int:
    """Return one accumulator requantized with gemmlowp's two roundings."""
    product = Fraction(acc * 2 ** max(exponent, 0) * multiplier, 2**31)
    first = min(floor(product + Fraction(1, 2)), 2**31 - 1)
    second = Fraction(first, 2 ** max(-exponent, 0))
    away = floor(abs(second) + Fraction(1, 2))
    return max(low, min(high, (away if second >= 0 else -away) + zero_point))


def reference_single_rounding(
    acc: int, multiplier: int, shift: int, *, zero_point: int, low: int, high: int
) -> int:
    """Return one accumulator requantized with one rounding, ties toward plus infinity."""
    rounded = floor(Fraction(acc * multiplier, 2**shift) + Fraction(1, 2))
    rounded = max(-(2**31), min(2**31 - 1, rounded))
    return max(low, min(high, rounded + zero_point))


def reference_float(acc: int, scale: Fraction, *, zero_point: int, low: int, high: int) -> int:
    """Return one accumulator requantized by a float32 scale, given exactly."""
    rounded = round(_to_float32(_to_float32(Fraction(acc)) * scale))
    return max(low, min(high, rounded + zero_point))


def _to_float32(x: Fraction) -> Fraction:
    """Round to 24 significant bits, ties to even; a large value stays finite, which is enough."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    # 2**(exponent - 1) < |x| < 2**(exponent + 1): find the binade, then its last bit.
    binade = exponent if abs(x) >= Fraction(2) ** exponent else exponent - 1
    unit = Fraction(2) ** max(binade - 23, -149)
    return round(x / unit) * unit
