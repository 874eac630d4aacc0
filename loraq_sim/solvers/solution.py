"""A solved layer: what is stored, what it costs, how close it is, and why it is no closer.

`Solution` holds the stored parts and counts their bytes; `Diagnostics` says what limits it: the
ranges of the groups, what a larger rank could still win, and the noise of the rounded branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from loraq_sim.conditioning import rotate_channels
from loraq_sim.errors import InputError
from loraq_sim.quantizers import QuantizedTensor
from loraq_sim.quantizers.tensor import as_rows, group_ends
from loraq_sim.solvers.problem import Branches, Trace, product
from loraq_sim.solvers.residual import with_residual_input
from loraq_sim.split import PrecisionSplit, grid_letter

__all__ = [
    "QUANTIZED_PARTS",
    "Diagnostics",
    "Solution",
    "check_inputs",
    "share_out",
    "transforms_in_words",
]

QUANTIZED_PARTS = ("main", "left", "right", "feedback", "feedback_left")
"""Tensors that a solution may hold in codes, in the order they are stored."""

# Ranks at which the share of the remaining error that they could carry is reported.
_RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Measures of one solution of one weight.

    ``amax_over_rms_before`` and ``_after`` are means over the scale groups of W and of what the
    main branch rounds, W - L R (1.7 for uniform, about 2.6 for 64 normal values); ``residual_norm``
    is ||W - L R|| / ||W||. ``left_to_win`` maps a rank r to the share of ||W - Q - L R||_F^2 in its
    r largest singular values: what an unquantized branch of r more components would remove.
    ``max_abs_error`` is in units of the weight; ``branch_noise`` is
    ||stored L R - L R||_F / ||W||_F where the method knows it.
    """

    amax_over_rms_before: float
    amax_over_rms_after: float
    residual_norm: float
    left_to_win: dict[int, float]
    max_abs_error: float
    branch_noise: float | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Solution:
    """A solved layer: stored branches, what they cost and how close they are.

    ``main`` is (N, K), ``left`` (N, r_w), ``right`` (r_w, K); the factors are None where r_w is 0.
    With a residual input (`loraq_sim.solvers.residual`) ``feedback`` holds the directions V
    (r_f, K) and ``feedback_left`` what they contribute, L_f (N, r_f).
    ``smooth`` is (K,) float32 or None and ``rotation`` a block size or None: the branches
    approximate W diag(smooth) H, with H the block Hadamard matrix of `conditioning`; at run
    time the activations are divided by ``smooth``, then rotated. ``grid`` is the letter of the grid
    that was chosen for what the main branch rounds (``""``, ``"s"`` or ``"u"`` behind A4), None
    where a split says it. ``weight_error`` is
    ||W - reconstruct()||_F / ||W||_F in the original weight. ``trace`` holds (stage, iteration,
    error) in order; ``seconds`` is wall time. ``branch_noise`` is what rounding did to the branch,
    relative to the weight, where known. ``charged`` maps parts that several layers hold in common
    (``right``, ``feedback``, ``smooth``) to this layer's share of their bytes: see `solve_group`.
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
    rotation: int | None = None
    grid: str | None = None
    feedback: QuantizedTensor | None = None
    feedback_left: QuantizedTensor | None = None
    charged: Mapping[str, int] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Rank of the branch, the components of the residual input included; 0 without one."""
        return self.weight_rank + self.feedback_rank

    @property
    def weight_rank(self) -> int:
        """Components of the branch that take up the weight's rounding, r_w."""
        return 0 if self.left is None else self.left.shape[1]

    @property
    def feedback_rank(self) -> int:
        """Components of the branch that the residual input spends, r_f; 0 without one."""
        return 0 if self.feedback is None else self.feedback.shape[0]

    @property
    def parts(self) -> dict[str, QuantizedTensor]:
        """The quantized tensors that are stored, by name."""
        found = {name: getattr(self, name) for name in QUANTIZED_PARTS}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def shared_by(self) -> int:
        """How many layers hold the right factor in common, and so X R^T; 1 for a layer alone.

        Of a branch that is all residual input, V is that factor.
        """
        return self._holders("feedback" if self.right is None else "right")

    @property
    def feedback_shared_by(self) -> int:
        """How many layers hold V in common, and so form one D; 1 for a layer alone."""
        return self._holders("feedback")

    def _holders(self, name: str) -> int:
        stored: QuantizedTensor | None = getattr(self, name)
        if stored is None or not self.charged.get(name):
            return 1
        # Even shares, so that the quotient is within a part in a thousand of the count.
        return max(1, round(stored.nbytes / self.charged[name]))

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Stored bytes of each part, scales and padding included; a share of common parts."""
        sizes = dict.fromkeys(("main", "left", "right"), 0)
        sizes |= {name: part.nbytes for name, part in self.parts.items()}
        sizes["smooth"] = 0 if self.smooth is None else 2 * self.smooth.size
        return sizes | dict(self.charged)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts (`pack()` of each writes exactly these)."""
        return sum(self.bytes_by_part.values())

    @property
    def bits_per_weight(self) -> float:
        """8 nbytes / (N K)."""
        return 8.0 * self.nbytes / (self.main.shape[0] * self.main.shape[1])

    def diagnose(self, weight: np.ndarray) -> Diagnostics:
        """Group ranges, spectrum of what is left and more, against the `weight` (N, K) solved.

        Takes about as long as one full singular value decomposition of the weight.

        Raises
        ------
        InputError
            If the shapes differ.
        """
        return _diagnose(self, weight)

    def __repr__(self) -> str:
        n, k = self.main.shape
        lines = [f"Solution of a {n} x {k} weight by {self.method} {self.preset}, seed {self.seed}"]
        rank = f"rank {self.rank}, " if self.rank else ""
        lines.append(f"{rank}weight error {self.weight_error:.3%}, {self.nbytes:,} bytes, "
                     f"{self.bits_per_weight:.3g} bits per weight")  # fmt: skip
        return "\n".join([*lines, *(f"{name}: {part!r}" for name, part in self.parts.items())])

    def _repr_html_(self) -> str:
        from loraq_sim.results.cards import solution_card

        return solution_card(self)

    def reconstruct(self) -> np.ndarray:
        """The weight as stored, (N, K) float32, rotation and smoothing undone."""
        stored = Branches(main=self.main, left=self.left, right=self.right).reconstruct()
        if self.feedback is not None and self.feedback_left is not None:
            stored = with_residual_input(stored, self.feedback, self.feedback_left)
        if self.rotation is not None:
            stored = rotate_channels(stored, self.rotation)
        return stored if self.smooth is None else stored / self.smooth


def _diagnose(solution: Solution, weight: np.ndarray) -> Diagnostics:
    if weight.shape != solution.main.shape:
        raise InputError(
            f"the solution is of a weight of shape {solution.main.shape}, got {weight.shape}"
        )
    smoothed = np.asarray(weight, dtype=np.float32)
    if solution.smooth is not None:
        smoothed = smoothed * solution.smooth
    if solution.rotation is not None:
        smoothed = rotate_channels(smoothed, solution.rotation)
    rest = smoothed
    if solution.left is not None and solution.right is not None:
        rest = smoothed - product(solution.left, solution.right)
    error = rest - solution.main.dequantize()
    squares = np.square(np.linalg.svd(error, compute_uv=False).astype(np.float64))
    total = float(squares.sum()) or 1.0
    fmt = solution.main.by_rows().format
    original = error if solution.rotation is None else rotate_channels(error, solution.rotation)
    unsmoothed = original if solution.smooth is None else original / solution.smooth
    size = float(np.linalg.norm(smoothed)) or 1.0
    return Diagnostics(
        amax_over_rms_before=_amax_over_rms(*as_rows(np.ascontiguousarray(smoothed), fmt)),
        amax_over_rms_after=_amax_over_rms(*as_rows(rest, fmt)),
        residual_norm=float(np.linalg.norm(rest)) / size,
        left_to_win={r: float(squares[:r].sum()) / total for r in _RANKS if r <= len(squares)},
        max_abs_error=float(np.abs(unsmoothed).max()),
        branch_noise=solution.branch_noise,
    )


def _amax_over_rms(rows: np.ndarray, group: int) -> float:
    """Mean over groups that are not all zero; 0 if all are."""
    amax = group_ends(rows, group).amax.astype(np.float64)
    starts = np.arange(0, rows.shape[1], group)
    counts = np.diff(np.append(starts, rows.shape[1]))
    squares = np.add.reduceat(np.square(rows, dtype=np.float64), starts, axis=1)
    rms = np.sqrt(squares / counts)
    used = rms > 0
    return float((amax[used] / rms[used]).mean()) if used.any() else 0.0


def share_out(solutions: dict[str, Solution], common: tuple[str, ...]) -> dict[str, Solution]:
    """Charge each member an even share of the common parts; the first ones take the remainder."""
    count = len(solutions)
    return {
        name: replace(
            solution,
            charged={
                part: solution.bytes_by_part[part] // count
                + (place < solution.bytes_by_part[part] % count)
                for part in common
                if solution.bytes_by_part.get(part)
            },
        )
        for place, (name, solution) in enumerate(solutions.items())
    }


def transforms_in_words(solution: Solution, split: PrecisionSplit) -> list[str]:
    """What is done to the input before it is rounded, and the grid where one was chosen."""
    words = [] if solution.rotation is None else [f"hadamard:{solution.rotation}"]
    words += [] if solution.smooth is None else ["smoothing"]
    if solution.grid is not None:
        words.append(f"A{split.main_activation.element.bits}{solution.grid}")
    return words


def check_inputs(solution: Solution, split: PrecisionSplit, name: str) -> None:
    """Raise InputError where the split does not say what the solution does to the input."""
    grid, said = solution.grid, grid_letter(split.main_activation, split.main_rule)
    if grid is not None and said not in (grid, "a"):
        bits = split.main_activation.element.bits
        raise InputError(
            f"layer {name!r}: split {split} rounds inputs as A{bits}{said}, the solution was made "
            f"for A{bits}{grid}; write A{bits}a for whatever the solution has"
        )
    spent, asked = solution.feedback_rank, split.feedback
    if (asked is None and spent) or (isinstance(asked, int) and asked != spent):
        told = f"its residual input takes {spent} components" if spent else "it has none"
        raise InputError(
            f"layer {name!r}: split {split} does not say what the solution does to the input: "
            f"{told}; write for example W4A4~W8A8r{max(solution.rank, 1)}f{max(spent, 1)}, or ~ "
            "without f for whatever the solution has"
        )
