"""One GEMM as the routes of the emulator pass it on: operands, checks, and what follows from them.

`checked_job` makes a `TileJob` of what a caller gave; its norms and bounds are computed when a
route asks for them. `plan_of` says what a tile kernel needs to know before it sees any code: the
packed layout, where each accumulator's share of K lies, limits, shifts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loraq_sim.emulator.bounds import Bounds, Sample
from loraq_sim.emulator.mac_array import (
    NO_ZEROS,
    GivenZeros,
    MacArray,
    TwoLevelArray,
    ZeroPoints,
    checked_int,
    checked_zero_points,
    overflow_limits,
)
from loraq_sim.emulator.packed_weight import (
    Norms,
    Order,
    PackedWeight,
    checked_codes,
    checked_weights,
)
from loraq_sim.errors import InputError
from loraq_sim.kernels.processor import LOOPS, choose_path

if TYPE_CHECKING:
    from loraq_sim.kernels.tiles import TileKernel
    from loraq_sim.kernels.vector_ir import TileShape

__all__ = [
    *("ACCUMULATORS", "FLIP", "AnyJob", "Choice", "Output", "Plan", "TileJob"),
    *("activation_range", "as_accumulators", "checked_job", "kernels_of"),
    "plan_of",
]

# Turns four signed codes into unsigned ones, 128 higher.
FLIP = -0x7F7F7F80

Array = TypeVar("Array", MacArray, TwoLevelArray)
ArrayOf = TypeVar("ArrayOf", bound=MacArray | TwoLevelArray, covariant=True)


@dataclass(frozen=True, eq=False)
class Output:
    """What a tile stores: its dtype, and the `TileArguments` that say so."""

    dtype: np.dtype[np.integer]
    arguments: Mapping[str, int]


_ROUNDING = ("shift", "dropped", "add", "negative", "odd", "lo", "hi")
ACCUMULATORS = Output(
    np.dtype(np.int32), {"out_bytes": 0, **{f"srs_{name}": 0 for name in _ROUNDING}}
)


@dataclass(frozen=True, kw_only=True, eq=False)
class TileJob(Generic[ArrayOf]):
    """The operands of one GEMM. Norms and bounds come on demand.

    Codes of `a` are int8, uint8 or int16, those of the weight int8 or uint8. `init` is the exact
    initial value, the correction of `zeros` included unless that comes after the accumulators;
    only with zero points may it lie outside the accumulator (`starts_outside`).
    """

    a: NDArray[np.int8] | NDArray[np.uint8] | NDArray[np.int16]
    weight: PackedWeight
    mac: ArrayOf
    init: NDArray[np.int64] | None
    path: str
    threads: int = 1
    output: Output = ACCUMULATORS
    zeros: ZeroPoints | None = None

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tiles take it: bytes, signed weights, initial values that fit."""
        bytes_only = self.a.dtype != np.int16 and self.weight.codes.dtype == np.int8
        return bytes_only and not self.starts_outside

    @cached_property
    def starts_outside(self) -> bool:
        """Whether an initial value does not fit the accumulator."""
        low, high = self.init_ends.tolist() if self.init_ends.size else (0, 0)
        return self.zeros is not None and (low < self.mac.lo or high > self.mac.hi)

    @property
    def is_corrected_after(self) -> bool:
        """Whether zero points are corrected behind the accumulators."""
        return self.zeros is not None and self.zeros.after

    def corrected(
        self, acc: NDArray[np.int32] | NDArray[np.int64]
    ) -> NDArray[np.int32] | NDArray[np.int64]:
        """Accumulators with what is corrected behind them, then in int64."""
        if self.zeros is None or not self.zeros.after:
            return acc
        return acc.astype(np.int64) + self.zeros.correction(self.a, self.weight.codes)

    @property
    def top_code(self) -> int:
        """Largest magnitude of a code of `a`, whatever the codes are."""
        return {"int8": 128, "uint8": 255, "int16": 32768}[self.a.dtype.name]

    @cached_property
    def a_norms(self) -> Norms:
        """Range and norms of the activations."""
        return Norms(self.a)

    @cached_property
    def bounds(self: "TileJob[MacArray]") -> Bounds:
        """What is proved of the sums, as far as it matters for this array."""
        init = self.init_ends
        anything = Bounds.of_codes(self.top_code, self.weight.norms, init)
        if self._enough(anything):
            return anything
        if not self.is_plain:
            return Bounds.of_norms(self.a_norms, self.weight.norms, init)
        # Some rows refute a proof sooner than all of them: their norms are at most the largest.
        refuted = not self.sample.bounds(self.weight.norms, anything).accumulator_fits(self.mac)
        if refuted and anything.reach < 2**31 and self.mac.tree_bits is None:
            return anything
        quick = Bounds.of_codes(self.a_norms.top, self.weight.norms, init)
        if self._enough(quick):
            return quick
        return Bounds.of_norms(self.a_norms, self.weight.norms, init)

    def _enough(self: "TileJob[MacArray]", bounds: Bounds) -> bool:
        fits = bounds.accumulator_fits(self.mac) and bounds.reach < 2**31
        return fits and self.mac.tree_bits is None

    @cached_property
    def init_rows(self) -> NDArray[np.int64]:
        """Initial values (1 or M, N), one row where all rows start alike; (0, 0) for none."""
        if self.init is None:
            return np.zeros((0, 0), np.int64)
        alike = self.init.strides[0] == 0
        return np.ascontiguousarray(self.init[:1] if alike else self.init)

    @cached_property
    def init_ends(self) -> NDArray[np.int64]:
        """Lowest and highest initial value, (2,), or (0,) where there are none."""
        rows = self.init_rows
        return np.array([rows.min(), rows.max()] if rows.size else [], np.int64)

    def starts(
        self, a_range: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """Extreme initial values (N,) for any activations within a range; None for no values."""
        if self.init is None or self.init.size == 0:
            return None
        if self.zeros is None or self.zeros.after:
            return self.init.min(axis=0), self.init.max(axis=0)
        return self.zeros.starts(self.init, self.a, a_range)

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
        mac = self.mac
        products = mac.column_k if isinstance(mac, TwoLevelArray) else mac.products_per_add
        return min(products, max(self.a.shape[1], 1))


AnyJob = TileJob[MacArray | TwoLevelArray]


def checked_job(
    a: ArrayLike,
    w: ArrayLike | PackedWeight,
    mac: Array,
    init: ArrayLike | None,
    threads: int,
    output: Output = ACCUMULATORS,
    zeros: GivenZeros = NO_ZEROS,
) -> TileJob[Array]:
    """Return the operands of a GEMM, checked; errors as of `emulate_gemm`."""
    if not isinstance(mac, MacArray | TwoLevelArray):
        raise InputError(
            f"mac must be a MacArray or a TwoLevelArray, got {mac!r}; describe one, such as "
            "MacArray(acc_bits=20, overflow='saturate'), or take array_preset('aie2').array"
        )
    codes = checked_codes("a", a, words=True)
    if isinstance(w, PackedWeight):
        weight, given = w, w.codes if zeros.w is None else w.codes.astype(w.given, copy=False)
    else:
        # Zero points say that 0..255 is meant; else only the dtype does.
        weight = PackedWeight(checked_weights(w, unsigned=zeros.w is not None))
        given = np.asarray(w)
    if codes.shape[1] != weight.shape[1]:
        raise InputError(
            f"a has shape {codes.shape} and w has shape {weight.shape}: both must be "
            f"(rows, K) with the same K, got K={codes.shape[1]} and K={weight.shape[1]}"
        )
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer) or threads < 1:
        raise InputError(f"threads must be an integer of 1 or more, got {threads!r}")
    start = _checked_init(init, (codes.shape[0], weight.shape[0]), mac)
    checked = checked_zero_points(zeros, np.asarray(a), given)
    if checked is not None and not checked.after:
        start = _with_correction(start, checked.correction(codes, weight.codes))
    return TileJob(
        a=codes,
        weight=weight,
        mac=mac,
        init=start,
        path=choose_path(),
        threads=int(threads),
        output=output,
        zeros=checked,
    )


def _with_correction(
    init: NDArray[np.int64] | None, correction: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Exact initial values: `init` and the correction of zero points."""
    if init is None or not init.size:
        return correction
    reach = max(-int(init.min()), int(init.max())) + int(np.abs(correction).max())
    if reach >= 2**63:
        raise InputError(
            f"init reaches {reach} with the correction of the zero points, beyond the 64 bits "
            "emulated; add the bias later, or correct with zero_point='after'"
        )
    return init + correction


def _checked_init(
    init: ArrayLike | None, shape: tuple[int, int], mac: MacArray | TwoLevelArray
) -> NDArray[np.int64] | None:
    if init is None:
        return None
    values = np.asarray(init)
    if values.dtype.kind not in "iu":
        raise InputError(f"init must hold integers, got dtype {values.dtype}")
    if values.size:
        low, high = int(values.min()), int(values.max())
        if low < mac.lo or high > mac.hi:
            raise InputError(
                f"init holds values from {low} to {high}, outside the {mac.acc_bits}-bit "
                f"accumulator ({mac.lo}..{mac.hi}); widen acc_bits or add the bias later"
            )
    try:
        return np.broadcast_to(values.astype(np.int64), shape)
    except ValueError:
        raise InputError(
            f"init has shape {values.shape}, which does not broadcast to (M, N) = {shape}"
        ) from None


def activation_range(dtype: np.dtype, job: AnyJob, a_bits: int) -> tuple[int, int]:
    """Return the ends of the range of `a_bits`-bit activations; InputError if a code leaves it."""
    a_bits = checked_int("a_bits", a_bits, 2, 16 if dtype == np.int16 else 8)
    unsigned = dtype.kind == "u" or job.unsigned
    allowed = (0, 2**a_bits - 1) if unsigned else overflow_limits(a_bits, "wrap")
    if job.zeros is not None and job.zeros.a.size:
        least, most = int(job.zeros.a.min()), int(job.zeros.a.max())
        if least < allowed[0] or most > allowed[1]:
            raise InputError(
                f"a_zero holds values from {least} to {most}, outside a_bits={a_bits} "
                f"({allowed[0]}..{allowed[1]}); a zero point is the code that stands for 0"
            )
    if a_bits == 8 and job.a.dtype != np.int16:  # as the checks of the codes have shown
        return allowed
    low, high = job.a_norms.low, job.a_norms.high
    if low < allowed[0] or high > allowed[1]:
        raise InputError(
            f"a holds codes from {low} to {high}, outside a_bits={a_bits} "
            f"({allowed[0]}..{allowed[1]})"
        )
    return allowed


def as_accumulators(
    values: NDArray[np.integer], mac: MacArray | TwoLevelArray
) -> NDArray[np.int32] | NDArray[np.int64]:
    """Sums in the dtype that callers get: int32 for accumulators of up to 32 bits, int64 above."""
    if mac.acc_bits <= 32:
        return values.astype(np.int32, copy=False)
    return values.astype(np.int64, copy=False)


def kernels_of(job: AnyJob) -> Mapping[str, "TileKernel"]:
    """Return the tile kernels of the job's path by name."""
    from loraq_sim.kernels.tiles import tile_kernels

    return tile_kernels(job.path)


class Choice(NamedTuple):
    """A kernel by name and how it wants its operands."""

    name: str
    order: Order
    a_shift: int = 0
    w_shift: int = 0


class Plan(NamedTuple):
    """How a kernel runs, whatever the codes are."""

    packing: tuple[str, int, int]
    dwords: int
    segments: list[tuple[int, int, int, int]]
    inner: int
    limits: tuple[int, int]
    shifts: tuple[int, int]
    mode: str
    statistics: int
    chunk: int
    lane: type[np.int16] | type[np.int32]
    nested: tuple[int, int, int, int]

    @property
    def start_shift(self) -> int:
        """Left shift of initial values: an aligned accumulator starts aligned.

        A wrapping one has its low bits where they are.
        """
        return 0 if self.shifts[0] else self.shifts[1]


@lru_cache(maxsize=1024)
def plan_of(
    choice: Choice, shape: "TileShape", k: int, mac: MacArray | TwoLevelArray, unsigned: bool
) -> Plan:
    """Return how a kernel of `shape` runs over K = `k`."""
    order = choice.order
    group = 1 if shape.single else order.group
    return Plan(
        packing=_packing(choice, shape, unsigned),
        dwords=int(order.ends(k)[-1]) // group * shape.rows,
        segments=_segments(order, shape, k),
        inner=1 if order.chunk <= 1 else order.padded_chunk // order.group,
        limits=_lane_limits(mac, choice),
        shifts=_result_shifts(mac, choice),
        mode="count" if shape.rule.startswith("count") else shape.rule,
        statistics=shape.statistics_vectors * shape.width // shape.vectors,
        chunk=max(order.turn, 1),
        lane=np.int16 if order.codes == "halves" else np.int32,
        nested=_inner_rule(mac, order) if shape.nested else (0, 0, 0, 0),
    )


def _packing(choice: Choice, shape: "TileShape", unsigned: bool) -> tuple[str, int, int]:
    """(kind, flip or mask, shift) of `loraq_sim.kernels.pack_panels` for A."""
    mask = 255 if unsigned else -1
    if choice.order.codes == "bytes":
        return "bytes", 0 if unsigned else FLIP, 0
    if choice.order.codes == "halves":
        return "doubled", mask, 0
    return "single" if shape.single else "words", mask, choice.a_shift


def _inner_rule(mac: MacArray | TwoLevelArray, order: Order) -> tuple[int, int, int, int]:
    """(chunks of a column, high bits that its sum drops, lowest, highest sum) in 32-bit lanes."""
    if isinstance(mac, TwoLevelArray):
        bits, overflow = mac.column.acc_bits, mac.column.overflow
    else:
        bits, overflow = mac.tree_bits or 32, mac.tree_rule
    bits = min(bits, 32)
    drop = 32 - bits if overflow == "wrap" else 0
    limits = overflow_limits(32 if drop else bits, overflow)
    return order.padded_turn // order.padded_chunk, drop, *limits


def _lane_limits(mac: MacArray | TwoLevelArray, choice: Choice) -> tuple[int, int]:
    if choice.name.startswith("nested") and mac.overflow == "wrap":
        return overflow_limits(32, "wrap")
    if choice.name == "exact":
        return 0, 0
    if choice.name.startswith("symmetric"):
        return mac.lo << (choice.a_shift + choice.w_shift), 0
    return overflow_limits(min(mac.acc_bits, 32), mac.overflow)


def _result_shifts(mac: MacArray | TwoLevelArray, choice: Choice) -> tuple[int, int]:
    """(up, down) of ``(acc << up) >> down``: wrap to the width, or take off the alignment."""
    if choice.name.startswith(("exact", "count_wrap", "nested")):
        spare = max(32 - mac.acc_bits, 0) if mac.overflow == "wrap" else 0
        return spare, spare
    return 0, choice.a_shift + choice.w_shift


def _segments(order: Order, shape: "TileShape", k: int) -> list[tuple[int, int, int, int]]:
    """For each accumulator, bytes into panels of A, W and offsets, and turns of the chunk loop."""
    ends = order.ends(k).tolist()
    lane_bytes = {"bytes": 1, "words": 2, "halves": 2}[order.codes]
    dword_bytes = 8 if shape.single else 4
    by_dot = order.chunk == 0 or shape.single or shape.rule in ("none", "raise")
    turn = order.group if by_dot else order.padded_turn
    return [
        (
            start // order.group * dword_bytes * shape.rows,
            start * lane_bytes * shape.width,
            start // order.padded_chunk * 4 * shape.width,
            (end - start) // turn,
        )
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]
