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
each of them. `loraq_sim.emulator.walk` takes them one by one.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from loraq_sim.emulator.float_overflow import (
    FloatOverflow,
)
from loraq_sim.emulator.mac_array import ZERO_POINT_PLACES, MacArray, TwoLevelArray
from loraq_sim.emulator.scaled_gemm import (
    COMBINES,
)
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format, parse_rounding
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.split import PrecisionSplit

__all__ = [
    *(
        "P_FORMATS",
        "TRANSFORMS",
        "Datapath",
        "Step",
        "StoredLayer",
        "datapath_steps",
        "p_format_of",
    ),
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
    ``after`` it (`loraq_sim.emulator.mac_array`). ``block_rounding`` is the mode in which values
    become mantissas of block formats (``mxintN``, ``bfp16ebs8``), by default ``rounding``: AI
    Engines cut them (``floor``) unless a kernel sets another mode.
    """

    mac: MacArray | TwoLevelArray = MacArray()
    combine: str = "fp32"
    p_format: str = "branch"
    feedback_p_format: str | None = None
    out_format: str = "fp16"
    rounding: str = "conv_even"
    float_overflow: FloatOverflow = FloatOverflow()
    zero_point: str = "initial"
    block_rounding: str | None = None

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise InputError(unknown_name("combine rule", self.combine, COMBINES))
        for p_format in (self.p_format, self.feedback_p_format or self.p_format):
            if p_format not in P_FORMATS:
                raise InputError(unknown_name("format of P", p_format, P_FORMATS))
        if self.zero_point not in ZERO_POINT_PLACES:
            raise InputError(unknown_name("zero_point", self.zero_point, ZERO_POINT_PLACES))
        parse_format(self.out_format)
        for mode in (self.rounding, self.block_rounding or self.rounding):
            parse_rounding(mode)
        object.__setattr__(self, "float_overflow", FloatOverflow.of(self.float_overflow))

    def rounding_to(self, fmt: Format) -> str:
        """The mode in which values become codes of a format."""
        if self.block_rounding is not None and fmt.element.block is not None:
            return self.block_rounding
        return self.rounding


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
