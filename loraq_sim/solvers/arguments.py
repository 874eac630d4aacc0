"""What `solve` accepts: matrices that can be solved, names that exist, a rank that fits."""

import numpy as np

from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format
from loraq_sim.layers import as_array, is_floating
from loraq_sim.solvers.budget import rank_for_budget

__all__ = ["BRANCH_ROTATIONS", "check_names", "checked_matrix", "resolve_rank"]

BRANCH_ROTATIONS = (None, "learned")

_DEFAULT_RANK = 64
_LARGEST = 2.0**48


def checked_matrix(values: np.ndarray, name: str) -> np.ndarray:
    """`values` as a finite C-contiguous float32 matrix; an error names what is wrong with it."""
    try:
        array = as_array(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be an array, got {type(values).__name__}: {error}") from None
    if array.ndim != 2 or 0 in array.shape or not is_floating(array.dtype):
        raise InputError(
            f"{name} must be a non-empty floating 2-D array, got {array.dtype} of shape "
            f"{array.shape}"
        )
    # What lies beyond float32 becomes inf here and is reported below.
    with np.errstate(over="ignore"):
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


def check_names(
    method: str,
    methods: tuple[str, ...],
    preset: str,
    presets: tuple[str, ...],
    seed: int,
    branch_rotation: str | None,
) -> None:
    """Raise InputError for the first argument of `solve` that is no choice."""
    if method not in methods:
        raise InputError(unknown_name("method", method, methods))
    if preset not in presets:
        raise InputError(unknown_name("preset", preset, presets))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed must be an integer from 0, got {seed!r}")
    if branch_rotation not in BRANCH_ROTATIONS:
        raise InputError(f"branch_rotation must be None or 'learned', got {branch_rotation!r}")


def resolve_rank(
    shape: tuple[int, int], branch: Format | None, rank: int | None, budget: str | None
) -> int:
    """The rank that `rank`, `budget` or neither asks for; 0 without a branch."""
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
