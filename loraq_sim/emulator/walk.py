"""Take the steps of a data path one by one, and run a layer on it.

Whoever emulates, explains or exports a part of the data path walks the steps of
`loraq_sim.emulator.datapath` and no list of its own. Each GEMM is
`loraq_sim.emulator.scaled_gemm.scaled_gemm`, which says what of it is bit exact.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import rotate_channels, shift_of_channels
from loraq_sim.emulator.datapath import Datapath, Step, StoredLayer, datapath_steps
from loraq_sim.emulator.float_overflow import (
    UNBOUNDED,
    Clipping,
    clipping,
    rounded_tensor,
)
from loraq_sim.emulator.mac_array import combine_format
from loraq_sim.emulator.scaled_gemm import (
    FLOAT_MODEL,
    GemmStatistics,
    clamped,
    ended_gemm,
    rounded,
    scaled_gemm,
)
from loraq_sim.errors import named_options
from loraq_sim.kernels.processor import is_jit_off
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import float_dtype
from loraq_sim.split import PrecisionSplit

__all__ = ["LayerOutput", "StepResult", "run_layer", "walk_steps"]


@dataclass(frozen=True, kw_only=True, eq=False)
class StepResult:
    """A step that was taken: its inputs and weight, its result, and what was seen.

    Inputs and results are arrays, or `QuantizedTensor` behind a rounding. ``statistics`` are those
    of a GEMM; ``clipped`` lists tensors with values that left a float format in this step.
    """

    step: Step
    inputs: tuple[Any, ...]
    weight: Any
    result: Any
    statistics: GemmStatistics | None = None
    clipped: tuple[Clipping, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LayerOutput:
    """Output (M, N) as float32 values of the output format, with what each step saw.

    ``gemms`` has ``main`` and, with a branch, ``down`` (X R^T) and ``up`` (P L^T), and, with a
    residual input, ``feedback_down``, ``feedback_back`` and ``feedback_up``; ``clipped``
    lists the tensors with values beyond their float format, in the order of the data path. `y` may
    hold infinities and NaN.
    """

    y: np.ndarray
    gemms: Mapping[str, GemmStatistics]
    clipped: tuple[Clipping, ...] = ()

    def __repr__(self) -> str:
        rows, columns = self.y.shape
        seen = self.statistics
        return (
            f"LayerOutput {rows} x {columns} of {', '.join(self.gemms)}: "
            f"overflow_count={seen.overflow_count}, safe_acc_bits={seen.safe_acc_bits}, "
            f"clipped_count={self.clipped_count}"
        )

    @property
    def statistics(self) -> GemmStatistics:
        """Statistics of all GEMMs together."""
        return functools.reduce(GemmStatistics.joined, self.gemms.values())

    @property
    def clipped_count(self) -> int:
        """Values that left a float format, over all tensors."""
        return sum(found.count for found in self.clipped)


def walk_steps(
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
    bias: np.ndarray | None = None,
    *,
    merge_sums: bool = False,
) -> Iterator[StepResult]:
    """Take the steps of `datapath_steps` one by one; nothing runs beyond what is asked for.

    Parameters are those of `run_layer`. With `merge_sums` the last sums and the rounding of y are
    one step where nothing overflows, with the same bits: the last one, whose inputs are the terms.
    The last product then often becomes part of it as well: its result is None.
    """
    steps = datapath_steps(stored, split, datapath, bias=bias is not None)
    offline = {"bias": bias}
    if split.shift:
        bias = folded_bias(stored, split.shift, bias)
        added = shift_of_channels(stored.main.shape[1], split.shift, stored.smooth)
        offline = {"bias": bias, "shift": added}
    tensors: dict[str, Any] = {"X": activations}
    for index, step in enumerate(steps):
        weight = None
        if step.weight is not None:
            weight = (
                offline[step.weight] if step.weight in offline else getattr(stored, step.weight)
            )
            if isinstance(weight, QuantizedTensor):
                weight = (weight.T if step.is_transposed else weight).by_rows()
        if merge_sums:
            merged = _merged(steps[index:], tensors, weight, bias, datapath)
            yield from merged
            if merged:
                return
        inputs = tuple(tensors[name] for name in step.inputs)
        done = _OPERATIONS[step.operation](step, inputs, weight, datapath)
        tensors[step.result] = done.result
        # A large layer's activations are kept only while a step still reads them.
        wanted = {name for later in steps[index + 1 :] for name in later.inputs}
        tensors = {name: tensor for name, tensor in tensors.items() if name in wanted}
        yield done


@named_options
def run_layer(
    activations: np.ndarray,
    stored: StoredLayer,
    split: PrecisionSplit,
    datapath: Datapath,
    *,
    bias: np.ndarray | None = None,
    on_step: Callable[[StepResult], None] | None = None,
) -> LayerOutput:
    """Run one solved layer on an accelerator's data path.

    Parameters
    ----------
    activations : ndarray of shape (M, K), float32
        Full-precision input rows; rounded here, per token and group, with absmax scales. Values
        that are not finite run on as infinities and NaN.
    stored : StoredLayer
        A solution; its ``smooth`` factors divide the activations first, its ``rotation`` then mixes
        their channels (in float32).
    split : PrecisionSplit
        Names the activation formats of the two branches.
    datapath : Datapath
    bias : ndarray of shape (N,), float32, optional
        Added in float32 after the branches are combined.
    on_step : callable, optional
        Sees every step that was taken; the last sums and rounding as one where nothing overflows,
        mostly without the result of the last product, which is then never whole.
    """
    gemms: dict[str, GemmStatistics] = {}
    clipped: list[Clipping] = []
    for done in walk_steps(activations, stored, split, datapath, bias, merge_sums=True):
        if done.statistics is not None:
            gemms[done.step.name] = done.statistics
        clipped += done.clipped
        if on_step is not None:
            on_step(done)
    return LayerOutput(y=done.result.dequantize(), gemms=gemms, clipped=tuple(clipped))


def folded_bias(
    stored: StoredLayer, shift: float, bias: np.ndarray | None = None
) -> NDArray[np.float32]:
    """bias - shift Q^T, (N,) float32: what takes back the shift of activations."""
    added = shift_of_channels(stored.main.shape[1], shift, stored.smooth).astype(np.float64)
    total = -(stored.main.by_rows().dequantize().astype(np.float64) @ added)
    return (total if bias is None else bias.astype(np.float64) + total).astype(np.float32)


_TRANSFORMED: dict[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "smooth": operator.truediv, "rotate": rotate_channels, "shift": operator.add,
}  # fmt: skip


def _transform(step: Step, inputs: tuple, weight: Any, datapath: Datapath) -> StepResult:
    (x,) = inputs
    # Only factors far from 1, or values near the end of float32, overflow here.
    with np.errstate(over="ignore", invalid="ignore"):
        result = _TRANSFORMED[step.operation](x, weight)
    rule = datapath.float_overflow.fp32
    result, records = _summed(step, result, (x,), "fp32", rule)
    return StepResult(step=step, inputs=inputs, weight=weight, result=result, clipped=records)


def _rounding(step: Step, inputs: tuple, weight: Any, datapath: Datapath) -> StepResult:
    if step.format is None:
        raise TypeError(f"step {step.name!r} names no format to round to")
    rounding, rules = datapath.rounding_to(step.format), datapath.float_overflow
    result, records = rounded_tensor(
        step.result, inputs[0], step.format, rounding, rules, step.rule
    )
    return StepResult(step=step, inputs=inputs, weight=weight, result=result, clipped=records)


def _gemm(step: Step, inputs: tuple, weight: Any, datapath: Datapath) -> StepResult:
    (x,) = inputs
    rule = datapath.float_overflow.rule(datapath.combine)
    y, seen = scaled_gemm(
        x,
        weight,
        datapath.mac,
        datapath.combine,
        saturate=rule == "saturate",
        zero_point=datapath.zero_point,
    )
    records: tuple[Clipping, ...] = ()
    if seen.clipped_count:
        # Shifts are exact until their sum becomes a float32, as sums of 16-bit floats are.
        is_fp32 = seen.arithmetic == FLOAT_MODEL
        fmt = "fp32" if is_fp32 else combine_format(datapath.combine)
        found = Clipping(
            tensor=f"the sums {step.result}",
            format=fmt,
            rule=rule,
            count=seen.clipped_count,
            size=y.size,
            first_row=seen.first_clipped_row or 0,
        )
        records = (found,)
        if rule == UNBOUNDED:
            exact = _exact(x) @ _exact(weight).T
            y = np.where(np.isfinite(y), y.astype(np.float64), exact)
    return StepResult(
        step=step, inputs=inputs, weight=weight, result=y, statistics=seen, clipped=records
    )


def _add(step: Step, inputs: tuple, weight: Any, datapath: Datapath) -> StepResult:
    terms = inputs if weight is None else (*inputs, weight)
    # The bias is added in float32, whatever partial sums are combined in, and X has no others.
    is_sum = weight is None and step.operation == "add"
    combine = combine_format(datapath.combine) if is_sum else "fp32"
    if step.operation == "subtract":
        terms = (terms[0], -terms[1])
    rule = datapath.float_overflow.rule(combine)
    with np.errstate(over="ignore", invalid="ignore"):
        total = terms[0] + terms[1]
    is_wide = total.dtype == np.float64
    total, records = _summed(
        step, total if is_wide else rounded(total, combine), terms, combine, rule
    )
    return StepResult(step=step, inputs=inputs, weight=weight, result=total, clipped=records)


def _merged(
    steps: tuple[Step, ...],
    tensors: Mapping[str, Any],
    weight: Any,
    bias: np.ndarray | None,
    datapath: Datapath,
) -> tuple[StepResult, ...]:
    """The last of `steps`, sums and a rounding to 16 bits, in one pass; none where it takes more.

    A product before them, with `weight`, is part of that pass where it can be. None also where a
    value overflows: then each step counts its own.
    """
    *sums, last = steps
    fmt = last.format
    product = sums.pop(0) if sums and sums[0].operation == "gemm" else None
    if fmt is None or fmt.element.name not in ("bf16", "fp16") or not (sums or product):
        return ()
    if any(step.operation != "add" for step in sums):
        return ()
    others = [step for step in sums if step.weight is None]
    is_fp32 = combine_format(datapath.combine) == "fp32"
    if len(others) > 1 or (others and not is_fp32) or is_jit_off():
        return ()
    made = None if product is None else product.result
    terms = [tensors[name] for step in sums[:1] for name in step.inputs if name != made]
    if bias is not None and len(sums) > len(others):
        terms.append(bias)
    if any(term.size == 0 or term.dtype != np.float32 for term in terms):
        return ()
    terms = [np.ascontiguousarray(term) for term in terms]
    matrices = [term for term in terms if term.ndim == 2]
    added = next((term for term in terms if term.ndim == 1), None)
    ended: tuple[StepResult, ...] = ()
    if product is not None:
        inputs = tuple(tensors[name] for name in product.inputs)
        found = ended_gemm(
            inputs[0],
            weight,
            datapath.mac,
            datapath.combine,
            datapath.zero_point,
            fmt.element.name,
            other=matrices[0] if matrices else None,
            bias=added,
        )
        if found is None:
            return ()
        codes, seen = found
        ended = (
            StepResult(step=product, inputs=inputs, weight=weight, result=None, statistics=seen),
        )
    else:
        from loraq_sim.kernels import float_passes

        round_sums = getattr(float_passes, f"sum_to_{fmt.element.name}")
        y, *rest = matrices
        codes = np.empty(y.shape, np.uint16)
        z = rest[0] if rest else np.zeros((len(y), 0), np.float32)
        none = np.zeros(0, np.float32)
        if not round_sums(y, z, none if added is None else added, codes):
            return ()
    result = QuantizedTensor(codes=codes.view(float_dtype(fmt)), scales=None, format=fmt)
    return *ended, StepResult(step=last, inputs=tuple(terms), weight=None, result=result)


def _summed(
    step: Step, total: np.ndarray, terms: tuple, fmt: str, rule: str
) -> tuple[np.ndarray, tuple[Clipping, ...]]:
    """`total` of finite terms with what left its format as the rule has it, and the record."""
    infinite = ~np.isfinite(total)
    if not infinite.any():
        return total, ()
    clipped = infinite & functools.reduce(np.logical_and, map(np.isfinite, terms))
    if rule == "saturate":
        total, _ = clamped(total, fmt)
    elif rule == UNBOUNDED and len(terms) == 2:
        total = np.where(clipped, terms[0].astype(np.float64) + terms[1], total)
    tensor = "X" if step.operation in _TRANSFORMED else f"the sums {step.result}"
    return total, clipping(tensor, fmt, rule, clipped)


def _exact(stored: QuantizedTensor) -> np.ndarray:
    return stored.dequantize().astype(np.float64)


_OPERATIONS = {
    **dict.fromkeys(_TRANSFORMED, _transform),
    "round": _rounding,
    "gemm": _gemm,
    "add": _add,
    "subtract": _add,
}
