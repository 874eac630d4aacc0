"""Operands of the scaled GEMM in tiles: what codes are worth, how K runs, and weights packed.

Small floats are integers of a byte in units of a power of two where that holds them (e2m1 times 2,
e2m3 times 8), else float64. Norms of groups bound their sums.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.bounds import signed_width
from loraq_sim.emulator.packed_weight import Order, address_of, pack_panels, scratch
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import float_dtype

if TYPE_CHECKING:
    from loraq_sim.kernels.scaled_tile import ScaledShape
    from loraq_sim.kernels.tiles import Kernel

__all__ = [
    *("Columns", "ElementValues", "Plan", "column_norms", "element_values", "panel_values"),
    *("plan_of", "row_norms"),
]


class ElementValues(NamedTuple):
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
def element_values(fmt: Format) -> ElementValues:
    if fmt.element.is_integer:
        return ElementValues(None, np.zeros(0, np.int8), 0)
    patterns = np.arange(256) % 2**fmt.element.bits
    with np.errstate(invalid="ignore"):
        values = patterns.astype(np.uint8).view(float_dtype(fmt)).astype(np.float64)
    if np.isfinite(values).all():
        for fraction_bits in range(8):
            steps = values * 2.0**fraction_bits
            if (steps == np.rint(steps)).all() and np.abs(steps).max() <= 127:
                return ElementValues(values, steps.astype(np.int8), fraction_bits)
    return ElementValues(values, None, 0)


class Plan(NamedTuple):
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
def plan_of(path: str, dot: str, k: int, step: int, chunk: int, measure: bool) -> Plan:
    """The plan of a kernel by the name of its dot (see `loraq_sim.kernels.tiles.scaled_kernel`)."""
    from loraq_sim.kernels.tiles import scaled_kernel

    kernel = scaled_kernel(path, dot, measure=measure)
    order = Order(kernel.shape.instructions.dot, chunk, 1, step)
    return Plan(
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


class Columns(NamedTuple):
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
        cls, plan: Plan, w: QuantizedTensor, codes: NDArray, offset: int, unit: float = 1.0
    ) -> "Columns":
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
            scales=panel_values(w, w.group_scales, plan, panels, width),
            start=scratch("start", (panels, size), np.int32),
            offsets=scratch("offsets", (panels, plan.chunks * size), np.int32),
            norms=scratch("norms", (panels, 3 * size), np.int32).reshape(panels, -1, 3, width),
        )
        if has_sums:
            weight._sum(plan, offset)
        return weight

    def _sum(self, plan: Plan, offset: int) -> None:
        from loraq_sim.kernels.tiles import ColumnArguments, column_kernel

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


def panel_values(
    tensor: QuantizedTensor, scales: NDArray, plan: Plan, panels: int, width: int
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


def row_norms(codes: NDArray, plan: Plan, rows: int) -> NDArray[np.float32]:
    """Largest L2 norm of the codes of a group in each panel of rows, (panels, groups)."""
    from loraq_sim.kernels.float_passes import group_squares

    squares = np.empty((len(codes), plan.groups), np.int32)
    group_squares(np.ascontiguousarray(codes), plan.step, squares)
    return _roots(np.maximum.reduceat(squares, np.arange(0, len(codes), rows), axis=0))


def column_norms(weight: Columns) -> NDArray[np.float32]:
    """Largest L2 norm of the codes of a group in each panel of columns, (panels, groups)."""
    return _roots(weight.norms[:, :, 2].max(axis=2))


def _roots(squares: NDArray[np.int32]) -> NDArray[np.float32]:
    """Square roots, none too small."""
    return np.sqrt(squares.astype(np.float64)).astype(np.float32) * np.float32(1 + 2.0**-22)
