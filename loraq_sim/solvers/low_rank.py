"""Low-rank factors, and where the long loops that move them run: the CPU, or a GPU through torch.

The algorithms are written once, for arrays that know ``@``, ``.T`` and ``+=``. A `Device` holds the
arrays and knows the `Directions` of a descent of `loraq`: matrices D (N, K) along which the product
P = L R of a branch moves, from the Numba kernels here and formula by formula the same in
`loraq_sim.solvers.torch_directions`. Everything that is stored or reported is rounded and measured
on the CPU whatever the device. Where a processor multiplies bfloat16 natively (AVX512-BF16, AMX),
the products of a descent on a large weight are taken in it (`DirectionsInBf16`): they only say
where to go, so that their 8 bits leave the error as it is.

`descend` moves both factors along a direction D of shape (N, K) for their product P = L R. With
V = (R R^T)^(-1/2) R, the part of D that L can follow is D V^T, and the step of L is the orthogonal
factor of it (the nearest matrix with orthonormal columns), so that P moves by equally much along
each of its components; likewise for R:

    L += stride * polar(D V^T) (R R^T)^(-1/2)       R += stride * (L^T L)^(-1/2) polar(U^T D)

Neither the sizes of the components nor how they are split between L and R enter, which an
element-wise rule such as Adam would see: one stride, relative to ||W - L R||, serves flat spectra
and steep ones. Against Adam at equal steps the error is 5 to 10 % lower. Orthogonalized momentum:
Jordan et al., "Muon", 2024 (https://kellerjordan.github.io/posts/muon); scaling by Gram matrices:
Tong, Ma, Chi, "Accelerating ill-conditioned low-rank matrix estimation via scaled gradient
descent", JMLR 22 (2021). Nesterov's form of momentum matters here: without it the error is 8 %
higher.

`truncated_svd` gives the best rank-r approximation: exact for small matrices, by randomized
subspace iteration otherwise (Halko, Martinsson, Tropp, "Finding structure with randomness", SIAM
Review 53 (2011), algorithm 4.4).
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from loraq_sim.kernels.processor import multiplies_bf16
from loraq_sim.solvers.main_grid import MainGrid

__all__ = [
    "CPU",
    "Device",
    "Directions",
    "DirectionsInBf16",
    "HELD_REFINING",
    "Projections",
    "balanced_factors",
    "descend",
    "held_share",
    "principal_factors",
    "project_exactly",
    "truncated_svd",
]


class Directions(Protocol):
    """Directions for one weight W and one main grid; factors and D are arrays of one device.

    A returned D is scratch: it holds until the next call, for the same factors, and perhaps as what
    `project` needs of it.
    """

    def distance(self, left: Any, right: Any) -> float:
        """||W - L R||_F."""

    def flatten(self, left: Any, right: Any, doublings: int) -> Any:
        """Towards smaller ranges of the groups of W - L R, by the norm of power 2**doublings."""

    def leave(self, left: Any, right: Any, step: int) -> Any:
        """The error that rounding leaves of W - L R; its scales follow from call to call."""

    def project(self, left: Any, right: Any, toward: Any, moving: tuple[int, ...]) -> list[Any]:
        """What each factor can follow of a direction D: see `Projections`."""

    def finish(self) -> list[float]:
        """Hand the scales back to the main grid; the Frobenius norms of what was left."""


Projections = Callable[[Any, Any, Any, tuple[int, ...]], list[Any]]
"""Called with L, R, a direction D (N, K) and which factors move: R D^T for 0 (L), L^T D for 1."""


def project_exactly(left: Any, right: Any, toward: Any, moving: tuple[int, ...]) -> list[Any]:
    """`Projections` in the arithmetic of the arrays."""
    return [left.T @ toward if i else right @ toward.T for i in moving]


# What is left of a weight, as a share of what flattens it, and of what rounding leaves of it: in a
# direction that holds it small, too. Flat optima: half or twice as much is 1 % worse.
HELD_FLATTENING = 2.0
HELD_REFINING = 0.03


class _CpuDirections:
    """`Directions` in NumPy; the scales are those of `grid` itself."""

    def __init__(self, rest: np.ndarray, grid: MainGrid, holds: bool = False) -> None:
        self._rest = rest
        self._grid = grid
        self._holds = holds
        self._norms: list[float] = []

    @functools.cached_property
    def _buffer(self) -> np.ndarray:
        return np.empty_like(self._rest)

    def distance(self, left: np.ndarray, right: np.ndarray) -> float:
        product = np.matmul(left, right, out=self._buffer)
        return float(np.linalg.norm(np.subtract(self._rest, product, out=product)))

    def flatten(self, left: np.ndarray, right: np.ndarray, doublings: int) -> Any:
        from loraq_sim.kernels.quantize import range_direction

        def turn(block: slice, product: np.ndarray) -> float:
            held = self._rest[block] - product if self._holds else None
            (rest, group), (rows, _) = self._grid.rows(self._rest[block]), self._grid.rows(product)
            range_direction(rest, rows, group, doublings, np.float32(self._grid.center_offset))
            if held is not None:
                product += held_share(np.linalg.norm(product), np.linalg.norm(held)) * held
            return 0.0

        return self._through(left, right, turn)[0]

    def leave(self, left: np.ndarray, right: np.ndarray, step: int) -> Any:
        def turn(block: slice, product: np.ndarray) -> float:
            held = self._rest[block] - product if self._holds else None
            norm = self._grid.leave(self._rest[block], product, step, block)
            if held is not None:
                product += np.float32(HELD_REFINING) * held
            return norm

        toward, norm = self._through(left, right, turn)
        self._norms.append(norm)
        return toward

    def project(
        self, left: np.ndarray, right: np.ndarray, toward: Any, moving: tuple[int, ...]
    ) -> list[np.ndarray]:
        return project_exactly(left, right, toward, moving)

    def finish(self) -> list[float]:
        return self._norms

    def _through(
        self, left: np.ndarray, right: np.ndarray, turn: Callable[[slice, np.ndarray], float]
    ) -> tuple[Any, float]:
        """The direction that `turn` makes of rows of L R, in place, and the norm it returns."""
        np.matmul(left, right, out=self._buffer)
        return self._buffer, turn(slice(None), self._buffer)


def held_share(flat: Any, held: Any) -> np.float32:
    """What to multiply W - L R of norm `held` with in a direction of norm `flat` that flattens."""
    return np.float32(HELD_FLATTENING * float(flat) / (float(held) or 1.0))


# Rows whose product and direction stay in the caches of a core from one pass to the next.
_ROWS_AT_ONCE = 384
# What is left of a weight, as a share of it, from which on a product may have 8 bits: their noise
# is 2**-9 of L R, that of rounding to four bits about a tenth of what is left, and 5 % of noise
# leaves a direction as it is.
_LEAST_LEFT = 0.25


class DirectionsInBf16(_CpuDirections):
    """The same, of products of bfloat16 values; sums are kept in float32.

    Directions are made of one block of rows of L R after the other, and are returned as their
    projections: a whole one would be written to memory and read twice. Where next to nothing of the
    weight is left, the product has all of its bits.
    """

    def __init__(self, rest: np.ndarray, grid: MainGrid, holds: bool, moving: tuple[int, ...]):
        super().__init__(rest, grid, holds)
        self._moving = moving
        self._is_coarse = False

    def distance(self, left: np.ndarray, right: np.ndarray) -> float:
        left_over = super().distance(left, right)
        self._is_coarse = left_over >= _LEAST_LEFT * float(np.linalg.norm(self._rest))
        # Peak memory: blocks need no product of the whole.
        del self._buffer
        return left_over

    def project(
        self, left: np.ndarray, right: np.ndarray, toward: Any, moving: tuple[int, ...]
    ) -> list[np.ndarray]:
        return [toward[i] for i in moving]

    def _through(
        self, left: np.ndarray, right: np.ndarray, turn: Callable[[slice, np.ndarray], float]
    ) -> tuple[Any, float]:
        import torch

        (n, k), rank = self._rest.shape, len(right)
        height = _ROWS_AT_ONCE if self._grid.is_in_rows else n
        product, squares = np.empty((height, k), np.float32), 0.0
        scratch = torch.empty((height, k), dtype=torch.bfloat16)
        of_right = torch.empty((n, rank), dtype=torch.bfloat16)
        of_left = torch.zeros((rank, k), dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            columns, rows = (torch.from_numpy(factor).bfloat16() for factor in (left, right))
            for start in range(0, n, height):
                block = slice(start, min(start + height, n))
                part, toward = product[: block.stop - start], scratch[: block.stop - start]
                in_full = torch.from_numpy(part)
                if self._is_coarse:
                    in_full.copy_(torch.mm(columns[block], rows, out=toward))
                else:
                    np.matmul(left[block], right, out=part)
                squares += turn(block, part) ** 2
                toward.copy_(in_full)
                if 0 in self._moving:
                    torch.mm(toward, rows.T, out=of_right[block])
                if 1 in self._moving:
                    of_left += torch.mm(columns[block].T, toward)
        return (of_right.float().numpy().T, of_left.numpy()), math.sqrt(squares)


# Elements of a weight from which descents multiply bfloat16 values where the processor can.
_LEAST_IN_BF16 = 2**20


class Device(Protocol):
    """Arrays and directions of one processor; all but `name` inside ``with device.working():``."""

    name: str

    def working(self) -> contextlib.AbstractContextManager[None]:
        """Keep float32 products exact to float32, and turn a full memory into an InputError."""

    def put(self, array: np.ndarray) -> Any:
        """`array` on this device, perhaps in the same memory."""

    def get(self, array: Any) -> np.ndarray:
        """An array of this device on the host, perhaps in the same memory."""

    def orthonormal(self, columns: Any) -> Any:
        """An orthonormal basis (N, r) of `columns` (N, r)."""

    def can_round_to(self, grid: MainGrid) -> bool:
        """Whether `directions` knows what rounding to `grid` leaves."""

    def directions(
        self,
        rest: np.ndarray,
        grid: MainGrid,
        holds: bool = False,
        moving: tuple[int, ...] = (0, 1),
    ) -> Directions:
        """Directions of descents on what L R leaves of `rest` (N, K), for the rounding to `grid`.

        With `holds` also towards less of it, as rounded inputs want it; `moving` as in `descend`.
        """


class _Cpu:
    """NumPy, and the Numba kernels."""

    name = "cpu"

    def working(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: np.ndarray) -> np.ndarray:
        return array

    def orthonormal(self, columns: np.ndarray) -> np.ndarray:
        return np.linalg.qr(columns)[0]

    def can_round_to(self, grid: MainGrid) -> bool:
        return True

    def directions(
        self,
        rest: np.ndarray,
        grid: MainGrid,
        holds: bool = False,
        moving: tuple[int, ...] = (0, 1),
    ) -> Directions:
        # Small products are not worth loading torch for.
        if rest.size < _LEAST_IN_BF16 or not multiplies_bf16():
            return _CpuDirections(rest, grid, holds)
        return DirectionsInBf16(rest, grid, holds, moving)


CPU: Device = _Cpu()


_OVERSAMPLE = 8
# Below this share of the smaller side the sketch is cheaper than LAPACK's full decomposition.
_SKETCH_SHARE = 1 / 3


def truncated_svd(
    matrix: np.ndarray,
    rank: int,
    *,
    rng: np.random.Generator,
    power_iterations: int = 2,
    start: np.ndarray | None = None,
    device: Device = CPU,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors (left, right) of the best rank-`rank` fit; left is orthonormal, sizes in right.

    Parameters
    ----------
    matrix : ndarray of shape (N, K), float32
    rank : int
        1 to min(N, K).
    rng : numpy.random.Generator
        Draws the sketch; unused when the decomposition is exact.
    power_iterations : int
        Passes of subspace iteration; two leave the residual within 1 % of the optimum on
        spectra as flat as those of rounding errors.
    start : ndarray of shape (r, K), optional
        Row space of an earlier fit, used as part of the sketch.
    device : Device
        Where the sketch is multiplied and made orthonormal; decompositions run on the CPU.

    Returns
    -------
    left : ndarray of shape (N, rank), float32, orthonormal columns
    right : ndarray of shape (rank, K), float32
    """
    n, k = matrix.shape
    size = min(rank + _OVERSAMPLE, n, k)
    if size > min(n, k) * _SKETCH_SHARE:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        return np.ascontiguousarray(u[:, :rank]), s[:rank, None] * vt[:rank]
    sketch = rng.standard_normal((k, size), dtype=np.float32)
    if start is not None:
        kept = min(start.shape[0], size)
        sketch[:, :kept] = start[:kept].T
    with device.working():
        held = device.put(matrix)
        basis = device.orthonormal(held @ device.put(sketch))
        for _ in range(power_iterations):
            rows = device.orthonormal(held.T @ basis)
            basis = device.orthonormal(held @ rows)
        basis, seen = device.get(basis), device.get(basis.T @ held)
    u, s, vt = np.linalg.svd(seen, full_matrices=False)
    return np.ascontiguousarray(basis @ u[:, :rank]), s[:rank, None] * vt[:rank]


def principal_factors(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with orthonormal left columns and sizes, in falling order, in right.

    Parameters
    ----------
    left : ndarray of shape (N, r), float32
    right : ndarray of shape (r, K), float32
    """
    basis, mixing = np.linalg.qr(left)
    u, s, vt = np.linalg.svd(mixing @ right, full_matrices=False)
    return np.ascontiguousarray(basis @ u), s[:, None] * vt


def balanced_factors(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same product with both factors of a component equally large, for orthonormal left."""
    roots = np.sqrt(np.linalg.norm(right, axis=1))
    shares = np.where(roots == 0, np.float32(1), roots)
    return np.ascontiguousarray(left * roots), np.ascontiguousarray(right / shares[:, None])


# What a mean keeps from step to step.
_KEPT = 0.9
# The last step, as a share of the first; in between it falls along a line.
_LAST = 0.02
# Eigenvalues of a Gram matrix below this share of the largest are float32 rounding noise.
_FLOOR = 1e-6
# Keeps the root of a vanished factor within float32.
_TINY = 1e-30


def descend(
    left: Any,
    right: Any,
    direction: Callable[[Any, Any, int], Any],
    *,
    steps: int,
    stride: float,
    moving: tuple[int, ...] = (0, 1),
    project: Projections = project_exactly,
) -> None:
    """Move `left` and `right` in place along what `direction` makes of their product.

    Parameters
    ----------
    left : ndarray or torch tensor of shape (N, r), float32
        An array of any device that knows ``@``, ``.T`` and ``+=``.
    right : the same, of shape (r, K)
    direction : callable
        Gets both factors and the step from 0; returns D (N, K), the same kind of array.
    steps : int
    stride : float
        How far the first step moves each component of the product, as a singular value.
    moving : tuple of int
        Which factors move: 0 is left, 1 right.
    project : callable
        The part of a direction that each factor can follow; see `Directions.project`.
    """
    # The left factor is walked transposed: both then are (r, .) with a Gram matrix of their rows.
    means: list[Any] = [None, None]
    for step in range(steps):
        toward = direction(left, right, step)
        size = stride * max(_LAST, 1.0 - step / steps)
        moves: list[Any] = [None, None]
        for i, ahead in zip(moving, project(left, right, toward, moving), strict=True):
            if means[i] is None:
                means[i] = ahead * 0.0
            # In units of which the step is free.
            means[i] *= _KEPT
            means[i] += ahead
            ahead += _KEPT * means[i]
            gram = left.T @ left if i else right @ right.T
            moves[i] = _on_host(functools.partial(_step, size), gram, ahead @ ahead.T) @ ahead
        if 0 in moving:
            left += moves[0].T
        if 1 in moving:
            right += moves[1]


def _on_host(function: Callable[..., np.ndarray], *small: Any) -> Any:
    """`function` of (r, r) matrices, worked out in NumPy wherever the matrices are."""
    if isinstance(small[0], np.ndarray):
        return function(*small)
    return small[0].new_tensor(function(*(each.cpu().numpy() for each in small)))


def _step(size: float, gram: np.ndarray, ahead: np.ndarray) -> np.ndarray:
    """What makes of the means their step, (r, r) float32.

    B^T polar(B M) = B^T (B M M^T B^T)^(-1/2) B M for means M, `ahead` being M M^T.
    """
    root = _root(gram)
    return (size * (root.T @ _symmetric_root(root @ ahead @ root.T) @ root)).astype(np.float32)


def _root(gram: np.ndarray) -> np.ndarray:
    """A matrix B with B^T B = gram^-1, float64: any such root gives the same step of the product.

    A ridge keeps components that have vanished from being multiplied by noise.
    """
    gram = gram.astype(np.float64)
    ridge = _FLOOR * float(np.trace(gram)) / len(gram) + _TINY
    factor = np.linalg.cholesky(gram + ridge * np.eye(len(gram)))
    return np.linalg.inv(factor)


def _symmetric_root(gram: np.ndarray) -> np.ndarray:
    """gram^(-1/2), float64."""
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, _FLOOR * values[-1] + _TINY)
    return (vectors / np.sqrt(values)) @ vectors.T
