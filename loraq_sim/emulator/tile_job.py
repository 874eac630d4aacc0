"""The operands of one GEMM as the tile routes pass them on, with what is derived from them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import Bounds, Norms, Sample
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.packed_weight import PackedWeight
from loraq_sim.emulator.tile_plan import ACCUMULATORS, Output
from loraq_sim.kernels.processor import LOOPS, KernelUnavailable, refuse_path

__all__ = ["TileJob", "kernels_of", "on_a_path_that_compiles"]

Run = TypeVar("Run", bound=Callable)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob:
    """The operands of one GEMM; codes of `a` are int8 or uint8. Norms and bounds come on demand."""

    a: NDArray[np.int8] | NDArray[np.uint8]
    weight: PackedWeight
    mac: MacArray | TwoLevelArray
    init: NDArray[np.int64] | None
    path: str
    threads: int = 1
    output: Output = ACCUMULATORS

    @cached_property
    def a_norms(self) -> Norms:
        """Range and norms of the activations."""
        return Norms(self.a)

    @cached_property
    def bounds(self) -> Bounds:
        """What is proved of the sums, as far as it matters for this array."""
        init = None if self.init is None else self.init_ends
        anything = Bounds.of_codes(255 if self.unsigned else 128, self.weight.norms, init)
        if self._enough(anything):
            return anything
        # Some rows refute a proof sooner than all of them: their norms are at most the largest.
        refuted = not self.sample.bounds(self.weight.norms, anything).accumulator_fits(self.mac)
        if refuted and anything.reach < 2**31 and self.mac.tree_bits is None:
            return anything
        quick = Bounds.of_codes(self.a_norms.top, self.weight.norms, init)
        if self._enough(quick):
            return quick
        return Bounds.of_norms(self.a_norms, self.weight.norms, init)

    def _enough(self, bounds: Bounds) -> bool:
        fits = bounds.accumulator_fits(self.mac) and bounds.reach < 2**31
        return fits and self.mac.tree_bits is None

    @cached_property
    def init_rows(self) -> NDArray[np.int64]:
        """Initial values (1 or M, N): one row where all rows start alike."""
        alike = self.init.strides[0] == 0
        return np.ascontiguousarray(self.init[:1] if alike else self.init)

    @cached_property
    def init_ends(self) -> NDArray[np.int64]:
        """Lowest and highest initial value, (2,), or (0,) where there are none."""
        rows = self.init_rows
        return np.array([rows.min(), rows.max()] if rows.size else [], np.int64)

    @cached_property
    def sample(self) -> Sample:
        """Norms of some rows, at least one in each panel of a plain kernel."""
        has_tiles = self.path != LOOPS
        return Sample.of(self.a, kernels_of(self)["exact"].shape.rows if has_tiles else 16)

    @property
    def unsigned(self) -> bool:
        """Whether the bytes of `a` are unsigned."""
        return self.a.dtype == np.uint8

    @property
    def work(self) -> int:
        """Multiply-adds."""
        return self.a.shape[0] * self.weight.codes.size

    @property
    def chunk(self) -> int:
        """Products per add into an accumulator, as far as K goes."""
        two_level = isinstance(self.mac, TwoLevelArray)
        products = self.mac.column_k if two_level else self.mac.products_per_add
        return min(products, max(self.a.shape[1], 1))


def on_a_path_that_compiles(run: Run) -> Run:
    """Run again on the next path where the tiles of one do not compile."""

    @wraps(run)
    def call(*args, **options):
        while True:
            try:
                return run(*args, **options)
            except KernelUnavailable as error:
                refuse_path(error)

    return call


def kernels_of(job: TileJob) -> Mapping:
    """Return the tile kernels of the job's path by name."""
    from loraq_sim.kernels.processor import tile_kernels

    return tile_kernels(job.path)
