"""The data path of one layer on an accelerator: the steps from X to the output, and their one walk.

    smooth, rotate           X'  = X / s, then a block Hadamard matrix, in float32
    shift                    where the split shifts what the main branch rounds: X' + shift
    round_main               X_a = round(X')
    main                     Y   = X_a Q^T       one MAC-array pass per scale group, then combined
    round_branch             X_b = round(X')     where its format differs from that of X_a
    down, round_p, up        P = X_b R^T, P^ = round(P), Z = P^ L^T
    combine, bias, output    y = round(Y + Z + bias)

With a residual input (`loraq_sim.solvers.residual`) the branch deflates X' first, in float32, and
all that is above reads D in place of X':

    round_feedback           X_f = round(X')
    feedback_down            P_f = X_f V^T, rounded to P^_f (round_feedback_p)
    feedback_back, deflate   D   = X' - P^_f V      V is stored once, in blocks that serve both
    feedback_up              Z_f = P^_f L_f^T, added before the bias (feedback_combine)

What a shift adds, the bias takes back, offline: bias - shift Q^T.

`datapath_steps` says which steps a layer takes; it needs no arrays, so that a cost model can charge
each of them. `walk_steps` takes them one by one. Whoever emulates, explains or exports a part of
the data path walks these steps and no list of its own. Each GEMM is
`loraq_sim.emulator.scaled_gemm.scaled_gemm`, which says what of it is bit exact.
"""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import rotate_channels, shift_of_channels
from loraq_sim.emulator.float_overflow import (
    UNBOUNDED,
    Clipping,
    FloatOverflow,
    clipping,
    rounded_tensor,
)
from loraq_sim.emulator.mac_array import MacArray, TwoLevelArray
from loraq_sim.emulator.scaled_gemm import (
    COMBINES,
    FLOAT_MODEL,
    GemmStatistics,
    clamped,
    rounded,
    scaled_gemm,
)
from loraq_sim.emulator.tensor_cores import combine_format
from loraq_sim.emulator.zero_points import ZERO_POINT_PLACES
from loraq_sim.errors import InputError, named_options, unknown_name
from loraq_sim.formats import Format, parse_format, parse_rounding
from loraq_sim.kernels.processor import is_jit_off
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import float_dtype
from loraq_sim.split import PrecisionSplit

__all__ = [
    *("P_FORMATS", "TRANSFORMS", "Datapath", "LayerOutput", "Step", "StepResult", "StoredLayer"),
    *("datapath_steps", "p_format_of", "run_layer", "walk_steps"),
]


P_FORMATS = ("branch", "fp16", "bf16", *(f"int{bits}" for bits in range(2, 9)))

TRANSFORMS = ("smooth", "rotate")
"""Operations that change all activations before they are rounded."""


class StoredLayer(Protocol):
    """What a data path reads of a solved layer (see `loraq_sim.solvers.Solution`).

    It may also have a ``rotation``, the block size of a Hadamard matrix, and the ``feedback`` (r_f,
    K) and ``feedback_left`` (N, r_f) of a residual input. `datapath_steps` asks of each part only
    whether it is None, so shapes without values will do there.
    """

    @property
    def main(self) -> QuantizedTensor: ...

    @property
    def left(self) -> QuantizedTensor | None: ...

    @property
    def right(self) -> QuantizedTensor | None: ...

    @property
    def smooth(self) -> np.ndarray | None: ...


@dataclass(frozen=True, kw_only=True)
class Datapath:
    """Accumulator, combine rule and intermediate formats of an accelerator.

    ``p_format`` is ``"branch"`` (P is rounded to the branch's activation format), ``fp16``,
    ``bf16`` or an integer such as ``int8``, in the groups of the split; ``feedback_p_format`` is
    that of P_f of a residual input, by default that of P; ``out_format`` is the format y is written
    in, such as ``"bf16"``; ``rounding`` is the mode in which activations and P
    become integer codes; ``float_overflow``, a `FloatOverflow` or a mapping such as
    ``{"fp16": "saturate"}``, says what becomes of values beyond a float format; ``zero_point`` says
    whether the correction of zero points is the accumulator's ``initial`` value or is added
    ``after`` it (`loraq_sim.emulator.zero_points`).
    """

    mac: MacArray | TwoLevelArray = MacArray()
    combine: str = "fp32"
    p_format: str = "branch"
    feedback_p_format: str | None = None
    out_format: str = "fp16"
    rounding: str = "conv_even"
    float_overflow: FloatOverflow = FloatOverflow()
    zero_point: str = "initial"

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise InputError(unknown_name("combine rule", self.combine, COMBINES))
        for p_format in (self.p_format, self.feedback_p_format or self.p_format):
            if p_format not in P_FORMATS:
                raise InputError(unknown_name("format of P", p_format, P_FORMATS))
        if self.zero_point not in ZERO_POINT_PLACES:
            raise InputError(unknown_name("zero_point", self.zero_point, ZERO_POINT_PLACES))
        parse_format(self.out_format)
        parse_rounding(self.rounding)
        object.__setattr__(self, "float_overflow", FloatOverflow.of(self.float_overflow))


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: what it is called, what it does, the tensors it reads and the one it makes.

    ``operation`` is ``smooth``, ``rotate``, ``shift``, ``round`` (to ``format``, by the scale rule
    ``rule``), ``gemm``, ``add`` or ``subtract``; ``weight`` names the part of the stored layer it
    takes, if any, and ``is_transposed`` says that it takes the part's transpose.
    """

    name: str
    operation: str
    inputs: tuple[str, ...]
    result: str
    weight: str | None = None
    is_transposed: bool = False
    format: Format | None = None
    rule: str | None = None


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


@dataclass(frozen=True, kw_only=True, eq=False)
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

    @property
    def statistics(self) -> GemmStatistics:
        """Statistics of all GEMMs together."""
        return functools.reduce(GemmStatistics.joined, self.gemms.values())

    @property
    def clipped_count(self) -> int:
        """Values that left a float format, over all tensors."""
        return sum(found.count for found in self.clipped)


def datapath_steps(
    stored: StoredLayer, split: PrecisionSplit, datapath: Datapath, *, bias: bool = False
) -> tuple[Step, ...]:
    """The steps of a layer in the order they run; the last one makes ``y``.

    Parameters
    ----------
    stored : StoredLayer
        Its ``smooth``, ``rotation``, ``left`` and ``feedback`` count where they are not None.
    split : PrecisionSplit
        Names the activation formats of the two branches.
    datapath : Datapath
    bias : bool
        Whether the layer has one.
    """
    steps, x = [], "X"
    for name in TRANSFORMS:
        part = {"smooth": "smooth", "rotate": "rotation"}[name]
        if getattr(stored, part, None) is not None:
            steps.append(
                Step(name=name, operation=name, inputs=(x,), result=f"X {name}", weight=part)
            )
            x = f"X {name}"
    has_feedback = getattr(stored, "feedback", None) is not None
    if has_feedback:
        steps += _deflation(x, split, datapath)
        x = "D"
    letter, shifted = x[0], x
    x_main, x_branch, y = f"{letter}_a", f"{letter}_a", "Y"
    if split.shift:
        steps.append(_shift(x, stored, split.shift))
        shifted = steps[-1].result
    steps += [
        _round("round_main", shifted, x_main, split.main_activation, _rule(split, "main")),
        _gemm_step("main", x_main, "main", y),
    ]
    if stored.left is not None:
        rule = _rule(split, "branch")
        same = split.branch_activation, rule, 0.0
        if same != (split.main_activation, _rule(split, "main"), split.shift):
            x_branch = f"{letter}_b"
            steps.append(_round("round_branch", x, x_branch, _branch_activation(split), rule))
        p = f"{letter}_b R^T"
        p_rule = rule if datapath.p_format == "branch" else None
        steps += [
            _gemm_step("down", x_branch, "right", p),
            _round("round_p", p, "P", p_format_of(split, datapath), p_rule),
            _gemm_step("up", "P", "left", "P L^T"),
            Step(name="combine", operation="add", inputs=(y, "P L^T"), result=f"{y} + P L^T"),
        ]
        y += " + P L^T"
    if has_feedback:
        summed = f"{y} + P_f L_f^T"
        steps += [
            _gemm_step("feedback_up", "P_f", "feedback_left", "P_f L_f^T"),
            Step(name="feedback_combine", operation="add", inputs=(y, "P_f L_f^T"), result=summed),
        ]
        y = summed
    if bias or split.shift:
        summed = f"{y} + bias"
        steps.append(Step(name="bias", operation="add", inputs=(y,), result=summed, weight="bias"))
        y = summed
    return (*steps, _round("output", y, "y", parse_format(datapath.out_format)))


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
    """
    steps = datapath_steps(stored, split, datapath, bias=bias is not None)
    offline = {"bias": bias}
    if split.shift:
        offline |= {"bias": folded_bias(stored, split.shift, bias)}
        offline |= {"shift": shift_of_channels(stored.main.shape[1], split.shift, stored.smooth)}
    tensors: dict[str, Any] = {"X": activations}
    for index, step in enumerate(steps):
        if merge_sums and (merged := _merged(steps[index:], tensors, bias, datapath)) is not None:
            yield merged
            return
        inputs = tuple(tensors[name] for name in step.inputs)
        weight = None
        if step.weight is not None:
            weight = (
                offline[step.weight] if step.weight in offline else getattr(stored, step.weight)
            )
            if isinstance(weight, QuantizedTensor):
                weight = (weight.T if step.is_transposed else weight).by_rows()
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
        Sees every step that was taken; the last sums and rounding as one where nothing overflows.
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


def p_format_of(split: PrecisionSplit, datapath: Datapath, *, is_feedback: bool = False) -> Format:
    """The format P is rounded to between the two factors, or P_f of a residual input."""
    name = datapath.p_format
    if is_feedback and datapath.feedback_p_format is not None:
        name = datapath.feedback_p_format
    if name == "branch":
        return _branch_activation(split)
    if name.startswith("int"):
        return parse_format(f"{name}/g{split.group}")
    return parse_format(name)


def folded_bias(
    stored: StoredLayer, shift: float, bias: np.ndarray | None = None
) -> NDArray[np.float32]:
    """bias - shift Q^T, (N,) float32: what takes back the shift of activations."""
    added = shift_of_channels(stored.main.shape[1], shift, stored.smooth).astype(np.float64)
    total = -(stored.main.by_rows().dequantize().astype(np.float64) @ added)
    return (total if bias is None else bias.astype(np.float64) + total).astype(np.float32)


def _shift(x: str, stored: StoredLayer, shift: float) -> Step:
    """What the main branch rounds is shifted; the branch reads X as it is."""
    if any(getattr(stored, part, None) is not None for part in ("rotation", "feedback")):
        raise InputError(
            "a shift of what GELU left serves nothing where activations are rotated or deflated: "
            "they lie on both sides of zero; use A4s or A4u, or leave that out"
        )
    return Step(name="shift", operation="shift", inputs=(x,), result=f"{x} shift", weight="shift")


def _rule(split: PrecisionSplit, part: str) -> str | None:
    """Scale rule of a part's activations, None for the default."""
    rule = split.main_rule if part == "main" else split.branch_rule
    return None if rule == "absmax" else rule


def _deflation(x: str, split: PrecisionSplit, datapath: Datapath) -> list[Step]:
    """From X to D, what the branch's loud directions leave of it."""
    p_format = p_format_of(split, datapath, is_feedback=True)
    is_branch = (datapath.feedback_p_format or datapath.p_format) == "branch"
    p_rule = _rule(split, "branch") if is_branch else None
    return [
        _round("round_feedback", x, "X_f", _branch_activation(split), _rule(split, "branch")),
        _gemm_step("feedback_down", "X_f", "feedback", "X_f V^T"),
        _round("round_feedback_p", "X_f V^T", "P_f", p_format, p_rule),
        Step(
            name="feedback_back", operation="gemm", inputs=("P_f",), result="P_f V",
            weight="feedback", is_transposed=True,
        ),
        Step(name="deflate", operation="subtract", inputs=(x, "P_f V"), result="D"),
    ]  # fmt: skip


def _branch_activation(split: PrecisionSplit) -> Format:
    if split.branch_activation is None:
        raise InputError(
            f"split {split} has no low-rank branch, but the layer has factors; use a split such as "
            "W4A4+W8A8r8"
        )
    return split.branch_activation


def _gemm_step(name: str, x: str, weight: str, result: str) -> Step:
    return Step(name=name, operation="gemm", inputs=(x,), result=result, weight=weight)


def _round(name: str, x: str, result: str, fmt: Format, rule: str | None = None) -> Step:
    return Step(name=name, operation="round", inputs=(x,), result=result, format=fmt, rule=rule)


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
    rules = datapath.float_overflow
    result, records = rounded_tensor(
        step.result, inputs[0], step.format, datapath.rounding, rules, step.rule
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


# The formats of `loraq_sim.kernels.float_sums.round_sums`, by its names for them.
_SIXTEEN_BITS = {"bf16": 0, "fp16": 1}


def _merged(
    steps: tuple[Step, ...], tensors: Mapping[str, Any], bias: np.ndarray | None, datapath: Datapath
) -> StepResult | None:
    """The last of `steps`, sums and a rounding to 16 bits, in one pass; None where it takes more.

    None also where a value overflows: then each step counts its own.
    """
    *sums, last = steps
    fmt = last.format
    kind = None if fmt is None else _SIXTEEN_BITS.get(fmt.element.name)
    if fmt is None or kind is None or not sums or any(step.operation != "add" for step in sums):
        return None
    others = [step for step in sums if step.weight is None]
    if len(others) > 1 or (others and datapath.combine != "fp32") or is_jit_off():
        return None
    y, *rest = (tensors[name] for name in sums[0].inputs)
    terms = [y, *rest] if bias is None or len(sums) == len(others) else [y, *rest, bias]
    if y.size == 0 or any(term.dtype != np.float32 for term in terms):
        return None
    from loraq_sim.kernels.float_sums import round_sums

    codes = np.empty(y.shape, np.uint16)
    z = rest[0] if rest else np.zeros((0, 0), np.float32)
    added = terms[-1] if terms[-1].ndim == 1 else np.zeros(0, np.float32)
    if not round_sums(*map(np.ascontiguousarray, (y, z, added)), kind, codes):
        return None
    result = QuantizedTensor(codes=codes.view(float_dtype(fmt)), scales=None, format=fmt)
    return StepResult(step=last, inputs=tuple(terms), weight=None, result=result)


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
