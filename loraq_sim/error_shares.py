"""What rounding the activations and P adds to a layer's error, seen while its data path runs.

With e the error of the output and d what one rounding changes of it, <d, e> / <e, e> is the share
of the squared error that is due to it, as `loraq_sim.explain` counts them. Here only two roundings
are told, on a sample of rows, so that every case can have them: d = (X_a - X') Q^T of the
activations of the main branch, d = (P^ - P) L^T of P. A P of 16 bits in place of the stored one
turns e into e - (P^ - fp16(P)) L^T.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from loraq_sim.emulator.datapath import StepResult

__all__ = ["RoundingWatch"]

_MOST_ROWS = 64
_LARGEST_FP16 = 65504.0


class RoundingWatch:
    """Takes the steps of one run (`loraq_sim.emulator.datapath.run_layer`'s `on_step`).

    Parameters
    ----------
    n_rows : int
        Activation rows of the run; at most 64 of them, spread evenly, are looked at.
    """

    def __init__(self, n_rows: int) -> None:
        count = min(n_rows, _MOST_ROWS)
        self._rows = np.arange(count, dtype=np.int64) * n_rows // max(count, 1)
        self._changes: dict[str, NDArray[np.float64]] = {}
        self._weights: dict[str, Any] = {}
        self._p: NDArray[np.float32] | None = None
        self._p_format = ""

    def __call__(self, done: StepResult) -> None:
        """Keep what is needed of a step."""
        name = done.step.name
        if name in ("main", "up"):
            self._weights[name] = done.weight
        elif name in ("round_main", "round_p"):
            before = np.asarray(done.inputs[0])[self._rows]
            after = done.result.dequantize()[self._rows]
            gemm = "main" if name == "round_main" else "up"
            with np.errstate(invalid="ignore"):
                self._changes[gemm] = after.astype(np.float64) - before
            if gemm == "up":
                self._p, self._p_format = before, done.step.format

    def shares(
        self, output: NDArray[np.float32], reference: NDArray[np.float64], error: float
    ) -> dict[str, Any]:
        """Columns of the result row: shares of the squared error, and the error with a wide P.

        Parameters
        ----------
        output, reference : ndarray of shape (M, N)
        error : float
            Relative error of the whole output.

        Returns
        -------
        dict
            ``activation_error_share``, ``p_error_share``, ``wide_p_error`` and ``p_format``; None
            where there is no P, no error, or a value that is not finite.
        """
        found: dict[str, Any] = dict.fromkeys(
            ("activation_error_share", "p_error_share", "wide_p_error", "p_format")
        )
        if self._p is not None:
            found["p_format"] = str(self._p_format)
        miss = output[self._rows].astype(np.float64) - reference[self._rows]
        square = float(np.vdot(miss, miss))
        if not np.isfinite(square) or square == 0.0:
            return found
        for gemm, name in (("main", "activation_error_share"), ("up", "p_error_share")):
            change = self._change(gemm, self._changes.get(gemm))
            if change is not None:
                found[name] = float(np.vdot(change, miss)) / square
        wide = self._wide_p()
        if wide is not None:
            left = miss - wide
            found["wide_p_error"] = error * float(np.sqrt(np.vdot(left, left) / square))
        return found

    def _change(self, gemm: str, operand: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """What a change of the rows of an operand changes of the output, (rows, N)."""
        if operand is None or not np.isfinite(operand).all():
            return None
        weight = self._weights[gemm].dequantize()
        return operand.astype(np.float32) @ weight.T if len(operand) else None

    def _wide_p(self) -> NDArray[np.float64] | None:
        """What the stored P changes of the output against one in fp16; None if that is no wider."""
        if self._p is None or self._p_format.element.bits >= 16:
            return None
        if not np.abs(self._p).max(initial=0.0) <= _LARGEST_FP16:
            return None
        rounding = self._p.astype(np.float16).astype(np.float64) - self._p
        return self._change("up", self._changes["up"] - rounding)
