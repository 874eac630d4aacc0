"""The stored branch: L and R rounded to their format so that the product loses least.

Groups of R run along K inside one row, so the row's size s is absorbed by its scales: for R it does
not matter where the singular values are, and L loses least where they are in R. But then the
components of P = X R^T differ by these sizes, and P is rounded with one scale for a group of
components, in which the small ones drown. `FrozenBranch` therefore divides the rows of R by
s**0.75 (or s**0.5, or leaves them, where L would lose more) and multiplies the columns of L by it:
the error of the weight stays as it is, that of outputs falls by 8 to 20 %.
After R is rounded, L = E R^T (R R^T)^-1 is the best left factor for what is stored;
refinements refit R against the stored L, and L against the stored R again (`round_branch`).

`FrozenBranch` rounds a branch part by part, so that the rest can make up for the rounding noise.
Components are taken by size, largest first: the noise of large ones then lies in what the main
branch and the small components still adapt to; only the noise of the last part stays. Or one factor
is pinned: the shorter one is rounded as a whole, and the other, which has more elements to make up
for it, is rounded part by part.

An orthogonal G between the factors, L R = (L G)(G^T R), leaves the product as it is, but not its
rounding (`learned_rotation`). G is found by turns, as in iterative quantization (Gong, Lazebnik,
CVPR 2011; LoRaQ proposes a learned rotation in the branch, its parametrization is not published):

    R^ <- round(G^T R)          nearest codes of the turned factor
    G  <- argmin ||G^T R - R^|| the orthogonal Procrustes solution, polar(R R^^T)

R alone decides: L is refitted to the rounded R afterwards, whatever G is. The turn of least loss is
returned, no turn at all among them. What it gains at the level of a weight is measured in
`docs/claims.md`: next to nothing, since groups of R run along the input channels, whose scales
already follow each row.
"""

import dataclasses

import numpy as np

from loraq_sim.formats import Format
from loraq_sim.quantizers import QuantizedTensor, quantize
from loraq_sim.solvers.low_rank import principal_factors
from loraq_sim.solvers.main_grid import main_scale_rule, requantize, stack_rows
from loraq_sim.solvers.problem import Branches

__all__ = ["FrozenBranch", "refit_left", "round_branch", "round_factors"]

Factors = tuple[QuantizedTensor, QuantizedTensor]

# Powers of the sizes of the components that L may take over, and how much more noise of the branch
# is next to none: it moves the error of the weight by less than half a percent.
_GAUGES = (0.75, 0.5)
_GAUGE_NOISE = 1.015
# Components further from the middle than this factor count as if they were at it.
_GAUGE_REACH = 64.0
_TURNS = 12
_REFINEMENTS = 2
_REFITS = 2
# Eigenvalues below this share of the largest are rounding noise of the float32 Gram matrix.
_RANK_CUTOFF = 1e-7


def round_branch(
    target: np.ndarray, right: np.ndarray, fmt: Format, rotation: str | None = None
) -> Factors:
    """Stored factors (left, right) whose product is close to `target`.

    Parameters
    ----------
    target : ndarray of shape (N, K), float32
        What the branch should carry.
    right : ndarray of shape (r, K), float32
        Row factor of the unquantized fit.
    fmt : Format
        Format of both factors: R in groups along K, L in groups along the rank.
    rotation : None or "learned"
        Whether R is turned first.
    """
    if rotation is not None:
        right = _learned_rotation(right, fmt).T @ right
    tried: list[tuple[float, Factors]] = []
    for refinement in range(_REFINEMENTS + 1):
        stored_right = quantize(right, fmt, rule="mse")
        rows = stored_right.dequantize()
        stored_left = quantize(_least_squares(target @ rows.T, rows @ rows.T), fmt, rule="mse")
        columns = stored_left.dequantize()
        tried.append((float(np.linalg.norm(target - columns @ rows)), (stored_left, stored_right)))
        if refinement < _REFINEMENTS:
            right = _least_squares(target.T @ columns, columns.T @ columns).T
    return min(tried, key=lambda trial: trial[0])[1]


def round_factors(
    left: np.ndarray, right: np.ndarray, fmt: Format, rotation: str | None = None
) -> Factors:
    """Stored factors close to `left` (N, r) and `right` (r, K), each rounded as it is.

    For fits in another metric than the Frobenius norm, which a refit would leave.
    """
    if rotation is not None:
        turn = _learned_rotation(right, fmt)
        left, right = left @ turn, turn.T @ right
    rule = None if fmt.element.is_plain_float else "mse"
    return quantize(left, fmt, rule=rule), quantize(right, fmt, rule=rule)


def refit_left(weight: np.ndarray, stored: Branches) -> Branches:
    """`stored` with L fitted to what its main branch leaves, and that branch's codes to the new L.

    Parameters
    ----------
    weight : ndarray of shape (N, K), float32
    stored : Branches
        With a branch; R and all scales of the main branch stay.
    """
    if stored.left is None or stored.right is None:
        return stored
    rows, fmt = stored.right.dequantize(), stored.left.format
    missed = weight - stored.main.dequantize()
    columns = _least_squares(missed @ rows.T, rows @ rows.T)
    left = quantize(columns, fmt, rule=main_scale_rule(fmt))
    main = requantize(weight - left.dequantize() @ rows, stored.main)
    return dataclasses.replace(stored, main=main, left=left)


class FrozenBranch:
    """Stored factors of a branch of `rank` in `fmt`; `unit` is what 1 in a descent is worth."""

    def __init__(
        self, n: int, rank: int, fmt: Format, unit: float, rotation: str | None = None
    ) -> None:
        self.rotation = rotation
        self.format = fmt
        self.rank = rank
        self.n_frozen = 0
        self.pinned: int | None = None
        self.noise = 0.0
        self._gauge: tuple[float, float] | None = None
        self._unit = np.float32(unit)
        self._columns = np.zeros((n, rank), dtype=np.float32)
        self._left: QuantizedTensor | None = None
        self._rows: list[QuantizedTensor] = []

    @property
    def can_freeze_parts(self) -> bool:
        """Whether parts of R can be rounded apart from each other: no scale spans its rows."""
        return not self.format.spans_rows

    def freeze(
        self, left: np.ndarray, right: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Round `count` more components of L R and return (stored L, R; free L, R).

        All are float32; the product of the first two is to be taken from the weight.
        """
        if self.pinned is not None:
            return self._freeze_pinned(left, right, count)
        left, right = self._gauged(*principal_factors(left, right))
        if self._left is None and count < self.rank:
            self._left = quantize(left, self.format, rule=main_scale_rule(self.format))
        stored_left, stored_right = self._round(*self._turned(left[:, :count], right[:count]))
        self.n_frozen += count
        free_left = np.ascontiguousarray(left[:, count:])
        return stored_left, stored_right, free_left, np.ascontiguousarray(right[count:])

    def pin(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Round the shorter factor of L R; returns it as stored, and the other refitted to it.

        Sets `pinned` to 0 for L or 1 for R. Nothing may be frozen before.
        """
        left, right = self._turned(*self._gauged(*principal_factors(left, right)))
        if len(left) >= right.shape[1]:
            self.pinned = 1
            rows, r_hat = self._rounded_rows(right)
            self._rows = [rows]
            l_hat = _least_squares(left @ (right @ r_hat.T), r_hat @ r_hat.T)
        else:
            self.pinned = 0
            self._left, l_hat = self._round_columns(left)
            r_hat = _least_squares(right.T @ (left.T @ l_hat), l_hat.T @ l_hat).T
            r_hat = np.ascontiguousarray(r_hat)
        self.noise = _distance(left, right, l_hat, r_hat)
        return l_hat, r_hat

    def _freeze_pinned(
        self, left: np.ndarray, right: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        l_hat, r_hat = np.ascontiguousarray(left[:, :count]), right[:count]
        if self.pinned == 0:
            rows, r_hat = self._rounded_rows(r_hat)
            self._rows.append(rows)
        else:
            if self._left is None:
                self._left = quantize(left, self.format, rule=main_scale_rule(self.format))
            self._left, l_hat = self._round_columns(l_hat)
            self._columns[:, self.n_frozen : self.n_frozen + count] = l_hat
        miss = _distance(left[:, :count], right[:count], l_hat, r_hat)
        self.noise = float(np.hypot(self.noise, miss))
        self.n_frozen += count
        free_left = np.ascontiguousarray(left[:, count:])
        return l_hat, r_hat, free_left, np.ascontiguousarray(right[count:])

    def _rounded_rows(self, rows: np.ndarray) -> tuple[QuantizedTensor, np.ndarray]:
        stored = quantize(rows * self._unit, self.format, rule=main_scale_rule(self.format))
        return stored, stored.dequantize() / self._unit

    def stored(self) -> Factors:
        """L (N, rank) and R (rank, K), once all components are frozen."""
        if self._left is None:
            raise ValueError(f"0 of {self.rank} components are frozen; freeze all of them first")
        return self._left, stack_rows(self._rows)

    def _gauged(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same product with a part of the sizes of the components in L instead of R.

        Parameters
        ----------
        left : ndarray of shape (N, r), float32, orthonormal columns
        right : ndarray of shape (r, K), float32, rows orthogonal to each other
        """
        if self.rotation is not None or self.format.element.is_plain_float:
            return left, right
        sizes = np.linalg.norm(right, axis=1).astype(np.float64)
        if self._gauge is None:
            # Parts that are frozen later keep to the unit and the power of the first.
            unit = float(np.exp(np.log(sizes[sizes > 0]).mean())) if sizes.any() else 1.0
            self._gauge = unit, self._largest_power(left, right, sizes / unit)
        unit, power = self._gauge
        moved = _moved(sizes / unit, power)
        return left * moved, right / moved[:, None]

    def _largest_power(self, left: np.ndarray, right: np.ndarray, relative: np.ndarray) -> float:
        """The most of the sizes that L can take at next to no more rounding noise in L R."""
        rule = main_scale_rule(self.format)
        rows = right * self._unit
        of_right = float(np.linalg.norm(quantize(rows, self.format, rule=rule).dequantize() - rows))
        sizes = np.linalg.norm(rows, axis=1).astype(np.float64)

        def noise(power: float) -> float:
            moved = _moved(relative, power)
            columns = left * moved
            lost = quantize(columns, self.format, rule=rule).dequantize() - columns
            of_left = np.linalg.norm(np.linalg.norm(lost, axis=0) * sizes / moved)
            return float(np.hypot(of_right, of_left))

        allowed = _GAUGE_NOISE * noise(0.0)
        return next((power for power in _GAUGES if noise(power) <= allowed), 0.0)

    def _turned(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.rotation is None:
            return left, right
        turn = _learned_rotation(right * self._unit, self.format)
        return left @ turn, turn.T @ right

    def _round(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tried: list[tuple[float, Factors, np.ndarray, np.ndarray]] = []
        rows = right
        for refit in range(_REFITS + 1):
            stored_rows, r_hat = self._rounded_rows(rows)
            # L R R^^T (R^ R^^T)^-1 without forming the (N, K) product L R.
            columns = _least_squares(left @ (right @ r_hat.T), r_hat @ r_hat.T)
            stored_left, l_hat = self._round_columns(columns)
            miss = _distance(left, right, l_hat, r_hat)
            tried.append((miss, (stored_left, stored_rows), l_hat, r_hat))
            if refit < _REFITS:
                rows = _least_squares(right.T @ (left.T @ l_hat), l_hat.T @ l_hat).T
        least, (self._left, stored_rows), l_hat, r_hat = min(tried, key=lambda trial: trial[0])
        self._columns[:, self.n_frozen : self.n_frozen + left.shape[1]] = l_hat
        self._rows.append(stored_rows)
        self.noise = float(np.hypot(self.noise, least))
        return l_hat, r_hat

    def _round_columns(self, columns: np.ndarray) -> tuple[QuantizedTensor, np.ndarray]:
        if self._left is None:
            stored = quantize(columns, self.format, rule=main_scale_rule(self.format))
            return stored, stored.dequantize()
        block = slice(self.n_frozen, self.n_frozen + columns.shape[1])
        trial = self._columns.copy()
        trial[:, block] = columns
        stored = requantize(trial, self._left)
        return stored, np.ascontiguousarray(stored.dequantize()[:, block])


def _moved(relative: np.ndarray, power: float) -> np.ndarray:
    """Factors of L's columns for components of `relative` sizes, (r,) float32."""
    near = np.clip(relative, 1 / _GAUGE_REACH, _GAUGE_REACH)
    return (near**power).astype(np.float32)


def _learned_rotation(right: np.ndarray, fmt: Format) -> np.ndarray:
    """Orthogonal G of shape (r, r), float32, for which round(G^T R) is closest to G^T R.

    Parameters
    ----------
    right : ndarray of shape (r, K), float32
        With the sizes of the components; the left factor orthonormal.
    fmt : Format
        Format the turned factor is rounded to.
    """
    rule = None if fmt.element.is_plain_float else "mse"
    turn = best = np.eye(len(right), dtype=np.float32)
    least = np.inf
    for _ in range(_TURNS):
        turned = turn.T @ right
        rounded = quantize(turned, fmt, rule=rule).dequantize()
        miss = float(np.linalg.norm(turned - rounded))
        if miss < least:
            best, least = turn, miss
        u, _, vt = np.linalg.svd(right @ rounded.T)
        turn = (u @ vt).astype(np.float32)
    return best


def _least_squares(moment: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """moment gram^+ for a symmetric positive semidefinite (r, r) `gram`, as float32.

    The pseudo-inverse keeps a factor row that was rounded to zero, or repeats another, solvable.
    """
    inverse = np.linalg.pinv(gram.astype(np.float64), rcond=_RANK_CUTOFF, hermitian=True)
    return np.ascontiguousarray(moment @ inverse, dtype=np.float32)


def _distance(
    left: np.ndarray, right: np.ndarray, other_left: np.ndarray, other_right: np.ndarray
) -> float:
    """||L R - L' R'||_F from Gram matrices in float64."""
    a = np.hstack([left, other_left]).astype(np.float64)
    b = np.vstack([right, -other_right]).astype(np.float64)
    return float(np.sqrt(max(np.sum((a.T @ a) * (b @ b.T)), 0.0)))
