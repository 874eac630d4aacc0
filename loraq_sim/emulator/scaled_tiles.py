"""The fast route of the scaled GEMM: sums are scaled and added while they are in registers.

Weights and activations are packed once for all groups; each group's sums stay in registers, where
they are scaled and added in float32, step by step as `loraq_sim.emulator.scaled_gemm` says. Bits do
not depend on the route. It is taken where

- every group has the same number of codes of K (the last may be short), and partial sums combine in
  float32;
- integers run on an array of one level with one accumulator, and no sum leaves it. The tiles keep
  the extreme sums after each chunk, which proves it, or else sends the caller to the slower route;
- small floats are integers of a byte in units of a power of two, so that the sum of a group is an
  exact integer; the others multiply in float64, which holds it.

The last product of a layer takes what follows it (`Ending`) along: its sums are added to the others
and rounded to 16 bits where their tile is.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray, overflow_limits
from loraq_sim.emulator.packed_weight import address_of, aligned_empty, pack_panels, scratch
from loraq_sim.emulator.scaled_operands import (
    Columns,
    Plan,
    column_norms,
    element_values,
    panel_values,
    plan_of,
    row_norms,
)
from loraq_sim.emulator.tile_job import FLIP
from loraq_sim.formats import Format
from loraq_sim.kernels.processor import LOOPS, choose_path, on_a_path_that_compiles
from loraq_sim.quantizers import QuantizedTensor

__all__ = ["Ending", "ScaledSums", "run_scaled"]

# Sums of so many products of unsigned bytes stay below 2**31.
_LONGEST = 2**15
# Of the rows, how many are measured in full before norms may prove the others harmless.
_SAMPLED = 16
# Products above which norms are had for less than they save.
_WORTH_NORMS = 2**21
# Packed rows that stay in an outer cache while they meet one panel of columns after the other.
_BLOCK_BYTES = 2**23
_FEW_BYTES = 2**17
# Bits of the float32 infinity, and of the float32 from which on a 16-bit float is infinite: half a
# step beyond its largest value.
_INFINITY = 0x7F800000
_BEYOND = {"bf16": 0x7F7F8000, "fp16": 0x477FF000}


class Ending(NamedTuple):
    """What becomes of the sums y of a layer's last product.

    Attributes
    ----------
    format : {"bf16", "fp16"}
        ``y + other + bias`` is rounded to it, each sum to float32 before, half to even.
    other : ndarray of shape (M, N), float32, or None
    bias : ndarray of shape (N,), float32, or None
    """

    format: str
    other: NDArray[np.float32] | None = None
    bias: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ScaledSums:
    """y (M, N) float32 and what was seen: `safe_acc_bits` and so on as of `GemmStatistics`.

    The widths are None for small floats. `finite` False says that y may hold infinities or NaN, or
    an ending of them. After an ending y is uint16, the bits of its format.
    """

    y: NDArray[np.float32] | NDArray[np.uint16]
    finite: bool
    safe_acc_bits: int | None = None
    guaranteed_acc_bits: int | None = None


@on_a_path_that_compiles
def run_scaled(
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: MacArray | TwoLevelArray,
    zero_point: str = "initial",
    ending: Ending | None = None,
) -> ScaledSums | None:
    """x w^T of tensors with scales, combined in float32; None where this route does not serve.

    It serves an `ending` where rows of the result are whole tiles.
    """
    path = choose_path()
    if ending is not None and not _can_end(path, ending, len(w.codes)):
        return None
    k = x.shape[1]
    step = _common_step(k, x.format, w.format)
    if path == LOOPS or step is None or 0 in (*x.shape, len(w.codes)):
        return None
    # Of zero points those that are part of unsigned activations' initial values.
    rare = x.zero_points is not None and (x.codes.dtype != np.uint8 or zero_point != "initial")
    if w.zero_points is not None or rare:
        return None
    if x.format.element.is_integer and w.format.element.is_integer:
        return _integers(path, x, w, mac, step, ending)
    return None if x.zero_points is not None else _floats(path, x, w, step, ending)


def _can_end(path: str, ending: Ending, columns: int) -> bool:
    from loraq_sim.kernels.tiles import scaled_kernel

    if path == LOOPS or (ending.format == "fp16" and path != "avx512"):
        return False
    widths = [scaled_kernel(path, dot, measure=False).shape.width for dot in ("codes", "doubles")]
    return columns % max(widths) == 0


def _common_step(k: int, *formats: Format) -> int | None:
    """Codes of K between two changes of a scale, if that is the same everywhere."""
    widths = sorted(fmt.group_width(k) for fmt in formats)
    if not 0 < widths[0] <= _LONGEST or (widths[1] < k and widths[1] % widths[0]):
        return None
    return widths[0]


def _integers(
    path: str,
    x: QuantizedTensor,
    w: QuantizedTensor,
    mac: MacArray | TwoLevelArray,
    step: int,
    ending: Ending | None,
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
    plan = plan_of(path, dot, x.shape[1], step, chunk, measure=True)
    weight = Columns.of(plan, w, w.codes, int(has_zeros) if unsigned else 128)
    if mac.tree_bits is not None:
        products = max(a_range[1], -a_range[0]) * weight.largest * chunk
        if products > 2 ** (mac.tree_bits - 1) - 1:
            return None
    rows = _Rows(plan, x, x.codes, weight, ending)
    y, low, high, finite = rows.run()
    if low < mac.lo or high > mac.hi:
        return None
    return ScaledSums(
        y=y,
        finite=finite,
        safe_acc_bits=signed_width(low, high),
        guaranteed_acc_bits=weight.guaranteed_bits(a_range, rows.zero_ends),
    )


def _floats(
    path: str, x: QuantizedTensor, w: QuantizedTensor, step: int, ending: Ending | None
) -> ScaledSums:
    of_x, of_w = element_values(x.format), element_values(w.format)
    unit = 2.0 ** -(of_x.fraction_bits + of_w.fraction_bits)
    if of_x.steps is not None and of_w.steps is not None:
        dot = "codes"
        a: NDArray = of_x.integers(x.codes)
        b: NDArray = of_w.integers(w.codes)
    else:
        dot, unit = "doubles", 1.0
        a, b = of_x.floats(x.codes), of_w.floats(w.codes)
    plan = plan_of(path, dot, x.shape[1], step, step, measure=False)
    weight = Columns.of(plan, w, b, 128, unit)
    y, _, _, finite = _Rows(plan, x, a, weight, ending).run()
    return ScaledSums(y=y, finite=finite)


# No product of norms is as small: all groups are measured.
_ALL = -1.0


class _Rows:
    """The activations of one GEMM; `codes` are those of `x` or what they stand for."""

    def __init__(
        self,
        plan: Plan,
        x: QuantizedTensor,
        codes: NDArray,
        weight: Columns,
        ending: Ending | None = None,
    ) -> None:
        self._plan, self._codes, self._weight, self._ending = plan, codes, weight, ending
        shape = plan.kernel.shape
        self._panels = -(-len(codes) // shape.rows)
        size = self._panels * shape.rows, len(weight.w) * shape.width
        self._scales = panel_values(x, x.group_scales, plan, self._panels, shape.rows)
        self._zeros = np.zeros((0, plan.groups, shape.rows), np.int32)
        if x.zero_points is not None:
            zeros = x.zero_points.astype(np.int32)
            self._zeros = panel_values(x, zeros, plan, self._panels, shape.rows)
        self._norms = (np.zeros((1, plan.groups), np.float32),) * 2
        self._out = aligned_empty(size, np.float32 if ending is None else np.uint16)
        self._nothing = np.zeros((1, size[1] if ending is not None else 0), np.float32)
        self._found = np.zeros((3, shape.lanes), np.int32)

    def run(self) -> tuple[NDArray, int, int, bool]:
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
            self._norms = row_norms(self._codes, self._plan, rows), column_norms(weight)
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
        beyond = _INFINITY if self._ending is None else _BEYOND[self._ending.format]
        return int(low.min()), int(high.max()), int(bits.max()) < beyond

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
            **self._finish(rows.start),
            row_panels=len(packed),
            column_panels=len(weight.w),
            row_blocks=-(-len(packed) // together),
            block_panels=together,
            groups=plan.groups,
            chunks=plan.chunks,
            inner=plan.inner,
        )
        plan.kernel.run(arguments)

    def _finish(self, first: int) -> dict[str, int]:
        """The arguments that say how rows from `first` on end."""
        from loraq_sim.kernels.scaled_tile import BF16, FP16, FP32

        if self._ending is None:
            return {"finish": FP32, "other": 0, "other_row": 0, "last_row": 0, "bias": 0}
        name, other, bias = self._ending
        given = self._nothing if other is None else other
        row = 0 if other is None else given.strides[0]
        return {
            "finish": {"bf16": BF16, "fp16": FP16}[name],
            "other": address_of(given) + first * row,
            "other_row": row,
            "last_row": len(self._codes) - 1 - first,
            "bias": address_of(self._nothing if bias is None else bias),
        }
