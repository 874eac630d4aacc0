"""Solutions of layers that read the same input (q, k and v of one attention), branch in common.

Their weights are stacked along their rows and solved as one matrix of shape (sum N, K): one R and
one product X R^T serve all members, each has its own rows of L and of the main branch. This is how
SVDQuant and its engine treat q, k and v. Against one branch each of the same rank, R is stored and
computed once instead of once a member; at equal bytes the common branch has the larger rank, but
each of its components has to serve all members.

The directions V of a residual input are those of the input, whatever the weight: members have one V
and one D, with a branch in common or one each.
"""

import dataclasses
from collections.abc import Mapping
from typing import Unpack

import numpy as np

from loraq_sim.conditioning import CONDITIONS, as_stored, smoothing_vector
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.solvers.main_grid import take_rows
from loraq_sim.solvers.problem import checked_matrix, relative_distance
from loraq_sim.solvers.residual import feedback_outputs
from loraq_sim.solvers.solution import Solution, share_out
from loraq_sim.solvers.solve import CHOOSE_SMOOTHING, GroupOptions, solve

__all__ = ["SHARE_INPUTS", "solve_group"]

SHARE_INPUTS = ("own", "common")


def solve_group(
    weights: Mapping[str, np.ndarray],
    *,
    share: str = "common",
    activations: np.ndarray | None = None,
    smooth: "float | np.ndarray | None" = None,
    **options: Unpack[GroupOptions],
) -> dict[str, Solution]:
    """Solutions of layers that read the same input, by name, with one smoothing vector.

    Parameters
    ----------
    weights : mapping of name to ndarray of shape (N_i, K), floating
        The same K throughout. Not modified.
    share : str
        ``"common"``: one branch; `rank`, `budget` and `method` are those of the stacked weight, and
        ``right`` of all solutions is the same object. ``"own"``: one branch each; with
        ``feedback="auto"`` all spend as many components as the middle one of them chooses.
    activations : ndarray of shape (T, K), floating, optional
        The input of all members.
    smooth
        As for `solve`; a strength is turned into one vector, of the stacked weight.
    **options
        Further arguments of `solve`.

    Returns
    -------
    dict of name to Solution
        In the given order. Bytes of what is stored once (``smooth``, ``feedback``; with a common
        branch ``right``) are shared out evenly, so that `Solution.nbytes` of the members adds up
        to what is stored; see `Solution.charged`. ``trace`` and ``branch_noise`` of a common
        branch are those of the stacked weight, ``seconds`` an even share, ``weight_error`` of each
        member.

    Raises
    ------
    InputError
        If there is no member, the members differ in K, or a member or option breaks a rule of
        `solve`; what chooses a smoothing by `activations` needs ``share="common"`` or `smooth`.
    """
    if share not in SHARE_INPUTS:
        raise InputError(unknown_name("sharing of inputs", share, SHARE_INPUTS))
    checked = {name: checked_matrix(w, f"weight of {name!r}") for name, w in weights.items()}
    if not checked:
        raise InputError("a group of layers that share an input needs at least one member")
    widths = {name: weight.shape[1] for name, weight in checked.items()}
    if len(set(widths.values())) > 1:
        text = ", ".join(f"{name!r} has K={k}" for name, k in widths.items())
        raise InputError(f"layers that share an input must have the same K: {text}")
    if share == "own":
        solutions = _with_own_branches(checked, activations, smooth, options)
    else:
        stacked = np.concatenate(list(checked.values()))
        whole = solve(stacked, activations=activations, smooth=smooth, **options)
        solutions = _split(whole, checked)
    common = ("right", "feedback", "smooth") if share == "common" else ("feedback", "smooth")
    return share_out(solutions, common)


def _with_own_branches(
    weights: Mapping[str, np.ndarray],
    activations: np.ndarray | None,
    smooth: "float | np.ndarray | None",
    options: GroupOptions,
) -> dict[str, Solution]:
    method, condition = options.get("method"), options.get("condition")
    chooses = [f"method {method!r}"] if method in CHOOSE_SMOOTHING else []
    if condition in CONDITIONS:
        chooses.append(f"condition {condition!r}")
    if chooses and activations is not None and smooth is None:
        raise InputError(
            f"{chooses[0]} would choose another smoothing for each member of the group, but they "
            "read one input; use share='common', or give smooth="
        )
    if smooth is not None:
        smooth = smoothing_vector(smooth, np.concatenate(list(weights.values())), activations)

    def solved(weight: np.ndarray, options: GroupOptions) -> Solution:
        return solve(weight, activations=activations, smooth=smooth, **options)

    solutions = {name: solved(weight, options) for name, weight in weights.items()}
    chosen = sorted(s.feedback_rank for s in solutions.values())
    spent = chosen[len(chosen) // 2]
    if spent != chosen[0] or spent != chosen[-1]:
        fixed: GroupOptions = {**options, "feedback": spent or None}
        solutions = {
            name: s if s.feedback_rank == spent else solved(weights[name], fixed)
            for name, s in solutions.items()
        }
    # One object for all says that it is stored once.
    directions = next(iter(solutions.values())).feedback
    return {
        name: dataclasses.replace(s, smooth=smooth, feedback=directions)
        for name, s in solutions.items()
    }


def _split(whole: Solution, weights: Mapping[str, np.ndarray]) -> dict[str, Solution]:
    """Each member's rows of a solution of the stacked weight."""
    solutions, start = {}, 0
    for name, weight in weights.items():
        rows = slice(start, start + len(weight))
        start = rows.stop
        member = dataclasses.replace(
            whole,
            main=take_rows(whole.main, rows),
            left=None if whole.left is None else take_rows(whole.left, rows),
            feedback_left=_outputs_of(weight, whole),
            seconds=whole.seconds / len(weights),
        )
        error = relative_distance(weight, member.reconstruct())
        solutions[name] = dataclasses.replace(member, weight_error=error)
    return solutions


def _outputs_of(weight: np.ndarray, whole: Solution) -> QuantizedTensor | None:
    """A member's L_f; not rows of the stacked one, whose scales may serve rows of two members."""
    if whole.feedback is None or whole.feedback_left is None:
        return None
    turned, _ = as_stored(weight, None, whole.smooth, whole.rotation)
    return feedback_outputs(turned, whole.feedback, whole.feedback_left.format)
