"""The data path of a layer in float64, in which every source of error has a switch.

It walks the steps of `loraq_sim.emulator.datapath`. Roundings of operands are switched by taking
the operand before or after its rounding. What an accumulator or a sum did wrong is measured in the
emulated run, as the difference from the exact sum of the same operands, and added where its switch
is on. Values beyond a float format have a switch of their own: a second emulated run, in formats
whose exponents have no limits, tells them from rounding. With all switches on the output is that
of `run_layer`, with all off that of the full-precision layer.

The rounding of the branch is switched off by the float branch that the stored one stands for. Let Q
be the stored main weight, L R the stored branch and W the weight, smoothed and rotated as the
solution is. Two steps of least squares take the rounding out of the branch: L' fits W - Q with the
stored R, then R' fits it with L'. With B = L' R' the error of the weight is the sum of two parts,

    Q + L R - W = (Q + B - W) + (L R - B):

what the branch before its rounding does not take up of the main weight's rounding, and what
rounding the factors adds. (The best fit of all, a truncated SVD, would say less: where singular
values are nearly equal it is far from the stored branch and hardly better.)

A residual input (`loraq_sim.solvers.residual`) has one switch for how D is formed: on, D and P_f
are those of the emulated run; off, P_f = X V^T and D = X - P_f V of exact numbers, whose rounding
for the branches is then done anew.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import shift_of_channels
from loraq_sim.emulator.datapath import TRANSFORMS, Datapath, Step, datapath_steps
from loraq_sim.emulator.float_overflow import Clipping, FloatOverflow, rounded_tensor
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.scaled_gemm import scaled_gemm
from loraq_sim.emulator.walk import walk_steps
from loraq_sim.layers import Layer
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers import Solution
from loraq_sim.split import PrecisionSplit

__all__ = [
    "BRANCH_SOURCES",
    "FEEDBACK_SOURCES",
    "OVERFLOW",
    "SOURCES",
    "SwitchableLayer",
    "float_branch",
    "leaving_rows",
    "stored_weight",
]

OVERFLOW = "float_overflow"

SOURCES = {
    "main_weight": "rounding of the main weight, less what the branch takes up of it",
    "branch_weight": "rounding of the factors L and R",
    "main_activation": "rounding of the activations that enter the main branch",
    "branch_activation": "rounding of the activations that enter the low-rank branch",
    "p_rounding": "rounding of P between the two factors of the branch",
    "feedback": "forming the residual input of rounded numbers: X, P_f, and the sums of both",
    "feedback_weight": "rounding of L_f, what the directions of the residual input contribute",
    "accumulator": "overflow of accumulators: wrapped or saturated sums, in all GEMMs",
    "combine": "rounding of sums outside the accumulators: group partials, branches, bias",
    "output_rounding": "rounding of the output to its format",
    OVERFLOW: "values beyond the range of a float format (P, output, scales, sums): infinite or "
    "clamped",
}
"""In the order of the data path."""

BRANCH_SOURCES = ("branch_weight", "branch_activation", "p_rounding")
FEEDBACK_SOURCES = ("feedback", "feedback_weight")

_WIDE = MacArray(acc_bits=64)
_ROUNDED_OPERANDS = {"main": "main_activation", "down": "branch_activation"}
_STORED_OPERANDS = {
    **{"main": "main_weight", "down": "branch_weight", "up": "branch_weight"},
    "feedback_up": "feedback_weight",
}
# The steps from X to D.
_FORMING = ("round_feedback", "feedback_down", "round_feedback_p", "feedback_back", "deflate")
_ROUNDINGS = {"round_p": "p_rounding", "output": "output_rounding"}


@dataclass(frozen=True, kw_only=True, eq=False)
class FloatBranch:
    """``left`` (N, r) and ``right`` (r, K), float64, with left @ right = B."""

    left: NDArray[np.float64]
    right: NDArray[np.float64]

    def product(self) -> NDArray[np.float64]:
        """B, (N, K)."""
        return self.left @ self.right


def stored_weight(layer: Layer, solution: Solution) -> NDArray[np.float64]:
    """The weight the branches approximate, smoothed and rotated, (N, K) float64."""
    weight = layer.weight.astype(np.float64)
    smooth = solution.smooth
    return _rotated(weight if smooth is None else weight * smooth.astype(np.float64), solution)


def _entering_rows(x: NDArray[np.float32], solution: Solution) -> NDArray[np.float64]:
    """Activations (M, K) as the branches take them, without any rounding."""
    exact, smooth = x.astype(np.float64), solution.smooth
    return _rotated(exact if smooth is None else exact / smooth.astype(np.float64), solution)


def leaving_rows(rows: NDArray[np.float64], solution: Solution) -> NDArray[np.float64]:
    """Rows (N, K) beside the stored weight, with rotation and smoothing undone."""
    undone = _rotated(rows, solution)
    return undone if solution.smooth is None else undone / solution.smooth.astype(np.float64)


def _rotated(rows: NDArray[np.float64], solution: Solution) -> NDArray[np.float64]:
    """`rows` times the solution's block Hadamard matrix, which is its own inverse."""
    block = solution.rotation
    if block is None:
        return rows
    from scipy.linalg import hadamard

    matrix = hadamard(block).astype(np.float64) / np.sqrt(block)
    return (rows.reshape(len(rows), -1, block) @ matrix).reshape(rows.shape)


def float_branch(layer: Layer, solution: Solution) -> FloatBranch | None:
    """The float branch beside the solution's main weight; None without a branch."""
    if solution.right is None:
        return None
    residual = stored_weight(layer, solution) - solution.main.dequantize()
    stored = solution.right.dequantize().astype(np.float64)
    left = residual @ np.linalg.pinv(stored)
    return FloatBranch(left=left, right=np.linalg.pinv(left) @ residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Walk:
    """What one emulated run gave: rounded operands, and differences from exact sums by step.

    ``formed`` has P_f and D of a residual input.
    """

    path: Datapath
    operands: dict[str, NDArray[np.float64]]
    formed: dict[str, NDArray[np.float64]]
    accumulator: dict[str, NDArray[np.float64]]
    sums: dict[str, NDArray[np.float64]]
    overflows: int
    clipped: tuple[Clipping, ...]


class SwitchableLayer:
    """One solved layer on its own activations.

    Parameters
    ----------
    layer : Layer
    solution : Solution
    split : PrecisionSplit
    datapath : Datapath
    x : ndarray of shape (M, K), float32
        Activation rows.

    Attributes
    ----------
    sources : tuple of str
        Switches this layer has, of `loraq_sim.explain.switchable.SOURCES`.
    overflows : int
        Accumulator overflows of the emulated run.
    clipped : tuple of Clipping
        Tensors of the emulated run with values beyond their float format.
    """

    def __init__(
        self,
        layer: Layer,
        solution: Solution,
        split: PrecisionSplit,
        datapath: Datapath,
        x: NDArray[np.float32],
    ) -> None:
        missing: tuple[str, ...] = () if solution.left is not None else BRANCH_SOURCES
        missing += () if solution.feedback is not None else FEEDBACK_SOURCES
        self.sources = tuple(s for s in SOURCES if s not in missing)
        self._steps = datapath_steps(solution, split, datapath, bias=layer.bias is not None)
        self._bias = None if layer.bias is None else layer.bias.astype(np.float64)
        self._exact_x = _entering_rows(x, solution)
        self._weights = _operand_weights(layer, solution)
        self._exact_p = self._exact_d = self._exact_x
        if solution.feedback is not None:
            directions = _values(solution.feedback)
            self._exact_p = self._exact_x @ directions.T
            self._exact_d = self._exact_x - self._exact_p @ directions
        emulated = _walk(x, solution, split, datapath, layer.bias)
        self.overflows, self.clipped = emulated.overflows, emulated.clipped
        # By whether values may leave their formats; without any the two runs are one.
        self._walks = {True: emulated, False: emulated}
        if emulated.clipped:
            free = replace(datapath, float_overflow=FloatOverflow.unbounded())
            self._walks[False] = _walk(x, solution, split, free, layer.bias)
        self._gemm = lru_cache(maxsize=8)(self._exact_gemm)

    def output(self, on: Collection[str]) -> NDArray[np.float64]:
        """Output (M, N) with the errors of `on` and no others; may hold infinities and NaN."""
        tensors: dict[str, Any] = {"X": self._exact_x}
        with np.errstate(over="ignore", invalid="ignore"):
            for step in self._steps:
                tensors[step.result] = self._taken(step, tensors, on)
        return tensors["y"]

    def _taken(self, step: Step, tensors: dict[str, Any], on: Collection[str]) -> Any:
        if step.operation in (*TRANSFORMS, "shift"):
            # All at once, in float64; their rounding belongs to that of the activations.
            return self._exact_x
        if step.name in _FORMING:
            formed = self._walks[OVERFLOW in on].formed if "feedback" in on else {}
            exact = {"P_f": self._exact_p, "D": self._exact_d}
            return formed.get(step.result, exact.get(step.result))
        if step.format is not None:
            if step.name in _ROUNDINGS:
                return self._rounded(step, tensors[step.inputs[0]], on)
            # Activations: which of its operand's values a GEMM reads is that GEMM's switch.
            return step
        if step.operation == "gemm":
            return self._multiplied(step, tensors[step.inputs[0]], on) + self._errors(step, on)
        total = sum(tensors[name] for name in step.inputs)
        if step.weight == "bias" and self._bias is not None:
            total = total + self._bias
        return total + self._errors(step, on)

    def _multiplied(self, step: Step, operand: Any, on: Collection[str]) -> NDArray[np.float64]:
        is_stored = _STORED_OPERANDS[step.name] in on
        if not isinstance(operand, Step):
            return operand @ self._weights[step.name, is_stored].T
        is_rounded = _ROUNDED_OPERANDS[step.name] in on
        is_exact_d = operand.inputs[0] == "D" and "feedback" not in on
        return self._gemm(step.name, operand, is_rounded, is_stored, OVERFLOW in on, is_exact_d)

    def _exact_gemm(
        self,
        name: str,
        operand: Step,
        is_rounded: bool,
        is_stored: bool,
        overflows: bool,
        is_exact_d: bool,
    ) -> NDArray[np.float64]:
        walk, free = self._walks[overflows], self._walks[False]
        if is_exact_d:
            x = (
                self._rounded_anew(operand, self._exact_d, walk.path)
                if is_rounded
                else (self._exact_d)
            )
        elif is_rounded:
            x = walk.operands[operand.result]
        else:
            x = walk.formed["D"] if operand.inputs[0] == "D" else self._exact_x
            if overflows:
                x = _clipped_as(x, walk.operands[operand.result], free.operands[operand.result])
        return x @ self._weights[name, is_stored].T

    def _rounded_anew(
        self, step: Step, values: NDArray[np.float64], path: Datapath
    ) -> NDArray[np.float64]:
        narrow, rule = _float32_where_it_fits(values), path.float_overflow
        if step.format is None:
            raise TypeError(f"step {step.name!r} names no format to round to")
        options = (step.format, path.rounding_to(step.format), rule, step.rule)
        return _values(rounded_tensor(step.result, narrow, *options)[0])

    def _errors(self, step: Step, on: Collection[str]) -> NDArray[np.float64] | float:
        """What accumulators and sums of this step did wrong, as far as it is switched on."""
        walk, free = self._walks[OVERFLOW in on], self._walks[False]
        error: NDArray[np.float64] | float = 0.0
        if "accumulator" in on:
            error = walk.accumulator.get(step.name, 0.0)
        if "combine" in on:
            error = error + free.sums[step.name]
        if walk is not free:
            error = error + (walk.sums[step.name] - free.sums[step.name])
        return error

    def _rounded(
        self, step: Step, values: NDArray[np.float64], on: Collection[str]
    ) -> NDArray[np.float64]:
        is_on, overflows = _ROUNDINGS[step.name] in on, OVERFLOW in on
        if not is_on and not (overflows and self.clipped):
            return values
        taken = self._rounded_anew(step, values, self._walks[overflows].path)
        if is_on:
            return taken
        free = self._rounded_anew(step, values, self._walks[False].path)
        return _clipped_as(values, taken, free)


def _walk(
    x: NDArray[np.float32],
    solution: Solution,
    split: PrecisionSplit,
    path: Datapath,
    bias: NDArray[np.float32] | None,
) -> _Walk:
    """Walk the emulated data path and compare every sum with the exact one of its operands."""
    operands: dict[str, NDArray[np.float64]] = {}
    formed: dict[str, NDArray[np.float64]] = {}
    accumulator: dict[str, NDArray[np.float64]] = {}
    sums: dict[str, NDArray[np.float64]] = {}
    overflows = 0
    clipped: list[Clipping] = []
    for done in walk_steps(x, solution, split, path, bias):
        name = done.step.name
        clipped += done.clipped
        if name == "round_feedback_p":
            formed["P_f"] = _values(done.result)
        elif name == "deflate":
            formed["D"] = done.result.astype(np.float64)
        elif done.step.operation == "round" and name not in _ROUNDINGS:
            values = _values(done.result)
            # The bias takes the shift back; here both are left out.
            if name == "round_main" and split.shift:
                values = values - shift_of_channels(x.shape[1], split.shift, solution.smooth)
            operands[done.step.result] = values
        elif done.statistics is not None:
            overflows += done.statistics.overflow_count
            safe = done.result
            if done.statistics.overflow_count:
                # Without an overflow the accumulators hold the exact sums.
                safe, _ = scaled_gemm(
                    done.inputs[0], done.weight, _WIDE, path.combine,
                    saturate=path.float_overflow.rule(path.combine) == "saturate",
                )  # fmt: skip
                accumulator[name] = _difference(done.result, safe.astype(np.float64))
            with np.errstate(over="ignore", invalid="ignore"):
                exact = _values(done.inputs[0]) @ _values(done.weight).T
            sums[name] = _difference(safe, exact)
        elif done.step.operation == "add":
            terms = done.inputs if done.weight is None else (*done.inputs, done.weight)
            with np.errstate(over="ignore", invalid="ignore"):
                total = terms[0].astype(np.float64) + terms[1]
            sums[name] = _difference(done.result, total)
    return _Walk(
        path=path, operands=operands, formed=formed, accumulator=accumulator, sums=sums,
        overflows=overflows, clipped=tuple(clipped),
    )  # fmt: skip


def _operand_weights(
    layer: Layer, solution: Solution
) -> dict[tuple[str, bool], NDArray[np.float64]]:
    """What each GEMM multiplies with, by its name and whether the weight is taken as stored."""
    weight, branch = stored_weight(layer, solution), float_branch(layer, solution)
    weights = {("main", True): _values(solution.main), ("main", False): weight}
    left, right = solution.left, solution.right
    if branch is not None and left is not None and right is not None:
        weights["main", False] = weight - branch.product()
        weights |= {("down", True): _values(right), ("down", False): branch.right}
        weights |= {("up", True): _values(left), ("up", False): branch.left}
    if solution.feedback is not None and solution.feedback_left is not None:
        outputs = weight @ _values(solution.feedback).T
        weights["feedback_up", True] = _values(solution.feedback_left)
        weights["feedback_up", False] = outputs
    return weights


def _difference(result: NDArray[Any], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """`result` less `exact`; 0 where `exact` is not finite, as its operands tell already."""
    with np.errstate(invalid="ignore"):
        return np.where(np.isfinite(exact), result.astype(np.float64) - exact, 0.0)


def _clipped_as(
    values: NDArray[np.float64], clipped: NDArray[np.float64], free: NDArray[np.float64]
) -> NDArray[np.float64]:
    """`values` with what leaving a format changed elsewhere: clamped, infinite or NaN values."""
    with np.errstate(invalid="ignore"):
        return np.where(clipped == free, values, values + (clipped - free))


def _float32_where_it_fits(values: NDArray[np.float64]) -> NDArray[np.floating]:
    narrow = values.astype(np.float32)
    beyond = np.isinf(narrow) & np.isfinite(values)
    return np.where(beyond, values, narrow.astype(np.float64)) if beyond.any() else narrow


def _values(stored: QuantizedTensor) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return stored.dequantize().astype(np.float64)
