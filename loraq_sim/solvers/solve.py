"""One door to every solver: check, find the rank, smooth and rotate, solve, measure.

`solve` makes one solution of a weight, `solve_many` several for the price of their differences;
`loraq_sim.solvers.shared_input` those of layers that read the same input.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import NamedTuple, Unpack

import numpy as np

from loraq_sim.conditioning import as_stored, hadamard_block, smoothing_vector
from loraq_sim.errors import InputError, named_options, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.solvers.baselines import (
    round_to_nearest,
    solve_alternating,
    solve_l2qer,
    solve_loftq,
    solve_lqer,
    solve_qera,
    solve_svdquant,
    solve_svdquant_published,
    solve_svdquant_tuned,
)
from loraq_sim.solvers.condition import (
    FEW_BITS,
    Condition,
    EnteringFormats,
    conditions_to_try,
)
from loraq_sim.solvers.gptq import (
    check_finish,
    finish_quickly,
    finish_with_data,
    solve_deflated,
    solve_gptq,
    solve_lrc,
)
from loraq_sim.solvers.loraq import solve_loraq
from loraq_sim.solvers.low_rank import Device
from loraq_sim.solvers.problem import (
    EFFORTS,
    PRESETS,
    Branches,
    GroupOptions,
    Problem,
    SharedStages,
    SolveOptions,
    array_key,
    checked_matrix,
    find_device,
    relative_distance,
    resolve_rank,
)
from loraq_sim.solvers.residual import (
    InputGrid,
    ResidualInput,
    checked_feedback,
    dequantized,
    simulated_output,
    spend_on_residual_input,
    whole_branch,
)
from loraq_sim.solvers.solution import Solution
from loraq_sim.split import AUTO, FITTED_TO_INPUTS, WITHOUT_BRANCH, grid_letter

__all__ = [
    "CHOOSE_SMOOTHING",
    "METHODS",
    "NEED_ACTIVATIONS",
    "GroupOptions",
    "SolveOptions",
    "solve",
    "solve_many",
]

CHOOSE_SMOOTHING = ("svdquant_tuned", "svdquant_published")
"""Methods that choose a smoothing from activations where none is given."""

NEED_ACTIVATIONS = ("l2qer", "qera", "gptq", "lrc", "quad", "resq")
"""Methods that do nothing without activations."""

_BRANCH_ROTATIONS = (None, "learned")

_DEFAULT_ACTIVATION = "int4/g64"

# Rows of inputs by which branches are judged.
_ROWS_COMPARED = 512
# Of layers no wider, shares of the rank are compared as finished: that takes the third power.
_QUICK_WIDTH = 1024


# One line a method; ``rtn`` is what every method with a branch gives at rank 0.
METHODS: dict[str, Callable[[Problem], Branches] | None] = {
    "rtn": None,
    "lqer": solve_lqer,
    "svdquant": solve_svdquant,
    "svdquant_tuned": solve_svdquant_tuned,
    "svdquant_published": solve_svdquant_published,
    "loftq": solve_loftq,
    "alternating": solve_alternating,
    "loraq": solve_loraq,
    "l2qer": solve_l2qer,
    "qera": solve_qera,
    "gptq": solve_gptq,
    "lrc": solve_lrc,
    "quad": solve_deflated,
    "resq": solve_deflated,
}
# Methods whose branch carries what rounding lost, nothing of the weight.
_ROUNDS_FIRST = ("lqer", "l2qer", "qera", "loftq")
# What spends the whole branch on a residual input, and what turns its directions.
DEFLATING = ("quad", "resq")
_TURNING = ("resq",)


@named_options
def solve(
    weight: np.ndarray,
    method: str = "loraq",
    *,
    main: "str | Format" = "int4/g64",
    branch: "str | Format | None" = "int8/g32",
    rank: int | None = None,
    budget: str | None = None,
    preset: str = "balanced",
    activations: np.ndarray | None = None,
    smooth: "float | np.ndarray | None" = None,
    rotate: str | None = None,
    condition: str | None = None,
    branch_rotation: str | None = None,
    feedback: "int | str | None" = None,
    main_activation: "str | Format | None" = None,
    branch_activation: "str | Format | None" = None,
    main_rule: str = "absmax",
    branch_rule: str = "absmax",
    finish: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    excluded: Collection[str] = (),
    shared: SharedStages | None = None,
) -> Solution:
    """Split `weight` into a quantized main branch and a quantized low-rank branch.

    Parameters
    ----------
    weight : ndarray or torch tensor of shape (N, K), floating
        Finite; bfloat16 of ml_dtypes and of torch as well. Not modified.
    method : str
        One of `METHODS`; ``l2qer``, ``qera``, ``gptq``, ``lrc``, ``quad`` and ``resq`` need
        `activations`, the last two `feedback`.
    main, branch : str or Format
        Formats; groups run along K for the main branch and R, along the rank for L.
    rank : int, optional
        Rank of the branch, 0 to min(N, K). Rank 0 gives round to nearest with any method.
    budget : str, optional
        Instead of `rank`: ``"fp16@32"``, the rank that fits the bytes of a 16-bit rank-32 branch.
        With neither, the rank is 64, or min(N, K) if that is less.
    preset : str
        ``fast``, ``balanced`` or ``best``: how long iterative methods search.
    activations : ndarray of shape (T, K), floating, optional
        Needed by ``smooth=alpha`` and by methods that use data.
    smooth : None, float or ndarray of shape (K,)
        See `loraq_sim.conditioning`.
    rotate : None or str
        ``"hadamard"`` or ``"hadamard:64"``: rotate the input channels, after smoothing, by a block
        Hadamard matrix of the largest (or the given) power of two that divides K. Activations are
        rotated alike at run time; see `loraq_sim.conditioning`.
    condition : None, "auto" or "rms"
        What to do where `smooth` or `rotate` is None: ``"rms"`` smooths in closed form,
        ``"auto"`` compares smoothings and rotations on activation rows left out, or rotates
        inputs of at most four bits where there are none; see `loraq_sim.solvers.condition`.
    branch_rotation : None or "learned"
        Turn the components of the branch before it is rounded so that less is lost; see
        `loraq_sim.solvers.branch`.
    feedback : None, int or "auto"
        How many components of the rank the residual input takes (`loraq_sim.solvers.residual`), or
        the share of the rank that does best on activation rows left out. Needs `activations`.
    main_activation, branch_activation : str or Format, optional
        What the inputs of the branches are rounded to at run time, which ``feedback="auto"``,
        `condition` and `finish` compare with; by default int4/g64, and the format of the branch.
    main_rule, branch_rule : str
        How the scales of those are found: ``absmax`` or ``signed_absmax``. Of the main branch also
        ``auto``: `condition` chooses among both and zero points, and `Solution.grid` says which.
    finish : None or "data"
        ``"data"``: round the main branch again in the metric of the activations and refit L to it,
        where that is better on rows left out; see `loraq_sim.solvers.gptq`. Needs `activations`.
    seed : int
        Seeds the randomized factorization. Same seed, same bytes.
    device : str
        ``"cpu"``, ``"cuda"`` or ``"cuda:N"``: where the descents of ``loraq`` and the truncated
        SVD of every method run (below a third of min(N, K); larger ranks take LAPACK's full
        SVD). All else runs on the CPU: rounding what is stored, measuring it, refining on main
        grids other than signed integers and e2m1 elements, and ``rtn``. The trace says where each
        refining step ran. Devices sum in different orders, so that single codes differ between
        them; equal weight, seed and device give the same bytes.
    excluded : collection of str
        What ``condition="auto"`` must not choose, of ``hadamard``, ``smooth`` and ``zero_points``:
        machines may lack them.
    shared : SharedStages, optional
        Stages kept from earlier solves of the same weight, here or for another one.

    Raises
    ------
    InputError
        If an argument breaks one of these rules; the message names it and its value.
    """
    started = time.perf_counter()
    weight, activations = _checked_arrays(weight, activations, finish)
    _check_names(method, preset, seed, branch_rotation)
    place = find_device(device)
    main = parse_format(main)
    branch = None if branch is None else parse_format(branch)
    entering_main = parse_format(main_activation or _DEFAULT_ACTIVATION)
    entering_branch = parse_format(branch_activation or branch or _DEFAULT_ACTIVATION)
    rank_with = functools.partial(resolve_rank, weight.shape, branch, rank, budget)
    if method in DEFLATING and not rank_with():
        method = "rtn"
    is_plain = method in WITHOUT_BRANCH
    into_branch = (entering_branch, branch_rule)
    candidates = [Condition(rotate, smooth, (entering_main, main_rule))]
    if condition is not None or main_rule == AUTO:
        candidates = conditions_to_try(
            weight,
            activations,
            condition,
            rotate=rotate,
            smooth=smooth,
            formats=EnteringFormats(
                main=main,
                branch=branch,
                into_main=(entering_main, main_rule),
                into_branch=into_branch,
            ),
            rank=0 if is_plain or method in _ROUNDS_FIRST else rank_with(),
            may_deflate=bool(feedback),
            excluded=excluded,
        )
    if feedback is not None:
        feedback = checked_feedback(feedback, method if is_plain else None, branch, activations)
    if method in DEFLATING:
        feedback = whole_branch(method, feedback, rank_with)

    is_coarse = condition == "auto" and entering_main.element.bits <= FEW_BITS
    is_coarse = is_coarse and method == "loraq"

    def prepared(chosen: Condition) -> _Prepared:
        block = hadamard_block(chosen.rotate, weight.shape[1])
        factors = smoothing_vector(chosen.smooth, weight, activations)
        _check_tuning(method, activations, factors, block, feedback)
        turned, entering = as_stored(weight, activations, factors, block)
        stage = _Stage(
            method=method,
            weight=turned,
            main=main,
            branch=branch,
            is_smoothed=factors is not None,
            branch_rotation=branch_rotation,
            seed=seed,
            device=place,
            holds=is_coarse,
            into_main=chosen.into_main,
            into_branch=into_branch,
            shared=shared,
        )
        total = 0 if is_plain else rank_with()
        plain = _Prepared(block, factors, turned, entering, stage, total, chosen.into_main)
        if feedback is None or branch is None or entering is None:
            return plain
        # Shares of the rank are compared by solutions of the kind that the layer gets.
        is_open = is_coarse and feedback == AUTO
        trial = _least_missed(plain, total, "fast", into_branch)[0] if is_open else stage
        quick = functools.partial(finish_quickly, turned, (chosen.into_main, into_branch))
        total, deflation, miss = spend_on_residual_input(
            turned,
            entering,
            feedback,
            rank_with,
            lambda rank: trial.branches(rank, "fast", entering),
            finished=None if finish is None or weight.shape[1] > _QUICK_WIDTH else quick,
            branch=branch,
            into_main=chosen.into_main,
            into_branch=into_branch,
            rng=np.random.default_rng((seed, 1)),
            turned=method in _TURNING,
        )
        left = entering if deflation is None else deflation.left_of(entering)
        return plain._replace(entering=left, total=total, deflation=deflation, miss=miss)

    ready = min(map(prepared, candidates), key=operator.attrgetter("miss"))
    block, factors, turned, entering, stage, total, into_main, deflation, _ = ready
    rank = total - (0 if deflation is None else deflation.rank)
    if is_coarse:
        _, solved = _least_missed(ready, rank, preset, into_branch)
    else:
        solved = stage.branches(rank, preset, entering)
    if solved.smooth is not None:
        factors = solved.smooth
        turned, entering = as_stored(weight, activations, factors, block)
    if finish is not None and entering is not None:
        solved = finish_with_data(
            turned,
            solved,
            entering,
            into_main=into_main,
            into_branch=into_branch,
        )
    measured = Solution(
        method=method if total or is_plain else "rtn",
        preset=preset,
        seed=seed,
        main=solved.main,
        left=solved.left,
        right=solved.right,
        smooth=factors,
        rotation=block,
        grid=grid_letter(*into_main) if main_rule == AUTO else None,
        feedback=None if deflation is None else deflation.feedback,
        feedback_left=None if deflation is None else deflation.feedback_left,
        weight_error=np.nan,
        trace=solved.trace,
        branch_noise=solved.branch_noise,
        seconds=0.0,
    )
    error = relative_distance(weight, measured.reconstruct())
    return dataclasses.replace(measured, weight_error=error, seconds=time.perf_counter() - started)


class _Prepared(NamedTuple):
    """A weight smoothed and rotated, and what a residual input takes of its branch.

    ``miss`` is the error of the output on rows left out, where a share of the rank was chosen.
    """

    block: int | None
    factors: np.ndarray | None
    turned: np.ndarray
    entering: np.ndarray | None
    stage: "_Stage"
    total: int
    into_main: InputGrid
    deflation: ResidualInput | None = None
    miss: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Stage:
    """A method on a weight that is smoothed and rotated: its branches, however large."""

    method: str
    weight: np.ndarray
    main: Format
    branch: Format | None
    is_smoothed: bool
    branch_rotation: str | None
    seed: int
    device: Device
    holds: bool
    into_main: InputGrid
    into_branch: InputGrid
    shared: SharedStages | None

    def branches(self, rank: int, preset: str, x: np.ndarray | None) -> Branches:
        """What the method makes of the weight, whose inputs are `x`; nothing is solved twice."""
        run = METHODS[self.method]
        is_plain = self.method in WITHOUT_BRANCH
        is_alone = is_plain or self.method in DEFLATING
        if run is None or (not is_alone and (self.branch is None or rank == 0)):
            return round_to_nearest(self.weight, self.main)
        key: tuple[Hashable, ...] = ()
        if self.shared is not None:
            arrays = (array_key(array) for array in (self.weight, x) if array is not None)
            key = (*arrays, str(self.main), preset, self.seed, self.device.name, self.holds)
        problem = Problem(
            weight=self.weight,
            main=self.main,
            branch=self.branch or self.main,
            rank=rank,
            effort=EFFORTS[preset],
            rng=np.random.default_rng(self.seed),
            activations=x,
            is_smoothed=self.is_smoothed,
            branch_rotation=self.branch_rotation,
            device=self.device,
            holds=self.holds,
            into_main=self.into_main,
            into_branch=self.into_branch,
            shared=SharedStages() if self.shared is None else self.shared,
            shared_key=key,
        )
        own: tuple[Hashable, ...] = (self.method, str(self.branch), rank)
        own += (not self.is_smoothed, self.branch_rotation)
        if self.method in FITTED_TO_INPUTS:
            own += tuple((str(fmt), rule) for fmt, rule in (self.into_main, self.into_branch))
        return problem.shared.recall(("solved", *own, *key), lambda: run(problem))


def _least_missed(
    ready: _Prepared, rank: int, preset: str, into_branch: InputGrid
) -> tuple[_Stage, Branches]:
    """Stage and branches, or those that do not hold what the main branch rounds small.

    These, whose weight has the lower error, are better where rounding loses little of inputs, such
    as a few spikes. Without activations nothing speaks for that.
    """
    x = ready.entering
    held = ready.stage, ready.stage.branches(rank, preset, x)
    if x is None:
        return held
    count = min(len(x), _ROWS_COMPARED)
    rows = x[np.arange(count) * len(x) // count]

    def miss(solved: Branches) -> float:
        y = simulated_output(rows, dequantized(solved), None, ready.into_main, into_branch)
        return float(np.linalg.norm(y - rows @ ready.turned.T))

    stage = dataclasses.replace(ready.stage, holds=False)
    return min(held, (stage, stage.branches(rank, preset, x)), key=lambda each: miss(each[1]))


def _checked_arrays(
    weight: np.ndarray, activations: np.ndarray | None, finish: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    weight = checked_matrix(weight, "weight")
    if activations is not None:
        activations = checked_matrix(activations, "activations")
        if activations.shape[1] != weight.shape[1]:
            raise InputError(
                f"activations have K={activations.shape[1]}, the weight K={weight.shape[1]}"
            )
    if finish is not None and check_finish(finish) and activations is None:
        raise InputError(
            f"finish={finish!r} rounds in the metric of the layer's inputs: give activations, or "
            "leave finish out (loraq needs no data)"
        )
    return weight, activations


def _check_tuning(
    method: str,
    activations: np.ndarray | None,
    factors: np.ndarray | None,
    block: int | None,
    feedback: "int | str | None",
) -> None:
    if method not in CHOOSE_SMOOTHING or activations is None or factors is not None:
        return
    for name, asked, what in (
        ("rotate", block, "in the channels of the layer, which rotate= mixes"),
        ("feedback", feedback, "for the inputs of the layer, which feedback= deflates first"),
    ):
        if asked:
            raise InputError(
                f"method {method!r} chooses its smoothing {what}; give smooth= (a strength "
                f"such as 0.5) as well, or drop {name}="
            )


def _check_names(method: str, preset: str, seed: int, branch_rotation: str | None) -> None:
    """Raise InputError for the first argument of `solve` that is no choice."""
    if method not in METHODS:
        raise InputError(unknown_name("method", method, METHODS))
    if preset not in PRESETS:
        raise InputError(unknown_name("preset", preset, PRESETS))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be an integer from 0, got {seed!r}")
    if branch_rotation not in _BRANCH_ROTATIONS:
        raise InputError(f"branch_rotation must be None or 'learned', got {branch_rotation!r}")


def solve_many(
    weight: np.ndarray, specs: Iterable[SolveOptions], **common: Unpack[SolveOptions]
) -> list[Solution]:
    """One `solve` of `weight` per mapping in `specs`, stages they have in common run once.

    Parameters
    ----------
    weight : ndarray of shape (N, K), floating
    specs : iterable of mappings
        Keywords of `solve`, such as ``{"branch": "int8/g64", "rank": 64}``.
    **common
        Keywords that all have in common.

    Returns
    -------
    solutions : list of Solution
        In the order of `specs`; each has the bytes that `solve` alone would give.
    """
    shared, solutions = SharedStages(), []
    for spec in specs:
        options: SolveOptions = {**common, **spec}
        solutions.append(solve(weight, **options, shared=shared))
    return solutions
