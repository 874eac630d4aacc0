"""Smoothing, rotation and input grid of a layer chosen by what they do to its output, or by a rule.

Rotation trades outliers of few channels for a little more of all; smoothing moves them into the
weight, whose rounding they then enter. What is best depends on the layer: ``condition="auto"``
compares none, the closed form of `loraq_sim.conditioning.balanced_smoothing` and SmoothQuant's
strength 0.5, each as it is and rotated by the largest block Hadamard matrix; where the grid of the
main branch's inputs is left open (``A4a``), each of them symmetric, with signed scales and with
zero points. The closed form balances what the main branch rounds, W - L R and, with a residual
input, D: what the branch carries is not rounded to few bits, and need not be smoothed
(`_smoothing_of_the_rest`; of float elements W and X themselves are balanced). Against balancing W
and X, output errors are 1 to 10 % lower.

What is compared is the output of rows X left out of the statistics
(`loraq_sim.solvers.residual.simulated_output`), with L R = SVD_r(W), rounded, and, for what a
solver makes of the main branch,

    V - g (V - round(V)),     V = W - L R,

all of the smoothed and rotated W. g stands for the share of the rounding error that a solver leaves
(`loraq`: 0.35 to 0.5), so that nothing needs to be solved for the comparison. Where the layer may
have a residual input (`loraq_sim.solvers.residual`), a quarter of the rank is tried on it, too, and
what is best with it is a second candidate beside what is best without.

Without activations, or with too few, inputs of up to four bits are rotated and all others are left
as they are: a rotation never needs data, and four bits cannot hold an outlier and the rest. They
are smoothed, too, as if all channels were equally loud: nothing is known of X, but what is rounded
of W is, and the closed form makes the most of it (errors fall by 4 to 5 % on transformers, not at
all to 1 % on others). A grid that is left open has zero points then: of rotated inputs on real
layers they lose least. Patches of 3 x 3 convolutions are what a rotation is wrong for (errors 1.5
times as large on those of a U-Net): neighbors are alike, and a Hadamard matrix gathers what is
alike in few channels. `loraq_sim.evaluate` excludes it for layers of such a kind.

What a machine lacks is left out of the comparison (`CHOICES`).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraq_sim.conditioning import (
    balanced_smoothing,
    check_condition,
    hadamard_block,
    power_smoothing,
    rotate_channels,
    smoothing_vector,
)
from loraq_sim.errors import InputError, unknown_name
from loraq_sim.formats import Format
from loraq_sim.quantizers import quantize
from loraq_sim.solvers.branch import round_factors
from loraq_sim.solvers.low_rank import truncated_svd
from loraq_sim.solvers.residual import (
    InputGrid,
    Operands,
    ResidualInput,
    principal_directions,
    residual_input,
    simulated_output,
)
from loraq_sim.split import AUTO, unsigned

__all__ = [
    "CHOICES",
    "FEW_BITS",
    "NOBODY_CHOOSES",
    "Condition",
    "EnteringFormats",
    "conditions_to_try",
]

CHOICES = ("hadamard", "smooth", "zero_points")
"""What a condition may choose, each of which a machine may lack."""

NOBODY_CHOOSES = (
    "who chooses the grid of inputs that is left open (A4a)? Give condition='auto', or write A4, "
    "A4s (signed scales) or A4u (zero points)"
)

FEW_BITS = 4
"""Inputs of so many bits or fewer make more of a layer's error than its weights do."""

_GAIN = np.float32(0.4)
# Fewer rows say little of channels; more than the second number say the same.
_LEAST_ROWS = 32
_MOST_ROWS = 1024
_FOLDS = 4
# What costs work at run time has to gain more than this, within which a trial and a solver differ.
_WORTH = 0.03
# One component in so many is tried on a residual input.
_PART_TRIED = 4
# Blocks that are too short spread nothing.
_LEAST_BLOCK = 8
# Balancing moves what the branch carries, and that what is to be balanced: twice is enough.
_PASSES = 2

Smooth = float | NDArray[np.float32] | None


class Condition(NamedTuple):
    """What is done to the inputs of a layer, and the grid that the main branch rounds them to."""

    rotate: str | None
    smooth: Smooth
    into_main: InputGrid


@dataclass(frozen=True, kw_only=True)
class EnteringFormats:
    """What the weights of both branches, and their inputs, are rounded to."""

    main: Format
    branch: Format | None
    into_main: InputGrid
    into_branch: InputGrid


def conditions_to_try(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32] | None,
    condition: str | None,
    *,
    rotate: str | None,
    smooth: Smooth,
    formats: "EnteringFormats",
    rank: int,
    may_deflate: bool,
    excluded: Collection[str] = (),
) -> list[Condition]:
    """`rotate`, `smooth` and the input grid with what `condition` makes of those left open.

    One choice, or two where a residual input may make another one the better.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    activations : ndarray of shape (T, K), float32, optional
    condition : None, "auto" or "rms"
    rotate, smooth
        As for `loraq_sim.solve`; what is given stays.
    formats : EnteringFormats
        The grid is left open by the rule ``auto``.
    rank : int
        Of the branch; 0 without one.
    may_deflate : bool
        Whether the layer may have a residual input.
    excluded : collection of str
        Of `CHOICES`, what is not to be chosen.

    Raises
    ------
    InputError
        If `condition` is none of these, asks for statistics of activations that are not there, or
        can choose nothing of what it must.
    """
    check_condition(condition)
    for name in excluded:
        if name not in CHOICES:
            raise InputError(unknown_name("choice of a condition", name, CHOICES))
    grids = _grids(formats.into_main, condition, excluded)
    if condition is None:
        return [Condition(rotate, smooth, grids[0])]
    if condition == "rms":
        if activations is None:
            raise InputError(
                "condition='rms' smooths by the root mean squares of activations; pass "
                "activations=, or use rotate='hadamard', which needs none"
            )
        found = balanced_smoothing(weight, activations) if smooth is None else smooth
        return [Condition(rotate, found, grids[0])]
    block = None if "hadamard" in excluded else _rotatable(weight.shape[1])
    if activations is None or len(activations) < _LEAST_ROWS:
        is_coarse = formats.into_main[0].element.bits <= FEW_BITS
        if is_coarse and block and rotate is None:
            rotate = "hadamard"
        if is_coarse and smooth is None and "smooth" not in excluded:
            alike = np.ones((1, weight.shape[1]), dtype=np.float32)
            smooth = _smoothing_of_the_rest(weight, alike, rank, 0)
        return [Condition(rotate, smooth, grids[-1])]
    smoothings = [smooth] if smooth is not None or "smooth" in excluded else None
    turned = ["hadamard"] if block else []
    rotations: list[str | None] = [None, *turned] if rotate is None else [rotate]
    trial = _Trial(weight, formats, grids, rank, may_deflate)
    return _best(weight, activations, smoothings, rotations, trial)


def _grids(asked: InputGrid, condition: str | None, excluded: Collection[str]) -> list[InputGrid]:
    """The grids to compare, the plainest first: one, or all of the width of `asked`."""
    fmt, rule = asked
    if rule != AUTO:
        return [asked]
    if condition != "auto":
        raise InputError(NOBODY_CHOOSES)
    if not fmt.element.is_integer or not fmt.element.is_signed or fmt.element.block is not None:
        raise InputError(
            f"the grid of inputs can be left open for symmetric integers, got {fmt}; write the "
            "format alone"
        )
    grids: list[InputGrid] = [(fmt, "absmax"), (fmt, "signed_absmax")]
    if "zero_points" not in excluded:
        grids.append((unsigned(fmt), "absmax"))
    return grids


def _rotatable(k: int) -> int | None:
    block = k & -k
    return block if block >= _LEAST_BLOCK else None


def _best(
    weight: NDArray[np.float32],
    activations: NDArray[np.float32],
    smoothings: list[Smooth] | None,
    rotations: list[str | None],
    trial: "_Trial",
) -> list[Condition]:
    count = min(len(activations), _MOST_ROWS)
    rows = activations[np.arange(count) * len(activations) // count]
    left_out = np.arange(count) % _FOLDS == _FOLDS // 2
    seen, unseen = rows[~left_out], rows[left_out]
    choices: list[Condition] = []
    errors: list[tuple[float, float]] = []
    given = [(each, False) for each in smoothings or ()]
    for (of_seen, is_for_rest), (of_all, _) in zip(
        given or trial.smoothings(seen), given or trial.smoothings(rows), strict=True
    ):
        factors = smoothing_vector(of_seen, weight, seen)
        for turn in rotations:
            choices += [Condition(turn, of_all, grid) for grid in trial.grids]
            found = trial.errors(seen, unseen, factors, turn)
            # Without a residual input, the choice is that of a layer that may not have one.
            errors += [(np.inf, either) for _, either in found] if is_for_rest else found
    plain, either = (_clearly_least(each) for each in zip(*errors, strict=True))
    return [choices[i] for i in dict.fromkeys((plain, either))]


def _clearly_least(errors: Iterable[float]) -> int:
    """The plainest comes first, and yields to what is clearly better."""
    least, best = np.inf, 0
    for i, error in enumerate(errors):
        if error < least * (1 - _WORTH):
            least, best = error, i
    return best


def _smoothing_of_the_rest(
    weight: NDArray[np.float32], x: NDArray[np.float32], rank: int, spent: int
) -> NDArray[np.float32]:
    """Balanced factors, (K,), for what a branch of `rank` leaves, `spent` of it on the inputs."""
    factors = balanced_smoothing(weight, x)
    own = rank - spent
    if not 0 < own < min(weight.shape):
        own = 0
    if not own and not spent:
        return factors
    for _ in range(_PASSES):
        main, rest = weight * factors, x / factors
        if own:
            rng = np.random.default_rng(0)
            left, right = truncated_svd(main, own, rng=rng, power_iterations=1)
            main = main - left @ right
        if spent:
            rows = principal_directions(rest, spent, np.random.default_rng(0))
            rest = rest - (rest @ rows.T) @ rows
        factors = balanced_smoothing(main / factors, rest * factors)
    return factors


@dataclass(frozen=True)
class _Trial:
    """About what a solver leaves of the output of a layer, without solving."""

    weight: NDArray[np.float32]
    formats: EnteringFormats
    grids: list[InputGrid]
    rank: int
    may_deflate: bool

    def _spent(self, n_rows: int) -> int:
        """Components that are tried on a residual input whose directions are told by `n_rows`."""
        if not self.may_deflate or self.formats.branch is None:
            return 0
        return min(self.rank // _PART_TRIED, n_rows, self.weight.shape[1])

    def smoothings(self, x: NDArray[np.float32]) -> list[tuple[Smooth, bool]]:
        """The smoothings to compare, made of rows `x`, the plainest first.

        With each whether it is one for what a residual input leaves.
        """
        # Of few rows, directions take most: what is left of them is not what is left of others.
        rank, spent = self.rank, min(self._spent(len(x)), len(x) // _PART_TRIED)
        if not self.formats.into_main[0].element.is_integer:
            # Floats lose of each value a share of its own: there is no range to be balanced.
            rank = spent = 0
        return [
            (None, False),
            *(
                (_smoothing_of_the_rest(self.weight, x, rank, each), each > 0)
                for each in dict.fromkeys((0, spent))
            ),
            (power_smoothing(0.5, 0.5, self.weight, x, trust_quiet=False), False),
        ]

    def errors(
        self,
        seen: NDArray[np.float32],
        x: NDArray[np.float32],
        factors: NDArray[np.float32] | None,
        rotate: str | None,
    ) -> list[tuple[float, float]]:
        """By grid, the error for rows `x`, and the lesser of it and that with a residual input.

        All are smoothed and rotated; directions are those of `seen`.
        """
        weight = self.weight
        if factors is not None:
            weight, seen, x = weight * factors, seen / factors, x / factors
        block = hadamard_block(rotate, weight.shape[1])
        if block is not None:
            weight, seen, x = (rotate_channels(rows, block) for rows in (weight, seen, x))
        left, right = weight[:, :0], weight[:0]
        if self.rank:
            left, right = truncated_svd(
                weight, self.rank, rng=np.random.default_rng(0), power_iterations=1
            )
        wanted = x @ weight.T
        tried: list[tuple[ResidualInput | None, Operands]] = [
            (None, self._solved(weight, left, right))
        ]
        spent = self._spent(len(seen))
        if spent and self.formats.branch is not None:
            own, rng = self.rank - spent, np.random.default_rng(0)
            deflation = residual_input(weight, seen, spent, self.formats.branch, rng)
            tried.append((deflation, self._solved(weight, left[:, :own], right[:own])))
        found = []
        for grid in self.grids:
            missed = [
                simulated_output(x, operands, deflation, grid, self.formats.into_branch) - wanted
                for deflation, operands in tried
            ]
            sizes = [float(np.linalg.norm(each)) for each in missed]
            found.append((sizes[0], min(sizes)))
        return found

    def _solved(
        self, weight: NDArray[np.float32], left: NDArray[np.float32], right: NDArray[np.float32]
    ) -> Operands:
        if not len(right) or self.formats.branch is None:
            return Operands(self._rounded(weight))
        sizes = np.linalg.norm(right, axis=1)
        # Sizes as `solvers.branch` shares them out: P is rounded in groups of components.
        in_left = np.where(sizes > 0, sizes, 1) ** np.float32(0.75)
        stored = round_factors(left * in_left, right / in_left[:, None], self.formats.branch)
        left, right = (part.dequantize() for part in stored)
        return Operands(self._rounded(weight - left @ right), left, right)

    def _rounded(self, rest: NDArray[np.float32]) -> NDArray[np.float32]:
        return rest - _GAIN * (rest - quantize(rest, self.formats.main).dequantize())
