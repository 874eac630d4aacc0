"""What is asked of codes around their packing: order, offsets, ranges and norms."""

import numpy as np

from loraq_sim.kernels.jit import njit

__all__ = ["chunk_offsets", "code_range", "gather_codes", "row_norms", "sampled_norms"]


@njit(cache=True, nogil=True)
def gather_codes(codes, order, out):
    """out[r, i] = codes[r, order[i]], or 0 where order[i] is -1; zeros fill what is left.

    codes (R, K), out (R or more, packed K or more) int8; order (packed K,), or (0,) to keep it.
    """
    for r in range(out.shape[0]):
        target = out[r]
        target[:] = 0
        if r >= codes.shape[0]:
            continue
        row = codes[r]
        if order.size == 0:
            for i in range(row.size):
                target[i] = row[i]
        for i in range(order.size):
            if order[i] >= 0:
                target[i] = row[order[i]]


@njit(cache=True, nogil=True)
def chunk_offsets(codes, ends, chunk, amount, width, offsets, last):
    """Prefix sums of amount * codes after each chunk, restarting with each segment.

    codes (N, K) int8, packed order; ends (P,) int64 of the segments in K, multiples of `chunk`;
    offsets (panels, chunks * width) int32, or (panels, 0) for none wanted;
    last (P, panels * width) int32, zeros: the sum of each segment.
    """
    for n in range(codes.shape[0]):
        row = codes[n]
        panel = offsets[n // width]
        start = 0
        at = n % width
        for p in range(ends.size):
            total = np.int32(0)
            while start < ends[p]:
                for i in range(start, start + chunk):
                    total = np.int32(total + np.int32(amount) * np.int32(row[i]))
                start += chunk
                if panel.size > 0:
                    panel[at] = total
                    at += width
            last[p, n] = total


@njit(cache=True, nogil=True)
def code_range(codes):
    """Return (lowest, highest) code of (R, K) int8 or uint8, both with 0."""
    low, high = codes.dtype.type(0), codes.dtype.type(0)
    for r in range(codes.shape[0]):
        row = codes[r]
        for i in range(row.size):
            low, high = min(low, row[i]), max(high, row[i])
    return low, high


@njit(cache=True, nogil=True)
def sampled_norms(codes, mask, step):
    """Highest, then lowest (largest magnitude, L1 norm, squared L2 norm) of every `step`-th row.

    codes (R, K) int8, R >= 1; mask as for `row_norms`. int64 each.
    """
    high_top, high_l1, high_l2 = np.int64(0), np.int64(0), np.int64(0)
    low_top = low_l1 = low_l2 = np.int64(2**62)
    norms = np.empty((5, 1), np.int64)
    for r in range(0, codes.shape[0], step):
        row_norms(codes[r : r + 1], mask, norms)
        top, l1, l2 = max(norms[1, 0], -norms[0, 0]), norms[3, 0], norms[4, 0]
        high_top, high_l1, high_l2 = max(high_top, top), max(high_l1, l1), max(high_l2, l2)
        low_top, low_l1, low_l2 = min(low_top, top), min(low_l1, l1), min(low_l2, l2)
    return high_top, high_l1, high_l2, low_top, low_l1, low_l2


@njit(cache=True, nogil=True)
def row_norms(codes, mask, norms):
    """Lowest code, highest, sum, L1 norm and squared L2 norm of each row; norms (5, R) int64.

    codes (R, K) int8; mask int16, 255 where the bytes are unsigned, else -1. The lowest and
    highest include 0.
    """
    for r in range(codes.shape[0]):
        row = codes[r]
        low, high = np.int16(0), np.int16(0)
        total, l1, l2 = np.int64(0), np.int64(0), np.int64(0)
        # 4096 squares of codes below 2**8 stay below 2**31: 32-bit lanes hold a stretch.
        for begin in range(0, row.size, 4096):
            part = row[begin : begin + 4096]
            sum0, sum1, sum2 = np.int32(0), np.int32(0), np.int32(0)
            for i in range(part.size):
                code = np.int32(np.int16(part[i]) & mask)
                low, high = min(low, np.int16(code)), max(high, np.int16(code))
                sum0 = np.int32(sum0 + code)
                sum1 = np.int32(sum1 + np.int32(abs(code)))
                sum2 = np.int32(sum2 + np.int32(code * code))
            total += sum0
            l1 += sum1
            l2 += sum2
        norms[0, r], norms[1, r], norms[2, r], norms[3, r], norms[4, r] = low, high, total, l1, l2
