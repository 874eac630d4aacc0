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
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import Order, address_of, aligned_empty, pack_panels
from loraq_sim.emulator.tile_job import FLIP, on_a_path_that_compiles
from loraq_sim.emulator.tile_run import block_panels, scratch
from loraq_sim.formats import Format
from loraq_sim.kernels.processor import LOOPS, choose_path
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import float_dtype

__all__ = ["ScaledSums", "run_scaled"]

# Sums of so many products of an unsigned and a signed byte stay below 2**31.
_LONGEST = 2**16


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
    x: QuantizedTensor, w: QuantizedTensor, mac: MacArray | TwoLevelArray
) -> ScaledSums | None:
    """x w^T of tensors with scales, combined in float32; None where this route does not serve."""
    path = choose_path()
    k = x.shape[1]
    step = _common_step(k, x.format, w.format)
    if path == LOOPS or step is None or 0 in (*x.shape, len(w.codes)):
        return None
    if x.zero_points is not None or w.zero_points is not None:
        return None
    if x.format.element.is_integer and w.format.element.is_integer:
        return _integers(path, x, w, mac, step)
    return _floats(path, x, w, step)


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
    weight = _Columns.of(path, w, step, chunk, 0 if unsigned else 128)
    products = max(a_range[1], -a_range[0]) * weight.largest * chunk
    if mac.tree_bits is not None and products > 2 ** (mac.tree_bits - 1) - 1:
        return None
    y, low, high, finite = _run(path, x, x.codes, weight, measure=True)
    if low < mac.lo or high > mac.hi:
        return None
    return ScaledSums(
        y=y,
        finite=finite,
        safe_acc_bits=signed_width(low, high),
        guaranteed_acc_bits=weight.guaranteed_bits(a_range),
    )


def _floats(path: str, x: QuantizedTensor, w: QuantizedTensor, step: int) -> ScaledSums:
    of_x, of_w = _element_values(x.format), _element_values(w.format)
    if of_x.steps is not None and of_w.steps is not None:
        weight = _Columns.of(path, w, step, step, 128, codes=of_w.integers(w.codes))
        weight = weight._replace(unit=2.0 ** -(of_x.fraction_bits + of_w.fraction_bits))
        y, _, _, finite = _run(path, x, of_x.integers(x.codes), weight, measure=False)
    else:
        weight = _Columns.of_floats(path, w, of_w.floats(w.codes), step)
        y, _, _, finite = _run(path, x, of_x.floats(x.codes), weight, measure=False)
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


class _Columns(NamedTuple):
    """Weights as the tiles read them: `groups` of `chunks`, each of `inner` dot steps.

    `norms` are (panels, groups, 3, width): sums, L1 norms and squared L2 norms.
    """

    order: Order
    dot: str
    groups: int
    chunks: int
    inner: int
    step: int
    unit: float
    shape: tuple[int, int]
    w: NDArray
    scales: NDArray[np.float32]
    start: NDArray[np.int32]
    offsets: NDArray[np.int32]
    norms: NDArray[np.int32]

    @classmethod
    def of(
        cls,
        path: str,
        w: QuantizedTensor,
        step: int,
        chunk: int,
        offset: int,
        codes: NDArray[np.int8] | None = None,
    ) -> "_Columns":
        """Pack weights; A is raised by `offset` where the dot of a path takes unsigned codes."""
        from loraq_sim.kernels.scaled_tile import ColumnArguments
        from loraq_sim.kernels.tiles import column_kernel, scaled_kernel

        shape = scaled_kernel(path, "codes", measure=True).shape
        dot = shape.instructions.dot
        codes = w.codes if codes is None else codes
        order = Order(dot, chunk, 1, step)
        packed = _packed_columns(path, w, codes, order, shape.width)
        chunks, inner = order.padded_turn // order.padded_chunk, order.padded_chunk // order.group
        panels, groups = len(packed.w), packed.groups
        packed = packed._replace(
            chunks=chunks,
            inner=inner,
            start=aligned_empty((panels, groups * shape.width), np.int32),
            offsets=aligned_empty((panels, groups * chunks * shape.width), np.int32),
            norms=aligned_empty((panels, groups * 3 * shape.width), np.int32),
        )
        arguments = ColumnArguments(
            w=address_of(packed.w),
            w_stride=packed.w.strides[0],
            start=address_of(packed.start),
            offsets=address_of(packed.offsets),
            norms=address_of(packed.norms),
            offset=offset if dot == "bytes" else 0,
            panels=panels,
            groups=groups,
            chunks=chunks,
            inner=inner,
        )
        column_kernel(path).run(arguments)
        return packed._replace(norms=packed.norms.reshape(panels, groups, 3, shape.width))

    @classmethod
    def of_floats(
        cls, path: str, w: QuantizedTensor, codes: NDArray[np.float64], step: int
    ) -> "_Columns":
        """Pack float64 weights."""
        from loraq_sim.kernels.tiles import scaled_kernel

        shape = scaled_kernel(path, "doubles", measure=False).shape
        return _packed_columns(path, w, codes, Order("doubles", step, 1, step), shape.width)

    @property
    def largest(self) -> int:
        """A bound of the magnitude of a code: the largest L1 norm, at most 128."""
        return min(128, int(self.norms[:, :, 1].max(initial=0)))

    def guaranteed_bits(self, a_range: tuple[int, int]) -> int:
        """Width of a register for the sum of any group with any activations in a range."""
        sums, norms = self.norms[:, :, 0].astype(np.int64), self.norms[:, :, 1]
        positive, negative = (norms + sums) // 2, (sums - norms) // 2
        low = positive * a_range[0] + negative * a_range[1]
        high = positive * a_range[1] + negative * a_range[0]
        return signed_width(int(low.min(initial=0)), int(high.max(initial=0)))


def _packed_columns(
    path: str, w: QuantizedTensor, codes: NDArray, order: Order, width: int
) -> _Columns:
    n, k = codes.shape
    step = order.column
    length, panels, groups = int(order.ends(k)[-1]), -(-n // width), -(-k // step)
    element = np.float64 if order.codes == "doubles" else np.int32
    packed = aligned_empty((panels, length // order.group * width), element)
    mask = 0 if order.codes == "bytes" else -1
    pack_panels(path, codes, order, order.codes, width, packed, mask=mask)
    none = np.zeros((panels, 0), np.int32)
    return _Columns(
        order=order,
        dot=order.codes,
        groups=groups,
        chunks=1,
        inner=step,
        step=step,
        unit=1.0,
        shape=(n, k),
        w=packed,
        scales=_panel_scales(w, step, groups, panels, width),
        start=none,
        offsets=none,
        norms=none,
    )


def _panel_scales(
    tensor: QuantizedTensor, step: int, groups: int, panels: int, width: int
) -> NDArray[np.float32]:
    """Scales of `groups` stretches of `step` codes, (panels, groups, width); 0 beyond the rows."""
    rows, k = tensor.shape
    scales = tensor.group_scales
    of_group = np.arange(groups) * step // tensor.format.group_width(k)
    if scales.shape[1] != groups:
        scales = scales[:, of_group]
    if 1 < len(scales) < rows:
        scales = np.repeat(scales, tensor.format.group_size or 1, axis=0)[:rows]
    padded = np.zeros((panels * width, groups), np.float32)
    padded[:rows] = scales
    return np.ascontiguousarray(padded.reshape(panels, width, groups).transpose(0, 2, 1))


def _run(
    path: str, x: QuantizedTensor, codes: NDArray, weight: _Columns, *, measure: bool
) -> tuple[NDArray[np.float32], int, int, bool]:
    """y, the lowest and highest sum (0 included), and whether all of y is finite."""
    from loraq_sim.kernels.scaled_tile import ScaledArguments
    from loraq_sim.kernels.tiles import scaled_kernel

    dot = "doubles" if weight.dot == "doubles" else "codes"
    kernel = scaled_kernel(path, dot, measure=measure)
    shape = kernel.shape
    m, panels = len(codes), len(weight.w)
    row_panels = -(-m // shape.rows)
    scales = _panel_scales(x, weight.step, weight.groups, row_panels, shape.rows)
    out = aligned_empty((row_panels * shape.rows, panels * shape.width), np.float32)
    spare = scratch("spare", (shape.rows, shape.width), np.float32)
    found = np.zeros((3, shape.instructions.lanes), np.int32)
    words = weight.w.shape[1] // shape.width * shape.rows
    block = block_panels(row_panels, words * weight.w.itemsize // 4, 1)
    packed = scratch("packed", (block, words), weight.w.dtype)
    mask = -1 if weight.dot != "bytes" else 0 if codes.dtype == np.uint8 else FLIP
    if codes.dtype == np.uint8 and weight.dot == "words":
        mask = 255
    for first in range(0, row_panels, block):
        count = min(block, row_panels - first)
        rows = slice(first * shape.rows, (first + count) * shape.rows)
        pack_panels(
            path, codes[rows], weight.order, weight.dot, shape.rows, packed[:count], mask=mask
        )
        arguments = ScaledArguments(
            a=address_of(packed),
            a_stride=packed.strides[0],
            w=address_of(weight.w),
            w_stride=weight.w.strides[0],
            x_scale=address_of(scales) + first * scales.strides[0],
            x_stride=scales.strides[0],
            w_scale=address_of(weight.scales),
            start=address_of(weight.start),
            column_stride=weight.scales.strides[0],
            offsets=address_of(weight.offsets),
            offsets_stride=weight.offsets.strides[0],
            spare=address_of(spare),
            unit=int(np.float32(weight.unit).view(np.uint32)),
            statistics=address_of(found),
            out=address_of(out) + rows.start * out.strides[0],
            out_row=out.strides[0],
            row_panels=count,
            first_panel=0,
            column_panels=panels,
            groups=weight.groups,
            chunks=weight.chunks,
            inner=weight.inner,
        )
        kernel.run(arguments)
    finite = int(found[2].max()) < _INFINITY
    y = np.ascontiguousarray(out[:m, : weight.shape[0]])
    return y, int(found[0].min()), int(found[1].max()), finite


# Bits of the float32 infinity.
_INFINITY = 0x7F800000
