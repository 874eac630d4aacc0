"""Expected time of the parts of a case, in seconds on one core of a reference machine.

    solve   = c_0 + c_w N K + c_q (N + K) r^2             decompositions, rounding, the start
    stages  = steps (s_0 + s_w N K + s_r N K r)           flatten, refine and settle of loraq
    emulate = e_0 + e_w N K + e_x T (N + K) + e_m T N K   quantizing inputs, the GEMMs, metrics
    first   = f_w N K + f_x T (N + K) + f_m T N K         reading the layer, its reference output

    N K: weights    r: rank    T: activation rows emulated    steps: of `loraq_sim.solvers.effort`

Splits of a layer share what `loraq_sim.solvers.shared_stages` shares: solves of one problem all of
it, branch formats of one rank the steps before the branch is rounded. `WorkOfLayer` keeps count.

The constants are a non-negative least-squares fit of relative errors over 30 kinds of case, with
N and K from 128 to 4608, ranks 0 to 64 and all presets. Against the CPU time of whole sweeps with
the default splits, the sum is 0.88 to 1.03 times that on the example dumps in preset fast, 0.96
and 1.44 in balanced, and 1.53 on two layers of PixArt-Sigma, whose ranks go beyond the fit.
"""

import math
import re
from dataclasses import dataclass, field

from loraq_sim.dumps import LayerInfo
from loraq_sim.solvers.effort import EFFORTS
from loraq_sim.split import PrecisionSplit

__all__ = ["WorkOfLayer", "rank_of"]

_WEIGHT_S = 5.3e-8
_RANK_S = 1.37e-8
_STEP_S = (3.9e-4, 1.5e-9, 5.6e-11)
_ROUND_S = (2.0e-4, 1.1e-8)
_RECALL_S = 6.3e-9
_EMULATE_S = (2.0e-3, 7.7e-9, 4.4e-9, 2.0e-11)
_FIRST_S = (4.0e-9, 6.8e-9, 2.5e-11)
# These repeat a decomposition and a rounding as often as the preset says.
_ALTERNATING = ("loftq", "svdquant_tuned", "alternating")
# Branches below 8 bits are frozen in parts, each settled; the coarsest refine by themselves.
_SETTLES = {6: 2, 5: 2, 7: 2, 4: 1, 3: 1, 2: 1}
_COARSE_BITS = 4


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
        seconds = self._emulate(tokens)
        if not is_solved:
            seconds += self._solve(split, method, preset, seed)
        return seconds

    def _emulate(self, tokens: int | None) -> float:
        weights, rows, values = self._sizes(tokens)
        case, per_weight, per_value, per_mac = _EMULATE_S
        seconds = case + per_weight * weights + per_value * values + per_mac * rows * weights
        if self._is_new("emulated"):
            per_weight, per_value, per_mac = _FIRST_S
            seconds += per_weight * weights + per_value * values + per_mac * rows * weights
        return seconds

    def _solve(self, split: PrecisionSplit, method: str, preset: str, seed: int) -> float:
        weights = self.info.n * self.info.k
        main = str(split.main_weight)
        if method == "rtn" or not split.has_branch:
            return _ROUND_S[0] + _ROUND_S[1] * weights
        rank = min(rank_of(split), self.info.n, self.info.k)
        if not self._is_new("solved", main, str(split.branch_weight), rank, method, preset, seed):
            return _RECALL_S * weights
        once = _WEIGHT_S * weights + _RANK_S * (self.info.n + self.info.k) * rank**2
        effort = EFFORTS[preset]
        if method in _ALTERNATING:
            return once * effort.alternations
        if method != "loraq":
            return once
        flatten, refine = 0, effort.refine_float_steps
        if split.main_weight.element.is_integer:
            flatten, refine = effort.flatten_steps, effort.refine_steps
        stages = ("stages", main, rank, preset, seed)
        element = split.branch_weight.element
        bits = 16 if element.is_plain_float else element.bits
        steps = _SETTLES.get(bits, 0) * effort.settle_steps
        steps += flatten if self._is_new("flatten", *stages) else 0
        if bits <= _COARSE_BITS or self._is_new("refine", *stages):
            steps += refine
        per_step = _STEP_S[0] + (_STEP_S[1] + _STEP_S[2] * rank) * weights
        return once + steps * per_step

    def _sizes(self, tokens: int | None) -> tuple[int, float, float]:
        rows = min(tokens or math.inf, self.info.tokens or 0)
        return self.info.n * self.info.k, rows, rows * (self.info.n + self.info.k)

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
