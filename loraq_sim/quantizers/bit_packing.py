"""Tight packing of 2- to 8-bit codes: little-endian bits, every row starts on a byte."""

import numpy as np

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(codes: np.ndarray, bits: int) -> bytes:
    """Bytes of int8 or uint8 `codes`, `bits` bits each, along the last axis."""
    rows = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, codes.shape[-1])
    if bits == 8:
        return rows.tobytes()
    # Bit j of a code goes to stream position bits * index + j; two's complement keeps low bits.
    planes = (rows[:, :, None] >> np.arange(bits, dtype=np.uint8)) & np.uint8(1)
    stream = planes.reshape(rows.shape[0], rows.shape[1] * bits)
    return np.packbits(stream, axis=1, bitorder="little").tobytes()


def unpack_rows(
    data: bytes, start: int, shape: tuple[int, ...], bits: int, is_signed: bool
) -> tuple[np.ndarray, int]:
    """Codes of `shape` (int8 if signed, else uint8) packed at `start`, and where they end."""
    k = shape[-1]
    n_rows = int(np.prod(shape[:-1], dtype=np.int64))
    row_bytes = -(-k * bits // 8)
    stop = start + n_rows * row_bytes
    raw = np.frombuffer(data, dtype=np.uint8, count=stop - start, offset=start)
    raw = raw.reshape(n_rows, row_bytes)
    stream = np.unpackbits(raw, axis=1, count=k * bits, bitorder="little")
    planes = stream.reshape(n_rows, k, bits) << np.arange(bits, dtype=np.uint8)
    codes = planes.sum(axis=2, dtype=np.uint8)
    if is_signed:
        # Shift the sign bit to bit 7 and back, so that it fills the byte.
        spare = np.int8(8 - bits)
        codes = (codes << np.uint8(8 - bits)).view(np.int8) >> spare
    return codes.reshape(shape), stop
