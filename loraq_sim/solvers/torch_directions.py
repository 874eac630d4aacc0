"""A device of torch, CUDA or (in tests) the CPU, and the two directions of a descent on it.

The directions are, formula by formula, those of the Numba kernels in `loraq_sim.kernels.quantize`.
Elementwise operations are the same float32 operations in the same order; sums over a group are
taken in another order, so that of two scales with errors equal to rounding the other one may be
chosen. One operation a line is meant: torch runs each as its own kernel, so that no product is
fused into a sum.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from loraq_sim.errors import InputError
from loraq_sim.solvers.low_rank import HELD_REFINING, held_share, project_exactly
from loraq_sim.solvers.main_grid import MainGrid

__all__ = ["TorchDevice"]

# Elements worked on at once: about six temporaries of 64 MB, however large the weight.
_BLOCK_ELEMENTS = 2**24
_FLOOR = 2.0**-6
_E2M1_MAX = 6.0

Nearest = Callable[[torch.Tensor], torch.Tensor]


class TorchDirections:
    """`loraq_sim.solvers.low_rank.Directions` with all arrays on `device`."""

    def __init__(
        self, device: "TorchDevice", rest: np.ndarray, grid: MainGrid, holds: bool = False
    ) -> None:
        self._device = device
        self._holds = holds
        self._grid = grid
        rows, self._group = grid.rows(rest)
        self._shape = rest.shape
        self._rest = device.put(rows)
        self._buffer = torch.empty_like(self._rest)
        self._scales = device.put(grid.scales.reshape(len(rows), -1))
        self._squares: list[torch.Tensor] = []

    def distance(self, left: torch.Tensor, right: torch.Tensor) -> float:
        self._multiply(left, right)
        torch.sub(self._rest, self._buffer, out=self._buffer)
        return float(torch.linalg.vector_norm(self._buffer))

    def flatten(self, left: torch.Tensor, right: torch.Tensor, doublings: int) -> torch.Tensor:
        product = self._multiply(left, right)
        held = self._rest - self._buffer if self._holds else None
        range_direction(self._rest, self._buffer, self._group, doublings, self._grid.center_offset)
        if held is not None:
            sizes = (torch.linalg.vector_norm(each) for each in (self._buffer, held))
            self._buffer.add_(held, alpha=float(held_share(*sizes)))
        return product

    def leave(self, left: torch.Tensor, right: torch.Tensor, step: int) -> torch.Tensor:
        product = self._multiply(left, right)
        held = self._rest - self._buffer if self._holds else None
        square = round_residual(
            self._rest, self._buffer, self._group, self._grid, step, self._scales
        )
        self._squares.append(square)
        if held is not None:
            self._buffer.add_(held, alpha=HELD_REFINING)
        return product

    def project(
        self, left: torch.Tensor, right: torch.Tensor, toward: Any, moving: tuple[int, ...]
    ) -> list[torch.Tensor]:
        return project_exactly(left, right, toward, moving)

    def finish(self) -> list[float]:
        self._grid.scales = self._device.get(self._scales).reshape(self._grid.scales.shape)
        # One transfer at the end: reading a number at each step would wait for the device.
        return torch.stack(self._squares).sqrt().tolist() if self._squares else []

    def _multiply(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right, out=self._buffer.view(self._shape))


def range_direction(
    weight: torch.Tensor, product: torch.Tensor, group: int, doublings: int, offset: float
) -> None:
    """Turn `product` (rows, K) into the direction in which it flattens `weight` - `product`."""
    for w, p in _grouped(group, weight, product):
        v = w - p
        top = v.amax(dim=-1, keepdim=True).clamp_min_(0)
        bottom = v.amin(dim=-1, keepdim=True).clamp_max_(0)
        center = offset * (top - bottom)
        center = torch.where(top < -bottom, -center, center)
        amax = torch.maximum(top - center, center - bottom)
        # All zero: nothing to flatten, and the direction comes out as zero.
        inverse = torch.where(amax == 0, amax, 1 / amax)
        v -= center
        base = (v * inverse).square_().clamp_min_(_FLOOR)
        power = base.clone()
        for _ in range(doublings - 2):
            power.square_().mul_(base)
        total = (power * base).sum(dim=-1, keepdim=True, dtype=torch.float32).double()
        factor = total.pow(0.5 ** (doublings - 1)).div_(total).float()
        p.copy_(v.mul_(power).mul_(factor))


def round_residual(
    weight: torch.Tensor,
    product: torch.Tensor,
    group: int,
    grid: MainGrid,
    step: int,
    scales: torch.Tensor,
) -> torch.Tensor:
    """Turn `product` into what rounding leaves of `weight` - `product`; its squared norm, float64.

    Parameters
    ----------
    weight, product : tensor of shape (rows, K), float32
        `product` is overwritten.
    group : int
        Elements per scale; the last group of a row may be short.
    grid : MainGrid
        A grid that has a kernel: elements and candidate scales.
    step : int
        Step of the descent, which the candidates depend on.
    scales : tensor of shape (rows, groups), float32
        Last scales on entry, 0 where there is none; overwritten by the best.
    """
    total = torch.zeros((), dtype=torch.float64, device=weight.device)
    nearest = _nearest_of(grid)
    for w, p, last in _grouped(group, weight, product, scales=scales):
        v = w - p
        best, error = _best_scales(v, last, grid, step, nearest)
        is_scaled = best != 0
        rounded = nearest(v * torch.where(is_scaled, 1 / best, best)).mul_(best)
        torch.sub(v, rounded, out=p)
        last.copy_(best)
        total += torch.where(is_scaled, error, 0).sum(dtype=torch.float64)
    return total


def _best_scales(
    v: torch.Tensor, last: torch.Tensor, grid: MainGrid, step: int, nearest: Nearest
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (rows, groups, 1) of least error, the first tried on ties, and their squared errors.

    They are last scales times steps, and a fresh one now and then or where there is no last one.
    """
    candidates = grid.candidates(step)
    best, error = last, torch.full_like(last, torch.inf)
    for factor in candidates.steps:
        best, error = _better(v, last * float(factor), nearest, best, error)
    is_new = last == 0
    if candidates.is_fresh or bool(is_new.any()):
        scale = _fresh_scales(v, float(candidates.code), grid.is_power)
        if not candidates.is_fresh:
            scale = torch.where(is_new, scale, 0)
        best, error = _better(v, scale, nearest, best, error)
    return best, error


def _better(
    v: torch.Tensor,
    scale: torch.Tensor,
    nearest: Nearest,
    best: torch.Tensor,
    error: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    miss = nearest(v * (1 / scale)).mul_(scale).sub_(v)
    trial = miss.square_().sum(dim=-1, keepdim=True)
    is_better = (trial < error) & (scale != 0)
    return torch.where(is_better, scale, best), torch.where(is_better, trial, error)


def _fresh_scales(v: torch.Tensor, code: float, is_power: bool) -> torch.Tensor:
    """Scales that put the extreme of each group on `code`, rounded up to powers of two if asked."""
    top = v.amax(dim=-1, keepdim=True).clamp_min_(0)
    bottom = v.amin(dim=-1, keepdim=True).clamp_max_(0)
    # CUDA divides by a number as by a product with its rounded inverse; by a tensor it divides.
    scale = torch.where(top >= -bottom, top, bottom) / torch.full_like(top, code)
    if is_power or code > 0:
        scale = scale.abs()
    if is_power:
        # Any mantissa bit carries into the exponent; then the mantissa is cleared. Zero stays.
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return scale


def _nearest_of(grid: MainGrid) -> Nearest:
    """The function that rounds values, in place, to the elements of `grid`, ties to even."""
    if grid.is_e2m1:
        return _nearest_e2m1
    lo, hi = grid.format.element.lo, grid.format.element.hi
    return lambda x: x.clamp_(lo, hi).round_()


def _nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    size = x.abs().clamp_max_(_E2M1_MAX)
    # Spacing 0.5 below 2, 1 below 4, 2 above; an even multiple of it has an even mantissa.
    spacing = torch.full_like(size, 0.5).masked_fill_(size >= 2, 1.0).masked_fill_(size >= 4, 2.0)
    return size.div_(spacing).round_().mul_(spacing).copysign_(x)


def _grouped(
    group: int, *arrays: torch.Tensor, scales: torch.Tensor | None = None
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Views (rows, groups, elements) of (rows, K), and (rows, groups, 1) of scales, block by block.

    Blocks of rows bound the temporaries; a short last group makes a block of its own.
    """
    n_rows, k = arrays[0].shape
    full = k - k % group
    height = max(1, _BLOCK_ELEMENTS // k)
    for start in range(0, n_rows, height):
        rows = slice(start, start + height)
        for columns, size in ((slice(0, full), group), (slice(full, k), k - full)):
            if size == 0:
                continue
            views = [array[rows, columns].unflatten(1, (-1, size)) for array in arrays]
            if scales is not None:
                groups = slice(columns.start // group, -(-columns.stop // group))
                views.append(scales[rows, groups].unsqueeze(-1))
            yield tuple(views)


class TorchDevice:
    """Arrays as torch tensors on `place`; `name` is what results call it.

    Matrices of the size of the rank are factored on the host, by the code of the CPU: a GPU has
    nothing to win on them.
    """

    def __init__(self, place: str, *, name: str | None = None) -> None:
        self._place = torch.device(place)
        self.name = name or place

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Without gradients, autocast and TF32 inside; the caller's settings hold again after."""
        autocast = torch.autocast(self._place.type, enabled=False)
        try:
            with torch.no_grad(), autocast, _exact_float32():
                yield
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"device={self.name!r} ran out of memory: free some of it, or use device='cpu'"
            ) from error

    def put(self, array: np.ndarray) -> torch.Tensor:
        # torch warns of memory it must not write to, and takes no reversed arrays.
        array = np.require(array, requirements=("C", "W"))
        return torch.from_numpy(array).to(self._place)

    def get(self, array: torch.Tensor) -> np.ndarray:
        return array.cpu().numpy()

    def orthonormal(self, columns: torch.Tensor) -> torch.Tensor:
        return torch.linalg.qr(columns)[0]

    def can_round_to(self, grid: MainGrid) -> bool:
        return grid.has_kernel

    def directions(
        self,
        rest: np.ndarray,
        grid: MainGrid,
        holds: bool = False,
        moving: tuple[int, ...] = (0, 1),
    ) -> TorchDirections:
        return TorchDirections(self, rest, grid, holds)


@contextlib.contextmanager
def _exact_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products: their 10 bits would drown the rounding error.

    torch has one setting of the process and, from 2.9, one a backend; it refuses to read the former
    once the latter was set apart from it.
    """
    # What older releases lack, and the annotations of torch do not know.
    settings: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    backends = [backend for backend in settings if hasattr(backend, "fp32_precision")]
    kept = [backend.fp32_precision for backend in backends]
    try:
        general = torch.get_float32_matmul_precision()
    except RuntimeError:
        general = None
    try:
        if general is None:
            for backend in backends:
                backend.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if general is not None:
            torch.set_float32_matmul_precision(general)
        for backend, precision in zip(backends, kept, strict=True):
            backend.fp32_precision = precision
