"""What integers may hold: bounds on sums before a product is computed, limits of what goes out.

For any subset of K, |sum a_k w_k| <= max|a| * ||w||_1, <= ||a||_1 * max|w| and, by Cauchy-Schwarz,
<= ||a||_2 * ||w||_2. Every prefix, every accumulator's share and every merge is such a subset, so
one bound covers all of them. The guaranteed width uses the weights alone, as A2Q does (Colbert et
al., 2023), but with the two ends of the activation range kept apart, which is tight: some
activations reach it.

Behind the accumulators a requantizer has limits of its own: which integers it takes, and which
codes its output holds (`output_limits`, `output_dtype`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.mac_array import (
    MacArray,
    TwoLevelArray,
    checked_int,
    overflow_limits,
    signed_width,
)
from loraq_sim.emulator.packed_weight import Norms, PackedWeight
from loraq_sim.errors import InputError
from loraq_sim.formats import Saturation, parse_saturation

__all__ = [
    "Bounds",
    "INT32",
    "Sample",
    "as_matrix",
    "checked_integers",
    "guaranteed_bits",
    "int32_values",
    "narrowed",
    "output_dtype",
    "output_finish",
    "output_limits",
    "per_column",
    "proved_tiles",
    "spread",
    "within_int32",
]


# The int32 lanes of kernels/accumulate.py form (accumulator + chunk) - lower limit:
# 2**29 + 2**29 + 2**29 < 2**31, and merge two accumulators: the same.
_LANE_BITS = 30
# Below this size no squared norm and no product of two of them leaves int64.
_SQUARES_FIT = 2**15


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Proved limits for one pair of operands.

    `product` bounds one |a * w|; `total` bounds |sum| over any subset of K for any output;
    `init_low` and `init_high` are the extreme initial values.
    """

    product: int
    total: int
    init_low: int
    init_high: int

    @classmethod
    def of(
        cls, a: NDArray[np.integer], w: NDArray[np.integer], init: NDArray[np.int64] | None
    ) -> "Bounds":
        """Compute the bounds of (M, K) activations, (N, K) weights and initial values or None."""
        return cls.of_norms(Norms(a), Norms(w), init)

    @classmethod
    def of_norms(cls, a: Norms, w: Norms, init: NDArray[np.int64] | None) -> "Bounds":
        """Compute the bounds from the norms of both operands."""
        by_norms = min(a.longest * w.top, isqrt(a.longest_squared * w.longest_squared))
        quick = cls.of_codes(a.top, w, init)
        return replace(quick, total=min(quick.total, by_norms))

    @classmethod
    def of_codes(cls, top: int, w: Norms, init: NDArray[np.int64] | None) -> "Bounds":
        """Compute weaker bounds for any activations of magnitudes up to `top`."""
        starts = np.zeros(1, np.int64) if init is None or init.size == 0 else init
        return cls(
            product=top * w.top,
            total=top * w.longest,
            init_low=min(0, int(starts.min())),
            init_high=max(0, int(starts.max())),
        )

    @property
    def reach(self) -> int:
        """Largest magnitude of any exact prefix, initial value included."""
        return max(self.init_high, -self.init_low) + self.total

    def tree_fits(self, mac: MacArray) -> bool:
        """Whether no chunk sum can leave the tree."""
        if mac.tree_bits is None:
            return True
        chunk = min(self.product * mac.products_per_add, self.total)
        return chunk <= overflow_limits(mac.tree_bits, "saturate_symmetric")[1]

    def accumulator_fits(self, mac: MacArray | TwoLevelArray) -> bool:
        """Whether no prefix or merge can leave the accumulator."""
        return self.init_low - self.total >= mac.lo and self.init_high + self.total <= mac.hi

    def lanes_fit(self, mac: MacArray) -> bool:
        """Whether every value of the exact prefixes and of the rule fits the int32 lanes."""
        # A chunk sum that leaves a b-bit tree has at least magnitude 2**(b-1), and what the tree
        # returns has at most that, so the tree never enlarges a chunk and `total` still holds.
        return self.reach < 2**31 and (mac.acc_bits <= _LANE_BITS or self.accumulator_fits(mac))


class Sample(NamedTuple):
    """Norms of every so many rows of the activations: sooner had than all, and enough to refute.

    `highest` and `lowest` hold the (largest magnitude, L1 norm, squared L2 norm) over those rows.
    """

    highest: tuple[int, int, int]
    lowest: tuple[int, int, int]

    @classmethod
    def of(cls, codes: NDArray[np.integer], step: int) -> "Sample":
        """Look at rows 0, step, 2 * step, ... of (M, K) int8 or uint8 codes."""
        from loraq_sim.kernels.pack_panels import sampled_norms

        if codes.shape[0] == 0:
            return cls((0, 0, 0), (0, 0, 0))
        mask = np.int16(255 if codes.dtype == np.uint8 else -1)
        found = sampled_norms(np.ascontiguousarray(codes).view(np.int8), mask, step)
        return cls(found[:3], found[3:])

    def bounds(self, w: Norms, known: Bounds) -> Bounds:
        """Return what `Bounds.of_norms` would for these rows alone; `known` gives the rest."""
        top, l1, l2 = self.highest
        total = min(top * w.longest, l1 * w.top, isqrt(l2 * w.longest_squared))
        return replace(known, product=top * w.top, total=total)

    def refutes_tiles(self, w: Norms, width: int, bounds: Bounds, mac: MacArray) -> bool:
        """Whether no tile of any panel of rows with a row of the sample can be proved."""
        top, l1, l2 = self.lowest
        w_top, w_l1, w_l2 = w.calmest_panel(width)
        room = _room(bounds, mac)
        return top * w_l1 > room and l1 * w_top > room and l2 * w_l2 > room * room


def _room(bounds: Bounds, mac: MacArray) -> int:
    return min(bounds.init_low - mac.lo, mac.hi - bounds.init_high)


def proved_tiles(
    a: Norms, rows: int, w: Norms, width: int, bounds: Bounds, mac: MacArray
) -> NDArray[np.bool_]:
    """Whether no output of a tile can overflow, (row panels, column panels) of rows x width."""
    room = _room(bounds, mac)
    of_a, of_w = a.of_panels(rows), w.of_panels(width)
    # Squared norms are below 2**16 * 2**15 = 2**31, so that their product fits int64.
    squares = max(a.k, w.k) <= _SQUARES_FIT and room < _SQUARES_FIT**2
    (top_a, l1_a, l2_a), (top_w, l1_w, l2_w) = of_a[:, :, None], of_w
    proved = (top_a * l1_w <= room) | (l1_a * top_w <= room)
    if squares:
        proved |= l2_a * l2_w <= room * room
    return proved


def guaranteed_bits(
    weight: PackedWeight,
    a_range: tuple[int, int],
    starts: tuple[NDArray[np.int64], NDArray[np.int64]] | None,
    mac: MacArray,
) -> int:
    """Return the accumulator width that no activations within `a_range` can overflow.

    The extreme sum over any subset of K is reached by giving each product its own extreme:
    sum over k of max(0, w_k * a_low, w_k * a_high), and likewise downward. `starts` are the extreme
    initial values (N,) for such activations. Of a narrow tree each chunk counts with the extremes
    of what the tree may deliver.
    """
    if starts is None:
        if mac.tree_bits is None:
            return weight.norms.guaranteed_bits(a_range)
        starts = np.zeros(1, np.int64), np.zeros(1, np.int64)
    first, last = starts
    low, high = _sums_delivered(weight, a_range, mac)
    if mac.accumulators > 1:
        # The other accumulators start at zero, whatever the first one holds.
        first, last = np.minimum(first, 0), np.maximum(last, 0)
    # Python integers: an initial value near the end of int64 plus a sum may leave int64.
    lows = [int(x) + int(y) for x, y in np.broadcast(first, low)]
    highs = [int(x) + int(y) for x, y in np.broadcast(last, high)]
    return signed_width(min(lows, default=0), max(highs, default=0))


def _sums_delivered(
    weight: PackedWeight, a_range: tuple[int, int], mac: MacArray
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Extreme sums over subsets of the chunks of each row as the tree delivers them, (N,) each.

    A tree that clamps keeps a chunk between its clamped extremes. One that wraps may turn its sign:
    a chunk that can leave the tree can be anything there.
    """
    if mac.tree_bits is None:
        return weight.norms.sums_within(a_range)
    positive, negative = weight.stretch_sums(mac.products_per_add)
    low = positive * a_range[0] + negative * a_range[1]
    high = positive * a_range[1] + negative * a_range[0]
    least, most = overflow_limits(mac.tree_bits, mac.tree_rule)
    leaves = (low < least) | (high > most)
    wraps = leaves & (mac.tree_rule == "wrap")
    low = np.where(wraps, least, np.maximum(low, least))
    high = np.where(wraps, most, np.minimum(high, most))
    return low.sum(axis=1), high.sum(axis=1)


INT32 = np.iinfo(np.int32)


def output_limits(
    out_bits: int, *, signed: bool = True, saturation: str = "saturate"
) -> tuple[int, int]:
    """Return the (lowest, highest) output value; InputError if an argument is out of range.

    `out_bits` is 2 to 32. ``symmetric`` gives up the most negative value of a signed output.
    """
    mode = parse_saturation(saturation)
    out_bits = checked_int("out_bits", out_bits, 2, 32)
    if not signed:
        return 0, 2**out_bits - 1
    high = 2 ** (out_bits - 1) - 1
    return (-high if mode is Saturation.SYMMETRIC else -high - 1), high


def output_dtype(out_bits: int, signed: bool) -> np.dtype:
    """Return the smallest of int8, int16, int32 (or unsigned) that holds `out_bits`."""
    width = 8 if out_bits <= 8 else 16 if out_bits <= 16 else 32
    return np.dtype(f"{'int' if signed else 'uint'}{width}")


def checked_integers(name: str, values: ArrayLike) -> NDArray[np.int32] | NDArray[np.int64]:
    """Return integers as int32 or int64 without changing a value, or raise InputError."""
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} must hold integers, got dtype {array.dtype}")
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {int(array.max())}, which does not fit in int64")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def output_finish(
    zero_point: int, out_bits: int, signed: bool, clamp: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Return (zero point, lowest, highest output), checked."""
    lo, hi = output_limits(out_bits, signed=signed)
    zero_point = checked_int("zero_point", zero_point, lo, hi)
    if clamp is None:
        return zero_point, lo, hi
    low = checked_int("clamp[0]", clamp[0], lo, hi)
    return zero_point, low, checked_int("clamp[1]", clamp[1], low, hi)


def within_int32(values: NDArray[np.integer]) -> bool:
    """Whether all values fit int32."""
    return not values.size or bool(values.min() >= INT32.min and values.max() <= INT32.max)


def int32_values(acc: ArrayLike) -> NDArray[np.integer]:
    """Accumulators as an (R, N) matrix, or InputError if one does not fit int32."""
    values = checked_integers("acc", acc)
    if not within_int32(values):
        worst = max(int(values.max()), int(values.min()), key=abs)
        raise InputError(f"acc must fit int32, got {worst}; these multipliers are defined on int32")
    return as_matrix(values)


def as_matrix(values: NDArray[np.integer]) -> NDArray[np.integer]:
    """(..., N) as (R, N), contiguous."""
    n = values.shape[-1] if values.ndim else 1
    return np.ascontiguousarray(values).reshape(values.size // n if n else 0, n)


def narrowed(
    kernel: Callable[..., None],
    acc: ArrayLike,
    values: NDArray[np.integer],
    arguments: tuple[Any, ...],
    dtype: np.dtype,
) -> NDArray[np.integer]:
    """What a kernel makes of `values` (R, N), in the shape of the `acc` they are made of."""
    out = np.array(values, np.int64, order="C")
    kernel(out, *arguments)
    return out.astype(dtype).reshape(np.shape(acc))


def per_column(name: str, values: ArrayLike, n: int, low: int, high: int) -> NDArray[np.int64]:
    """One integer or (N,) of them as (N,) int64, each from `low` to `high`, or InputError."""
    array = checked_integers(name, values).astype(np.int64)
    if array.size and (array.min() < low or array.max() > high):
        worst = int(array.min()) if array.min() < low else int(array.max())
        raise InputError(f"{name} must be from {low} to {high}, got {worst}")
    return spread(name, array, n)


def spread(name: str, array: NDArray, n: int) -> NDArray:
    """One value or (N,) of them as (N,), or InputError with the shape."""
    if array.shape not in ((), (1,), (n,)):
        raise InputError(
            f"{name} has shape {array.shape}; give one value or one per column, ({n},)"
        )
    # A copy: a read-only view would compile its reader once more.
    return np.array(np.broadcast_to(array, (n,)), order="C")
