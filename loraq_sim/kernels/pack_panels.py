"""Pack code matrices into the panels that the tiles read: all rows of a panel, dot step by step.

A panel holds `width` rows of the operand (rows of A, or columns of the result for W). Rows beyond
the matrix are packed as zeros. K must be a multiple of what a dword holds.
"""

import numpy as np
from numba import njit

__all__ = [
    *("BYTES", "DOUBLED", "WORDS", "WORDS_SINGLE"),
    *(
        "chunk_offsets",
        "code_range",
        "pack_bytes",
        "pack_doubled",
        "pack_halves",
        "pack_rows",
        "pack_words",
    ),
    "row_norms",
]

# How `pack_rows` packs.
BYTES, WORDS, WORDS_SINGLE, DOUBLED = 0, 1, 2, 3


@njit(cache=True, nogil=True)
def pack_bytes(codes, flip, width, out):
    """Four codes a dword: out[p, s * width + r] = codes[p * width + r, s] ^ flip.

    codes (R, K / 4) int32, four int8 or uint8 codes each; `flip` int32 adds 128 to signed codes
    (0x80808080) or nothing (0); out (panels, K / 4 * width) int32.
    """
    for p in range(out.shape[0]):
        panel = out[p].reshape((codes.shape[1], width))
        for r in range(width):
            column = panel[:, r]
            if p * width + r < codes.shape[0]:
                row = codes[p * width + r]
                for s in range(row.size):
                    column[s] = row[s] ^ flip
            else:
                column[:] = flip


@njit(cache=True, nogil=True)
def pack_words(codes, mask, shift, single, width, out):
    """Two codes a dword, each shifted left; `single` makes two dwords, (a, 0) and (0, a').

    codes (R, K) int8; mask int16, 255 where the bytes are unsigned, else -1;
    out (panels, K / 2 * width), or twice as long if `single`, int32.
    """
    k = codes.shape[1]
    wide = np.empty(k, np.int16)
    low, high = np.int32(0xFFFF), np.int32(-0x10000)
    for p in range(out.shape[0]):
        panel = out[p].reshape((out.shape[1] // width, width))
        for r in range(width):
            column = panel[:, r]
            if p * width + r >= codes.shape[0]:
                column[:] = 0
                continue
            row = codes[p * width + r]
            for i in range(k):
                wide[i] = (np.int16(row[i]) & mask) << shift
            pairs = wide.view(np.int32)
            if single:
                for s in range(pairs.size):
                    column[2 * s] = pairs[s] & low
                    column[2 * s + 1] = pairs[s] & high
            else:
                for s in range(pairs.size):
                    column[s] = pairs[s]


@njit(cache=True, nogil=True)
def pack_doubled(codes, mask, width, out):
    """One code a dword, in both halves. codes (R, K) int8; mask as above; out int32."""
    k = codes.shape[1]
    wide = np.empty(k, np.int32)
    for p in range(out.shape[0]):
        panel = out[p].reshape((k, width))
        for r in range(width):
            column = panel[:, r]
            if p * width + r >= codes.shape[0]:
                column[:] = 0
                continue
            row = codes[p * width + r]
            for i in range(k):
                code = np.int32(row[i]) & np.int32(mask)
                wide[i] = (code & np.int32(0xFFFF)) | (code << np.int32(16))
            for i in range(k):
                column[i] = wide[i]


@njit(cache=True, nogil=True)
def pack_halves(codes, mask, width, out):
    """One code an int16. codes (R, K) int8; mask as above; out (panels, K * width) int16."""
    for p in range(out.shape[0]):
        panel = out[p].reshape((codes.shape[1], width))
        for r in range(width):
            column = panel[:, r]
            if p * width + r >= codes.shape[0]:
                column[:] = 0
                continue
            row = codes[p * width + r]
            for i in range(row.size):
                column[i] = np.int16(row[i]) & mask


@njit(cache=True, nogil=True)
def pack_rows(codes, packing, width, out):
    """Pack codes (R, K) int8 as packing (kind, mask or flip, shift), int64, says; out as above."""
    kind, extra, shift = packing
    if kind == BYTES:
        pack_bytes(codes.view(np.int32), np.int32(extra), width, out)
    elif kind == DOUBLED:
        pack_doubled(codes, np.int16(extra), width, out)
    else:
        pack_words(codes, np.int16(extra), np.int16(shift), kind == WORDS_SINGLE, width, out)


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
