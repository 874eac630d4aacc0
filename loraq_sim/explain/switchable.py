"""The data path of a layer in float64, in which every source of error has a switch.

Roundings of operands are switched by taking the operand before or after its rounding. What an
accumulator or a sum did wrong is measured in the emulated run, as the difference from the exact
sum of the same operands, and added where its switch is on. With all switches on the output is that
of `run_layer`, with all off that of the full-precision layer.
"""

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.combine import rounded
from loraq_sim.emulator.datapath import Datapath, layer_input, p_format_of
from loraq_sim.emulator.input_rounding import quantize_rounded
from loraq_sim.emulator.mac_array import MacArray
from loraq_sim.emulator.scaled_gemm import scaled_gemm
from loraq_sim.explain.float_branch import entering_rows, float_branch, stored_weight
from loraq_sim.explain.sources import BRANCH_SOURCES, SOURCES
from loraq_sim.layers import Layer
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers import Solution
from loraq_sim.split import PrecisionSplit

__all__ = ["SwitchableLayer"]

_WIDE = MacArray(acc_bits=64)


class _Emulated(NamedTuple):
    """What a GEMM gave, and its two differences from the exact sum of its operands."""

    output: NDArray[np.float32]
    accumulator: NDArray[np.float64]
    combine: NDArray[np.float64]
    overflows: int


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
        Switches this layer has, of `loraq_sim.explain.sources.SOURCES`.
    overflows : int
        Overflows of the emulated run.
    """

    def __init__(
        self,
        layer: Layer,
        solution: Solution,
        split: PrecisionSplit,
        datapath: Datapath,
        x: NDArray[np.float32],
    ) -> None:
        has_branch = solution.left is not None
        self.sources = tuple(s for s in SOURCES if has_branch or s not in BRANCH_SOURCES)
        self._datapath = datapath
        self._p_format = p_format_of(split, datapath) if has_branch else None
        self._bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
        self._exact_x = entering_rows(x, solution)
        entering = layer_input(x, solution)
        mode = datapath.rounding
        x_main = quantize_rounded(entering, split.main_activation, mode)
        weight = stored_weight(layer, solution)
        self._x = {"main": _values(x_main)}
        self._branch = float_branch(layer, solution)
        self._weights = {
            ("main", True): _values(solution.main),
            ("main", False): weight - (self._branch.product() if self._branch else 0.0),
        }
        self._runs = {"main": self._emulate(x_main, solution.main)}
        y = self._runs["main"].output
        if has_branch:
            y = self._emulate_branch(solution, split, entering, x_main, y)
        if layer.bias is not None:
            y = y + layer.bias
        parts = [
            run.output.astype(np.float64) for name, run in self._runs.items() if name != "down"
        ]
        # Adding the branches and the bias rounds as well.
        self._added = y.astype(np.float64) - (sum(parts) + self._bias)
        self.overflows = sum(run.overflows for run in self._runs.values())
        self._gemm = lru_cache(maxsize=8)(self._exact_gemm)

    def output(self, on: Collection[str]) -> NDArray[np.float64]:
        """Output (M, N) with the errors of `on` and no others."""
        y = self._gemm("main", "main_activation" in on, "main_weight" in on)
        y = y + self._sum_errors("main", on)
        if self._branch is not None:
            has_stored = "branch_weight" in on
            p = self._gemm("down", "branch_activation" in on, has_stored)
            p = p + self._sum_errors("down", on)
            if "p_rounding" in on:
                p = _values(
                    quantize_rounded(p.astype(np.float32), self._p_format, self._datapath.rounding)
                )
            y = y + p @ self._weights["up", has_stored].T + self._sum_errors("up", on)
        y = y + self._bias
        if "combine" in on:
            y = y + self._added
        if "output_rounding" in on:
            y = _values(quantize(y.astype(np.float32), self._datapath.out_format))
        return y

    def _emulate_branch(
        self,
        solution: Solution,
        split: PrecisionSplit,
        entering: NDArray[np.float32],
        x_main: QuantizedTensor,
        y: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        mode = self._datapath.rounding
        x_branch = x_main
        if split.branch_activation != split.main_activation:
            x_branch = quantize_rounded(entering, split.branch_activation, mode)
        self._x["down"] = _values(x_branch)
        self._weights |= {
            ("down", True): _values(solution.right),
            ("down", False): self._branch.right,
            ("up", True): _values(solution.left),
            ("up", False): self._branch.left,
        }
        self._runs["down"] = self._emulate(x_branch, solution.right)
        p = quantize_rounded(self._runs["down"].output, self._p_format, mode)
        self._runs["up"] = self._emulate(p, solution.left)
        return rounded(y + self._runs["up"].output, self._datapath.combine)

    def _emulate(self, x: QuantizedTensor, w: QuantizedTensor) -> _Emulated:
        path = self._datapath
        output, seen = scaled_gemm(x, w, path.mac, path.combine)
        # Without an overflow the accumulators hold the exact sums.
        safe = scaled_gemm(x, w, _WIDE, path.combine)[0] if seen.overflow_count else output
        exact = _values(x) @ _values(w).T
        return _Emulated(
            output=output,
            accumulator=output.astype(np.float64) - safe,
            combine=safe - exact,
            overflows=seen.overflow_count,
        )

    def _exact_gemm(self, name: str, is_rounded: bool, is_stored: bool) -> NDArray[np.float64]:
        x = self._x[name] if is_rounded else self._exact_x
        return x @ self._weights[name, is_stored].T

    def _sum_errors(self, name: str, on: Collection[str]) -> NDArray[np.float64] | float:
        run = self._runs[name]
        error = run.accumulator if "accumulator" in on else 0.0
        return error + run.combine if "combine" in on else error


def _values(stored: QuantizedTensor) -> NDArray[np.float64]:
    return stored.dequantize().astype(np.float64)
