"""The fast route of the scaled GEMM: sums are scaled and added while they are in registers.

Weights and activations are packed once for all groups; each group's sums stay in registers, where
they are scaled and added in float32, step by step as `loraq_sim.emulator.scaled_gemm` says. Bits do
not depend on the route. It is taken where

- every group has the same number of codes of K (the last may be short), and partial sums combine in
  float32;
- integers run on an array of one level with one accumulator, and no sum leaves it. The tiles keep
  the extreme sums after each chunk, which proves it, or else sends the caller to the slower route;
- small floats are integers of a byte in units of a power of two (e2m1 times 2, e2m3 times 8), so
  that the sum of a group is exact as an integer; the others multiply in float64, which holds it.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import Order, address_of, aligned_empty, pack_panels, scratch
from loraq_sim.emulator.tile_job import FLIP
from loraq_sim.formats import Format
from loraq_sim.kernels.processor import LOOPS, choose_path, on_a_path_that_compiles
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import float_dtype

if TYPE_CHECKING:
    from loraq_sim.kernels.scaled_tile import ScaledShape
    from loraq_sim.kernels.tiles import Kernel

__all__ = ["ScaledSums", "run_scaled"]

# Sums of so many products of unsigned bytes stay below 2**31.
_LONGEST = 2**15
# Of the rows, how many are measured in full before norms may prove the others harmless.
_SAMPLED = 16
# Products above which norms are had for less than they save.
_WORTH_NORMS = 2**21
# Packed rows that stay in an outer cache while they meet one panel of columns after the other.
_BLOCK_BYTES = 2**23
_FEW_BYTES = 2**17
# Bits of the float32 infinity.
_INFINITY = 0x7F800000


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledSums:
    """y (M, N) float32 and what was seen: `safe_acc_bits` and so on as of `GemmStatistics`.

    The widths are None for small floats. `finite` False says that y may hold infinities or NaN.
    """

    y: NDArray[np.float32]
    finite: bool
    safe_acc_bits: int | None = None
    guaranteed_acc_bits: int | None = None


@on_a_path_that_compiles
def run_scaled(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: MacArray | TwoLevelArray,
    zero_point: str = "initial",
) -> ScaledSums | None:
    """x w^T of tensors with scales, combined in float32; None where this route does not serve."""
    path = choose_path()
    k = x.shape[1]
    step = _common_step(k, x.format, w.format)
    if path == LOOPS or step is None or 0 in (*x.shape, len(w.codes)):
        return None
    # Of zero points those that are part of unsigned activations' initial values.
    rare = x.zero_points is not None and (x.codes.dtype != np.uint8 or zero_point != "initial")
    if w.zero_points is not None or rare:
        return None
    if x.format.element.is_integer and w.format.element.is_integer:
        return _integers(path, x, w, mac, step)
    return None if x.zero_points is not None else _floats(path, x, w, step)


def _common_step(k: int, *formats: Format) -> int | None:
    """Codes of K between two changes of a scale, if that is the same everywhere."""
    widths = sorted(fmt.group_width(k) for fmt in formats)
    if not 0 < widths[0] <= _LONGEST or (widths[1] < k and widths[1] % widths[0]):
        return None
    return widths[0]


def _integers(
    path: str, x: QuantizedTensor, w: QuantizedTensor, mac: MacArray | TwoLevelArray, step: int
) -> ScaledSums | None:
    if not isinstance(mac, MacArray) or mac.accumulators > 1:
        return None
    if w.codes.dtype != np.int8 or x.codes.itemsize > 1:
        return None
    bits = x.format.element.bits
    unsigned = x.codes.dtype == np.uint8
    a_range = (0, 2**bits - 1) if unsigned else overflow_limits(bits, "wrap")
    ends = int(x.codes.min()), int(x.codes.max())
    if ends[0] < a_range[0] or ends[1] > a_range[1]:
        return None
    chunk = min(mac.products_per_add, step)
    has_zeros = x.zero_points is not None
    dot = "zeros" if has_zeros else "codes"
    plan = _plan(path, dot, x.shape[1], step, chunk, measure=True)
    weight = _Columns.of(plan, w, w.codes, int(has_zeros) if unsigned else 128)
    if mac.tree_bits is not None:
        products = max(a_range[1], -a_range[0]) * weight.largest * chunk
        if products > 2 ** (mac.tree_bits - 1) - 1:
            return None
    rows = _Rows(plan, x, x.codes, weight)
    y, low, high, finite = rows.run()
    if low < mac.lo or high > mac.hi:
        return None
    return ScaledSums(
        y=y,
        finite=finite,
        safe_acc_bits=signed_width(low, high),
        guaranteed_acc_bits=weight.guaranteed_bits(a_range, rows.zero_ends),
    )


def _floats(path: str, x: QuantizedTensor, w: QuantizedTensor, step: int) -> ScaledSums:
    of_x, of_w = _element_values(x.format), _element_values(w.format)
    unit = 2.0 ** -(of_x.fraction_bits + of_w.fraction_bits)
    if of_x.steps is not None and of_w.steps is not None:
        dot = "codes"
        a: NDArray = of_x.integers(x.codes)
        b: NDArray = of_w.integers(w.codes)
    else:
        dot, unit = "doubles", 1.0
        a, b = of_x.floats(x.codes), of_w.floats(w.codes)
    plan = _plan(path, dot, x.shape[1], step, step, measure=False)
    weight = _Columns.of(plan, w, b, 128, unit)
    y, _, _, finite = _Rows(plan, x, a, weight).run()
    return ScaledSums(y=y, finite=finite)


class _Values(NamedTuple):
    """What each byte of an element is worth; None of integers, whose codes are the values.

    `steps` are the values as int8, in units of ``2**-fraction_bits``, or None where none serve.
    """

    values: NDArray[np.float64] | None
    steps: NDArray[np.int8] | None
    fraction_bits: int

    def integers(self, codes: NDArray) -> NDArray[np.int8]:
        """Codes as integers, where `steps` says how."""
        if self.values is None or self.steps is None:
            return codes
        return self.steps.take(codes.view(np.uint8))

    def floats(self, codes: NDArray) -> NDArray[np.float64]:
        """Codes as the numbers they stand for."""
        if self.values is None:
            return codes.astype(np.float64)
        return self.values.take(codes.view(np.uint8))


@lru_cache(maxsize=64)
def _element_values(fmt: Format) -> _Values:
    if fmt.element.is_integer:
        return _Values(None, np.zeros(0, np.int8), 0)
    patterns = np.arange(256) % 2**fmt.element.bits
    with np.errstate(invalid="ignore"):
        values = patterns.astype(np.uint8).view(float_dtype(fmt)).astype(np.float64)
    if np.isfinite(values).all():
        for fraction_bits in range(8):
            steps = values * 2.0**fraction_bits
            if (steps == np.rint(steps)).all() and np.abs(steps).max() <= 127:
                return _Values(values, steps.astype(np.int8), fraction_bits)
    return _Values(values, None, 0)


class _Plan(NamedTuple):
    """How K runs: `groups` of `chunks` of `inner` dot steps, `steps` in all, whatever the codes."""

    path: str
    kernel: "Kernel[ScaledShape]"
    order: Order
    step: int
    groups: int
    chunks: int
    inner: int
    steps: int
    element: type[np.generic]

    @property
    def dot(self) -> str:
        """Name of the operand layout."""
        return self.order.codes


@lru_cache(maxsize=1024)
def _plan(path: str, dot: str, k: int, step: int, chunk: int, measure: bool) -> _Plan:
    """The plan of a kernel by the name of its dot (see `loraq_sim.kernels.tiles.scaled_kernel`)."""
    from loraq_sim.kernels.tiles import scaled_kernel

    kernel = scaled_kernel(path, dot, measure=measure)
    order = Order(kernel.shape.instructions.dot, chunk, 1, step)
    return _Plan(
        path=path,
        kernel=kernel,
        order=order,
        step=step,
        groups=-(-k // step),
        chunks=order.padded_turn // order.padded_chunk,
        inner=order.padded_chunk // order.group,
        steps=int(order.ends(k)[-1]) // order.group,
        element=np.float64 if dot == "doubles" else np.int32,
    )


class _Columns(NamedTuple):
    """Weights as the tiles read them, until others are packed.

    `norms` are (panels, groups, 3, width): sums of positive codes, of negative ones, and squared L2
    norms. `unit` is what a sum of 1 is worth.
    """

    shape: tuple[int, int]
    unit: float
    w: NDArray
    scales: NDArray[np.float32]
    start: NDArray[np.int32]
    offsets: NDArray[np.int32]
    norms: NDArray[np.int32]

    @classmethod
    def of(
        cls, plan: _Plan, w: QuantizedTensor, codes: NDArray, offset: int, unit: float = 1.0
    ) -> "_Columns":
        """Pack `codes`, what those of `w` stand for, to meet A raised by `offset`."""
        width, groups = plan.kernel.shape.width, plan.groups
        panels = -(-len(codes) // width)
        packed = scratch("columns", (panels, plan.steps * width), plan.element)
        mask = 0 if plan.dot == "bytes" else -1
        pack_panels(plan.path, codes, plan.order, plan.dot, width, packed, mask=mask)
        has_sums = plan.dot != "doubles"
        size = groups * width if has_sums else 0
        weight = cls(
            shape=w.codes.shape,
            unit=unit,
            w=packed,
            scales=_panel_values(w, w.group_scales, plan, panels, width),
            start=scratch("start", (panels, size), np.int32),
            offsets=scratch("offsets", (panels, plan.chunks * size), np.int32),
            norms=scratch("norms", (panels, 3 * size), np.int32).reshape(panels, -1, 3, width),
        )
        if has_sums:
            weight._sum(plan, offset)
        return weight

    def _sum(self, plan: _Plan, offset: int) -> None:
        from loraq_sim.kernels.scaled_tile import ColumnArguments
        from loraq_sim.kernels.tiles import column_kernel

        arguments = ColumnArguments(
            w=address_of(self.w),
            w_stride=self.w.strides[0],
            start=address_of(self.start),
            offsets=address_of(self.offsets),
            norms=address_of(self.norms),
            offset=offset if plan.dot == "bytes" or plan.kernel.shape.zeros else 0,
            panels=len(self.w),
            groups=plan.groups,
            chunks=plan.chunks,
            inner=plan.inner,
        )
        column_kernel(plan.path).run(arguments)

    @property
    def largest(self) -> int:
        """A bound of the magnitude of a code: the largest sum of those of one sign, at most 128."""
        return min(128, int(np.abs(self.norms[:, :, :2]).max(initial=0)))

    def guaranteed_bits(self, a_range: tuple[int, int], zeros: NDArray[np.int32]) -> int:
        """Width of a register for the sum of any group with any activations in a range.

        `zeros` (groups, 2) are the lowest and the highest zero point of each group, which count as
        they are; (0, 2) for none.
        """
        # At most 2**15 codes of 128 in a group and activations of 255 stay below 2**30.
        positive, negative = self.norms[:, :, 0], self.norms[:, :, 1]
        low = positive * a_range[0] + negative * a_range[1]
        high = positive * a_range[1] + negative * a_range[0]
        if len(zeros):
            ends = [(positive + negative) * -zeros[:, end, None] for end in (0, 1)]
            low, high = low + np.minimum(*ends), high + np.maximum(*ends)
        return signed_width(int(low.min(initial=0)), int(high.max(initial=0)))


def _panel_values(
    tensor: QuantizedTensor, scales: NDArray, plan: _Plan, panels: int, width: int
) -> NDArray:
    """Scales or zero points of all groups of K, (panels, groups, width); 0 beyond the rows."""
    (rows, k), groups = tensor.shape, plan.groups
    if scales.shape[1] not in (1, groups):
        scales = scales[:, np.arange(groups) * plan.step // tensor.format.group_width(k)]
    if 1 < len(scales) < rows:
        scales = np.repeat(scales, tensor.format.group_size or 1, axis=0)[:rows]
    padded = np.empty((panels * width, groups), scales.dtype)
    padded[:rows], padded[rows:] = scales, 0
    return np.ascontiguousarray(padded.reshape(panels, width, groups).transpose(0, 2, 1))


# No product of norms is as small: all groups are measured.
_ALL = -1.0


class _Rows:
    """The activations of one GEMM; `codes` are those of `x` or what they stand for."""

    def __init__(self, plan: _Plan, x: QuantizedTensor, codes: NDArray, weight: _Columns) -> None:
        self._plan, self._codes, self._weight = plan, codes, weight
        shape = plan.kernel.shape
        self._panels = -(-len(codes) // shape.rows)
        size = self._panels * shape.rows, len(weight.w) * shape.width
        self._scales = _panel_values(x, x.group_scales, plan, self._panels, shape.rows)
        self._zeros = np.zeros((0, plan.groups, shape.rows), np.int32)
        if x.zero_points is not None:
            zeros = x.zero_points.astype(np.int32)
            self._zeros = _panel_values(x, zeros, plan, self._panels, shape.rows)
        self._norms = (np.zeros((1, plan.groups), np.float32),) * 2
        self._out = aligned_empty(size, np.float32)
        self._found = np.zeros((3, shape.instructions.lanes), np.int32)

    def run(self) -> tuple[NDArray[np.float32], int, int, bool]:
        """y (M, N), the lowest and highest sum measured, 0 included, and whether all is finite.

        Where norms pay, some rows are measured in full, and of the others what goes beyond.
        """
        panels, weight = self._panels, self._weight
        some = panels // _SAMPLED + 1
        small = self._codes.size * len(weight.w) < _WORTH_NORMS
        if small or len(self._zeros) or not self._plan.kernel.shape.measure:
            some = panels
        self._run(0, some, _ALL, _ALL)
        if some < panels:
            rows = self._plan.kernel.shape.rows
            self._norms = _row_norms(self._codes, self._plan, rows), _column_norms(weight)
            low, high, _ = self._seen()
            # Sums within these limits change neither the width nor whether anything overflows.
            limit = 2.0 ** (signed_width(low, high) - 1) - 1
            # In most tiles whole sums reach some two thirds as far as the largest of them all.
            self._run(some, panels, limit, 2 * limit - 2 / 3 * max(high, -low))
        y = self._out[: len(self._codes), : weight.shape[0]]
        return np.ascontiguousarray(y), *self._seen()

    @property
    def zero_ends(self) -> NDArray[np.int32]:
        """Lowest and highest zero point of each group, (groups, 2); (0, 2) for none."""
        if not len(self._zeros):
            return np.zeros((0, 2), np.int32)
        of_rows = self._zeros.transpose(0, 2, 1).reshape(-1, self._plan.groups)[: len(self._codes)]
        return np.stack([of_rows.min(axis=0), of_rows.max(axis=0)], axis=1)

    def _seen(self) -> tuple[int, int, bool]:
        low, high, bits = self._found
        return int(low.min()), int(high.max()), int(bits.max()) < _INFINITY

    def _run(self, first: int, stop: int, limit: float, sure: float) -> None:
        """Compute row panels, in blocks that packed stay in an outer cache."""
        plan, weight = self._plan, self._weight
        words = plan.steps * plan.kernel.shape.rows
        most = max(1, _BLOCK_BYTES // (words * weight.w.itemsize))
        # The products are rounded: the last bits of the limit do not count.
        given = np.array([weight.unit, limit * (1 - 2.0**-20), sure], np.float32)
        for begin in range(first, stop, most):
            count = min(most, stop - begin)
            packed = scratch("packed", (count, words), weight.w.dtype)
            self._run_block(begin, packed, given.view(np.int32).tolist())

    def _run_block(self, first: int, packed: NDArray, bits: list[int]) -> None:
        from loraq_sim.kernels.scaled_tile import ScaledArguments

        plan, weight, scales = self._plan, self._weight, self._scales
        shape, (x_norms, w_norms) = plan.kernel.shape, self._norms
        rows = slice(first * shape.rows, (first + len(packed)) * shape.rows)
        unsigned = self._codes.dtype == np.uint8
        mask = 255 if unsigned else -1
        if plan.dot == "bytes":
            mask = 0 if unsigned else FLIP
        codes = self._codes[rows]
        pack_panels(plan.path, codes, plan.order, plan.dot, shape.rows, packed, mask=mask)
        spare = scratch("spare", (shape.rows, shape.width), np.float32)
        known = len(x_norms) > 1
        # Few weights stay in cache while rows of the result are written one after the other.
        together = len(packed)
        if weight.w.nbytes <= _FEW_BYTES:
            together = max(1, _FEW_BYTES // (shape.rows * self._out.strides[0]))
        arguments = ScaledArguments(
            a=address_of(packed),
            a_stride=packed.strides[0],
            w=address_of(weight.w),
            w_stride=weight.w.strides[0],
            x_scale=address_of(scales) + first * scales.strides[0],
            x_zero=address_of(self._zeros) + first * scales.strides[0],
            x_stride=scales.strides[0],
            w_scale=address_of(weight.scales),
            start=address_of(weight.start),
            column_stride=weight.scales.strides[0],
            offsets=address_of(weight.offsets),
            offsets_stride=weight.offsets.strides[0],
            spare=address_of(spare),
            unit=bits[0],
            x_norm=address_of(x_norms) + known * first * x_norms.strides[0],
            x_norm_stride=known * x_norms.strides[0],
            w_norm=address_of(w_norms),
            w_norm_stride=known * w_norms.strides[0],
            limit=bits[1],
            sure=bits[2],
            statistics=address_of(self._found),
            out=address_of(self._out) + rows.start * self._out.strides[0],
            out_row=self._out.strides[0],
            row_panels=len(packed),
            column_panels=len(weight.w),
            row_blocks=-(-len(packed) // together),
            block_panels=together,
            groups=plan.groups,
            chunks=plan.chunks,
            inner=plan.inner,
        )
        plan.kernel.run(arguments)


def _row_norms(codes: NDArray, plan: _Plan, rows: int) -> NDArray[np.float32]:
    """Largest L2 norm of the codes of a group in each panel of rows, (panels, groups)."""
    from loraq_sim.kernels.float_passes import group_squares

    squares = np.empty((len(codes), plan.groups), np.int32)
    group_squares(np.ascontiguousarray(codes), plan.step, squares)
    return _roots(np.maximum.reduceat(squares, np.arange(0, len(codes), rows), axis=0))


def _column_norms(weight: _Columns) -> NDArray[np.float32]:
    """Largest L2 norm of the codes of a group in each panel of columns, (panels, groups)."""
    return _roots(weight.norms[:, :, 2].max(axis=2))


def _roots(squares: NDArray[np.int32]) -> NDArray[np.float32]:
    """Square roots, none too small."""
    return np.sqrt(squares.astype(np.float64)).astype(np.float32) * np.float32(1 + 2.0**-22)
