"""What becomes of values beyond the range of a float format: infinity, or its largest value.

That belongs to the format and to the kernel that converts, so a data path says it per format
(`FloatOverflow`). Rounding comes first: float16 holds 65519 as 65504, and 65520 overflows. A NaN
stays one, and so does 0 times infinity. Every value that leaves a format is counted where it
happens; what an infinity does to later sums is not counted again.

Scales follow the rule of their format. A group whose scale is infinite has codes of zero, x / inf,
and therefore the value NaN. E8M0 has no infinity and saturates. Elements under a block scale
(``mxfp8_e4m3``) that lie beyond the largest code are rounded to it as the scale rule foresees; that
is rounding, not counted, unless the data path lets fp8 overflow.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.mac_array import combine_format
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import SCALES, Format, parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.around_zero import exact_scales
from loraq_sim.quantizers.quantize import quantize_rounded
from loraq_sim.quantizers.tensor import (
    all_finite,
    as_rows,
    ends_of_groups,
    float_dtype,
    spread,
)

__all__ = [
    *("FLOAT_RULES", "UNBOUNDED", "Clipping", "FloatOverflow"),
    *("clipping", "rounded_float", "rounded_tensor"),
]

FLOAT_RULES = ("infinity", "saturate")
UNBOUNDED = "unbounded"
"""A rule no machine has: an exponent without limits, to tell overflow from rounding."""

_SIGNIFICANT_BITS = {"fp32": 24, "bf16": 8, "fp16": 11, "e4m3": 4}
_MINIFLOATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class FloatOverflow:
    """Rule of each float format, ``infinity`` or ``saturate``.

    ``fp8_e4m3`` has no infinity; there ``infinity`` means NaN, as its conversion without saturation
    gives. ``fp32`` also is the rule of ``fp22`` sums, ``fp8_e4m3`` that of e4m3 scales.
    """

    fp32: str = "infinity"
    bf16: str = "infinity"
    fp16: str = "infinity"
    fp8_e4m3: str = "saturate"
    fp8_e5m2: str = "saturate"

    def __post_init__(self) -> None:
        for field in fields(self):
            rule = getattr(self, field.name)
            if rule not in (*FLOAT_RULES, UNBOUNDED):
                what = f"overflow rule of {field.name}"
                raise InputError(unknown_name(what, str(rule), FLOAT_RULES))

    @classmethod
    def of(cls, rules: "FloatOverflow | Mapping[str, str]") -> "FloatOverflow":
        """The rules of a mapping such as ``{"fp16": "saturate"}``; others keep their default."""
        if isinstance(rules, cls):
            return rules
        if not isinstance(rules, Mapping):
            raise InputError(
                f'float_overflow must map formats to rules, such as {{"fp16": "saturate"}}, got '
                f"{rules!r:.80}"
            )
        known = [field.name for field in fields(cls)]
        for name in rules:
            if name not in known:
                raise InputError(unknown_name("format of float_overflow", str(name), known))
        return cls(**rules)

    @classmethod
    def unbounded(cls) -> "FloatOverflow":
        """No format overflows."""
        return cls(**{field.name: UNBOUNDED for field in fields(cls)})

    def rule(self, name: str) -> str:
        """Rule of a format of `loraq_sim.formats` (element, scale) or of a combine step."""
        if name == "e8m0":
            return "saturate"
        name = combine_format(name)
        return getattr(self, {"e4m3": "fp8_e4m3", "fp22": "fp32"}.get(name, name))


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Values of one tensor that left the range of its format.

    ``count`` of ``size`` values of ``tensor`` (such as ``y`` or ``scales of X_a``) became what
    ``rule`` says; ``first_row`` is the first activation row among them.
    """

    tensor: str
    format: str
    rule: str
    count: int
    size: int
    first_row: int

    def sentence(self) -> str:
        """In words: ``32 of 2,048 values of y overflow fp16 to infinity (first: row 3)``."""
        verb = f"are clamped to the largest {self.format}"
        if self.rule == "infinity":
            no_infinity = self.format in ("e4m3", "mxfp8_e4m3")
            verb = f"overflow {self.format} to {'NaN' if no_infinity else 'infinity'}"
        what = self.tensor if self.tensor.startswith("scales") else f"values of {self.tensor}"
        return f"{self.count:,} of {self.size:,} {what} {verb} (first: row {self.first_row})"


def clipping(
    tensor: str, fmt: str, rule: str, clipped: NDArray[np.bool_] | None
) -> tuple[Clipping, ...]:
    """The record of a mask whose first axis is the row; none where it is None or all False."""
    if clipped is None or not clipped.any():
        return ()
    rows = np.flatnonzero(clipped.reshape(len(clipped), -1).any(axis=1))
    found = Clipping(
        tensor=tensor,
        format=fmt,
        rule=rule,
        count=int(clipped.sum()),
        size=clipped.size,
        first_row=int(rows[0]),
    )
    return (found,)


def rounded_float(
    values: NDArray[np.floating], name: str, rule: str
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Values rounded to a float format, ties to even, and which of them left its range (or None).

    Parameters
    ----------
    values : ndarray of any shape, float32 or float64
        May hold infinities and NaN, which count as having left a range before.
    name : {"fp32", "bf16", "fp16", "e4m3"}
    rule : str
        ``infinity``, ``saturate`` or ``unbounded``.

    Returns
    -------
    rounded : ndarray in the format's dtype (float64 where `rule` is ``unbounded`` and needed)
    clipped : ndarray of bool, or None where every value stayed in range
    """
    dtype = _dtype(name)
    # Overflow is what this function is about; NaN passes through.
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(dtype)
    wild = ~np.isfinite(rounded)
    if not wild.any():
        return rounded, None
    clipped = wild & np.isfinite(values)
    if rule == "saturate":
        import ml_dtypes

        # As cvt.satfinite does: infinities become the largest value, too.
        largest = np.float32(ml_dtypes.finfo(dtype).max)
        clamped = np.copysign(largest, values).astype(dtype)
        rounded = np.where(wild & ~np.isnan(values), clamped, rounded)
    elif rule == UNBOUNDED:
        exact = _significant(values.astype(np.float64), _SIGNIFICANT_BITS[name])
        rounded = np.where(clipped, exact, rounded.astype(np.float64))
    return rounded, clipped if clipped.any() else None


def rounded_tensor(
    tensor: str,
    x: NDArray[np.floating],
    fmt: Format,
    rounding: str,
    overflow: FloatOverflow,
    rule: str | None = None,
) -> tuple[QuantizedTensor, tuple[Clipping, ...]]:
    """Rows `x` (M, K) in `fmt` as a data path rounds them, and what left a float range there.

    `tensor` names them in the records, `rule` the scale rule (`loraq_sim.quantize`). Values that
    are not finite come from earlier overflows: a group that holds one has a scale that is not
    finite, and is NaN as a whole; where its scale format saturates, infinities are clamped with it.
    """
    if fmt.element.is_plain_float:
        name = fmt.element.name
        beyond = overflow.rule(name)
        codes, clipped = rounded_float(x, name, beyond)
        stored = QuantizedTensor(codes=codes, scales=None, format=fmt)
        return stored, clipping(tensor, name, beyond, clipped)
    x = _within_float32(x, overflow)
    ends = ends_of_groups(x, fmt)
    if not (all_finite(x) if ends is None else ends.are_finite):
        return _with_wild_groups(tensor, x, np.isfinite(x), fmt, rounding, overflow, rule)
    stored = quantize_rounded(x, fmt, rounding, rule, ends)
    stored, records = _scales_that_overflow(tensor, x, stored, rounding, overflow, rule)
    minifloat = _MINIFLOATS.get(fmt.element.minifloat or "")
    if minifloat is None or overflow.rule(minifloat) != "infinity":
        return stored, records
    with np.errstate(over="ignore", invalid="ignore"):
        codes = (x / _per_element(stored, x.shape)).astype(stored.codes.dtype)
    wild = ~np.isfinite(codes)
    free = _replaced(stored, codes=codes)
    return free, (*records, *clipping(tensor, str(fmt), "infinity", wild))


def _scales_that_overflow(
    tensor: str,
    x: NDArray[np.float32],
    stored: QuantizedTensor,
    rounding: str,
    overflow: FloatOverflow,
    scale_rule: str | None,
) -> tuple[QuantizedTensor, tuple[Clipping, ...]]:
    """`stored`, whose scales were clamped, with those beyond their format as the rule has them."""
    fmt = stored.format
    # The exponent of a block is taken from its values, and so is within its range.
    held, kept = fmt.scale_format, stored.group_scales
    if fmt.element.block is not None or not np.any(np.abs(kept) >= held.largest):
        return stored, ()
    rows, group = as_rows(x, fmt)
    exact = exact_scales(rows, group, fmt, scale_rule).astype(np.float32).reshape(kept.shape)
    name = held.name
    if name == "e8m0":
        beyond = np.abs(exact) > held.largest
        return stored, clipping(f"scales of {tensor}", name, "saturate", beyond)
    rule = overflow.rule(name)
    scales, clipped = rounded_float(exact, name, rule)
    if clipped is None:
        return stored, ()
    records = clipping(f"scales of {tensor}", name, rule, clipped)
    if rule == "saturate":
        return stored, records
    if rule == UNBOUNDED:
        wide = quantize_rounded(x, replace(fmt, scale=SCALES["fp32"]), rounding, scale_rule)
        return _replaced(wide, format=fmt), records
    scales = np.where(clipped, scales.astype(np.float32), kept)
    return _emptied(stored, clipped, scales), records


def _with_wild_groups(
    tensor: str,
    x: NDArray[np.float32],
    finite: NDArray[np.bool_],
    fmt: Format,
    rounding: str,
    overflow: FloatOverflow,
    scale_rule: str | None,
) -> tuple[QuantizedTensor, tuple[Clipping, ...]]:
    """As `rounded_tensor`, of rows some of whose values are not finite."""
    name = fmt.scale_format.name
    rule = overflow.rule(name)
    if fmt.element.block is None and rule == "saturate" and name != "e8m0":
        # A clamped scale leaves codes at their ends, as a value of the largest float32 does.
        largest = np.finfo(np.float32).max
        kept = np.where(np.isnan(x), np.float32(0), np.clip(x, -largest, largest))
        wild = np.isnan(x)
    else:
        kept, wild = np.where(finite, x, np.float32(0)), ~finite
    stored, records = rounded_tensor(tensor, kept, fmt, rounding, overflow, scale_rule)
    scales = stored.group_scales
    if fmt.has_tensor_scale:
        # One scale of the tensor: a value that is not finite reaches every block.
        groups = np.full(scales.shape, wild.any())
    else:
        rows, group = as_rows(wild, fmt)
        starts = np.arange(0, rows.shape[1], group)
        groups = np.logical_or.reduceat(rows, starts, axis=1).reshape(scales.shape)
    return _emptied(stored, groups, np.where(groups, np.float32(np.nan), scales)), records


def _emptied(
    stored: QuantizedTensor, groups: NDArray[np.bool_], scales: NDArray[np.float32]
) -> QuantizedTensor:
    """`stored` with `scales` and with codes of zero in `groups`."""
    inside = spread(groups, stored.format, stored.shape)
    zeros = stored.zero_points
    return _replaced(
        stored,
        codes=np.where(inside, np.zeros_like(stored.codes), stored.codes),
        scales=scales.astype(np.float32),
        zero_points=None if zeros is None else np.where(groups, np.zeros_like(zeros), zeros),
    )


def _replaced(stored: QuantizedTensor, **changes: Any) -> QuantizedTensor:
    names = ("codes", "scales", "format", "zero_points", "tensor_scale")
    return QuantizedTensor(**{name: getattr(stored, name) for name in names} | changes)


def _per_element(stored: QuantizedTensor, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Scales of every element; 1 where a zero scale marks a group of zeros."""
    scales = np.where(stored.group_scales == 0, np.float32(1), stored.group_scales)
    return np.broadcast_to(spread(scales, stored.format, stored.shape), shape)


def _within_float32(x: NDArray[np.floating], overflow: FloatOverflow) -> NDArray[np.float32]:
    if x.dtype == np.float32:
        return x
    # Only sums without limits are wider; what is beyond float32 then counts as its largest value.
    largest = float(np.finfo(np.float32).max)
    return (np.clip(x, -largest, largest) if overflow.fp32 == UNBOUNDED else x).astype(np.float32)


def _significant(values: NDArray[np.float64], bits: int) -> NDArray[np.float64]:
    """Values rounded to `bits` significant bits, ties to even, whatever their exponent."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def _dtype(name: str) -> np.dtype:
    if name == "e4m3":
        import ml_dtypes

        return np.dtype(ml_dtypes.float8_e4m3fn)
    return float_dtype(parse_format(name))
