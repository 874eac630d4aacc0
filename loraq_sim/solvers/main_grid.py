"""The main branch during a descent, and rounding to a grid that is already there.

A descent needs the error (W - P) - Q(W - P) at every step, P being the product of the branch.
Scales of a `MainGrid` follow P there (see `loraq_sim.kernels.quantize`) and are rounded to their
stored format at the end only.

Once codes are stored, parts of a matrix are rounded to its scales (`requantize`), and its rows are
taken apart and put together (`take_rows`, `stack_rows`) without moving a scale.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from loraq_sim.errors import InputError
from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.quantizers.quantize import quantize_near
from loraq_sim.quantizers.tensor import as_rows, float_dtype, spread

__all__ = [
    "Candidates",
    "MainGrid",
    "grid_of",
    "main_scale_rule",
    "nearest_codes",
    "requantize",
    "stack_rows",
    "take_rows",
]

# Neighbors of the last scale to try, in turn, and how often a fresh one is tried.
_NEIGHBORS = (np.float32(0.985), np.float32(1.015))
_POWER_NEIGHBORS = (np.float32(0.5), np.float32(2.0))
_FRESH_EVERY = 4
# A fresh scale puts the extreme of the group a little beyond the last code; best of 0.8 .. 1.
_FRESH_CLIP = np.float32(0.93)
_E2M1_MAX = np.float32(6)


def main_scale_rule(fmt: Format) -> str | None:
    """The searching rule of `fmt`: ``signed_mse`` for integers whose scale has a sign to spare."""
    if fmt.element.is_plain_float:
        return None
    return "signed_mse" if _has_signed_scales(fmt) else "mse"


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Scales to try at a step: the last one times ``steps``, and a fresh one.

    A fresh scale puts the extreme of a group on ``code``; it is tried where ``is_fresh``, else only
    for groups without a scale.
    """

    steps: np.ndarray
    is_fresh: bool
    code: np.float32


class MainGrid:
    """The main format `fmt` applied to what a branch leaves of one weight of `shape`."""

    def __init__(self, fmt: Format, shape: tuple[int, int]) -> None:
        self.format = fmt
        self.scales = np.zeros(fmt.scale_shape(shape), dtype=np.float32)
        element = fmt.element
        self.is_power = fmt.scale is not None and fmt.scale.name == "e8m0"
        # The kernels walk along rows.
        self._in_rows = fmt.granularity != "block"
        self._is_integer = element.is_integer and element.is_signed and self._in_rows
        self.is_e2m1 = element.minifloat == "float4_e2m1fn" and self._in_rows

    @property
    def has_kernel(self) -> bool:
        """Whether scales can follow a descent; else each step rounds from scratch."""
        return self._is_integer or self.is_e2m1

    @property
    def is_in_rows(self) -> bool:
        """Whether each row of a weight has groups of its own, which can be rounded alone."""
        return self.has_kernel and not self.format.spans_rows

    @property
    def is_uniform(self) -> bool:
        """Whether a smaller range of a group makes its steps smaller."""
        return self.format.element.is_integer and self._in_rows

    @property
    def center_offset(self) -> float:
        """Half a step as a share of the range, where one side of zero has one more code."""
        if not _has_signed_scales(self.format):
            return 0.0
        return 0.5 / 2**self.format.element.bits

    def candidates(self, step: int) -> Candidates:
        """The scales that `step` of a descent tries; for a grid that has a kernel."""
        neighbors = _POWER_NEIGHBORS if self.is_power else _NEIGHBORS
        steps = np.array([1.0, neighbors[step % 2]], dtype=np.float32)
        is_fresh = step % _FRESH_EVERY == 0
        if self.is_e2m1:
            return Candidates(steps=steps, is_fresh=is_fresh, code=_E2M1_MAX)
        lo, hi = np.float32(self.format.element.lo), np.float32(self.format.element.hi)
        code = hi
        if is_fresh and not self.is_power:
            code = (lo if _has_signed_scales(self.format) else hi) / _FRESH_CLIP
        return Candidates(steps=steps, is_fresh=is_fresh, code=code)

    def rows(self, values: np.ndarray) -> tuple[np.ndarray, int]:
        """`values` (N, K) as rows of scale groups, and the elements of a group."""
        return as_rows(values, self.format)

    def leave(
        self, weight: np.ndarray, product: np.ndarray, step: int, rows: slice = slice(None)
    ) -> float:
        """Overwrite `product` by (W - P) - Q(W - P); returns its Frobenius norm.

        Both hold the `rows` of the whole, which is all of it where `is_in_rows` is false.
        """
        from loraq_sim.kernels.quantize import round_residual

        if not self.has_kernel:
            return self._leave_by_quantizer(weight, product)
        tried = self.candidates(step)
        # 0 asks for fresh scales only where there is none.
        fresh = tried.code if tried.is_fresh else np.float32(0)
        (weight, group), (product, _) = self.rows(weight), self.rows(product)
        scales = self.scales[rows].reshape(weight.shape[0], -1)
        element = self.format.element
        ends = () if self.is_e2m1 else (np.float32(element.lo), np.float32(element.hi))
        how = fresh, self.is_power, tried.steps, scales
        total = round_residual(weight, product, group, ends, *how)
        return float(np.sqrt(total))

    def finish(self, target: np.ndarray, unit: float) -> QuantizedTensor:
        """Stored codes of `target`, (N, K), with the scales of the descent where they are best.

        Codes keep their fit to the branch only with the scales they were found with: a search from
        scratch alone loses 1 to 2 % of the error. `unit` is what 1 in the descent is worth here.
        """
        rule = main_scale_rule(self.format)
        if rule is None or not self._is_integer or self.is_power or not self.scales.any():
            return quantize(target, self.format, rule=rule)
        return quantize_near(target, self.format, rule, self.scales * np.float32(unit))

    def _leave_by_quantizer(self, weight: np.ndarray, product: np.ndarray) -> float:
        np.subtract(weight, product, out=product)
        if not np.isfinite(product).all():
            raise FloatingPointError("the product of the factors left float32")
        product -= quantize(product, self.format).dequantize()
        return float(np.linalg.norm(product))


def _has_signed_scales(fmt: Format) -> bool:
    element = fmt.element
    is_free = element.is_integer and element.is_signed and element.block is None
    return is_free and fmt.scale is not None and fmt.scale.name != "e8m0"


def requantize(values: np.ndarray, like: QuantizedTensor) -> QuantizedTensor:
    """`values` rounded to nearest with the scales and zero points of `like`, of the same shape.

    Values that are stored on this grid already keep their codes.
    """
    if like.scales is None:
        return quantize(values, like.format)
    codes = nearest_codes(values, *grid_of(like), like.format)
    return dataclasses.replace(like, codes=codes.astype(like.codes.dtype))


def grid_of(like: QuantizedTensor) -> tuple[np.ndarray, np.ndarray | None]:
    """Steps and zero points of each element of a tensor that has scales; 1 for a group of zeros."""
    steps = spread(like.group_scales, like.format, like.shape)
    # Zero, and the smallest power that a format without zero has, mark a group of zeros.
    steps = np.where(np.abs(steps) < np.finfo(np.float32).tiny, np.float32(1), steps)
    if like.zero_points is None:
        return steps, None
    return steps, spread(like.zero_points, like.format, like.shape).astype(np.float32)


def nearest_codes(
    values: np.ndarray, steps: np.ndarray, zeros: np.ndarray | None, fmt: Format
) -> np.ndarray:
    """The element values nearest to `values` where the grid has these steps and zero points."""
    scaled = values / steps
    if not fmt.element.is_integer:
        largest = np.float32(ml_dtypes.finfo(float_dtype(fmt)).max)
        return np.clip(scaled, -largest, largest).astype(float_dtype(fmt))
    codes = np.rint(scaled)
    if zeros is not None:
        codes += zeros
    return np.clip(codes, fmt.element.lo, fmt.element.hi)


def take_rows(tensor: QuantizedTensor, rows: slice) -> QuantizedTensor:
    """Some rows of a matrix. One scale for all of it (``tensor``) is stored with each part.

    Raises
    ------
    InputError
        If its scales serve blocks of rows, and the part does not begin and end with one.
    """
    of_groups = slice(None) if tensor.format.granularity == "tensor" else rows
    if tensor.format.granularity == "block":
        height = tensor.format.group_width(tensor.shape[0])
        if rows.start % height or (rows.stop % height and rows.stop < tensor.shape[0]):
            raise InputError(
                f"rows {rows.start} to {rows.stop} cut blocks of {height} rows that share a scale "
                f"in {tensor.format}; use a format with scales along rows, such as int4/g64"
            )
        of_groups = slice(rows.start // height, -(-rows.stop // height))

    def part(per_group: np.ndarray | None) -> np.ndarray | None:
        return None if per_group is None else np.ascontiguousarray(per_group[of_groups])

    return dataclasses.replace(
        tensor,
        codes=np.ascontiguousarray(tensor.codes[rows]),
        scales=part(tensor.scales),
        zero_points=part(tensor.zero_points),
    )


def stack_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """One tensor of the rows of `parts`, whose scales must not span rows."""
    if len(parts) == 1:
        return parts[0]
    return dataclasses.replace(
        parts[0],
        codes=np.concatenate([part.codes for part in parts]),
        scales=_stacked([part.scales for part in parts]),
        zero_points=_stacked([part.zero_points for part in parts]),
    )


def _stacked(per_group: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [values for values in per_group if values is not None]
    return np.concatenate(known) if known else None
