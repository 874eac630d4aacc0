"""One door to every solver: check the input, find the rank, smooth, solve, measure."""

import time
from dataclasses import dataclass

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format, parse_format
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.alternating import solve_alternating
from loraq_sim.solvers.budget import rank_for_budget
from loraq_sim.solvers.diagnostics import Diagnostics, diagnose
from loraq_sim.solvers.effort import EFFORTS, PRESETS
from loraq_sim.solvers.l2qer import solve_l2qer
from loraq_sim.solvers.loftq import solve_loftq
from loraq_sim.solvers.loraq import solve_loraq
from loraq_sim.solvers.lqer import solve_lqer
from loraq_sim.solvers.problem import Branches, Problem, Trace, relative_distance
from loraq_sim.solvers.qera import solve_qera
from loraq_sim.solvers.rtn import round_to_nearest
from loraq_sim.solvers.shared_stages import SharedStages, array_key
from loraq_sim.solvers.smoothing import smoothing_vector
from loraq_sim.solvers.svdquant import solve_svdquant
from loraq_sim.solvers.svdquant_tuned import solve_svdquant_tuned

__all__ = ["METHODS", "PRESETS", "Solution", "solve"]

# One line a method; ``rtn`` has no branch and is what every method gives at rank 0.
METHODS = {
    "rtn": None,
    "lqer": solve_lqer,
    "svdquant": solve_svdquant,
    "svdquant_tuned": solve_svdquant_tuned,
    "loftq": solve_loftq,
    "alternating": solve_alternating,
    "loraq": solve_loraq,
    "l2qer": solve_l2qer,
    "qera": solve_qera,
}

_DEFAULT_RANK = 64
_LARGEST = 2.0**48


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """A solved layer: stored branches, what they cost and how close they are.

    ``main`` is (N, K), ``left`` (N, r), ``right`` (r, K); the factors are None at rank 0.
    ``smooth`` is (K,) float32 or None: the branches approximate W diag(smooth), and the activations
    are divided by it at run time. ``weight_error`` is ||W - reconstruct()||_F / ||W||_F in the
    unsmoothed weight. ``trace`` holds (stage, iteration, error) in order; ``seconds`` is wall time.
    ``branch_noise`` is what rounding did to the branch, relative to the weight, where known.
    """

    method: str
    preset: str
    seed: int
    main: QuantizedTensor
    left: QuantizedTensor | None
    right: QuantizedTensor | None
    smooth: np.ndarray | None
    weight_error: float
    trace: Trace
    seconds: float
    branch_noise: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the branch; 0 without one."""
        return 0 if self.left is None else self.left.shape[1]

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Stored bytes of each part, scales and padding included."""
        parts = {"main": self.main, "left": self.left, "right": self.right}
        sizes = {name: 0 if part is None else part.nbytes for name, part in parts.items()}
        return sizes | {"smooth": 0 if self.smooth is None else 2 * self.smooth.size}

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts (`pack()` of each writes exactly these)."""
        return sum(self.bytes_by_part.values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (N K)."""
        return 8.0 * self.nbytes / (self.main.shape[0] * self.main.shape[1])

    def diagnose(self, weight: np.ndarray) -> Diagnostics:
        """Group ranges, spectrum of what is left and more; see `loraq_sim.solvers.diagnostics`."""
        return diagnose(self, weight)

    def reconstruct(self) -> np.ndarray:
        """The weight as stored, (N, K) float32, smoothing undone."""
        stored = Branches(main=self.main, left=self.left, right=self.right).reconstruct()
        return stored if self.smooth is None else stored / self.smooth


def solve(
    weight: np.ndarray,
    method: str = "loraq",
    main: "str | Format" = "int4/g64",
    branch: "str | Format | None" = "int8/g32",
    rank: int | None = None,
    budget: str | None = None,
    preset: str = "balanced",
    activations: np.ndarray | None = None,
    smooth: "float | np.ndarray | None" = None,
    seed: int = 0,
    device: str = "cpu",
    shared: SharedStages | None = None,
) -> Solution:
    """Split `weight` into a quantized main branch and a quantized low-rank branch.

    Parameters
    ----------
    weight : ndarray of shape (N, K), floating
        Finite. Not modified.
    method : str
        One of `METHODS`; ``l2qer`` and ``qera`` need `activations`.
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
        See `loraq_sim.solvers.smoothing`.
    seed : int
        Seeds the randomized factorization. Same seed, same bytes.
    device : str
        ``"cpu"``.
    shared : SharedStages, optional
        Stages kept from earlier solves of the same weight; see `loraq_sim.solvers.many`.

    Raises
    ------
    InputError
        If an argument breaks one of these rules; the message names it and its value.
    """
    started = time.perf_counter()
    weight = _checked_matrix(weight, "weight")
    if activations is not None:
        activations = _checked_matrix(activations, "activations")
        if activations.shape[1] != weight.shape[1]:
            raise InputError(
                f"activations have K={activations.shape[1]}, the weight K={weight.shape[1]}"
            )
    if method not in METHODS:
        raise InputError(unknown_name("method", method, METHODS))
    if preset not in PRESETS:
        raise InputError(unknown_name("preset", preset, PRESETS))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be an integer from 0, got {seed!r}")
    if device != "cpu":
        raise InputError(f"device must be 'cpu', got {device!r}")
    main = parse_format(main)
    branch = None if branch is None else parse_format(branch)
    rank = 0 if method == "rtn" else _resolve_rank(weight.shape, branch, rank, budget)
    factors = smoothing_vector(smooth, weight, activations)
    smoothed = weight if factors is None else weight * factors
    entering = activations if factors is None or activations is None else activations / factors
    if rank == 0:
        solved = round_to_nearest(smoothed, main)
    else:
        problem = Problem(
            weight=smoothed,
            main=main,
            branch=branch,
            rank=rank,
            effort=EFFORTS[preset],
            rng=np.random.default_rng(seed),
            activations=entering,
            is_smoothed=factors is not None,
            **({} if shared is None else _sharing(shared, smoothed, entering, main, preset, seed)),
        )
        solved = problem.shared.recall(
            ("solved", method, str(branch), rank, factors is None, *problem.shared_key),
            lambda: METHODS[method](problem),
        )
        factors = factors if solved.smooth is None else solved.smooth
    return _measured(solved, weight, factors, method if rank else "rtn", preset, seed, started)


def _sharing(
    shared: SharedStages,
    weight: np.ndarray,
    activations: np.ndarray | None,
    main: Format,
    preset: str,
    seed: int,
) -> dict[str, object]:
    arrays = (weight,) if activations is None else (weight, activations)
    digests = (array_key(array) for array in arrays)
    return {"shared": shared, "shared_key": (*digests, str(main), preset, seed)}


def _measured(
    solved: Branches,
    weight: np.ndarray,
    factors: np.ndarray | None,
    method: str,
    preset: str,
    seed: int,
    started: float,
) -> Solution:
    stored = solved.reconstruct()
    if factors is not None:
        stored /= factors
    return Solution(
        method=method,
        preset=preset,
        seed=seed,
        main=solved.main,
        left=solved.left,
        right=solved.right,
        smooth=factors,
        weight_error=relative_distance(weight, stored),
        trace=solved.trace,
        branch_noise=solved.branch_noise,
        seconds=time.perf_counter() - started,
    )


def _checked_matrix(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind != "f":
        raise InputError(
            f"{name} must be a non-empty floating 2-D array, got {array.dtype} of shape "
            f"{array.shape}"
        )
    array = np.ascontiguousarray(array, dtype=np.float32)
    n_bad = array.size - int(np.isfinite(array).sum())
    if n_bad:
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InputError(
            f"{name} holds {n_bad} NaN or Inf values; the first is {array[where]} at {where}"
        )
    largest = float(np.abs(array).max())
    if largest > _LARGEST:
        raise InputError(
            f"{name} reaches {largest:.3g}; beyond {_LARGEST:.3g} squares and products overflow "
            "float32: rescale the layer"
        )
    return array


def _resolve_rank(
    shape: tuple[int, int], branch: Format | None, rank: int | None, budget: str | None
) -> int:
    if rank is not None and budget is not None:
        raise InputError(f"give either rank or budget, got rank={rank} and budget={budget!r}")
    if branch is None:
        if rank or budget is not None:
            raise InputError("a rank or budget needs a branch format, got branch=None")
        return 0
    if budget is not None:
        return rank_for_budget(*shape, branch, budget)
    if rank is None:
        return min(_DEFAULT_RANK, *shape)
    if isinstance(rank, bool) or int(rank) != rank or not 0 <= rank <= min(shape):
        raise InputError(
            f"rank must be an integer from 0 to min(N, K) = {min(shape)}, got {rank!r}"
        )
    return int(rank)
