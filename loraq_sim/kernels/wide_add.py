"""Add partial sums to wide accumulators under an overflow rule, and see what happens."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__: list[str] = []


@njit(cache=True)
def _add_partials(partial, clamp, lo, hi, mask, sign, held, exact, touched, extremes, beyond):
    """Add `partial` to `held` element by element; return how many adds left [lo, hi].

    partial (S,) int32 or int64; held (S,), the accumulators, and exact (S,), what they would hold
    without a limit (modulo 2**64), int64; touched (S,) bool marks elements with an overflow;
    extremes (2,) int64 the lowest and highest `exact` so far; beyond (1,) bool whether an exact sum
    left int64. These five are updated in place. With `clamp` an out-of-range sum becomes `lo` or
    `hi`, otherwise ``((sum & mask) ^ sign) - sign``. The scalars are int64 but `clamp`, a bool.
    """
    zero = np.int64(0)
    count = zero
    for i in range(partial.size):
        amount = np.int64(partial[i])
        before = held[i]
        total = before + amount
        # Both operands have the sign that the sum lost: the exact sum does not fit int64.
        leaves_int64 = ((before ^ total) & (amount ^ total)) < zero
        overflows = leaves_int64 or total < lo or total > hi
        if overflows:
            count += np.int64(1)
            touched[i] = True
            if not clamp:
                total = ((total & mask) ^ sign) - sign
            elif leaves_int64:
                total = hi if before >= zero else lo
            else:
                total = min(max(total, lo), hi)
        held[i] = total
        known = exact[i]
        full = known + amount
        if ((known ^ full) & (amount ^ full)) < zero:
            beyond[0] = True
        exact[i] = full
        extremes[0] = min(extremes[0], full)
        extremes[1] = max(extremes[1], full)
    return count
