"""Expected time of the parts of a case, in seconds on one core of a reference machine.

    once    = c_0 + c_w N K + c_r (N + K) r               decomposition, rounding, branch refits
    step(r) = s_0 + (s_w + s_r r) N K + s_q r^2 + s_e r^3  of flatten, refine and settle in loraq
    emulate = e_0 + e_w N K + e_x T (N + K) + e_p T (N + K) r  quantizing inputs, GEMMs, metrics
    first   = f_w N K + f_m T N K                         reading the layer, its reference output

    N K: weights    r: rank    T: activation rows emulated    steps: of `loraq_sim.solvers.effort`

Splits of a layer share what `loraq_sim.solvers.shared_stages` shares: solves of one problem all of
it, branch formats of one rank the steps before the branch is rounded. `WorkOfLayer` keeps count.

The constants are a non-negative least-squares fit of relative errors to thread times of 90 solves
of layers of the example dumps, PixArt-Sigma and SANA: N and K from 128 to 11200, ranks 4 to 240,
all presets; each of those is within 0.8 to 1.25. Against the CPU time of whole sweeps the sum is
1.04 and 0.97 (minilm, fast and balanced), 0.78 (tiny_pixart, balanced), 0.94 (ten PixArt layers in
12 splits, fast) and 0.91 (two SANA layers, fast).
"""

import math
import re
from dataclasses import dataclass, field

from loraq_sim.dumps import LayerInfo
from loraq_sim.solvers.effort import EFFORTS
from loraq_sim.split import PrecisionSplit

__all__ = ["WorkOfLayer", "rank_of"]

_ONCE_S = 2.5e-3
_WEIGHT_S = 4.39e-8
_REFIT_S = 4.35e-7
_STEP_S = (5.24e-5, 2.64e-9, 7.64e-11, 1.71e-7, 1.5e-9)
_ROUND_S = (1.4e-4, 5.7e-9)
_RECALL_S = (4.4e-4, 7.9e-9)
_EMULATE_S = (1.0e-3, 5.1e-9, 1.1e-8, 1.8e-11)
_FIRST_S = (3.0e-9, 5.2e-11)
# A Gram matrix of the inputs is decomposed, (K, K).
_METRIC_S = 2.2e-10
# `solvers.svdquant_tuned` decomposes and rounds for each strength of smoothing.
_STRENGTHS = 39
# Shares of the rank that are still free in each settling, and while refining, by how coarse the
# branch is. What `solvers.loraq` does depends on the values; this is what the layers at hand gave.
_COARSE = (0.25, (0.15, 0.05))
_MIDDLING = (1.0, (0.5, 0.25, 0.1))
_FINE = (1.0, ())
_PLANS = {2: _COARSE, 3: _COARSE, 4: _COARSE, 5: _MIDDLING}


@dataclass
class WorkOfLayer:
    """Work of the cases of one layer, taken in the order in which they run.

    Parameters
    ----------
    info : LayerInfo or None
        None for a layer that cannot be described.
    """

    info: LayerInfo | None
    _done: set[tuple] = field(default_factory=set)

    def case_seconds(
        self,
        split: PrecisionSplit,
        method: str,
        preset: str,
        tokens: int | None,
        *,
        seed: int = 0,
        is_solved: bool = False,
    ) -> float:
        """Time of the next case; `is_solved` if an earlier one has just the same solution."""
        if self.info is None:
            return _EMULATE_S[0]
        seconds = self._emulate(split, tokens)
        if not is_solved:
            seconds += self._solve(split, method, preset, seed)
        return seconds

    def _emulate(self, split: PrecisionSplit, tokens: int | None) -> float:
        weights = self.info.n * self.info.k
        rows = min(tokens or math.inf, self.info.tokens or 0)
        case, per_weight, per_value, per_product = _EMULATE_S
        values = rows * (self.info.n + self.info.k)
        seconds = case + per_weight * weights
        seconds += (per_value + per_product * self._rank(split)) * values
        if self._is_new("emulated"):
            per_weight, per_mac = _FIRST_S
            seconds += (per_weight + per_mac * rows) * weights
        return seconds

    def _solve(self, split: PrecisionSplit, method: str, preset: str, seed: int) -> float:
        weights = self.info.n * self.info.k
        main = str(split.main_weight)
        if method == "rtn" or not split.has_branch:
            return _ROUND_S[0] + _ROUND_S[1] * weights
        rank = self._rank(split)
        if not self._is_new("solved", main, str(split.branch_weight), rank, method, preset, seed):
            return _RECALL_S[0] + _RECALL_S[1] * weights
        decomposing = _ONCE_S + _WEIGHT_S * weights
        refitting = 0.0
        if not split.branch_weight.element.is_plain_float:
            refitting = _REFIT_S * (self.info.n + self.info.k) * rank
        passes = EFFORTS[preset].alternations
        if method == "loraq":
            return decomposing + refitting + self._descend(split, rank, preset, seed)
        if method == "alternating":
            return passes * (decomposing + refitting)
        if method == "loftq":
            return passes * decomposing
        if method == "svdquant_tuned":
            return (passes + (_STRENGTHS if self.info.tokens else 0)) * decomposing
        return decomposing + (_METRIC_S * self.info.k**3 if method == "qera" else 0.0)

    def _descend(self, split: PrecisionSplit, rank: int, preset: str, seed: int) -> float:
        """Time of the steps of loraq that no earlier case has done."""
        effort = EFFORTS[preset]
        flatten, refine = 0, effort.refine_float_steps
        if split.main_weight.element.is_integer:
            flatten, refine = effort.flatten_steps, effort.refine_steps
        element = split.branch_weight.element
        refined, settled = _PLANS.get(0 if element.is_plain_float else element.bits, _FINE)
        stages = ("stages", str(split.main_weight), rank, preset, seed)
        seconds = 0.0
        if self._is_new("flatten", *stages):
            seconds += flatten * self._step(rank)
        if refined < 1 or self._is_new("refine", *stages):
            seconds += refine * self._step(refined * rank)
        return seconds + effort.settle_steps * sum(self._step(free * rank) for free in settled)

    def _step(self, rank: float) -> float:
        once, per_weight, per_product, square, cube = _STEP_S
        weights = self.info.n * self.info.k
        return once + (per_weight + per_product * rank) * weights + (square + cube * rank) * rank**2

    def _rank(self, split: PrecisionSplit) -> int:
        return min(rank_of(split), self.info.n, self.info.k)

    def _is_new(self, *what: object) -> bool:
        is_new = what not in self._done
        self._done.add(what)
        return is_new


def rank_of(split: PrecisionSplit) -> int:
    """Rank of the branch, for a budget about the rank its codes alone would allow."""
    if not split.has_branch:
        return 0
    if split.rank is not None:
        return split.rank
    bits = int(re.match(r"W(\d+)", split.branch)[1])
    return int(split.budget.rpartition("@")[2]) * 16 // bits
