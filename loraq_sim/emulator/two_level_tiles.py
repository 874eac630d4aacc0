"""A two-level array tile by tile: one emulated GEMM for each, then the adds of the wide level.

This takes every column there is, and checks the registers that run both levels at once.
"""

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.gemm import GemmReport, emulate_gemm, emulate_gemm_report
from loraq_sim.emulator.mac_array import TwoLevelArray

__all__ = ["TileByTile"]


class TileByTile:
    """The wide accumulators (M, N) of one GEMM, what they would hold exactly, and the counts."""

    def __init__(
        self, array: TwoLevelArray, start: NDArray[np.int64] | None, shape: tuple[int, int]
    ) -> None:
        self.array = array
        first = np.zeros(shape, np.int64) if start is None else start
        self.value = np.array(first, dtype=np.int64, order="C")
        self.touched = np.zeros(shape, dtype=np.bool_)
        self.overflow_count = 0
        self.first_overflow_k: int | None = None
        self.reports: list[GemmReport] = []
        self._exact = self.value.copy()
        ends = (first.min(), first.max()) if first.size else (0, 0)
        self._extremes = np.array(ends, dtype=np.int64)
        self._beyond = np.zeros(1, dtype=np.bool_)

    def run(self, a: NDArray[np.integer], w: NDArray[np.int8], *, reports: bool) -> None:
        """Add all tiles of (M, K) and (N, K) codes; keep the reports of the columns if asked."""
        for k in range(0, a.shape[1], self.array.column_k):
            tile = slice(k, k + self.array.column_k)
            if not reports:
                self._add(emulate_gemm(a[:, tile], w[:, tile], self.array.column), k)
                continue
            self.reports.append(emulate_gemm_report(a[:, tile], w[:, tile], self.array.column))
            self._add(self.reports[-1].acc, k)

    def _add(self, partial: NDArray[np.integer], k: int) -> None:
        from loraq_sim.kernels.wide_add import _add_partials

        bits = self.array.acc_bits
        count = _add_partials(
            np.ascontiguousarray(partial).reshape(-1),
            self.array.overflow != "wrap",
            np.int64(self.array.lo),
            np.int64(self.array.hi),
            np.int64(-1 if bits == 64 else 2**bits - 1),
            np.int64(-(2**63) if bits == 64 else 2 ** (bits - 1)),
            self.value.reshape(-1),
            self._exact.reshape(-1),
            self.touched.reshape(-1),
            self._extremes,
            self._beyond,
        )
        self.overflow_count += int(count)
        if count and self.first_overflow_k is None:
            self.first_overflow_k = k

    @property
    def safe_bits(self) -> int:
        """Width that holds every exact prefix of the partial sums."""
        # A sum beyond int64 needs one bit more: all partial sums together stay below 2**63.
        return 65 if self._beyond[0] else signed_width(*(int(x) for x in self._extremes))
