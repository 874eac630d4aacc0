"""Pack code matrices into the panels that the tiles read: all rows of a panel, dot step by step.

A panel holds `width` rows of the operand (rows of A, or columns of the result for W). Rows beyond
the matrix are packed as zeros. K must be a multiple of what a dword holds.
"""

import numpy as np
from llvmlite import ir
from numba.core import types

from loraq_sim.kernels.jit import intrinsic, njit

__all__ = [
    *("BYTES", "DOUBLED", "WORDS", "WORDS_SINGLE"),
    *("pack_bytes", "pack_halves", "pack_rows", "pack_words"),
    *("chunk_offsets", "code_range", "gather_codes", "row_norms", "sampled_norms"),
]

# How `pack_rows` packs.
BYTES, WORDS, WORDS_SINGLE, DOUBLED = 0, 1, 2, 3


@intrinsic
def _transpose_block(typingctx, source, source_stride, target, target_stride, flip, mask):
    """Transpose 4 x 4 dwords, each ``(dword ^ flip) & mask``.

    Addresses and byte strides, int64; flip and mask int32. LLVM does not find this in loops.
    """

    def emit(context, builder, signature, args):
        source, source_stride, target, target_stride, flip, mask = args
        kind = ir.VectorType(ir.IntType(32), 4)

        def at(base, stride, r):
            offset = builder.mul(stride, ir.IntType(64)(r))
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def pick(x, y, *lanes):
            return builder.shuffle_vector(x, y, ir.Constant(kind, lanes))

        def spread(scalar):
            first = ir.Constant(kind, ir.Undefined)
            first = builder.insert_element(first, scalar, ir.IntType(32)(0))
            return pick(first, first, 0, 0, 0, 0)

        rows = [builder.load(at(source, source_stride, r), align=4) for r in range(4)]
        flips, masks = spread(flip), spread(mask)
        a, b, c, d = (builder.and_(builder.xor(row, flips), masks) for row in rows)
        low, high = (0, 4, 1, 5), (2, 6, 3, 7)
        halves = [(pick(a, b, *lanes), pick(c, d, *lanes)) for lanes in (low, high)]
        for r in range(4):
            x, y = halves[r // 2]
            lanes = (0, 1, 4, 5) if r % 2 == 0 else (2, 3, 6, 7)
            builder.store(pick(x, y, *lanes), at(target, target_stride, r), align=4)
        return context.get_dummy_value()

    kinds = [types.int64] * 4 + [types.int32] * 2
    return types.void(*kinds), emit


@njit(nogil=True)
def _transpose_rows(rows, flip, mask, target, stride):
    """Write rows (4, S) int32 as S steps of four dwords, `stride` int32 apart from `target` on."""
    steps = rows.shape[1]
    address = target.ctypes.data
    for s in range(0, steps - 3, 4):
        _transpose_block(
            rows.ctypes.data + 4 * s, rows.strides[0], address + 4 * s * stride, 4 * stride,
            flip, mask,
        )  # fmt: skip
    for s in range(steps - steps % 4, steps):
        for r in range(4):
            target[s * stride + r] = (rows[r, s] ^ flip) & mask


@njit(cache=True, nogil=True)
def pack_bytes(codes, flip, width, out):
    """Four codes a dword: out[p, s * width + r] = codes[p * width + r, s] ^ flip.

    codes (R, K / 4) int32, four int8 or uint8 codes each; `flip` int32 adds 128 to signed codes
    (0x80808080) or nothing (0); out (panels, K / 4 * width) int32.
    """
    for p in range(out.shape[0]):
        panel = out[p].reshape((codes.shape[1], width))
        done = 0
        while done + 4 <= width and p * width + done + 4 <= codes.shape[0]:
            rows = codes[p * width + done : p * width + done + 4]
            _transpose_rows(rows, flip, np.int32(-1), out[p, done:], width)
            done += 4
        for r in range(done, width):
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
    wide = np.empty((4, k), np.int16)
    pairs = wide.view(np.int32)
    zero, low, high = np.int32(0), np.int32(0xFFFF), np.int32(-0x10000)
    for p in range(out.shape[0]):
        for first in range(0, width, 4):
            count = min(4, width - first)
            for r in range(count):
                target = wide[r]
                if p * width + first + r < codes.shape[0]:
                    row = codes[p * width + first + r]
                    for i in range(k):
                        target[i] = (np.int16(row[i]) & mask) << shift
                else:
                    target[:] = 0
            if count == 4 and single:
                _transpose_rows(pairs, zero, low, out[p, first:], 2 * width)
                _transpose_rows(pairs, zero, high, out[p, width + first :], 2 * width)
            elif count == 4:
                _transpose_rows(pairs, zero, np.int32(-1), out[p, first:], width)
            else:
                panel = out[p].reshape((out.shape[1] // width, width))
                for r in range(count):
                    column, row = panel[:, first + r], pairs[r]
                    for s in range(row.size):
                        if single:
                            column[2 * s] = row[s] & low
                            column[2 * s + 1] = row[s] & high
                        else:
                            column[s] = row[s]


@njit(cache=True, nogil=True)
def _pack_doubled(codes, mask, width, out):
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
        _pack_doubled(codes, np.int16(extra), width, out)
    else:
        pack_words(codes, np.int16(extra), np.int16(shift), kind == WORDS_SINGLE, width, out)


@njit(cache=True, nogil=True)
def gather_codes(codes, order, out):
    """out[r, i] = codes[r, order[i]], or 0 where order[i] is -1; an empty order pads with zeros.

    codes (R, K), out (R or more, packed K) int8; order (packed K,) or (0,) int64.
    """
    for r in range(codes.shape[0]):
        row, target = codes[r], out[r]
        if order.size == 0:
            for i in range(row.size):
                target[i] = row[i]
            for i in range(row.size, target.size):
                target[i] = 0
        for i in range(order.size):
            target[i] = row[order[i]] if order[i] >= 0 else np.int8(0)


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
