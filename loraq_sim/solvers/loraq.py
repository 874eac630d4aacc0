"""LoRaQ: data-free optimization of a quantized low-rank branch against the rounding error.

Minimize ||W - Q - L R||_F^2 over Q on the main grid and L, R on the branch grid (arXiv 2604.18117;
the stages are ours). From L R = SVD_r(W):

1. flatten (integer main grids): descend on the range of the groups of W - L R, to which their
   rounding error is proportional, though it makes W - L R larger (`kernels.quantize`);
2. refine: descend on ||e||^2 with e = (W - L R) - round(W - L R) and the codes taken as constant,
   so that the branch also cancels the rounding error. Steps are large enough to change codes:
   small ones stay where alternation gets stuck;
3. freeze: round the branch, least-squares refits in between (`solvers.branch`). Where rounding the
   branch loses much against the error itself (few bits, or a branch that carries most of W), it is
   rounded largest components first, each time followed by refining the rest; where it loses most,
   before refining at all: the noise then only shapes what the main branch rounds;
4. round the main branch once more, against the branch as stored;
5. keep the end only where it is better than the start, than no branch and than a branch that no one
   optimized (`baselines.best_candidate`): a solution is never worse than round to nearest, or than
   LQER. Where LQER wins (a few outliers, which rounding meets exactly), stages 2 to 4 also start
   from it, and LoftQ goes on from it.

Every preset runs those below it too and returns the best, so that a longer search is never worse:
it flattens on from where the shorter one stopped, so that one costs its refining only, and its end
where that may be the better one.

Float main grids skip stage 1, whose premise they lack. Where inputs have four bits, rounding them
makes most of the error, in proportion to the size of W - L R, which both descents enlarge:
conditioned solves for such inputs descend on that size as well (``Problem.holds``). With data-free
conditions, output errors are 2 to 7 % lower than without, or than without stage 1.
Stages 1 and 2 run on the device of the problem where it knows the main grid, 3 and 4 on the CPU.
Both are descents of one kind (`low_rank.descend`).
"""

import copy
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraq_sim.quantizers import quantize
from loraq_sim.solvers.baselines import best_candidate, solve_loftq
from loraq_sim.solvers.branch import FrozenBranch, refit_left
from loraq_sim.solvers.low_rank import (
    CPU,
    Device,
    Directions,
    balanced_factors,
    descend,
)
from loraq_sim.solvers.main_grid import MainGrid, main_scale_rule
from loraq_sim.solvers.problem import (
    EFFORTS,
    Branches,
    Effort,
    Problem,
    Trace,
    TraceEntry,
    product,
)

__all__ = ["solve_loraq"]

logger = logging.getLogger(__name__)

# First steps of a component of L R, as shares of the root mean square singular value that W - L R
# would have at the rank of L R. Flat optima: a third less or more costs 1 to 2 % of the error.
_FLATTEN_RATE = 0.2
# Powers of the range norm, as log2 p, each for an equal share of the steps.
_FLATTEN_DOUBLINGS = (3, 4, 5)
# Fits of L to stored main branches with e4m3 scales: further ones gain less than 0.2 %.
_REFITS = 3
# How far storing moves the error of a branch that loses less than a quarter of it: up by 3 %, in
# quadrature, and down by what a search of scales finds.
_NEARLY = 1.05
# A second flattening, from where a shorter one came to rest.
_AGAIN = 0.7
_REFINE_RATE = 0.035
_REFINE_RATE_FLOAT = 0.05
# What a weight is to the error that rounding and a first branch leave of it: about 1 in 10.
_TO_ROUNDING = 10.0
# Below this share of the weight, what a branch leaves is rounding noise of float32.
_NOTHING = 1e-6
# Steps move the product by a few times what it leaves; beyond this they feed on components that
# have vanished.
_RUNAWAY = 100.0


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """Shares of the rank that are frozen before the refining steps and before each settling.

    `pins` rounds one factor of all components before the first settling; `settle_rate` is for
    the settlings what the rates above are for their stages.
    """

    before_refining: float
    before_settling: tuple[float, ...]
    settle_rate: float = 0.022
    pins: bool = False


# By what rounding a branch loses at the start, as a share of the error of the start: below the
# first bound nothing of the branch needs to be stored early, beyond the second most of it.
_PLANS = (
    (0.25, _Plan(before_refining=0.0, before_settling=())),
    (
        0.5,
        _Plan(
            before_refining=0.0,
            before_settling=(0.3, 0.5, 0.65, 0.8, 0.9, 0.96),
            settle_rate=0.03,
            pins=True,
        ),
    ),
    (1.2, _Plan(before_refining=0.75, before_settling=(0.82, 0.88, 0.94, 0.98))),
    (math.inf, _Plan(before_refining=0.9, before_settling=(0.93, 0.955, 0.975, 0.99))),
)
# Main branches with float elements or power-of-two scales follow a moving branch less well: there
# the plans above lose up to 16 %.
_PLANS_ROUGH = (
    _PLANS[0],
    (0.5, _Plan(before_refining=0.0, before_settling=(0.5, 0.75, 0.9), settle_rate=0.012)),
    (math.inf, _Plan(before_refining=0.75, before_settling=(0.85, 0.95), settle_rate=0.012)),
)


def solve_loraq(problem: Problem) -> Branches:
    """Data-free optimization of a quantized low-rank branch against the rounding error.

    The best of a descent, of those of less effort, and of what needs none.
    """
    run = _Run(problem)
    ends, least_effort = _ends(run)
    # What the least effort is compared with is the same for all presets, so that no preset misses
    # what a lower one finds.
    least = {"end": least_effort, "start": run.start}
    untouched = dataclasses.replace(problem, rng=run.another_rng())
    name, found = best_candidate(untouched, least)
    tried = [*ends, run.start]
    trace = run.trace + [entry for end in ends for entry in end.trace]
    if name not in least:
        tried.append(found)
        trace += found.trace
    if name == "lqer":
        # Rounding left something of low rank, and the descent from the weight got lost: what
        # starts from there keeps what rounding does well.
        passes, descent = (dataclasses.replace(problem, rng=run.another_rng()) for _ in range(2))
        other = _Run(descent, after_rounding=True)
        after = [solve_loftq(passes), other.start, *_ends(other)[0]]
        tried += after
        trace += other.trace[1:] + [each.trace[-1] for each in after[1:]]
        trace += after[0].trace
    # Of equals the end of the effort that was asked for.
    order = [ends[-1], *tried]
    best = min(order, key=_stored_error)
    return dataclasses.replace(best, trace=trace)


def _stored_error(branches: Branches) -> float:
    return min(entry.weight_error for entry in branches.trace)


def _efforts(effort: Effort) -> list[tuple[str, Effort]]:
    """`effort` and all below it, the least first, by the names of their ends in a trace."""
    found = [("end", effort)]
    while (below := found[-1][1].below) is not None:
        found.append((below, EFFORTS[below]))
    return found[::-1]


def _ends(run: "_Run") -> tuple[list[Branches], Branches]:
    """What each effort ends at; each flattens on from where the one below it stopped.

    The effort that was asked for comes last. What less effort came to is stored only where that may
    be better; the second result is about no better than what the least came to.
    """
    efforts = _efforts(run.problem.effort)
    runs: list[_Run] = []
    flattened = 0
    for name, effort in efforts:
        if run.grid.is_uniform and not run.is_after_rounding:
            steps = effort.flatten_steps - flattened
            run.flatten(name, steps, _FLATTEN_RATE * (_AGAIN if flattened else 1.0))
            flattened = effort.flatten_steps
        own = run if len(runs) == len(efforts) - 1 else run.fork()
        own.refine_first(name, effort)
        runs.append(own)
    *below, last = (own.store for own in runs)
    asked = last(*efforts[-1])
    ends = [
        store(*effort)
        for own, store, effort in zip(runs, below, efforts, strict=False)
        if own.in_sight <= _NEARLY * _stored_error(asked)
    ]
    ends.append(asked)
    if len(ends) == len(runs):
        return ends, ends[0]
    entry = dataclasses.replace(asked.trace[-1], weight_error=_NEARLY * runs[0].in_sight)
    return ends, dataclasses.replace(asked, trace=[entry])


class _Run:
    """One weight on its way through the stages, in units of about its root mean square."""

    def __init__(self, problem: Problem, *, after_rounding: bool = False) -> None:
        self.problem = problem
        self.is_after_rounding = after_rounding
        self.trace: Trace = []
        # The error after refining, where storing the branch cannot make it much smaller; else 0.
        self.in_sight = 0.0
        self._untouched_rng = copy.deepcopy(problem.rng)
        self.unit = _power_of_two_near(problem.weight)
        # What is still to be met by the main branch and the free components.
        self.rest = problem.weight / np.float32(self.unit)
        self.size = float(np.linalg.norm(self.rest)) or 1.0
        self.grid = MainGrid(problem.main, self.rest.shape)
        self.device = problem.device
        self.holds = problem.holds and self.grid.is_uniform
        carried = self.rest
        if after_rounding:
            carried = carried - quantize(carried, problem.main).dequantize()
        columns, rows = problem.truncated_svd(carried, power_iterations=1)
        self.start = self._start(columns, rows)
        self.left, self.right = balanced_factors(columns, rows)
        self.branch = self._new_branch()

    def _share(self, stage: str, run: Callable[[], None]) -> None:
        """Run a stage that no branch format enters, or take over what it gave an earlier solve."""

        def compute() -> tuple[np.ndarray, np.ndarray, np.ndarray, Trace]:
            n_before = len(self.trace)
            run()
            factors = self.left.copy(), self.right.copy()
            return *factors, self.grid.scales.copy(), self.trace[n_before:]

        n_before = len(self.trace)
        left, right, scales, entries = self.problem.shared.recall(self._key(stage), compute)
        self.left, self.right, self.grid.scales = left.copy(), right.copy(), scales.copy()
        self.trace[n_before:] = entries

    def another_rng(self) -> np.random.Generator:
        """A generator as it was given, for what should be as if it ran alone."""
        return copy.deepcopy(self._untouched_rng)

    def fork(self) -> "_Run":
        """The same state to go on from; what one of the two does leaves the other as it is."""
        other = copy.copy(self)
        other.left, other.right = self.left.copy(), self.right.copy()
        other.grid = MainGrid(self.problem.main, self.rest.shape)
        other.branch, other.trace = self._new_branch(), []
        return other

    def refine_first(self, name: str, effort: Effort) -> None:
        """Stage 2 with the steps of `effort`; `name` is that of its end in the trace."""
        plan = self._plan()
        steps, rate = effort.refine_float_steps, _REFINE_RATE_FLOAT
        if self.grid.is_uniform:
            steps, rate = effort.refine_steps, _REFINE_RATE
        if plan.before_refining:
            self.freeze(plan.before_refining)
            self.refine(steps, rate, "refine")
        else:
            n_before = len(self.trace)
            self._share(f"refine {name}", lambda: self.refine(steps, rate, "refine"))
            if not plan.before_settling and len(self.trace) > n_before:
                self.in_sight = self.trace[-1].weight_error

    def store(self, name: str, effort: Effort) -> Branches:
        """Stages 3 and 4 of the same."""
        plan = self._plan()
        if plan.pins:
            self.pin()
            self.refine(effort.settle_steps, plan.settle_rate, "settle")
        for share in plan.before_settling:
            self.freeze(share)
            self.refine(effort.settle_steps, plan.settle_rate, "settle")
        self.freeze(1.0)
        return self._end(name)

    def _plan(self) -> _Plan:
        if not self.branch.can_freeze_parts:
            return _PLANS[0][1]
        is_smooth = main_scale_rule(self.problem.main) == "signed_mse"
        plans = _PLANS if is_smooth else _PLANS_ROUGH
        return next(plan for bound, plan in plans if self.noise_at_start <= bound)

    def flatten(self, name: str, steps: int, rate: float) -> None:
        """Stage 1: small ranges of the groups of what the main branch rounds."""
        self._share(f"flatten {name}", lambda: self._flatten(steps, rate))

    def _flatten(self, steps: int, rate: float) -> None:
        with self.device.working():
            directions = self.device.directions(self.rest, self.grid, self.holds, self.moving)

            def flatten(left: Any, right: Any, step: int) -> Any:
                doublings = _FLATTEN_DOUBLINGS[step * len(_FLATTEN_DOUBLINGS) // steps]
                return directions.flatten(left, right, doublings)

            self._descend(self.device, directions, flatten, steps, rate)

    def refine(self, steps: int, rate: float, stage: str) -> None:
        """Stage 2, on the components that are still free."""
        if not self.left.shape[1]:
            return
        device = self.device if self.device.can_round_to(self.grid) else CPU
        if device is not self.device:
            logger.info(
                "%s on cpu: %s cannot round to %s", stage, self.device.name, self.grid.format
            )
        with device.working():
            directions = device.directions(self.rest, self.grid, self.holds, self.moving)
            self._descend(device, directions, directions.leave, steps, rate)
            norms = directions.finish()
        if not np.isfinite(self.grid.scales).all():
            self.grid.scales = np.zeros_like(self.grid.scales)
        self.trace += [
            TraceEntry(
                stage=stage,
                iteration=step,
                weight_error=norm / self.size,
                is_stored=False,
                device=device.name,
            )
            for step, norm in enumerate(itertools.takewhile(math.isfinite, norms))
        ]

    @property
    def moving(self) -> tuple[int, ...]:
        """Which factors a descent moves, as in `low_rank.descend`."""
        return tuple(i for i in (0, 1) if i != self.branch.pinned)

    def _named(self, end: str) -> str:
        return f"{end} after lqer" if self.is_after_rounding else end

    def pin(self) -> None:
        """Stage 3 for one factor of all components."""
        self.left, self.right = self.branch.pin(self.left, self.right)

    def freeze(self, share: float) -> None:
        """Stage 3 for the largest components, up to `share` of the rank."""
        wanted = max(1, round(share * self.problem.rank)) if share else 0
        if wanted <= self.branch.n_frozen:
            return
        stored_left, stored_right, left, right = self.branch.freeze(
            self.left, self.right, wanted - self.branch.n_frozen
        )
        # Not in place: forks hold the same array.
        product = stored_left @ stored_right
        self.rest = np.subtract(self.rest, product, out=product)
        is_pinned = self.branch.pinned is not None
        self.left, self.right = (left, right) if is_pinned else balanced_factors(left, right)

    def _end(self, name: str) -> Branches:
        """Stage 4, with its one error as the trace."""
        # As large as the weight, and not needed any more: peak memory.
        del self.rest
        left, right = self.branch.stored()
        target = product(left, right)
        np.subtract(self.problem.weight, target, out=target)
        main = self.grid.finish(target, self.unit)
        del target
        noise = self.branch.noise / self.size
        end = self._measured(name, Branches(main=main, left=left, right=right, branch_noise=noise))
        if not self.problem.main.has_tensor_scale:
            return end
        # Stored scales of three mantissa bits are not those the branch was fitted with.
        for _ in range(_REFITS):
            refitted = self._measured(name, refit_left(self.problem.weight, end))
            if _stored_error(refitted) >= _stored_error(end):
                break
            end = refitted
        return end

    def _measured(self, name: str, end: Branches) -> Branches:
        error = self.problem.relative_error(end.reconstruct())
        entry = TraceEntry(stage=self._named(name), iteration=0, weight_error=error)
        return dataclasses.replace(end, trace=[entry])

    def _key(self, stage: str) -> tuple:
        return (stage, self.is_after_rounding, self.problem.rank, *self.problem.shared_key)

    def _descend(
        self,
        device: Device,
        directions: Directions,
        direction: Callable[[Any, Any, int], Any],
        steps: int,
        rate: float,
    ) -> None:
        """Steps of `rate` times what L R leaves: codes and ranges change by steps of that size.

        Factors stay as they are where L R leaves nothing, or where the steps run away, as they may
        for weights of lower rank than the branch.
        """
        # By columns: walked transposed.
        left, right = device.put(self.left.copy(order="F")), device.put(self.right.copy())
        distance = directions.distance(left, right)
        if distance <= _NOTHING * self.size:
            return
        if self.is_after_rounding:
            # A few outliers are all of the norm there, and are met exactly.
            distance = min(distance, _TO_ROUNDING * self.start_error * self.size)
        stride = rate * distance / math.sqrt(self.left.shape[1])
        allowed = _RUNAWAY * (_reach(self.left, self.right) + self.size * self.left.shape[1])
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                descend(
                    left,
                    right,
                    direction,
                    steps=steps,
                    stride=stride,
                    moving=self.moving,
                    project=directions.project,
                )
                left, right = np.ascontiguousarray(device.get(left)), device.get(right)
                stays = _reach(left, right) <= allowed
        except (np.linalg.LinAlgError, FloatingPointError):
            stays = False
        if stays:
            self.left, self.right = left, right
        else:
            logger.info("the steps ran away; the factors stay as they were")

    def _start(self, columns: np.ndarray, rows: np.ndarray) -> Branches:
        branch = self._new_branch()
        branch.freeze(columns, rows, self.problem.rank)
        left, right = branch.stored()
        # Scales by the quick rule: the start is there for weights that are of low rank already.
        main = quantize(self.problem.weight - product(left, right), self.problem.main)
        start = Branches(main=main, left=left, right=right)
        error = self.problem.relative_error(start.reconstruct())
        self.start_error = error
        self.noise_at_start = branch.noise / self.size / error if error else 0.0
        self.trace.append(TraceEntry(stage=self._named("start"), iteration=0, weight_error=error))
        return dataclasses.replace(start, trace=self.trace[-1:])

    def _new_branch(self) -> FrozenBranch:
        problem = self.problem
        sizes = len(problem.weight), problem.rank
        return FrozenBranch(*sizes, problem.branch, self.unit, problem.branch_rotation)


def _reach(left: np.ndarray, right: np.ndarray) -> float:
    """A bound on ||L R||_F; NaN or infinite where a factor is."""
    return float(np.linalg.norm(left)) * float(np.linalg.norm(right))


def _power_of_two_near(weight: np.ndarray) -> float:
    """The root mean square rounded down to a power of two, which scales without rounding."""
    rms = float(np.linalg.norm(weight)) / math.sqrt(weight.size)
    return 2.0 ** (math.frexp(rms)[1] - 1) if rms else 1.0
