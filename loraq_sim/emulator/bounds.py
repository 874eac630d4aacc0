"""Static bounds on integer sums: what can be proved before a single product is computed.

For any subset of K, |sum a_k w_k| <= max|a| * ||w||_1 and <= ||a||_1 * max|w|. Every prefix, every
accumulator's share and every merge is such a subset, so one bound covers all of them. The
guaranteed width uses the weights alone, as A2Q does (Colbert et al., 2023), but with the two ends
of the activation range kept apart, which is tight: some activations reach it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.mac_array import MacArray, overflow_limits

__all__ = ["Bounds", "guaranteed_bits", "signed_width"]

# The int32 lanes of kernels/accumulate.py form (accumulator + chunk) - lower limit:
# 2**29 + 2**21 + 2**29 < 2**31, and merge two accumulators: 2**29 + 2**29 + 2**29 < 2**31.
_LANE_BITS = 30


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
        product = total = 0
        if a.size and w.size:
            a_top, a_norm = _top_and_norm(a)
            w_top, w_norm = _top_and_norm(w)
            product, total = a_top * w_top, min(a_top * w_norm, a_norm * w_top)
        has_init = init is not None and init.size > 0
        return cls(
            product=product,
            total=total,
            init_low=min(0, int(init.min())) if has_init else 0,
            init_high=max(0, int(init.max())) if has_init else 0,
        )

    def tree_fits(self, mac: MacArray) -> bool:
        """Whether no chunk sum can leave the tree."""
        if mac.tree_bits is None:
            return True
        chunk = min(self.product * mac.products_per_add, self.total)
        return chunk <= overflow_limits(mac.tree_bits, "saturate_symmetric")[1]

    def accumulator_fits(self, mac: MacArray) -> bool:
        """Whether no prefix or merge can leave the accumulator."""
        return self.init_low - self.total >= mac.lo and self.init_high + self.total <= mac.hi

    def lanes_fit(self, mac: MacArray) -> bool:
        """Whether every value of the exact prefixes and of the rule fits the int32 lanes."""
        # A chunk sum that leaves a b-bit tree has at least magnitude 2**(b-1), and what the tree
        # returns has at most that, so the tree never enlarges a chunk and `total` still holds.
        reach = max(self.init_high, -self.init_low) + self.total
        return reach < 2**31 and (mac.acc_bits <= _LANE_BITS or self.accumulator_fits(mac))


def _top_and_norm(codes: NDArray[np.integer]) -> tuple[int, int]:
    """Return (largest magnitude, largest row L1 norm) of a code matrix."""
    top = max(int(codes.max()), -int(codes.min()))
    # |code| <= 255, so int16 holds the magnitudes of int8's -128 too.
    return top, int(np.abs(codes.astype(np.int16)).sum(axis=1, dtype=np.int64).max())


def guaranteed_bits(
    w: NDArray[np.integer],
    a_range: tuple[int, int],
    init: NDArray[np.int64] | None,
    mac: MacArray,
) -> int:
    """Return the accumulator width that no activations within `a_range` can overflow.

    The extreme sum over any subset of K is reached by giving each product its own extreme:
    sum over k of max(0, w_k * a_low, w_k * a_high), and likewise downward. `w` is (N, K).
    Initial values count as they are. A narrow tree is taken as exact, which bounds it.
    """
    if w.size == 0:
        high = low = np.zeros(w.shape[0], np.int64)
    else:
        positive = np.maximum(w, 0).sum(axis=1, dtype=np.int64)
        negative = np.minimum(w, 0).sum(axis=1, dtype=np.int64)
        high = positive * a_range[1] + negative * a_range[0]
        low = positive * a_range[0] + negative * a_range[1]
    first = last = np.zeros(1, np.int64)
    if init is not None and init.size:
        first, last = init.min(axis=0), init.max(axis=0)
    if mac.accumulators > 1:
        # The other accumulators start at zero, whatever the first one holds.
        first, last = np.minimum(first, 0), np.maximum(last, 0)
    # Python integers: an initial value near the end of int64 plus a sum may leave int64.
    lows = [int(x) + int(y) for x, y in np.broadcast(first, low)]
    highs = [int(x) + int(y) for x, y in np.broadcast(last, high)]
    return signed_width(min(lows, default=0), max(highs, default=0))


def signed_width(low: int, high: int) -> int:
    """Return the bits of the narrowest two's complement register that holds low and high."""
    return 1 + max(
        (high if high >= 0 else -high - 1).bit_length(),
        (low if low >= 0 else -low - 1).bit_length(),
    )
